"""The scheduler's own cost: time in `step()` outside the model and outside token selection.

The demonstration checkpoint with 64 slots; texts have 4 to 30 forced tokens, so that slots change owners all
the time.

    python -m benchmarks.step
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

from benchmarks.command_line import make_parser
from benchmarks.measure import report
from benchmarks.sides.engine_sides import smooth_noise
from blip2_actor import Engine, EngineConfig, GenerationOptions, Request
from blip2_actor.engine import scheduler
from blip2_actor.engine.model_runner import ModelRunner

NUM_SLOTS = 64
NUM_IMAGES = 1024


class Stopwatch:
    """Adds up the time inside wrapped functions, in the engine's own thread.

    The encoding thread next to it adds nothing to a step.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, owner: Any, name: str) -> None:
        wrapped: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **named: Any) -> Any:
            if threading.current_thread().name != "blip2-engine":
                return wrapped(*args, **named)
            started = time.perf_counter()
            try:
                return wrapped(*args, **named)
            finally:
                self.seconds += time.perf_counter() - started

        setattr(owner, name, timed)


def measure(threads: int | None) -> dict[str, Any]:
    """Return milliseconds per step, over the steps with nearly all slots in use."""
    model = Stopwatch()
    for name in ("encode", "prefill", "decode"):
        model.wrap(ModelRunner, name)
    model.wrap(scheduler, "advance")
    draw = random.Random(0)
    own_ms: list[float] = []
    all_ms: list[float] = []
    with Engine(EngineConfig(model="demo", device="cpu", max_slots=NUM_SLOTS, num_threads=threads)) as engine:
        driven = engine._core.scheduler
        step = driven.step

        def timed() -> None:
            inside, started = model.seconds, time.perf_counter()
            step()
            whole = time.perf_counter() - started
            if driven.num_running >= NUM_SLOTS - NUM_SLOTS // 8:
                own_ms.append(1000 * (whole - (model.seconds - inside)))
                all_ms.append(1000 * whole)

        driven.step = timed  # type: ignore[method-assign]
        asked = []
        for picture in smooth_noise(NUM_IMAGES, engine.image_size_px):
            length = draw.randint(4, 30)
            options = GenerationOptions(max_new_tokens=length, min_new_tokens=length)
            asked.append(Request(image=picture, options=options))
        engine.generate(asked)
    return {
        "benchmark": "step",
        "own_ms": statistics.median(own_ms),
        "to_stay_below_ms": 0.5,
        "step_ms": statistics.median(all_ms),
        "steps": len(own_ms),
        "num_slots": NUM_SLOTS,
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    arguments = parser.parse_args()
    report(measure(arguments.threads), arguments.output)


if __name__ == "__main__":
    main()
