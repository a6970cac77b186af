"""Backpressure: ten times the object store's size passes through it, and nothing is spilled to disk.

Reading and decoding are faster than the engine here. Without backpressure the pixels of the whole input would
wait in the store.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from ray._private.internal_api import get_state_from_address, node_stats
from ray.cluster_utils import Cluster

from blip2_actor import decode_image
from blip2_actor.testing import fake_caption
from tests.chaos.cluster import NODE, cluster, start_driver
from tests.integration.inputs import png, write_tar

STORE_BYTES = NODE["object_store_memory"]
SIZE_PX = 448
NUM_TARS, ROWS_PER_TAR = 10, 10 * STORE_BYTES // (SIZE_PX**2 * 3) // 10 + 1
NUM_IMAGES = 16
POLL_EVERY_S = 0.05


@cache
def caption_of(seed: int) -> str:
    return fake_caption(decode_image(png(seed), SIZE_PX).array(SIZE_PX))


def store_of_the_worker(nodes: Cluster) -> Any:
    """Return the raylet's statistics of the object store on the node with CPUs."""
    for node in get_state_from_address(nodes.address).node_table():
        if node["Alive"] and node["Resources"].get("CPU"):
            address, port = node["NodeManagerAddress"], node["NodeManagerPort"]
            return node_stats(address, port, include_memory_info=False).store_stats
    raise AssertionError("no node with CPUs is alive")


def test_the_store_stays_bounded_and_nothing_is_spilled(tmp_path: Path):
    seeds = [row % NUM_IMAGES for row in range(ROWS_PER_TAR)]
    for at in range(NUM_TARS):
        write_tar(tmp_path / "in" / f"{at}.tar", {f"{row}": png(seed) for row, seed in enumerate(seeds)})
    settings = {"input": [str(tmp_path / "in")], "output": str(tmp_path / "out")}
    engine = {"image_size_px": SIZE_PX, "seconds_per_image": 0.008}
    peak = 0
    with cluster(num_nodes=1) as nodes:
        driver = start_driver(nodes, settings, engine, tmp_path / "log")
        try:
            while driver.poll() is None:
                peak = max(peak, store_of_the_worker(nodes).object_store_bytes_used)
                time.sleep(POLL_EVERY_S)
        finally:
            driver.kill()
        after = store_of_the_worker(nodes)
    assert driver.returncode == 0, (tmp_path / "log").read_text()
    print(
        f"peak {peak:,} of {STORE_BYTES:,} bytes, {after.cumulative_created_bytes:,} passed through, "
        f"{after.spilled_bytes_total:,} spilled, {after.object_store_bytes_fallback:,} outside it"
    )
    assert after.cumulative_created_bytes >= 10 * STORE_BYTES
    assert peak < STORE_BYTES
    assert (after.spilled_bytes_total, after.object_store_bytes_fallback) == (0, 0)
    for at in range(NUM_TARS):
        rows = pq.read_table(tmp_path / "out" / f"{at}.tar.parquet", columns=["caption"])
        assert rows["caption"].to_pylist() == [caption_of(seed) for seed in seeds]
