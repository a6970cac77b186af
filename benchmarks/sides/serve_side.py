"""Applications of Serve: `@serve.batch` around `generate`, and the endpoint without a model."""

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
from starlette.datastructures import UploadFile
from starlette.requests import Request

from benchmarks.sides.map_batches import Captioner
from blip2_actor import EngineConfig, GenerationOptions
from blip2_actor.testing import FakeEngineConfig
from deploy.app import CAPTIONER, compose
from deploy.local_service import APPLICATION
from deploy.observe.logs import serve_logging
from deploy.settings import Settings


class ServeBatch:
    """A careful version: the model has its own thread, and other threads decode images."""

    def __init__(self, device: str, *captioner: Any) -> None:
        """Load the model.

        Args:
            device: torch device of the model.
            captioner: the arguments of `Captioner`.
        """
        # One thread loads and computes, because a second one would have its own OpenMP threads.
        self._thread = ThreadPoolExecutor(1)
        self._captioner = self._thread.submit(Captioner, *captioner).result()
        self._captioner.model.to(device)

    async def __call__(self, request: Request) -> dict[str, str]:
        form = await request.form()
        upload = form["image"]
        assert isinstance(upload, UploadFile)
        image = await asyncio.to_thread(_decode, await upload.read())
        return {"caption": await self._caption(image)}

    @serve.batch(max_batch_size=1)
    async def _caption(self, images: list[Image.Image]) -> list[str]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._captioner.captions, images)

    def set_max_batch_size(self, size: int) -> None:
        self._caption.set_max_batch_size(size)


class LocalServe:
    """A local Ray with one application, with this process as its driver."""

    def __init__(self, deployment: str, application: serve.Application) -> None:
        """Start Ray and the application.

        Args:
            deployment: the deployment whose replica `ask_replica` asks.
        """
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=200 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._url = f"http://127.0.0.1:{free.getsockname()[1]}"
        logs = serve_logging("info")
        serve.start(
            http_options={"host": "127.0.0.1", "port": int(self._url.rpartition(":")[2])}, logging_config=logs
        )
        serve.run(application, name=APPLICATION, logging_config=logs)
        self._replica = serve.get_deployment_handle(deployment, APPLICATION)

    def url(self) -> str:
        return self._url

    def ask_replica(self, method: str, *args: Any) -> Any:
        return getattr(self._replica, method).remote(*args).result()

    def shutdown(self) -> None:
        ray.shutdown()


def serve_batch(config: EngineConfig, options: GenerationOptions) -> LocalServe:
    """Deploy `ServeBatch`, which takes a form at any path."""
    resources = {"num_cpus": 1, "num_gpus": int(config.device.startswith("cuda"))}
    # Serve's default limit of 5 requests would also limit the batch.
    deployment = serve.deployment(ServeBatch, max_ongoing_requests=2048, ray_actor_options=resources)
    arguments = (config.model, config.info().dtype, config.num_threads, options.max_new_tokens)
    bound = deployment.bind(config.device, *arguments, options.min_new_tokens)
    return LocalServe(ServeBatch.__name__, bound)


def endpoint_without_model(image_size_px: int) -> LocalServe:
    """Deploy the endpoint with an engine that computes nothing."""
    engine = FakeEngineConfig(image_size_px=image_size_px)
    return LocalServe(CAPTIONER.name, compose(engine, Settings(cache_bytes=0)))


def _decode(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded)).convert("RGB")
