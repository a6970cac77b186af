"""Send a load of images to an address, and measure the answers; knows neither Ray nor the model.

There are two kinds of load. In a closed loop each caller waits for its answer before it asks again. At a
fixed rate arrivals wait for nobody, and a latency counts from the arrival, so that a slow server cannot hide
its delay.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import aiohttp
import numpy as np

MIN_REQUESTS_PER_CALLER = 4
STREAM = {"stream": "true"}
"""Form fields that ask for the text in pieces."""
TIMEOUT_S = 120.0
"""Seconds that a caller waits for an answer: twice the endpoint's own limit."""
BOUNDARY = "image"


@dataclass(frozen=True)
class Answer:
    """One request; times are in seconds of `time.perf_counter()`."""

    asked: float
    answered: float
    error: str | None
    """HTTP status other than 200, or the name of the exception; None for a caption."""
    begun: float | None = None
    """When the first piece of a caption came."""


@dataclass(frozen=True)
class Load:
    """A closed loop of callers, or arrivals at a rate; see the module docstring."""

    callers: int = 0
    """Number of callers in the closed loop; 0 means arrivals."""
    per_s: float = 0.0
    """Mean rate of arrivals; the gaps are exponential and seeded."""

    def __str__(self) -> str:
        return f"{self.callers} callers" if self.callers else f"{self.per_s:.3g}/s offered"

    def offer(
        self,
        url: str,
        images: Sequence[bytes],
        seconds: float,
        fields: Mapping[str, str] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """Send encoded images in turn, each as the field `image` of a form; return the `summary`.

        Args:
            url: a route that takes a form.
            fields: further fields of each form.
        """
        return asyncio.run(self._offer(url, [_form(image, fields) for image in images], seconds))

    async def _offer(self, url: str, forms: Sequence[bytes], seconds: float) -> dict[str, Any]:
        answers: list[Answer] = []
        turn = itertools.cycle(forms)
        headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(TIMEOUT_S)
        async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session:

            async def ask(asked: float) -> None:
                error: str | None = None
                begun: float | None = None
                try:
                    async with session.post(url, data=next(turn)) as response:
                        await response.content.readany()
                        begun = time.perf_counter()
                        await response.read()
                        error = None if response.status == 200 else str(response.status)
                except (aiohttp.ClientError, TimeoutError) as failure:
                    error = type(failure).__name__
                answers.append(Answer(asked, time.perf_counter(), error, begun))

            async def caller() -> float:
                num_asked = 0
                while num_asked < MIN_REQUESTS_PER_CALLER or time.perf_counter() < end:
                    await ask(time.perf_counter())
                    num_asked += 1
                return time.perf_counter()

            arrival = time.perf_counter()
            end = arrival + seconds
            if self.callers:
                first_end_s = min(await asyncio.gather(*(caller() for _ in range(self.callers))))
                return summary(answers, first_end_s)
            gaps, asked = random.Random(0), []
            while (arrival := arrival + gaps.expovariate(self.per_s)) < end:
                await asyncio.sleep(arrival - time.perf_counter())
                asked.append(asyncio.create_task(ask(arrival)))
            await asyncio.gather(*asked)
            return summary(answers, time.perf_counter())


def summary(answers: Sequence[Answer], until: float) -> dict[str, Any]:
    """Summarize the answers to one load.

    Args:
        until: time at which the first caller left. Throughput counts answers up to here, because afterwards
            the load is lower than the one that was asked for.

    Returns:
        Captions per second up to `until`, percentiles of the latency of all captions and of their first
        pieces, and the errors, with the latency of those that have an HTTP status.
    """
    good = [answer for answer in answers if answer.error is None]
    if not good:
        raise RuntimeError(f"none of {len(answers)} requests was answered with status 200")
    in_time = sum(answer.answered <= until for answer in good)
    p50, p95, p99 = np.percentile([1000 * (answer.answered - answer.asked) for answer in good], (50, 95, 99))
    begun = [1000 * (answer.begun - answer.asked) for answer in good if answer.begun is not None]
    refused = [
        1000 * (answer.answered - answer.asked) for answer in answers if (answer.error or "").isdigit()
    ]
    return {
        "num_answers": len(good),
        "per_s": in_time / (until - min(answer.asked for answer in answers)),
        "p50_ms": float(p50),
        "p95_ms": float(p95),
        "p99_ms": float(p99),
        "first_p50_ms": float(np.median(begun)) if begun else None,
        "refused_p99_ms": float(np.percentile(refused, 99)) if refused else None,
        "errors": dict(Counter(answer.error for answer in answers if answer.error)),
    }


def _form(image: bytes, fields: Mapping[str, str]) -> bytes:
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields.items()
    ]
    head = 'Content-Disposition: form-data; name="image"; filename="image.png"\r\nContent-Type: image/png'
    start = "".join(parts) + f"--{BOUNDARY}\r\n{head}\r\n\r\n"
    return start.encode() + image + f"\r\n--{BOUNDARY}--\r\n".encode()
