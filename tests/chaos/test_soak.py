"""A long run under random deaths: every few seconds a process is killed, and no row is lost or written twice.

BLIP2_SOAK_SEED repeats the choices of an earlier run; the timing of the machine still differs.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from pipeline.stages.decode import DecodeStage
from pipeline.stages.write import WriteStage
from tests.chaos.cluster import NODE, cluster, kill, processes, start_driver
from tests.integration.inputs import BROKEN, right_caption, write_tars

NUM_TARS, ROWS_PER_TAR, LINKS = 20, 500, 2
MIN_KILLS = 40
PAUSE_S = (5.0, 10.0)
VICTIMS = {
    # Texts in the command lines of processes, and how often each is chosen.
    WriteStage.__name__: 4,
    DecodeStage.__name__: 2,
    "decode_child": 2,
    "ReadShard": 1,
    "node": 1,
    "driver killed": 1,
    "driver terminated": 1,
}


class Soak:
    """A run whose processes are killed and which is started again until it is done."""

    def __init__(self, nodes: Cluster, root: Path, seed: int) -> None:
        self._nodes, self._root = nodes, root
        self.outputs = [root / "out0"]
        self._random = random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.restarts = 0
        self.driver = self._start()

    def _start(self) -> subprocess.Popen:
        settings = {
            "input": [str(self._root / "in")],
            "output": str(self.outputs[-1]),
            "max_failed_fraction": 0.1,
            "placement": {"max_actors": 2, "calls_per_actor": 4},
        }
        return start_driver(self._nodes, settings, {"seconds_per_image": 0.02}, self._root / "log")

    def run(self) -> None:
        """Kill a process every few seconds, in job after job, until a job ends and enough was killed."""
        while True:
            try:
                status = self.driver.wait(self._random.uniform(*PAUSE_S))
            except subprocess.TimeoutExpired:
                self._kill_something()
                continue
            if status == 0:
                if self.kills.total() >= MIN_KILLS:
                    return
                self.outputs.append(self._root / f"out{len(self.outputs)}")
            else:
                self.restarts += 1
            self.driver = self._start()

    def _kill_something(self) -> None:
        victim = self._random.choices(list(VICTIMS), list(VICTIMS.values()))[0]
        if victim == "driver killed":
            self.driver.kill()
        elif victim == "driver terminated":
            self.driver.send_signal(signal.SIGTERM)
        elif victim == "node":
            self._nodes.remove_node(self._random.choice(sorted(self._nodes.worker_nodes, key=str)), False)
            self._nodes.add_node(**NODE)
        else:
            found = sorted(processes(self._nodes, victim))
            if not found:
                return
            kill(self._random.choice(found))
        self.kills[victim] += 1


def expected(image: bytes) -> tuple[str, str | None]:
    return ("undecodable", None) if image == BROKEN else ("ok", right_caption(image))


@pytest.mark.timeout(1800)
def test_soak(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    seed = int(os.environ.get("BLIP2_SOAK_SEED", time.time_ns() % 10_000))
    truth = write_tars(tmp_path / "in", NUM_TARS, ROWS_PER_TAR, broken_every=101)
    for shard in list(truth):
        for link in range(1, LINKS):
            linked = f"link{link}/{shard}"
            (tmp_path / "in" / linked).parent.mkdir(parents=True, exist_ok=True)
            os.link(tmp_path / "in" / shard, tmp_path / "in" / linked)
            truth[linked] = truth[shard]
    started = time.monotonic()
    with cluster(num_nodes=2) as nodes:
        soak = Soak(nodes, tmp_path, seed)
        try:
            soak.run()
        finally:
            soak.driver.kill()
    lost = twice = wrong = 0
    for output in soak.outputs:
        for shard, images in truth.items():
            columns = ["key", "caption", "status"]
            rows = pq.read_table(output / f"{shard}.parquet", columns=columns).to_pylist()
            found = Counter(row["key"] for row in rows)
            lost += sum(key not in found for key in images)
            twice += sum(count - 1 for count in found.values())
            wrong += [row["key"] for row in rows] != list(images)
            wrong += sum((row["status"], row["caption"]) != expected(images[row["key"]]) for row in rows)
    num_rows = len(soak.outputs) * sum(map(len, truth.values()))
    seconds = time.monotonic() - started
    with capsys.disabled():
        print(f"\nsoak, seed {seed}: {num_rows:,} rows in {seconds:.0f} s")
        print(f"{soak.kills.total()} kills {dict(soak.kills)}, {soak.restarts} restarts of the driver")
        print(f"rows lost {lost}, rows twice {twice}, rows wrong {wrong}")
    assert (lost, twice, wrong) == (0, 0, 0)
    assert soak.kills.total() >= MIN_KILLS
