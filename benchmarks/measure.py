"""How the benchmarks measure: alternating rounds in one run, medians, and the machine next to the figures."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers


@dataclass(frozen=True)
class Timing:
    """Seconds that one contender took in each round."""

    seconds: list[float]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median of the rounds."""
        return (max(self.seconds) - min(self.seconds)) / self.median_s

    def scaled(self, factor: float) -> Timing:
        """Return the timing of the same rounds with `factor` times the work."""
        return Timing([seconds * factor for seconds in self.seconds])


def alternate(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm_up: int = 1,
    cpu_s: Callable[[], float] = time.process_time,
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Run all contenders alternately, so that other work on the machine disturbs all of them.

    Args:
        contenders: the functions to time, by name.
        rounds: number of timed rounds.
        warm_up: number of untimed rounds before them.
        cpu_s: returns the CPU seconds that all contenders have used so far.

    Returns:
        Wall-clock and CPU times of the rounds.
    """
    wall: dict[str, Timing] = {name: Timing([]) for name in contenders}
    cpu: dict[str, Timing] = {name: Timing([]) for name in contenders}
    for turn in range(warm_up + rounds):
        for name, run in contenders.items():
            started, used = time.perf_counter(), cpu_s()
            run()
            _synchronize()
            if turn >= warm_up:
                cpu[name].seconds.append(cpu_s() - used)
                wall[name].seconds.append(time.perf_counter() - started)
    return wall, cpu


def quotients(timings: Mapping[str, Timing], slow: str, fast: str) -> list[float]:
    """Return how many times faster `fast` is than `slow` in each round."""
    return [s / f for s, f in zip(timings[slow].seconds, timings[fast].seconds, strict=True)]


def ratio(timings: Mapping[str, Timing], slow: str, fast: str) -> float:
    """Return how many times faster `fast` is than `slow`: the median of the ratio of each round."""
    return statistics.median(quotients(timings, slow, fast))


def product(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], None], float]:
    """Build a contender that multiplies two square matrices, which shows the device's practical peak.

    A product of 2048^3 takes a GPU 20 us, less than its launch takes, so a GPU multiplies larger matrices.

    Returns:
        The contender, and the number of floating-point operations of one call.
    """
    size, times = (8192, 10) if device.type == "cuda" else (2048, 1)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def multiply() -> None:
        for _ in range(times):
            torch.mm(left, right)

    return multiply, times * 2 * size**3


def machine() -> dict[str, Any]:
    """Describe the machine that ran the benchmark."""
    described: dict[str, Any] = {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def report(result: dict[str, Any], output: Path | None) -> None:
    """Write the JSON file and print the JSON as one line, the last of the benchmark."""
    write(result, output)
    print(json.dumps({**result, "machine": machine()}), flush=True)


def write(result: dict[str, Any], output: Path | None) -> None:
    """Write the result and the machine as JSON, unless `output` is None."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({**result, "machine": machine()}, indent=2) + "\n")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
