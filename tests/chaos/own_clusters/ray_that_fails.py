"""Run the caption command on a Ray that starts its processes, then times out; print the remaining processes.

python -m tests.chaos.own_clusters.ray_that_fails '{"settings": {...}, "engine": {...}}'
"""

from __future__ import annotations

import json
import sys
from typing import NoReturn

import psutil

from pipeline.run.cluster import set_ray_environment
from tests.drive import drive

TIMED_OUT = (
    "The current node timed out during startup. This could happen because some of the raylet failed to "
    "startup or the GCS has become overloaded."
)


def main(arguments: str) -> int:
    set_ray_environment()
    from ray._private import services

    started: list[str] = []

    def time_out(*_: object) -> NoReturn:
        """Raise what Ray raises if its processes do not answer for 30 seconds."""
        started.extend(child.name() for child in psutil.Process().children(recursive=True))
        raise Exception(TIMED_OUT)

    services.get_node = time_out
    status = drive(arguments)
    left = [child.name() for child in psutil.Process().children(recursive=True)]
    print(json.dumps({"started": started, "left": left}))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
