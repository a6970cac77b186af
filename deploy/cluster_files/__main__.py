"""`python -m deploy.cluster_files FOLDER`: write what a cluster needs to a folder."""

from __future__ import annotations

import sys
from pathlib import Path

from blip2_actor.flags import WRONG_FLAGS, Parser
from deploy.cluster_files.write import write_cluster_files

PROG = "python -m deploy.cluster_files"


def main(argv: list[str] | None = None) -> int:
    """Write the files; return 0 when they are written, 3 when the folder must change first."""
    parser = Parser(
        prog=PROG,
        description="Write the files of a cluster: for ray up, Serve and Kubernetes, and its image.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to write them; made if needed")
    folder = parser.parse_args(argv).folder
    try:
        written = write_cluster_files(folder)
    except ValueError as error:
        sys.stderr.write(f"{PROG}: {error}\n")
        return WRONG_FLAGS
    except OSError as error:
        sys.stderr.write(
            f"{PROG}: {folder} cannot be written ({error.strerror or error}); name another folder\n"
        )
        return WRONG_FLAGS
    sys.stdout.write("".join(f"{path}\n" for path in written))
    sys.stdout.write(
        f"copy the wheel to {folder}/ and build the image there: "
        "docker build --build-context wheel=. --target cuda -t IMAGE .\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
