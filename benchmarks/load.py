"""Offers a load of images to an address and says how it was answered; knows neither Ray nor the model."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np

MIN_PER_CALLER = 4
RETRY_FOR_S = 120.0
"""How long a caller waits; twice what the endpoint allows itself."""
BOUNDARY = "image"


@dataclass(frozen=True)
class Answer:
    asked: float
    answered: float
    error: str | None
    """A status, or what kept the answer away; None for a caption."""


@dataclass(frozen=True)
class Load:
    """Callers who each wait for their answer before they ask again; with none, arrivals at a rate."""

    callers: int = 0
    per_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.callers} callers" if self.callers else f"{self.per_s:.3g}/s offered"

    def offer(self, url: str, images: Sequence[bytes], seconds: float) -> dict[str, Any]:
        """Send encoded images in turn, each as the `image` of a form."""
        return asyncio.run(self._offer(url, [_form(image) for image in images], seconds))

    async def _offer(self, url: str, forms: Sequence[bytes], seconds: float) -> dict[str, Any]:
        answers: list[Answer] = []
        turn = itertools.cycle(forms)
        headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        connector, patience = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(RETRY_FOR_S)
        async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=patience) as session:

            async def ask(asked: float) -> None:
                error: str | None = None
                try:
                    async with session.post(url, data=next(turn)) as response:
                        await response.read()
                        error = None if response.status == 200 else str(response.status)
                except (aiohttp.ClientError, TimeoutError) as failure:
                    error = type(failure).__name__
                answers.append(Answer(asked, time.perf_counter(), error))

            async def caller() -> float:
                num_asked = 0
                while num_asked < MIN_PER_CALLER or time.perf_counter() < end:
                    await ask(time.perf_counter())
                    num_asked += 1
                return time.perf_counter()

            arrival = time.perf_counter()
            end = arrival + seconds
            if self.callers:
                until = min(await asyncio.gather(*(caller() for _ in range(self.callers))))
                return summary(answers, until)
            gaps, asked = random.Random(0), []
            while (arrival := arrival + gaps.expovariate(self.per_s)) < end:
                await asyncio.sleep(arrival - time.perf_counter())
                asked.append(asyncio.create_task(ask(arrival)))
            await asyncio.gather(*asked)
            return summary(answers, time.perf_counter())


def summary(answers: Sequence[Answer], until: float) -> dict[str, Any]:
    """Good answers per second up to `until`, when the first caller left; the latency of all of them."""
    good = [answer for answer in answers if answer.error is None]
    if not good:
        raise RuntimeError(f"none of {len(answers)} requests was answered with 200")
    in_time = sum(answer.answered <= until for answer in good)
    p50, p95, p99 = np.percentile([1000 * (answer.answered - answer.asked) for answer in good], (50, 95, 99))
    return {
        "per_s": in_time / (until - min(answer.asked for answer in answers)),
        "p50_ms": float(p50),
        "p95_ms": float(p95),
        "p99_ms": float(p99),
        "errors": dict(Counter(answer.error for answer in answers if answer.error)),
    }


def _form(image: bytes) -> bytes:
    head = 'Content-Disposition: form-data; name="image"; filename="image.png"\r\nContent-Type: image/png'
    return f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode() + image + f"\r\n--{BOUNDARY}--\r\n".encode()
