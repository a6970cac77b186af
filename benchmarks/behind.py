"""What callers and a batch job lose when they share an engine: latency of the one, speed of the other.

Callers come at random at a share of the engine's own speed; the job always has enough waiting, at low
priority. Three conditions take turns, so that other work on the machine disturbs all: callers alone, the job
alone, and both. This is done twice: with the demonstration checkpoint, whose steps take longer the more texts
run, and with a device that takes the same time however many there are, as an accelerator nearly does.

    python -m benchmarks.behind
"""

from __future__ import annotations

import queue
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks.command_line import make_parser
from benchmarks.measure import report
from blip2_actor import EngineConfig, GenerationOptions, Request, Result
from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.request_state import RequestState
from blip2_actor.engine.scheduler import Scheduler
from blip2_actor.generation.search import TextSearch

ONLINE_SHARE = 0.3
NUM_ROUNDS = 5
ROUND_S = 4.0
BACKLOG = 256
"""Requests of the job that wait or run."""


ENCODE_BATCH = 16
ENCODE_S, PASS_S = 0.010, 0.005
"""What the device of `SteadyEngine` takes for a batch of images, and for a prefill or decode step."""


class Submits(Protocol):
    def submit(self, request: Request) -> Future[Result]: ...


class SteadyDevice:
    """A runner whose passes take the same time whatever is in them; texts end at `max_new_tokens`."""

    def cached_length(self, request: RequestState) -> int:
        return 1

    def encode(self, images: Sequence[EncodedImage]) -> None:
        time.sleep(ENCODE_S)
        for image in images:
            image.prefix = torch.zeros(1, 1)

    def prefill(self, requests: Sequence[RequestState], slots: list[int]) -> torch.Tensor:
        return self.decode(slots, slots)

    def decode(self, token_ids: list[int], lengths: list[int]) -> torch.Tensor:
        time.sleep(PASS_S)
        return torch.tensor([0.0, 1.0]).repeat(len(token_ids), 1)

    def copy_slots(self, *_: object) -> None: ...


class NoWords:
    """A vocabulary without texts; 0 would end one."""

    end_ids = frozenset({0})

    def decode(self, token_ids: Sequence[int]) -> str:
        return ""


class SteadyEngine:
    """The scheduler on a `SteadyDevice`, in a thread of its own."""

    def __init__(self, slots: int) -> None:
        self.scheduler = Scheduler(SteadyDevice(), slots, ENCODE_BATCH)  # type: ignore[arg-type]
        self._arrived: queue.SimpleQueue[RequestState | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Future[Result]:
        assert request.options is not None
        options = request.options.resolve()
        image = EncodedImage(np.zeros((2, 2, 3), np.uint8))
        state = RequestState(
            image, [1], options, lambda: [TextSearch(options, [1], NoWords())], request.low_priority
        )
        self._arrived.put(state)
        return state.future

    def close(self) -> None:
        self._arrived.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            while not self.scheduler.has_work or not self._arrived.empty():
                state = self._arrived.get()
                if state is None:
                    return
                self.scheduler.add(state)
            self.scheduler.step()


class Load:
    """One condition, measured over all rounds."""

    def __init__(self, engine: Submits, per_s: float, has_batch: bool) -> None:
        """
        Args:
            per_s: callers that come in a second; 0 for none.
        """
        self.latencies_s: list[float] = []
        self.num_done, self.seconds = 0, 0.0
        self._engine, self._per_s, self._has_batch = engine, per_s, has_batch
        self._choose = random.Random(0)
        self._images = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), np.uint8)

    def run(self, for_s: float = ROUND_S) -> None:
        """Keep the condition up for some seconds, then cancel what is left."""
        began_s = time.perf_counter()
        batch: list[Future[Result]] = []
        online: list[Future[Result]] = []
        next_s = began_s
        while (now_s := time.perf_counter()) < began_s + for_s:
            done = [future for future in batch if future.done()]
            self.num_done += len(done)
            batch = [future for future in batch if not future.done()]
            while self._has_batch and len(batch) < BACKLOG:
                batch.append(self._submit(low_priority=True))
            while self._per_s and next_s <= now_s:
                next_s += self._choose.expovariate(self._per_s)
                online.append(self._submit(low_priority=False))
                online[-1].add_done_callback(self._watch(time.perf_counter()))
            time.sleep(0.005)
        self.seconds += time.perf_counter() - began_s
        for future in online:
            future.result()
        for future in batch:
            future.cancel()

    def _submit(self, low_priority: bool) -> Future[Result]:
        length = self._choose.randint(10, 30)
        options = GenerationOptions(max_new_tokens=length, min_new_tokens=length)
        image = self._images[self._choose.randrange(len(self._images))]
        return self._engine.submit(Request(image=image, options=options, low_priority=low_priority))

    def _watch(self, began_s: float) -> Callable[[Future[Result]], None]:
        return lambda _: self.latencies_s.append(time.perf_counter() - began_s)


def measure(engine: Submits) -> dict[str, float]:
    Load(engine, 0.0, has_batch=True).run()  # warm-up
    full = Load(engine, 0.0, has_batch=True)
    full.run()
    per_s = ONLINE_SHARE * full.num_done / full.seconds
    alone = Load(engine, per_s, has_batch=False)
    batch = Load(engine, 0.0, has_batch=True)
    both = Load(engine, per_s, has_batch=True)
    for _ in range(NUM_ROUNDS):
        for load in (alone, batch, both):
            load.run()
    return {
        "online_per_s": per_s,
        "online_alone_median_s": statistics.median(alone.latencies_s),
        "online_both_median_s": statistics.median(both.latencies_s),
        "online_slower": statistics.median(both.latencies_s) / statistics.median(alone.latencies_s),
        "batch_alone_per_s": batch.num_done / batch.seconds,
        "batch_keeps": (both.num_done / both.seconds) / (batch.num_done / batch.seconds),
    }


def measure_both(threads: int | None, slots: int) -> dict[str, Any]:
    steady = SteadyEngine(slots)
    figures: dict[str, Any] = {"benchmark": "behind", "steady device": measure(steady)}
    steady.close()
    config = EngineConfig(model="demo", device="cpu", dtype="float32", num_threads=threads, max_slots=slots)
    with config.build() as engine:
        figures["demo on CPUs"] = measure(engine)
    return figures


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--slots", type=int, default=32, help="texts generated at once (default: 32)")
    arguments = parser.parse_args()
    report(measure_both(arguments.threads, arguments.slots), arguments.output)


if __name__ == "__main__":
    main()
