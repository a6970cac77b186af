"""The engine alone, in one process without Ray: the rate to which the job and the endpoint are compared."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.sides.steady_rate import steady_rate
from blip2_actor import Engine, EngineConfig, GenerationOptions, Request, decode_image


class EngineAlone:
    """An engine and a folder of images, which are decoded before the first run."""

    def __init__(self, config: EngineConfig, images: str, options: GenerationOptions) -> None:
        self._engine, self._options = Engine(config), options
        size_px = self._engine.image_size_px
        paths = sorted(Path(images).iterdir())
        self._pixels = [decode_image(path.read_bytes(), size_px).array(size_px) for path in paths]
        self._engine.generate([Request(image=self._pixels[0])], options)

    def run(self) -> float:
        """Caption all images; return images/s in the steady state."""
        end_times: list[float] = []
        futures = [self._engine.submit(Request(image=pixels), self._options) for pixels in self._pixels]
        for future in futures:
            future.add_done_callback(lambda _: end_times.append(time.monotonic()))
        if not all(future.result().ok for future in futures):
            raise RuntimeError("the engine refused an image of its own benchmark")
        return steady_rate([(end, count) for count, end in enumerate(end_times, 1)])
