"""How everything here is measured: alternating rounds in one run, medians, the machine beside them."""

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
    """Seconds of one contender over all rounds."""

    seconds: list[float]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median."""
        return (max(self.seconds) - min(self.seconds)) / self.median_s


def alternate(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1
) -> dict[str, Timing]:
    """Run all contenders in turn, `rounds` times; what disturbs the machine disturbs them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warm_up + rounds):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            _synchronize()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return {name: Timing(found) for name, found in seconds.items()}


def ratio(timings: Mapping[str, Timing], slow: str, fast: str) -> float:
    """How many times faster `fast` is: the median of the rounds' own ratios."""
    pairs = zip(timings[slow].seconds, timings[fast].seconds, strict=True)
    return statistics.median(s / f for s, f in pairs)


def product(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], None], float]:
    """A contender that multiplies two square matrices, the device's practical peak; and its FLOP.

    2048^3 on a CPU. A GPU is through with that in 20 us, less than it takes to ask for it.
    """
    size, times = (8192, 10) if device.type == "cuda" else (2048, 1)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def multiply() -> None:
        for _ in range(times):
            torch.mm(left, right)

    return multiply, times * 2 * size**3


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
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
    """Write the JSON and print it as the last line."""
    write(result, output)
    print(json.dumps({**result, "machine": machine()}), flush=True)


def write(result: dict[str, Any], output: Path | None) -> None:
    """Write the JSON, if it is wanted, with the machine in it."""
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
