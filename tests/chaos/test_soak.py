"""A long run under random deaths: every few seconds a process is killed, and no row is lost or written twice.

Between two starts of the driver the input also changes: a shard is added, replaced or deleted.

BLIP2_SOAK_SEED repeats the choices of an earlier run; the timing of the machine still differs.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from pipeline.stages.decode import DecodeStage
from pipeline.stages.write import WriteStage
from tests.chaos.cluster import NODE, cluster, kill, processes, start_driver
from tests.integration.inputs import BROKEN, png, read_output, right_caption, write_tar, write_tars

NUM_TARS, ROWS_PER_TAR, LINKS = 20, 500, 2
MIN_KILLS = 40
PAUSE_S = (5.0, 10.0)
VICTIMS = {
    # Texts in the command lines of the processes to kill, and their relative frequencies.
    WriteStage.__name__: 4,
    DecodeStage.__name__: 2,
    "decode_child": 2,
    "ReadShard": 1,
    "node": 1,
    "driver killed": 1,
    "driver terminated": 1,
}


CHANGES = ("added", "replaced", "deleted")

Images = Mapping[str, bytes]


class ChangingInput:
    """Tars that a test adds, replaces and deletes, and their contents."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self._folder, self._random = folder, chance
        self.truth: dict[str, Images] = dict(write_tars(folder, NUM_TARS, ROWS_PER_TAR, broken_every=101))
        for shard in list(self.truth):
            for link in range(1, LINKS):
                linked = f"link{link}/{shard}"
                (folder / linked).parent.mkdir(parents=True, exist_ok=True)
                os.link(folder / shard, folder / linked)
                self.truth[linked] = self.truth[shard]
        self._unchanged = set(self.truth)
        self.deleted: dict[str, Images] = {}
        """Deleted tars: their rows that were finished earlier stay."""
        self.changes: Counter[str] = Counter()

    def change(self) -> None:
        """Change one tar; each kind of change is equally likely."""
        number = self.changes.total()
        kind = CHANGES[number % len(CHANGES)]
        # A driver may die before it sees a change, so a deleted tar must have had only one content.
        choice = self._unchanged if kind == "deleted" else self.truth.keys()
        shard = f"added/{number:05d}.tar" if kind == "added" else self._random.choice(sorted(choice))
        self._unchanged.discard(shard)
        if kind == "deleted":
            (self._folder / shard).unlink()
            self.deleted[shard] = self.truth.pop(shard)
        else:
            num_rows = self._random.randint(ROWS_PER_TAR // 2, ROWS_PER_TAR)
            seed = (number + 1) * 1_000_000
            images = {f"image-{row:06d}": png(seed + row) for row in range(num_rows)}
            aside = self._folder.parent / "aside.tar"
            write_tar(aside, images)
            (self._folder / shard).parent.mkdir(exist_ok=True)
            aside.replace(self._folder / shard)
            self.truth[shard] = images
        self.changes[kind] += 1


class Soak:
    """A run whose processes are killed, and which is started again until it is finished."""

    def __init__(self, nodes: Cluster, root: Path, seed: int) -> None:
        self._nodes, self._root = nodes, root
        self._random = random.Random(seed)
        self.input = ChangingInput(root / "in", self._random)
        self.outputs = [root / "out0"]
        self.expected: list[tuple[Path, dict[str, Images], dict[str, Images]]] = []
        """For each finished output: the tars that it must hold, and those that were deleted."""
        self.kills: Counter[str] = Counter()
        self.restarts = 0
        self.driver = self._start()

    def _start(self) -> subprocess.Popen:
        settings = {
            "input": [str(self._root / "in")],
            "output": str(self.outputs[-1]),
            "max_failed_fraction": 0.1,
            "add_new": True,
            "redo_changed": True,
            "placement": {"max_actors": 2, "calls_per_actor": 4},
        }
        return start_driver(self._nodes, settings, {"seconds_per_image": 0.02}, self._root / "log")

    def run(self) -> None:
        """Kill a process every few seconds, in job after job, until enough were killed and a job ends."""
        while True:
            try:
                status = self.driver.wait(self._random.uniform(*PAUSE_S))
            except subprocess.TimeoutExpired:
                self._kill_something()
                continue
            if status == 0:
                self.expected.append((self.outputs[-1], dict(self.input.truth), dict(self.input.deleted)))
                if self.kills.total() >= MIN_KILLS and len(self.input.changes) == len(CHANGES):
                    return
                self.input.deleted.clear()
                self.outputs.append(self._root / f"out{len(self.outputs)}")
            else:
                self.restarts += 1
                self.input.change()
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
    started = time.monotonic()
    with cluster(num_nodes=2) as nodes:
        soak = Soak(nodes, tmp_path, seed)
        try:
            soak.run()
        finally:
            soak.driver.kill()
    lost = twice = wrong = num_rows = 0
    for output, truth, deleted in soak.expected:
        files = {str(path.relative_to(output)).removesuffix(".parquet") for path in output.rglob("*.parquet")}
        lost += sum(len(images) for shard, images in truth.items() if shard not in files)
        wrong += len(files - truth.keys() - deleted.keys())
        for shard in sorted(files & (truth.keys() | deleted.keys())):
            images = truth.get(shard) or deleted[shard]
            rows = read_output(output, shard)
            found = [row["key"] for row in rows]
            lost += len(images.keys() - set(found)) if shard in truth else 0
            twice += len(found) - len(set(found))
            wrong += found != list(images)[: len(found)]
            wrong += sum((row["status"], row["caption"]) != expected(images[row["key"]]) for row in rows)
            num_rows += len(found)
    seconds = time.monotonic() - started
    with capsys.disabled():
        print(f"\nsoak, seed {seed}: {num_rows:,} rows of {len(soak.expected)} outputs in {seconds:.0f} s")
        print(f"{soak.kills.total()} kills {dict(soak.kills)}, {soak.restarts} restarts of the driver")
        print(f"changes of the input: {dict(soak.input.changes)}")
        print(f"rows lost {lost}, rows twice {twice}, rows wrong {wrong}")
    assert (lost, twice, wrong) == (0, 0, 0)
    assert soak.kills.total() >= MIN_KILLS
