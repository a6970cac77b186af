"""If Ray does not start, the endpoint prints one sentence, exits with 1 and leaves no process."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import psutil

from tests.integration.online.endpoint_process import serving
from tests.ports import free_port

TOO_LATE = """
import sys, time, types
from deploy import local_service

start_ray, skipped_s = local_service._start_ray, 0.0

def get_node(*_):
    global skipped_s
    time.sleep(1)
    skipped_s += 15
    raise RuntimeError("the node is not there")

def start_ray_too_late(settings):
    from ray._private import node, services  # not before the endpoint has set the environment for Ray

    services.get_node = get_node
    node.time = types.SimpleNamespace(**vars(time) | {"monotonic": lambda: time.monotonic() + skipped_s})
    start_ray(settings)

local_service._start_ray = start_ray_too_late

from deploy.__main__ import main
sys.exit(main())
"""
"""The endpoint on a Ray whose processes start but never report; the wait of 30 s is shortened to 2 s."""


def test_a_ray_that_comes_up_too_late_is_one_sentence_and_leaves_nothing_running(tmp_path: Path) -> None:
    with serving(tmp_path, "--port", str(free_port()), start=["-c", TOO_LATE]) as command:
        seen: dict[int, psutil.Process] = {}
        names = set()
        while command.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in psutil.Process(command.pid).children(recursive=True):
                    seen[process.pid] = process
                    names.add(process.name())
            time.sleep(0.05)
        said = command.communicate()[1]
        assert command.returncode == 1, said
        assert "raylet" in names
        assert said.startswith("blip2 serve: Ray did not start on this machine: The current node timed out")
        assert said.count("\n") == 1
        _, alive = psutil.wait_procs(list(seen.values()), timeout=30)
        assert not alive
