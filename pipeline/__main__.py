"""`python -m pipeline`, the same as `blip2`.

What happens while the packages are imported, or because of a bug, ends here: as a sentence, or as a traceback
without the secrets of URIs.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from pipeline.errors import Interrupted
from pipeline.progress import write
from pipeline.progress.writing import open_missing_streams

WRONG_INSTALLATION = 3
"""Exit status of what is refused before work; the table in `pipeline.exit_status` cannot be imported yet."""
BUG = 1
OBJECTS_BETWEEN_COLLECTIONS = 50_000
"""Python's own 700 make `blip2 status` of 100,000 shards a sixth slower: it makes millions of objects, which
form no circles and are walked over again and again (two cores, 2026-11-26)."""


def run() -> NoReturn:
    """Run the command line and end the process at once.

    Python would first unload torch, Ray and pandas, which takes a second of CPU time. Each command has ended
    by then what it has started.
    """
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    open_missing_streams()
    status = main()
    write(sys.stderr, "")
    os._exit(status)


def main() -> int:
    """Run the command line, unless another `blip2_actor` hides ours."""
    if sys.platform == "win32":
        write(
            sys.stderr,
            "blip2: Windows is not supported, got win32; run it in WSL 2 or in a Linux container\n",
        )
        return WRONG_INSTALLATION
    hidden_by = file_that_hides("blip2_actor")
    if hidden_by is not None:
        write(
            sys.stderr,
            f"blip2: {hidden_by} is imported in place of the package blip2_actor that blip2 needs; "
            "rename it, run from another folder, or take its folder out of PYTHONPATH\n",
        )
        return WRONG_INSTALLATION
    from pipeline.run.signals import StopRequest

    try:
        with StopRequest(is_command=True).by_signals():
            from pipeline.cli.main import main

            return main()
    except Interrupted as error:
        write(sys.stderr, f"blip2: {error}\n")
        return 128 + error.number
    except Exception:
        from pipeline.storage.secrets import hide_secrets

        write(sys.stderr, hide_secrets(traceback.format_exc()))
        return BUG
    finally:
        write(sys.stdout, "")  # flushes it here, where a pipe that is closed does no harm


def file_that_hides(package: str) -> str | None:
    """Return the file or folder that is imported in place of one of our packages, or None."""
    ours = Path(__file__).resolve().parents[1] / package / "__init__.py"
    spec = find_spec(package)
    if spec is None or (spec.origin and Path(spec.origin).resolve() == ours):
        return None
    return spec.origin or next(iter(spec.submodule_search_locations or [package]))


if __name__ == "__main__":
    run()
