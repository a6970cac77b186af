"""The ok rows of a shard together with their images, which are read again from the input.

An image must still have the SHA-256 digest that its row stores. So a caption is never written next to another
image, whatever has happened to the input. A row without its image is left out and named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from blip2_actor import Status
from pipeline.errors import InputError
from pipeline.fetching.images_of_rows import images_of_output
from pipeline.inputs.changes import name_some
from pipeline.inputs.image_kinds import IMAGE_EXTENSIONS, extension_by_content
from pipeline.inputs.shards import Shard
from pipeline.ledger.ledger import Ledger
from pipeline.report.rows import FinishedRows, rows_in, tables_of
from pipeline.settings.from_dict import from_dict
from pipeline.settings.job_settings import CaptionSettings


def require_same_input(found: FinishedRows, inputs: Sequence[str]) -> None:
    """Check that the files of the input are those that the run has read.

    Raises:
        InputError: files of finished shards have changed, or the input cannot be listed.
    """
    changes = Ledger(found.folder).of(found.run).compare_input(found.run, inputs)
    wrong = {name: how for name, how in changes.changed.items() if name in found.shards}
    if wrong:
        names = [f"{name} ({how})" for name, how in wrong.items()]
        raise InputError(
            f"the input must hold the images of the run, got other files: {name_some(names)}; restore "
            "them, or export to csv, jsonl or txt, which need no images"
        )


@dataclass(frozen=True)
class ImageRows:
    """The ok rows of one finished shard, and where their images are."""

    found: FinishedRows
    shard: Shard
    lost: list[str] = field(default_factory=list)
    """For each row so far whose image is gone or another one, its key and what is wrong."""

    def __iter__(self) -> Iterator[tuple[Mapping[str, Any], bytes]]:
        """Yield each row with its encoded image, in order."""
        run = self.found.run
        settings = from_dict(CaptionSettings, run.settings).in_version(run.schema_version)
        options = settings.read_options.images_only
        numbers = (row["row"] for row in self._ok_rows(["row", "status"]))
        images = images_of_output(self.shard, numbers, self._ok_rows(), options, settings.fetching)
        with closing(images):
            for row, found in images:
                if found.image is None:
                    self.lost.append(f"{row['key']}: {found.error}")
                else:
                    yield row, found.image

    def _ok_rows(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """Yield the rows that are ok: an image that failed might take long to fail again.

        Arrow cannot filter tables with kept columns of view types, such as `string_view`.
        """
        for row in rows_in(tables_of(self.found.folder, self.shard.name, columns)):
            if row["status"] == Status.OK.value:
                yield row


def extension_of(name: str, image: bytes) -> str:
    """Return the ending for an image's file: that of its name in the input, else by its first bytes."""
    ending = name.rpartition(".")[2].lower()
    if ending in IMAGE_EXTENSIONS:
        return ending
    if found := extension_by_content(image):
        return found
    # It has been decoded: Pillow takes a BMP whatever its reserved bytes are, and other brands of HEIF.
    return "heic" if image[4:8] == b"ftyp" else "bmp" if image[:2] == b"BM" else "jpg"
