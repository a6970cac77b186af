"""The endpoint, and the alternative that users write: a deployment with `@serve.batch` around `generate`."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import ray
from PIL import Image
from ray import serve
from starlette.datastructures import UploadFile
from starlette.requests import Request

from benchmarks.sides.map_batches import Captioner
from blip2_actor import EngineConfig, EngineStats, GenerationOptions
from deploy.app import compose
from deploy.settings import Settings

PARTS = {"proxy": "ProxyActor", "gateway": ":Gateway", "model": ":Captioner", "serve_batch": ":ServeBatch"}
"""The processes of an application, with words from the title that Ray gives them."""
DECODERS = "decoders"
"""The children of the gateway."""


class ServeBatch:
    """A careful version: the model has a thread of its own, and images are decoded in other threads."""

    def __init__(self, device: str, *captioner: Any) -> None:
        """Load the model.

        Args:
            device: torch device of the model.
            captioner: the arguments of `Captioner`.
        """
        # One thread loads and computes, because a second one would have OpenMP threads of its own.
        self._thread = ThreadPoolExecutor(1)
        self._captioner = self._thread.submit(Captioner, *captioner).result()
        self._captioner.model.to(device)
        self._num_images = self._num_batches = 0

    async def __call__(self, request: Request) -> dict[str, str]:
        form = await request.form()
        upload = form["image"]
        assert isinstance(upload, UploadFile)
        image = await asyncio.to_thread(_decode, await upload.read())
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
    """Deploy one application at a time on a local Ray, whose driver is this process."""

    def __init__(self, config: EngineConfig, options: GenerationOptions) -> None:
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
            self._port = free.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": self._port})
        self._config, self._options = config, options
        self._resources = {"num_cpus": 1, "num_gpus": int(config.device.startswith("cuda"))}

    def endpoint(self) -> str:
        """Deploy the endpoint; return the URL that takes a form."""
        # Without kept answers: a load asks for the same images again.
        settings = Settings(engine=self._config, options=self._options, cache_bytes=0)
        captioner = {"ray_actor_options": self._resources}
        return self._deploy(compose(self._config, settings, captioner=captioner), "Captioner") + "v1/caption"

    def serve_batch(self) -> str:
        """Deploy `ServeBatch`; return the URL that takes a form."""
        config, options = self._config, self._options
        # Serve's default limit of 5 requests would also limit the batch.
        deployment = serve.deployment(
            ServeBatch, max_ongoing_requests=2048, ray_actor_options=self._resources
        )
        arguments = (config.model, config.info().dtype, config.num_threads, options.max_new_tokens)
        return self._deploy(deployment.bind(config.device, *arguments, options.min_new_tokens), "ServeBatch")

    def ask_replica(self, method: str, *args: Any) -> Any:
        return getattr(self._replica, method).remote(*args).result()

    def cpu_s(self) -> dict[str, float]:
        """Return the CPU seconds that each part of the running application has used so far."""
        used = dict.fromkeys([*PARTS, DECODERS], 0.0)
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                title = " ".join(process.cmdline())
                part = next((part for part, words in PARTS.items() if words in title), None)
                if part is None:
                    continue
                used[part] += _cpu_s(process)
                if part == "gateway":
                    used[DECODERS] += sum(map(_cpu_s, process.children(recursive=True)))
        return used

    def delete(self) -> None:
        serve.delete("default")

    def shutdown(self) -> None:
        ray.shutdown()

    def _deploy(self, application: serve.Application, deployment: str) -> str:
        serve.run(application)
        self._replica = serve.get_deployment_handle(deployment, "default")
        return f"http://127.0.0.1:{self._port}/"


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _decode(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded)).convert("RGB")
