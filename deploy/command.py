"""The command line of `blip2 serve`: flags to settings, and errors to exit statuses.

Exit status: 0 after an orderly end; 3 when flags, model or port are refused before anything starts; 1 when
Ray or the application does not start. Printing help imports neither torch, Ray nor pydantic.
"""

from __future__ import annotations

import multiprocessing
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from blip2_actor.flags import (
    WRONG_FLAGS,
    Parser,
    add_flags,
    build,
    effective_settings,
    hide_secrets,
    settings_as_json,
    settings_as_toml,
    with_flags,
    wrap_for,
)
from blip2_actor.installation import MissingPackages, require_packages
from blip2_actor.version_flag import add_version_flag
from deploy.guard.keys import read_keys
from deploy.observe.tracing import EXPORTER, is_tracing
from deploy.settings import ServeSettings

PROG = "blip2 serve"
NEEDS = ("ray", "fastapi", "python_multipart")
"""Packages of the extra `serve` without which nothing can be served."""
REFUSED = WRONG_FLAGS


FREQUENT = ("host", "port", "model", "device", "dtype", "keys_file", "allow_anonymous", "score_model")
"""Fields whose flags short help shows."""
EXAMPLES = (
    ("blip2 serve -m demo", "a small model, at http://127.0.0.1:8000"),
    ("blip2 serve --host 0.0.0.0 --keys-file keys.txt", "for other machines, whose callers have keys"),
    ("blip2 serve --score-model Salesforce/blip2-itm-vit-g", "also compare images with texts"),
)
CONFIG = "config"


def make_parser() -> Parser:
    parser = Parser(
        prog=PROG,
        description=ServeSettings.__doc__,
        parts=["serve"],
        frequent=FREQUENT,
        examples=EXAMPLES,
    )
    add_version_flag(parser)
    add_flags(parser, ServeSettings)
    return parser


def print_settings(arguments: list[str]) -> int:
    """Print the settings of a command line, and where each comes from; `blip2 config serve` does this."""
    as_json = arguments[:1] == ["--json"]
    given = make_parser().parse_args(arguments[as_json:])
    try:
        build(ServeSettings, vars(given))
        settings = effective_settings(given, ServeSettings)
        lines = [settings_as_json("serve", settings)] if as_json else [*settings_as_toml("serve", settings)]
    except ValueError as error:
        return _fail(error, REFUSED)
    text = "".join(f"{line}\n" for line in lines)
    sys.stdout.write(text.encode(errors="backslashreplace").decode())  # an escape of JSON
    return 0


def main(argv: list[str] | None = None) -> int:
    """Serve until told to stop, and return the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == [CONFIG]:
        return print_settings(arguments[1:])
    given = make_parser().parse_args(arguments)
    try:
        require_packages(PROG, NEEDS, "serve")
        if is_tracing():
            require_packages(PROG, (EXPORTER,), "otel")
        settings = build(ServeSettings, vars(given))
        _require_keys("--keys-file", settings.keys_file)
        _require_keys("--admin-keys-file", settings.admin_keys_file)
        _refuse_taken_port(settings.host, settings.port)
        if settings.metrics_port is not None:
            _refuse_taken_port("127.0.0.1", settings.metrics_port, "--metrics-port")
    except MissingPackages as error:
        sys.stderr.write(wrap_for(sys.stderr, str(error)) + "\n")
        return REFUSED
    except (ValueError, OSError) as error:
        return _fail(error, REFUSED)
    if refusal := _in_child(refusal_of, settings):
        return _fail(refusal, REFUSED)
    from deploy.local_service import serve_until_stopped

    try:
        serve_until_stopped(settings)
    except (ValueError, OSError, RuntimeError) as error:
        return _fail(error, 1)
    sys.stdout.write("stopped\n")
    return 0


def _require_keys(flag: str, keys_file: str | None) -> None:
    """Raise ValueError unless there is no file of keys to read, or it can be read and is right."""
    try:
        if keys_file is not None:
            read_keys(Path(keys_file))
    except OSError as error:
        raise ValueError(
            f"{flag} must be a file that can be read, got {keys_file}: {error.strerror}; make a line of it "
            "with python -m deploy.guard.keys NAME"
        ) from error


def refusal_of(settings: ServeSettings) -> str | None:
    """Return why the models, or the run that answers come from, cannot be served; None if they can."""
    try:
        settings.check_models()
        if settings.cache_from is not None:
            from deploy.reuse.finished_run import FinishedRun

            FinishedRun(settings.cache_from, settings.engine.info(), settings.image)
    except (ValueError, OSError) as error:
        return with_flags(str(error), ServeSettings)
    return None


def _in_child(call: Callable[[ServeSettings], str | None], settings: ServeSettings) -> str | None:
    """Call it in a process of its own, with which the 160 MiB of torch and transformers end."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        return child.submit(call, settings).result()


def _fail(error: Exception | str, status: int) -> int:
    sys.stderr.write(wrap_for(sys.stderr, hide_secrets(f"{PROG}: {error}")) + "\n")
    return status


def _refuse_taken_port(host: str, port: int, remedy: str = "--port or --host") -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"port {port} of {host} cannot be used ({error.strerror}); choose another {remedy}"
            ) from None
