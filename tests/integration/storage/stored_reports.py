"""An `on_end` for tests, in its own module because Ray workers import it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from pipeline.inputs.reader import ShardReport


@dataclass(frozen=True)
class StoreReport:
    """Write each report to its own file, so that a test sees every call of every worker."""

    folder: Path
    dies_once: bool = False
    """Kill the process instead of storing the first report."""

    def __call__(self, report: ShardReport) -> None:
        if self.dies_once:
            try:
                (self.folder / "died").touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        name = report.shard.replace("/", "+")
        (self.folder / f"{name}.{os.urandom(4).hex()}.json").write_text(
            json.dumps(dataclasses.asdict(report))
        )

    def reports(self) -> dict[str, ShardReport]:
        files = self.folder.glob("*.json")
        return {report.shard: report for report in (ShardReport(**json.loads(f.read_text())) for f in files)}
