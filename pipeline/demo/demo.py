"""`blip2 demo`: run the real job on drawn scenes and compare its captions with the correct ones.

The command fails unless almost all captions are right word for word and every row has the expected status.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from blip2_actor import EngineConfig, Status
from pipeline.demo.dataset import INPUTS, MARKER, Expected, write_demo_dataset
from pipeline.exit_status import before_work, errors_to_exit_status
from pipeline.ledger.layout import STATE
from pipeline.progress import Console
from pipeline.run.prepare import prepare
from pipeline.run.run_job import run_job
from pipeline.settings.demo_settings import DemoSettings
from pipeline.settings.job_settings import CaptionSettings

MIN_ACCURACY = 0.95
NUM_SHOWN = 6


@dataclass(frozen=True)
class Comparison:
    """The rows of the output compared with the expected rows."""

    num_readable: int
    num_exact: int
    wrong_status: tuple[str, ...]
    """Keys of rows with another status than expected, and of rows that are missing or were not expected."""

    @property
    def accuracy(self) -> float:
        return self.num_exact / self.num_readable if self.num_readable else 0.0


@errors_to_exit_status
def demo(settings: DemoSettings) -> int:
    """Draw scenes, caption them and compare; return 1 if less than 95 % are right or any status is wrong."""
    console = Console()
    with before_work(type(settings)):
        folder = _fresh_folder(settings.output)
    console.say(f"Rendering {settings.num_images:,} drawn scenes, some broken on purpose, to {folder}/")
    truth = write_demo_dataset(folder, num_images=settings.num_images)
    captions = folder / "captions"
    job = prepare(
        CaptionSettings(
            input=tuple(f"{folder}/{name}" for name in INPUTS),
            output=str(captions),
            engine=EngineConfig(model="demo"),
            max_failed_fraction=1.0,
        )
    )
    started = time.monotonic()
    result = run_job(job, console)
    seconds = time.monotonic() - started
    rows = _read(captions)
    _show_captions(console, rows, truth)
    comparison = compare(rows, truth)
    console.say(
        f"\naccuracy: {comparison.num_exact:,} of {comparison.num_readable:,} readable images "
        f"captioned word for word right ({comparison.accuracy:.1%}; {MIN_ACCURACY:.0%} wanted)"
    )
    console.say(
        f"throughput: {result.num_rows / seconds:,.0f} images/s over {seconds:.0f} s, start-up included"
    )
    for line in result.lines():
        console.say(line)
    _show_odd_rows(console, rows, truth, comparison)
    console.say(f"output: {captions}/**/*.parquet")
    done = result.exit_status(1.0) == 0 and not comparison.wrong_status
    status = 0 if done and comparison.accuracy >= MIN_ACCURACY else 1
    if status:
        console.fail(f"exit status {status}: a row has another status than expected, or captions are wrong")
    console.event("end", exit_status=status, accuracy=comparison.accuracy, num_rows=result.num_rows)
    return status


def compare(rows: Mapping[str, dict], truth: Mapping[str, Expected]) -> Comparison:
    """Compare rows, by key, with what is expected."""
    readable = [key for key, expected in truth.items() if expected.status is Status.OK]
    exact = sum(key in rows and rows[key]["caption"] == truth[key].caption for key in readable)
    wrong = [key for key in truth if key not in rows or rows[key]["status"] != truth[key].status]
    return Comparison(len(readable), exact, (*wrong, *(key for key in rows if key not in truth)))


def _fresh_folder(output: str) -> Path:
    folder = Path(output)
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise ValueError(
                f"output must be a new folder or one of an earlier demo, got {folder} with other files "
                "in it; give another --output"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    return folder


def _read(captions: Path) -> dict[str, dict]:
    files = [path for path in sorted(captions.rglob("*.parquet")) if STATE not in path.parts]
    columns = ["key", "caption", "status", "error"]
    return {row["key"]: row for file in files for row in pq.read_table(file, columns=columns).to_pylist()}


def _show_captions(console: Console, rows: Mapping[str, dict], truth: Mapping[str, Expected]) -> None:
    console.say("\nA handful of captions:")
    shown = [key for key, expected in truth.items() if expected.status is Status.OK and key in rows]
    for key in shown[:: max(1, len(shown) // NUM_SHOWN)][:NUM_SHOWN]:
        caption = rows[key]["caption"]
        correction = "" if caption == truth[key].caption else f"   (truth: {truth[key].caption})"
        console.say(f"  {key}  {caption}{correction}")


def _show_odd_rows(
    console: Console, rows: Mapping[str, dict], truth: Mapping[str, Expected], comparison: Comparison
) -> None:
    odd_rows = Counter((e.note, e.status.value) for e in truth.values() if e.note)
    console.say("odd images, as expected:" if not comparison.wrong_status else "odd images, expected:")
    for (note, status), count in sorted(odd_rows.items()):
        console.say(f"  {count:3} {status:16} {note}")
    for key in comparison.wrong_status[:NUM_SHOWN]:
        expected = truth[key].status.value if key in truth else "no such row"
        console.say(f"  {key}: expected {expected}, got {rows[key]['status'] if key in rows else 'no row'}")
