"""The command line of `blip2 serve`: flags to settings, and errors to exit statuses.

Exit status: 0 after an orderly end; 3 when flags, model or port are refused before anything starts; 1 when
Ray or the application does not start. Printing help imports neither torch, Ray nor pydantic.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

from blip2_actor.flags import WRONG_FLAGS, Parser, add_flags, build
from blip2_actor.installation import MissingPackages, require_packages
from blip2_actor.version_flag import add_version_flag
from deploy.guard.keys import read_keys
from deploy.settings import ServeSettings

PROG = "blip2 serve"
NEEDS = ("ray", "fastapi", "python_multipart")
"""Packages of the extra `serve` without which nothing can be served."""
REFUSED = WRONG_FLAGS


def make_parser() -> Parser:
    parser = Parser(prog=PROG, description=ServeSettings.__doc__)
    add_version_flag(parser)
    add_flags(parser, ServeSettings)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Serve until told to stop, and return the exit status."""
    given = make_parser().parse_args(argv)
    try:
        require_packages(PROG, NEEDS, "serve")
        settings = build(ServeSettings, vars(given))
        if settings.keys_file is not None:
            read_keys(Path(settings.keys_file))
        _refuse_taken_port(settings.host, settings.port)
        settings.check_models()
    except MissingPackages as error:
        sys.stderr.write(f"{error}\n")
        return REFUSED
    except (ValueError, OSError) as error:
        return _fail(error, REFUSED)
    from deploy.local_service import serve_until_stopped

    try:
        serve_until_stopped(settings)
    except (ValueError, OSError, RuntimeError) as error:
        return _fail(error, 1)
    sys.stdout.write("stopped\n")
    return 0


def _fail(error: Exception, status: int) -> int:
    sys.stderr.write(f"{PROG}: {error}\n")
    return status


def _refuse_taken_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"port {port} of {host} cannot be used ({error.strerror}); choose another --port or --host"
            ) from None
