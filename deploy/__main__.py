"""`python -m deploy`, the same as `blip2 serve`."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

WRONG_INSTALLATION = 3
"""Exit status of what is refused before work, as in `blip2_actor.flags`, which cannot be imported yet."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line, unless another `blip2_actor` hides ours."""
    hidden_by = file_that_hides("blip2_actor")
    if hidden_by is not None:
        sys.stderr.write(
            f"blip2 serve: {hidden_by} is imported in place of the package blip2_actor that the endpoint "
            "needs; rename it, run from another folder, or take its folder out of PYTHONPATH\n"
        )
        return WRONG_INSTALLATION
    from deploy.command import main

    return main(argv)


def file_that_hides(package: str) -> str | None:
    """Return the file or folder that is imported in place of one of our packages, or None."""
    ours = Path(__file__).resolve().parents[1] / package / "__init__.py"
    spec = find_spec(package)
    if spec is None or (spec.origin and Path(spec.origin).resolve() == ours):
        return None
    return spec.origin or next(iter(spec.submodule_search_locations or [package]))


if __name__ == "__main__":
    sys.exit(main())
