"""A job's endpoint is killed midway: the job waits, continues when the endpoint is back, and loses no row."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from blip2_actor import EngineConfig, Request, decode_image
from tests.integration.inputs import png, write_tars
from tests.integration.online.endpoint_process import ROOT, serving
from tests.ports import free_port

pytestmark = pytest.mark.timeout(580)

NUM_ROWS = 600
SIZE_PX = 64


@contextmanager
def endpoint(folder: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    with serving(
        folder, "--port", str(port), "--dtype", "float32", "--num-threads", "1", "--max-slots", "4"
    ) as command:
        assert command.stdout is not None
        assert "is ready" in command.stdout.readline(), command.communicate()[1]
        try:
            yield command
        finally:
            if command.poll() is None:
                kill_all(command)


def kill_all(command: subprocess.Popen[str]) -> None:
    """Kill an endpoint and all its processes, as a power cut would."""
    processes = [psutil.Process(command.pid), *psutil.Process(command.pid).children(recursive=True)]
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    command.communicate()


def lines_until(job: subprocess.Popen[str], phrase: str) -> str:
    assert job.stdout is not None
    said = ""
    for line in job.stdout:
        said += line
        if phrase in line:
            return said
    raise AssertionError(f"the job has ended without saying {phrase!r}:\n{said}")


def fragments_of(output: Path) -> int:
    return sum(1 for path in (output / "_blip2" / "fragments").rglob("*") if path.is_file())


def test_a_job_outlives_the_death_of_its_endpoint(tmp_path: Path) -> None:
    write_tars(tmp_path / "in", 1, NUM_ROWS)
    output, port = tmp_path / "out", free_port()
    url = f"http://127.0.0.1:{port}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with tempfile.TemporaryDirectory(prefix="rj", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
        with endpoint(tmp_path, port) as first:
            job = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "pipeline",
                    "caption",
                    str(tmp_path / "in"),
                    "--endpoint",
                    url,
                    "-o",
                    str(output),
                ],
                env=kept | {"RAY_TMPDIR": ray_folder, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            try:
                while not fragments_of(output):
                    assert job.poll() is None, job.communicate()[0]
                    time.sleep(0.02)
                os.kill(first.pid, signal.SIGSTOP)  # so that it restarts nothing that is killed
                kill_all(first)
                assert job.poll() is None, "the job has ended before its endpoint"
                lines_until(job, f"endpoint has been out of reach ({url} ")
            except BaseException:
                job.kill()
                raise
        with endpoint(tmp_path, port):
            said = job.communicate(timeout=300)[0]
    assert job.returncode == 0, said
    assert "and works again" in said
    (path,) = output.rglob("*.tar.parquet")
    rows = pq.read_table(path).to_pylist()
    assert [row["row"] for row in rows] == list(range(NUM_ROWS)) and {row["status"] for row in rows} == {"ok"}
    with EngineConfig(model="demo", device="cpu", dtype="float32", num_threads=1).build() as engine:
        pixels = [decode_image(png(n), SIZE_PX).array(SIZE_PX) for n in range(NUM_ROWS)]
        alone = [result.text for result in engine.generate([Request(image=one) for one in pixels])]
    assert [row["caption"] for row in rows] == alone
