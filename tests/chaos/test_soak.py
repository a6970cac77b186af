"""A long run under random deaths: every few seconds something is killed, and no row is lost or doubled.

Seeded: BLIP2_SOAK_SEED repeats a run's choices (the machine's own timing still differs).
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

from tests.chaos.cluster import NODE, cluster, kill, processes, start_driver
from tests.integration.inputs import BROKEN, right_caption, write_tars

NUM_TARS, ROWS_PER_TAR, LINKS = 20, 500, 2
LEAST_KILLS = 40
PAUSE_S = (5.0, 10.0)
VICTIMS = {
    "FragmentStage": 4,
    "DecodeStage": 2,
    "decode_child": 2,
    "ReadShardSource": 1,
    "node": 1,
    "driver killed": 1,
    "driver terminated": 1,
}


class Soak:
    """A run that is killed piece by piece and started again until it is done."""

    def __init__(self, nodes: Cluster, settings: dict, engine: dict, log: Path, seed: int) -> None:
        self._nodes, self._settings, self._engine, self._log = nodes, settings, engine, log
        self._random = random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.restarts = 0
        self.driver = self._start()

    def _start(self) -> subprocess.Popen:
        return start_driver(self._nodes, self._settings, self._engine, self._log)

    def run(self, gate: Path) -> None:
        """Kill every few seconds until the job is done, and it may only be done after LEAST_KILLS."""
        while True:
            try:
                status = self.driver.wait(self._random.uniform(*PAUSE_S))
            except subprocess.TimeoutExpired:
                self._kill_something()
                if self.kills.total() >= LEAST_KILLS:
                    gate.unlink(missing_ok=True)
                continue
            if status == 0:
                return
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
    gate = tmp_path / "gate"
    gate.touch()
    last = next(reversed(truth[sorted(truth)[-1]].values()))
    settings = {
        "input": [str(tmp_path / "in")],
        "output": str(tmp_path / "out"),
        "max_failed_fraction": 0.1,
        "placement": {"max_actors": 2, "calls_per_actor": 4},
    }
    engine = {"seconds_per_image": 0.015, "gate": str(gate), "holds_on": [right_caption(last)]}
    started = time.monotonic()
    with cluster(num_nodes=2) as nodes:
        soak = Soak(nodes, settings, engine, tmp_path / "log", seed)
        try:
            soak.run(gate)
        finally:
            soak.driver.kill()
    lost = twice = wrong = 0
    for shard, images in truth.items():
        file = tmp_path / "out" / f"{shard}.parquet"
        rows = pq.read_table(file, columns=["key", "caption", "status"]).to_pylist()
        found = Counter(row["key"] for row in rows)
        lost += sum(key not in found for key in images)
        twice += sum(count - 1 for count in found.values())
        in_order = [row["key"] for row in rows] == list(images)
        wrong += not in_order
        for row in rows:
            image = images[row["key"]]
            expected = None if image == BROKEN else right_caption(image)
            wrong += row["caption"] != expected or (row["status"] == "ok") != (expected is not None)
    num_rows, seconds = sum(map(len, truth.values())), time.monotonic() - started
    with capsys.disabled():
        print(f"\nsoak, seed {seed}: {num_rows:,} rows in {seconds:.0f} s")
        print(f"{soak.kills.total()} kills {dict(soak.kills)}, {soak.restarts} restarts of the driver")
        print(f"rows lost {lost}, rows twice {twice}, rows wrong {wrong}")
    assert (lost, twice, wrong) == (0, 0, 0)
    assert soak.kills.total() >= LEAST_KILLS
