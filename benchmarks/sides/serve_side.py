"""The endpoint, and what a user writes instead: a Serve deployment with `@serve.batch` around `generate`."""

from __future__ import annotations

import asyncio
import io
import logging
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from PIL import Image
from ray import serve
from starlette.requests import Request

from benchmarks.sides.map_batches import Captioner
from blip2_actor import EngineConfig, EngineStats, GenerationOptions
from deploy.app import compose
from deploy.settings import Settings


class ServeBatch:
    """Better than most: its model has a thread to itself, and images are decoded beside it."""

    def __init__(self, device: str, *captioner: Any) -> None:
        """`captioner` are the arguments of `Captioner`."""
        # The thread that loads is the one that computes: another would have OpenMP threads of its own.
        self._thread = ThreadPoolExecutor(1)
        self._captioner = self._thread.submit(Captioner, *captioner).result()
        self._captioner.model.to(device)
        self._num_images = self._num_batches = 0

    async def __call__(self, request: Request) -> dict[str, str]:
        form = await request.form()
        image = await asyncio.to_thread(_decode, await form["image"].read())
        return {"caption": await self._caption(image)}

    @serve.batch(max_batch_size=1)
    async def _caption(self, images: list[Image.Image]) -> list[str]:
        self._num_images += len(images)
        self._num_batches += 1
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._captioner.captions, images)

    def set_max_batch_size(self, size: int) -> None:
        self._caption.set_max_batch_size(size)

    def stats(self) -> EngineStats:
        return EngineStats(num_images_encoded=self._num_images, num_encode_calls=self._num_batches)


class ServeSide:
    """One application at a time on a Ray of its own, whose driver is this process."""

    def __init__(self, config: EngineConfig, options: GenerationOptions) -> None:
        quiet = logging.ERROR
        logging.getLogger("ray.serve").setLevel(quiet)
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=200 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=quiet,
        )
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": self._port})
        self._config, self._options = config, options
        self._place = {"num_cpus": 1, "num_gpus": int(config.device.startswith("cuda"))}

    def endpoint(self) -> str:
        """Deploy ours; the address that takes a form."""
        settings = Settings(engine=self._config, options=self._options)
        placed = {"ray_actor_options": self._place}
        return self._deploy(compose(self._config, settings, captioner=placed), "Captioner") + "v1/caption"

    def serve_batch(self) -> str:
        """Deploy theirs; the address that takes a form."""
        config, options = self._config, self._options
        # Serve's own limit of 5 requests would be the largest batch.
        deployment = serve.deployment(ServeBatch, max_ongoing_requests=2048, ray_actor_options=self._place)
        arguments = (config.model, config.info().dtype, config.num_threads, options.max_new_tokens)
        return self._deploy(deployment.bind(config.device, *arguments, options.min_new_tokens), "ServeBatch")

    def ask_replica(self, method: str, *args: Any) -> Any:
        return getattr(self._replica, method).remote(*args).result()

    def delete(self) -> None:
        serve.delete("default")

    def shutdown(self) -> None:
        ray.shutdown()

    def _deploy(self, application: serve.Application, deployment: str) -> str:
        serve.run(application)
        self._replica = serve.get_deployment_handle(deployment, "default")
        return f"http://127.0.0.1:{self._port}/"


def _decode(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded)).convert("RGB")
