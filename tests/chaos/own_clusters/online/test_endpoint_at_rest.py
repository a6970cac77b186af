"""The memory of an endpoint that has served no request yet."""

from __future__ import annotations

from pathlib import Path

import psutil

from tests.chaos.own_clusters.online.test_endpoint_lifecycle import endpoint
from tests.integration.online.endpoint import wait_for

MAX_PSS_BYTES = 1 << 30


def test_all_processes_together_take_less_than_a_gibibyte(tmp_path: Path) -> None:
    """Serve used to import pandas into five of them."""
    with endpoint(tmp_path) as (_, command):
        processes = [psutil.Process(command.pid), *psutil.Process(command.pid).children(recursive=True)]
        mapped = {process.name(): Path(f"/proc/{process.pid}/maps").read_text() for process in processes}
        assert any(name.startswith("ray::Serve") for name in mapped)
        assert not [name for name, maps in mapped.items() if "/pandas/" in maps]

        def pss_bytes() -> int:
            return sum(process.memory_full_info().pss for process in processes if process.is_running())

        wait_for(lambda: pss_bytes() < MAX_PSS_BYTES, seconds=60)
