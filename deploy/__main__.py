"""`python -m deploy`: the Serve application on this machine, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import socket
import sys
import threading

from blip2_actor import EngineConfig

APPLICATION = "blip2"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    defaults = EngineConfig()
    parser = argparse.ArgumentParser(
        prog="python -m deploy", description="Serve captions over HTTP from this machine."
    )
    add = parser.add_argument
    add("--model", default=defaults.model, help='hub name, folder, or "demo" (default %(default)s)')
    add("--revision", default=None, help="commit, tag or branch of a hub model")
    add("--device", default=defaults.device, help="auto, cpu or such as cuda:0 (default %(default)s)")
    add("--dtype", default=defaults.dtype, help="auto, float32, bfloat16 or float16 (default %(default)s)")
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default %(default)s)",
    )
    add("--port", default=8000, type=int, help="port to listen on (default %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Serve until told to stop; 0 after a clean end, 1 when it cannot start."""
    arguments = parse_arguments(argv)
    try:
        _refuse_taken_port(arguments.host, arguments.port)
        engine = EngineConfig(
            model=arguments.model,
            revision=arguments.revision,
            device=arguments.device,
            dtype=arguments.dtype,
            num_threads=os.cpu_count(),
        )
        engine.info()
        serve_until_stopped(engine, arguments.host, arguments.port)
    except (ValueError, OSError, RuntimeError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write("stopped\n")
    return 0


def serve_until_stopped(engine: EngineConfig, host: str, port: int) -> None:
    """Start a Ray of our own and the application on it; at a signal end both, requests in flight first.

    Raises:
        RuntimeError: the application does not start.
    """
    # A cluster of this process alone: nobody else knows its token, and no token file is left behind.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray
    from ray import serve

    from deploy.app import compose
    from deploy.settings import Settings

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    stop = threading.Event()
    _on_stop(stop)
    try:
        # Logical CPUs place our actors; they do not bind threads.
        ray.init(
            address="local",
            num_cpus=max(4, os.cpu_count() or 1),
            object_store_memory=512 << 20,
            include_dashboard=False,
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
        _on_stop(stop)  # again: Ray has set its own handlers
        num_gpus = 1 if engine.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1 else 0
        application = compose(
            engine,
            Settings(engine=engine),
            captioner={"ray_actor_options": {"num_cpus": 1, "num_gpus": num_gpus}},
        )
        serve.start(http_options={"host": host, "port": port})
        target = serve.RunTarget(application, name=APPLICATION)
        serve.run_many([target], wait_for_applications_running=False)
        if _wait_until_running(stop):
            sys.stdout.write(_invitation(engine.model, host, port))
            sys.stdout.flush()
            stop.wait()
            serve.delete(APPLICATION)
    finally:
        ray.shutdown()


def _wait_until_running(stop: threading.Event) -> bool:
    """Wait for the application; False when told to stop before it was there."""
    from ray import serve

    while not stop.wait(0.2):
        application = serve.status().applications[APPLICATION]
        if application.status == "RUNNING":
            return True
        if application.status == "DEPLOY_FAILED":
            reasons = [deployment.message for deployment in application.deployments.values()]
            raise RuntimeError("\n".join([application.message, *filter(None, reasons)]))
    return False


def _on_stop(stop: threading.Event) -> None:
    # An event, not KeyboardInterrupt: raised inside Ray it can end the process with its children alive.
    # SIGINT by name, because a shell makes its background jobs deaf to it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())


def _invitation(model: str, host: str, port: int) -> str:
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    image = "photo.jpg"
    lines = [f"{model} is ready on {url}/ (Ctrl-C ends it)"]
    if model == "demo":
        image = "scene.png"
        lines.append(f"  curl -so {image} {url}/{image}")
    lines.append(f"  curl -F image=@{image} {url}/v1/caption")
    return "\n".join(lines) + "\n"


def _refuse_taken_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"port must be free on {host}, got {port} ({error.strerror}); choose another"
            ) from None


if __name__ == "__main__":
    sys.exit(main())
