"""The endpoint on this machine: a Ray of its own, the application on it, and the end of both.

The cluster belongs to this process alone. Its token lives in the environment only, its workers import our
packages whatever the working folder holds, and every process ends with this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import TYPE_CHECKING

from blip2_actor.installation import ROOT, ray_start_remedy
from deploy import APPLICATION
from deploy.observe.logs import serve_logging
from deploy.observe.tracing import serve_environment
from deploy.settings import ServeSettings

if TYPE_CHECKING:
    import psutil

ENDED_WITHIN_S = 10.0
"""Maximum seconds for killed processes to end."""


class RayStartFailed(RuntimeError):
    """Ray did not come up on this machine; the message says what to do."""


def serve_until_stopped(settings: ServeSettings) -> None:
    """Start Ray and the application; at a signal end both, requests in flight first.

    Raises:
        RayStartFailed: Ray does not start.
        RuntimeError: the application does not start.
    """
    set_ray_environment()
    import ray
    from ray import serve

    from deploy.app import compose

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    engine = dataclasses.replace(settings.engine, num_threads=settings.engine.num_threads or os.cpu_count())
    stop = threading.Event()
    _set_on_signal(stop)
    try:
        _start_ray(settings)
        _set_on_signal(stop)  # again, because Ray has set its own handlers
        num_gpus = 0.0
        if engine.device != "cpu":
            # Each model starts with one engine. Ray counts a fourth digit of a GPU, and no fifth.
            share = ray.cluster_resources().get("GPU", 0) / (1 + len(settings.other_models))
            num_gpus = 1 if share >= 1 else math.floor(share * 10_000) / 10_000
        reserved = {"num_cpus": 1, "num_gpus": num_gpus}
        application = compose(
            engine, dataclasses.replace(settings, engine=engine), captioner={"ray_actor_options": reserved}
        )
        logs = serve_logging(settings.log_level)
        serve.start(http_options={"host": settings.host, "port": settings.port}, logging_config=logs)
        target = serve.RunTarget(application, name=APPLICATION, logging_config=logs)
        serve.run_many([target], wait_for_applications_running=False)
        if _wait_until_running(stop):
            sys.stdout.write(_invitation(settings) + _whereabouts())
            sys.stdout.flush()
            stop.wait()
            _drain(settings.longest_request_s + 30)
    finally:
        ray.shutdown()


def set_ray_environment() -> None:
    """Set what Ray and Serve read from the environment; Ray must not have been imported before."""
    # No other process knows the token of this cluster, and no token file is left behind.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Ray's name for a Ray that takes 127.0.0.1 as its address and listens there alone, on Linux too.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # Ray gives its workers the niceness 15, and so what else runs on this machine 28 times their CPU time.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # The workers of Serve differ from those that Ray would start ahead, and no task would use these.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # The threads of a model on CPUs wait without spinning: the cores are also those of gateway and decoders.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.update(serve_environment())
    _preparation()()
    from deploy.app import NODE_ENVIRONMENT  # imports Ray, which reads its environment now

    os.environ.update(NODE_ENVIRONMENT)


def _preparation() -> Callable[[], None]:
    """Return what each process does before it uses Serve, which has no settings for this (Ray 2.60).

    Serve's replicas listen on loopback, where Serve has them listen on every address. Serve is imported as
    if pandas were not installed, which others may import later: pandas encodes answers that are data frames,
    which ours are not, and takes 37 MiB in each process.

    The function is pickled by value, because a worker that imported this module would import Serve before.
    """

    def prepare() -> None:
        from ray._common import tls_utils

        add_port = tls_utils.add_port_to_grpc_server
        tls_utils.add_port_to_grpc_server = lambda server, address: add_port(
            server, address.replace("[::]", "127.0.0.1")
        )
        if "pandas" not in sys.modules:
            sys.modules["pandas"] = None  # type: ignore[assignment]
            try:
                import ray.serve  # noqa: F401
            finally:
                del sys.modules["pandas"]

    return prepare


def _drain(limit_s: float) -> None:
    """End the application when its last request has its answer; another signal ends it at once."""
    from ray import serve

    from deploy.observe.fleet import GATEWAYS

    hurry = threading.Event()
    _set_on_signal(hurry)
    ends_at_s = time.monotonic() + limit_s

    async def drain_gateways() -> None:
        drained = asyncio.ensure_future(serve.get_deployment_handle(GATEWAYS, APPLICATION).drain.remote())
        while time.monotonic() < ends_at_s and not hurry.is_set():
            if (await asyncio.wait([drained], timeout=0.1))[0]:
                drained.exception()  # a gateway has ended, and with it every request that could be waited for
                return

    # Serve would stop the engine together with the gateway, whose requests would wait for it in vain.
    asyncio.run(drain_gateways())
    serve.delete(APPLICATION, _blocking=False)
    while APPLICATION in serve.status().applications and time.monotonic() < ends_at_s:
        if hurry.wait(0.1):
            return


def _start_ray(settings: ServeSettings) -> None:
    import psutil
    import ray
    from ray.job_config import JobConfig

    class OurPackagesFirst(JobConfig):
        """Workers search the folder of our packages; Ray would add the working folder in front of it."""

        def _serialize(self) -> str:
            self._py_driver_sys_path = [str(ROOT)]
            return super()._serialize()

    before = set(psutil.Process().children())
    try:
        with _without_idle_processes():
            ray.init(
                address="local",
                # Logical CPUs place our actors; they do not bind threads.
                num_cpus=max(4 + len(settings.other_models), os.cpu_count() or 1),
                object_store_memory=512 << 20,
                include_dashboard=False,
                logging_level=logging.WARNING,
                log_to_driver=False,
                job_config=OurPackagesFirst(),
                runtime_env={"worker_process_setup_hook": _preparation()},
                _metrics_export_port=settings.metrics_port,
            )
    except Exception as error:  # Ray raises a plain Exception when one of its processes comes up too late
        _end_started_processes(before)
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise RayStartFailed(
            f"Ray did not start on this machine: {reason}; {ray_start_remedy(error)}"
        ) from error


@contextlib.contextmanager
def _without_idle_processes() -> Iterator[None]:
    """Let `ray.init` leave out the autoscaler, what copies the output of workers, and the dashboard's server.

    They have nothing to do on one machine, hold 55 MiB each, and Ray has no settings for this (Ray 2.60).
    """
    from ray._private.node import Node

    starts = {
        name: getattr(Node, name) for name in ("start_monitor", "start_log_monitor", "start_api_server")
    }
    try:
        for name in starts:
            setattr(Node, name, lambda *_, **__: None)
        yield
    finally:
        for name, start in starts.items():
            setattr(Node, name, start)


def _end_started_processes(before: Set[psutil.Process]) -> None:
    """End what a failed `ray.init` has started: `ray.shutdown` ends no node whose constructor has raised.

    The agents of a raylet that is killed would run on, so they are killed too.

    Args:
        before: the children that this process had before `ray.init`; they stay.
    """
    import psutil

    started = [child for child in psutil.Process().children() if child not in before]
    for child in list(started):
        with contextlib.suppress(psutil.NoSuchProcess):
            started += child.children(recursive=True)
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(started, timeout=ENDED_WITHIN_S)


def _wait_until_running(stop: threading.Event) -> bool:
    """Wait for the application; return False when told to stop before it runs."""
    from ray import serve

    while not stop.wait(0.2):
        application = serve.status().applications[APPLICATION]
        if application.status == "RUNNING":
            return True
        if application.status == "DEPLOY_FAILED":
            reasons = [deployment.message for deployment in application.deployments.values()]
            raise RuntimeError("\n".join([application.message, *filter(None, reasons)]))
    return False


def _set_on_signal(stop: threading.Event) -> None:
    # An event, not KeyboardInterrupt: raised inside Ray, that can end the process with its children alive.
    # SIGINT is set explicitly, because a shell has its background jobs ignore it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())


def _invitation(settings: ServeSettings) -> str:
    model = settings.engine.model
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"
    curl = "curl" if settings.keys_file is None else 'curl -H "Authorization: Bearer $BLIP2_KEY"'
    image = "photo.jpg"
    lines = [f"{model} is ready on {url}/ (Ctrl-C ends it)"]
    if model == "demo":
        image = "scene.png"
        lines.append(f"  {curl} -so {image} {url}/{image}")
    lines.append(f"  {curl} -F image=@{image} {url}/v1/caption")
    return "\n".join(lines) + "\n"


def _whereabouts() -> str:
    """Say where logs and metrics are."""
    import ray

    [node] = ray.nodes()
    logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path()) / "serve"
    return f"  logs in {logs}, metrics on http://127.0.0.1:{node['MetricsExportPort']}/metrics\n"
