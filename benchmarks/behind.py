"""What callers and a batch job lose when they share an engine: latency of the one, speed of the other.

The demonstration checkpoint. Callers come at random at a share of the engine's own speed; the job always has
enough waiting, at low priority. Three conditions take turns, so that other work on the machine disturbs all:
callers alone, the job alone, and both.

    python -m benchmarks.behind
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from benchmarks.command_line import make_parser
from benchmarks.measure import report
from blip2_actor import Engine, EngineConfig, GenerationOptions, Request, Result

ONLINE_SHARE = 0.3
NUM_ROUNDS = 5
ROUND_S = 4.0
BACKLOG = 256
"""Requests of the job that wait or run."""


class Load:
    """One condition, measured over all rounds."""

    def __init__(self, engine: Engine, per_s: float, has_batch: bool) -> None:
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


def measure(threads: int | None, slots: int) -> dict[str, float | str]:
    config = EngineConfig(model="demo", device="cpu", dtype="float32", num_threads=threads, max_slots=slots)
    with config.build() as engine:
        Load(engine, 0.0, has_batch=True).run()  # warm-up
        full = Load(engine, 0.0, has_batch=True)
        full.run()
        per_s = ONLINE_SHARE * full.num_done / full.seconds
        loads = {
            "online alone": Load(engine, per_s, has_batch=False),
            "batch alone": Load(engine, 0.0, has_batch=True),
            "both": Load(engine, per_s, has_batch=True),
        }
        for _ in range(NUM_ROUNDS):
            for load in loads.values():
                load.run()
        num_preempted = engine.stats().num_preempted
    alone, batch, both = loads.values()
    return {
        "benchmark": "behind",
        "online_per_s": per_s,
        "online_alone_median_s": statistics.median(alone.latencies_s),
        "online_both_median_s": statistics.median(both.latencies_s),
        "online_slower": statistics.median(both.latencies_s) / statistics.median(alone.latencies_s),
        "batch_alone_per_s": batch.num_done / batch.seconds,
        "batch_keeps": (both.num_done / both.seconds) / (batch.num_done / batch.seconds),
        "num_preempted": num_preempted,
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--slots", type=int, default=32, help="texts generated at once (default: 32)")
    arguments = parser.parse_args()
    report(measure(arguments.threads, arguments.slots), arguments.output)


if __name__ == "__main__":
    main()
