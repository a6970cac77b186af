"""`python -m deploy.cluster_files FOLDER`: write what a cluster needs to a folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deploy.cluster_files.write import write_cluster_files


def main(argv: list[str] | None = None) -> int:
    """Write the files; 0 when done, 3 when one of them is there already and nothing was written."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.cluster_files",
        description="Write the files of a cluster: ray_cluster.yaml, serve_config.yaml, manifests.",
    )
    parser.add_argument("folder", type=Path, help="where to write them; made if needed")
    folder = parser.parse_args(argv).folder
    try:
        written = write_cluster_files(folder)
    except FileExistsError as error:
        sys.stderr.write(f"error: {error}\n")
        return 3
    sys.stdout.write("".join(f"{path}\n" for path in written))
    sys.stdout.write(f"copy the wheel to {folder}/ before ray up: each node installs it from there\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
