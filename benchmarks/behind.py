"""What callers and a batch job lose when they share an engine: the callers' latency, the job's speed.

Callers come at random, at a fraction of the engine's own speed; the job always has requests waiting, at low
priority. There are three conditions: callers alone, the job alone, and both. They are measured twice. First
with the demonstration checkpoint, whose steps take longer the more texts run, by the clock and in turns, so
that other work disturbs all conditions alike. Then with the scheduler on devices that only count the time of
their passes, which nothing can disturb, so that no idle machine is needed.

    python -m benchmarks.behind
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
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
"""Number of the job's requests that wait or run."""
ENCODE_BATCH = 16
COUNTED_S = 25.0
"""Seconds that a counted device works in each condition."""


@dataclass(frozen=True)
class PassTimes:
    """Seconds that a device takes for its passes."""

    encode: float
    encode_image: float
    """For each image, added to `encode`."""
    prefill: float
    decode: float


DEVICES = {
    "passes of the same time": PassTimes(0.010, 0.0, 0.005, 0.005),
    "encoding takes longer for more images": PassTimes(0.006, 0.0013, 0.006, 0.005),
    "encoding takes as long as its images": PassTimes(0.002, 0.003, 0.002, 0.003),
}
"""The second resembles an accelerator with a large model, the third a CPU."""


class Submits(Protocol):
    def submit(self, request: Request) -> Future[Result]: ...


class CountedDevice:
    """A runner whose passes take no time but count it; texts end at `max_new_tokens`."""

    def __init__(self, times: PassTimes) -> None:
        self.now_s = 0.0
        self._times = times

    def cached_length(self, request: RequestState) -> int:
        return 1

    def encode(self, images: Sequence[EncodedImage]) -> None:
        self.now_s += self._times.encode + len(images) * self._times.encode_image
        for image in images:
            image.prefix = torch.zeros(1, 1)

    def prefill(self, requests: Sequence[RequestState], slots: list[int]) -> torch.Tensor:
        self.now_s += self._times.prefill
        return self._logits(len(slots))

    def decode(self, token_ids: list[int], lengths: list[int]) -> torch.Tensor:
        self.now_s += self._times.decode
        return self._logits(len(token_ids))

    def copy_slots(self, *_: object) -> None: ...

    def _logits(self, num_rows: int) -> torch.Tensor:
        return torch.tensor([0.0, 1.0]).repeat(num_rows, 1)


class NoWords:
    """A vocabulary without texts; token 0, which is never selected, would end one."""

    end_ids = frozenset({0})

    def detokenize(self, token_ids: Sequence[int]) -> str:
        return ""


class CountedLoad:
    """Run one condition on a counted device."""

    def __init__(self, times: PassTimes, slots: int, per_s: float, has_batch: bool) -> None:
        self.latencies_s: list[float] = []
        self.num_done = 0
        self._device = CountedDevice(times)
        self._scheduler = Scheduler(self._device, slots, ENCODE_BATCH)  # type: ignore[arg-type]
        self._scheduler.encoding.clock_s = lambda: self._device.now_s
        self._per_s, self._has_batch = per_s, has_batch
        self._choose = random.Random(0)

    def run(self, for_s: float) -> CountedLoad:
        next_s = self._choose.expovariate(self._per_s) if self._per_s else float("inf")
        online: dict[RequestState, float] = {}
        batch: set[RequestState] = set()
        while self._device.now_s < for_s:
            while next_s <= self._device.now_s:
                online[self._add(low_priority=False)] = next_s
                next_s += self._choose.expovariate(self._per_s)
            while self._has_batch and len(batch) < BACKLOG:
                batch.add(self._add(low_priority=True))
            if not self._scheduler.has_work:
                self._device.now_s = next_s
                continue
            self._scheduler.step()
            for request in [request for request in online if request.future.done()]:
                self.latencies_s.append(self._device.now_s - online.pop(request))
            done = {request for request in batch if request.future.done()}
            self.num_done += len(done)
            batch -= done
        return self

    def _add(self, low_priority: bool) -> RequestState:
        length = self._choose.randint(10, 30)
        options = GenerationOptions(max_new_tokens=length, min_new_tokens=length).resolve()
        image = EncodedImage(np.zeros((2, 2, 3), np.uint8))
        request = RequestState(
            image, [1], options, lambda: [TextSearch(options, [1], NoWords())], low_priority
        )
        request.arrived_s = self._device.now_s
        self._scheduler.add(request)
        return request


def count(times: PassTimes, slots: int, for_s: float = COUNTED_S) -> dict[str, float]:
    batch = CountedLoad(times, slots, 0.0, has_batch=True).run(for_s)
    per_s = ONLINE_SHARE * batch.num_done / for_s
    alone = CountedLoad(times, slots, per_s, has_batch=False).run(for_s)
    both = CountedLoad(times, slots, per_s, has_batch=True).run(for_s)
    return _figures(per_s, alone.latencies_s, both.latencies_s, batch.num_done / for_s, both.num_done / for_s)


def _figures(
    per_s: float,
    alone_s: Sequence[float],
    both_s: Sequence[float],
    batch_per_s: float,
    behind_per_s: float,
) -> dict[str, float]:
    return {
        "online_per_s": per_s,
        "online_alone_median_s": statistics.median(alone_s),
        "online_both_median_s": statistics.median(both_s),
        "online_slower": statistics.median(both_s) / statistics.median(alone_s),
        "batch_alone_per_s": batch_per_s,
        "batch_keeps": behind_per_s / batch_per_s,
    }


class Load:
    """Run and measure one condition over all rounds."""

    def __init__(self, engine: Submits, per_s: float, has_batch: bool) -> None:
        """
        Args:
            per_s: callers per second; 0 for none.
        """
        self.latencies_s: list[float] = []
        self.num_done, self.seconds = 0, 0.0
        self._engine, self._per_s, self._has_batch = engine, per_s, has_batch
        self._choose = random.Random(0)
        self._images = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), np.uint8)

    def run(self, for_s: float = ROUND_S) -> None:
        """Keep the condition up for some seconds, then cancel the remaining requests."""
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
    return _figures(
        per_s,
        alone.latencies_s,
        both.latencies_s,
        batch.num_done / batch.seconds,
        both.num_done / both.seconds,
    )


def measure_all(threads: int | None, slots: int) -> dict[str, Any]:
    figures: dict[str, Any] = {"benchmark": "behind"}
    figures |= {name: count(times, slots) for name, times in DEVICES.items()}
    config = EngineConfig(model="demo", device="cpu", dtype="float32", num_threads=threads, max_slots=slots)
    with config.build() as engine:
        figures["demo on CPUs"] = measure(engine)
    return figures


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--slots", type=int, default=32, help="texts generated at once (default: 32)")
    arguments = parser.parse_args()
    report(measure_all(arguments.threads, arguments.slots), arguments.output)


if __name__ == "__main__":
    main()
