"""The folder that an export writes into: files and folders by shard, complete or not there.

<into>/<shard>.csv ...           what was exported
<into>/.blip2_export/run.json    which run, and in which format
<into>/.blip2_export/done/       for each shard that was written: the state of its file in the output, or
                                 nothing if it was not finished, or rows have lost their images
<into>/.blip2_export/tmp/        what is being written; emptied when an export begins
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipeline.ledger.layout import STATE as RUN_STATE
from pipeline.ledger.layout import output_name
from pipeline.report.rows import FinishedRows

STATE = ".blip2_export"
"""Hidden, so that programs that read the whole folder leave it out."""
SUFFIXES = {"csv": ".csv", "jsonl": ".jsonl", "txt": ".txt", "webdataset": ".tar", "imagefolder": ""}


@dataclass(frozen=True)
class Destination:
    """Where an export goes; a context manager that leaves nothing half-written."""

    root: Path
    to: str
    source: FinishedRows

    @classmethod
    def begin(cls, into: str, to: str, source: FinishedRows) -> Destination:
        """Begin an export in a folder that is new or empty, or go on with the same one.

        Raises:
            ValueError: the folder holds something else, or two shards would have the same name in it.
            OSError: the folder cannot be written.
        """
        root = Path(into).expanduser()
        record = {"output": str(source.folder), "run": source.run.fingerprint.digest, "to": to}
        if root.exists() and not root.is_dir():
            raise ValueError(f"into must be a folder, got the file {into}; give another --into")
        state = Path(source.folder.path(RUN_STATE)).resolve()
        if source.folder.is_local and state in (root.resolve(), *root.resolve().parents):
            raise ValueError(f"into must not be inside the state of the run, got {into}; give another --into")
        stored = root / STATE / "run.json"
        if stored.exists():
            before = json.loads(stored.read_text(encoding="utf-8"))
            if {**before, "output": ""} != {**record, "output": ""}:
                raise ValueError(
                    f"into must be a new folder, or hold an export of the same run in the same format, got "
                    f"{into} with {before['to']} of {before['output']}; give another --into"
                )
        elif root.exists() and any(path.name != STATE for path in root.iterdir()):
            raise ValueError(
                f"into must be a new or empty folder, got {into} with other files; give another --into"
            )
        destination = cls(root, to, source)
        destination.require_distinct_names()
        (root / STATE).mkdir(parents=True, exist_ok=True)
        _replace(stored, json.dumps(record))
        return destination

    def __enter__(self) -> Destination:
        shutil.rmtree(self._tmp, ignore_errors=True)
        self._tmp.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._tmp, ignore_errors=True)

    @property
    def _tmp(self) -> Path:
        return self.root / STATE / "tmp"

    def name_of(self, shard: str) -> str:
        """Return the name of what a shard becomes."""
        suffix = SUFFIXES[self.to]
        return shard if suffix and shard.endswith(suffix) else shard + suffix

    def require_distinct_names(self) -> None:
        """Raise ValueError if one shard would replace what another one becomes."""
        names: dict[str, str] = {}
        for shard in self.source.run.shards:
            other = names.setdefault(self.name_of(shard.name), shard.name)
            if other != shard.name:
                raise ValueError(
                    f"to must be a format in which no two shards have one name, got {self.to}: {other} and "
                    f"{shard.name} would both be {self.name_of(shard.name)}; choose another format"
                )

    def is_up_to_date(self, shard: str) -> bool:
        """Return whether a shard was exported, and its rows are the same since."""
        with suppress(FileNotFoundError):
            stored = self._done(shard).read_text(encoding="utf-8")
            return stored == self._state(shard) and (self.root / self.name_of(shard)).exists()
        return False

    def start(self, shard: str) -> None:
        """Remember that a shard is being written, so that what it becomes is known if this process dies."""
        _replace(self._done(shard), "")

    def finish(self, shard: str, is_whole: bool) -> None:
        """Remember that a shard has been written; if it is not whole, the next export writes it again."""
        _replace(self._done(shard), self._state(shard) if is_whole else "")

    def drop_others(self, shards: Iterable[str]) -> None:
        """Delete what was written of shards that the run no longer has: a changed table may have other parts.

        Args:
            shards: all shards of the run.
        """
        names = {self.name_of(shard) for shard in shards}
        done = self.root / STATE / "done"
        for path in [*done.rglob("*.json")]:
            name = self.name_of(path.relative_to(done).as_posix().removesuffix(".json"))
            if name in names or not path.is_file():  # an input folder may be named so, too
                continue
            if (self.root / name).is_dir():
                shutil.rmtree(self.root / name)
            (self.root / name).unlink(missing_ok=True)
            path.unlink()

    @contextmanager
    def file(self, name: str) -> Iterator[IO[bytes]]:
        """Yield a file to write; it gets its name when the block ends without an error."""
        aside = self._tmp / uuid.uuid4().hex
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        self._move(aside, name)

    @contextmanager
    def folder(self, shard: str) -> Iterator[Path]:
        """Yield a folder to fill; it gets its name when the block ends without an error."""
        aside = self._tmp / uuid.uuid4().hex
        aside.mkdir()
        yield aside
        target = self.root / self.name_of(shard)
        if target.exists():
            self._done(shard).unlink(missing_ok=True)
            shutil.rmtree(target)
        self._move(aside, self.name_of(shard))

    def _move(self, aside: Path, name: str) -> None:
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(aside, target)

    def _done(self, shard: str) -> Path:
        return self.root / STATE / "done" / f"{shard}.json"

    def _state(self, shard: str) -> str:
        """Return what changes when the file of a shard in the output is written again."""
        folder = self.source.folder
        (info,) = folder.filesystem.get_file_info([folder.path(output_name(shard))])
        return json.dumps({"bytes": info.size, "written_ns": info.mtime_ns})


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
