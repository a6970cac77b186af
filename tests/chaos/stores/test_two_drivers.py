"""Two drivers start at the same moment on one bucket: the store's conditional write grants one the lease."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.storage.filesystems import open_filesystem
from pipeline.storage.folder import Folder
from tests.chaos.stores.faulty_s3 import faulty_store
from tests.integration.inputs import right_caption, write_tars


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("own_ray")
def test_one_wins_and_the_other_is_refused_with_its_name(tmp_path: Path) -> None:
    truth = write_tars(tmp_path / "in", num_tars=1, rows_per_tar=20)
    gate = tmp_path / "gate"
    gate.touch()
    with faulty_store() as store:
        open_filesystem(store.uri("bucket"))[0].create_dir("bucket")
        output = store.uri("bucket/out")
        settings = {"input": [str(tmp_path / "in")], "output": output}
        words = json.dumps({"settings": settings, "engine": {"gate": str(gate)}})
        drivers = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.drive", words],
                env=os.environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for _ in range(2)
        ]
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)  # until one of the drivers ends
        winner, loser = sorted(drivers, key=lambda driver: driver.poll() is not None)
        said, _ = loser.communicate()
        assert loser.returncode == 1, said
        assert f"while process {winner.pid} on " in said, said
        assert "starting Ray" not in said, "it was refused before it started anything"
        gate.unlink()
        said, _ = winner.communicate()
        assert winner.returncode == 0, said
        (shard, images), *_ = truth.items()
        table = Folder(output).read(f"{shard}.parquet", pq.read_table)
        assert table["caption"].to_pylist() == [right_caption(image) for image in images.values()]
