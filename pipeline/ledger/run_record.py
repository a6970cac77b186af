"""The record of a run: its fingerprint, its settings and its shards, written once when it begins.

The shard list is written first and `run.json` last: a run has begun when `run.json` exists. Passwords and
options of input URIs are not stored.

`run.json` holds its format version: the lowest whose readers understand the file. A file without
`format_version` is of version 0, which has the same fields as version 1; version 2 keeps its shards in
another file. A file of a newer version is refused, because this version cannot know what its fields mean.
The version is not part of the fingerprint.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import IO, Any

import pyarrow as pa

from blip2_actor import QuantizationChoice
from pipeline.column_names import SCHEMA_VERSION
from pipeline.inputs.changes import name_some
from pipeline.inputs.file_kinds import Unread
from pipeline.inputs.find_files import same_place
from pipeline.inputs.listing import Listing
from pipeline.inputs.shards import Shard, with_secrets, without_secrets
from pipeline.ledger.layout import RUN_FILE, SHARD_LIST, output_name, slices_shard_list
from pipeline.settings.fingerprint import GENERATION_CONFIG, Fingerprint, FingerprintMismatch
from pipeline.settings.job_settings import CaptionSettings
from pipeline.storage.folder import Folder, OpenFile, WrittenFile

FORMAT_VERSION = 2
"""Increased when a reader of the previous version would misread the file."""
TOGETHER_S = 2.0
"""Drivers that begin a run within this time of each other notice it, even in a store without conditional
writes."""


@dataclass(frozen=True)
class Run:
    """What a run does, and on which shards."""

    fingerprint: Fingerprint
    settings: Mapping[str, Any]
    """The command's settings as plain values, so that `retry` and `status` need only the output folder."""
    shards: tuple[Shard, ...]
    working_folder: str | None = None
    """Working folder of the first command, to which its inputs are relative; None in runs of 0.1.0."""
    hides_options: bool = True
    """Whether an input URI may have passwords or options, which are not stored."""
    unread: Unread = field(default_factory=Unread)
    """Files of the input that are not read."""
    kept: pa.Schema | None = None
    """The kept columns, with the types that they have in every file; None in runs of 0.1.0."""
    id: str = ""
    """Names the run in logs, metrics, leases and files; for an older run, it is derived from its record."""
    quantization: QuantizationChoice | None = None
    """What every worker quantizes; None if nothing is."""
    shard_list: str = SHARD_LIST
    """The file with the shards."""
    listed: WrittenFile | None = field(default=None, compare=False)
    """That file as it was when the shards were read."""

    @property
    def schema_version(self) -> int:
        """The version of the row contract in which the run was begun and will be finished."""
        return int(self.fingerprint.parts.get("schema", {}).get("version", SCHEMA_VERSION))

    @property
    def predates_generation_config(self) -> bool:
        """Whether the run may be of a version that did not read the checkpoint's `generation_config.json`.

        Such a run must go on without it. A run that was begun with `--ignore-generation-config` says so.
        """
        is_ignored = self.settings.get("engine", {}).get("ignore_generation_config", False)
        return GENERATION_CONFIG not in self.fingerprint.parts and not is_ignored

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs of the first command, without secrets, each in the one spelling of `same_place`."""
        folder = self.working_folder or os.getcwd()
        return tuple(same_place(name, folder) for name in self.settings.get("input", ()))

    def commit_of(self, model: str | None) -> str | None:
        """Return the commit of a model of the run on the hub, or None if the run has no such model."""
        parts, outputs = self.fingerprint.parts, self.settings.get("outputs", {})
        digests = {
            self.settings.get("engine", {}).get("model"): parts.get("model"),
            outputs.get("score_model"): parts.get("score_model"),
        }
        digest = digests.get(model) if model is not None else None
        return None if digest is None else digest.partition("+")[0]

    def with_shards(self, shards: Iterable[Shard], inputs: Sequence[str] = ()) -> Run:
        """Return the run with other shards, and with other inputs if they are given."""
        settings = dict(self.settings)
        if inputs and set(_places(inputs)) != set(self.inputs):
            settings["input"] = [*self.inputs, *sorted(set(_places(inputs)) - set(self.inputs))]
        hides_options = self.hides_options or _hide_options(inputs)
        return replace(self, settings=settings, shards=tuple(shards), hides_options=hides_options)

    def continues(self, fingerprint: Fingerprint, inputs: Sequence[str]) -> bool:
        """Return whether a command with this fingerprint and these inputs continues the run."""
        is_same = not self._with_our_input(fingerprint).differences(self.fingerprint)
        return is_same and not self._input_difference(inputs)

    def require_same(
        self, fingerprint: Fingerprint, inputs: Sequence[str], output: str, takes_new: bool = False
    ) -> None:
        """Raise FingerprintMismatch, which names each difference, unless a command continues the run.

        Inputs are compared by what they name: their order and spelling do not matter.

        Args:
            fingerprint: of the settings of the command.
            inputs: the inputs of the command.
            output: where the run is.
            takes_new: whether the command may have further inputs.
        """
        self._with_our_input(fingerprint).require_same(self.fingerprint, output)
        difference = self._input_difference(inputs, not takes_new)
        if difference:
            raise FingerprintMismatch(
                f"{output} was begun with another input: {difference}; run the first command again, give "
                "another --output, add --fork to begin a new output next to it, or --add-new to take added "
                "inputs into the run"
            )

    def _with_our_input(self, fingerprint: Fingerprint) -> Fingerprint:
        return Fingerprint({**fingerprint.parts, "input": self.fingerprint.parts.get("input")})

    def _input_difference(self, inputs: Sequence[str], counts_added: bool = True) -> str:
        """Say which inputs of a command the run lacks, and the other way round."""
        given, known = _places(inputs), self.inputs
        added, left_out = set(given).difference(known), set(known).difference(given)
        phrases = [f"added {name_some(sorted(added))}"] if added and counts_added else []
        return "; ".join([*phrases, *([f"left out {name_some(sorted(left_out))}"] if left_out else [])])


def begin_run(fingerprint: Fingerprint, settings: CaptionSettings, listing: Listing, kept: pa.Schema) -> Run:
    """Return the run that a command begins."""
    run_id = secrets.token_hex(8)
    return Run(
        fingerprint=fingerprint,
        settings=settings.to_dict(),
        shards=tuple(listing.shards),
        unread=listing.unread,
        working_folder=os.getcwd(),
        hides_options=_hide_options(settings.input),
        kept=kept,
        id=run_id,
        shard_list=SHARD_LIST if settings.slice is None else slices_shard_list(run_id),
    )


def _hide_options(inputs: Iterable[str]) -> bool:
    return any(without_secrets(name) != name for name in inputs)


def _places(inputs: Sequence[str]) -> list[str]:
    return [same_place(name, os.getcwd()) for name in inputs]


def write_run(folder: Folder, run: Run) -> bool:
    """Begin a run in a folder; return False if the driver of another slice has begun one at the same moment.

    The lease keeps all other drivers away.
    """
    _write_shards(folder, run)
    if run.shard_list == SHARD_LIST:
        folder.put(RUN_FILE, _record(run))
        return True
    if folder.put_new(RUN_FILE, _record(run)):
        return True
    if read_run(folder) is None:  # This store has no conditional writes: the last one counts.
        folder.put(RUN_FILE, _record(run))
        time.sleep(TOGETHER_S)
    is_ours = json.loads(folder.get(RUN_FILE) or b"{}").get("id") == run.id
    if not is_ours:
        folder.delete(run.shard_list)
    return is_ours


def _record(run: Run) -> bytes:
    record = {
        "format_version": 1 if run.shard_list == SHARD_LIST else 2,
        "id": run.id,
        "fingerprint": run.fingerprint.parts,
        "settings": run.settings,
        "working_folder": run.working_folder,
        "hides_options": run.hides_options,
        "unread": asdict(run.unread),
    }
    if run.kept is not None:
        record["kept"] = base64.b64encode(run.kept.serialize()).decode()
    if run.quantization is not None:
        record["quantization"] = run.quantization.to_dict()
    if run.shard_list != SHARD_LIST:
        record["shard_list"] = run.shard_list
    return json.dumps(record, indent=1).encode()


def revise_run(folder: Folder, run: Run, redone: Iterable[str]) -> None:
    """Store other shards and settings for a run that has begun.

    Args:
        redone: names of the shards whose rows are made again. Their files are deleted first: if this process
            dies in between, the next one finds the shards changed as this one has.
    """
    for shard in redone:
        folder.delete(output_name(shard))
    _write_shards(folder, run)
    stored = json.loads(folder.get(RUN_FILE) or b"{}").get("settings")
    if stored != json.loads(json.dumps(run.settings)):  # The time of the file tells when the run began.
        folder.put(RUN_FILE, _record(run))


def _write_shards(folder: Folder, run: Run) -> None:
    def write(file: IO[bytes]) -> None:
        with gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0) as lines:
            for shard in run.shards:
                stored = replace(shard, root=without_secrets(shard.root))
                lines.write(f"{stored.to_json()}\n".encode())

    folder.put_made(run.shard_list, write)


def read_run(folder: Folder, inputs: Sequence[str] = ()) -> Run | None:
    """Return the run that was begun in a folder, or None.

    Args:
        inputs: the input URIs of the command, with the passwords and options that the record leaves out.

    Raises:
        ValueError: a newer version of this program has written the record.
    """
    record = folder.get(RUN_FILE)
    if record is None:
        return None
    values = json.loads(record)
    version = values.get("format_version", 0)
    if version > FORMAT_VERSION:
        raise ValueError(
            f"a newer version of this program has begun the run in {folder}: {RUN_FILE} has format version "
            f"{version}, and this version reads up to {FORMAT_VERSION}; use the newer version, or give "
            "another --output"
        )
    shard_list, choice = values.get("shard_list", SHARD_LIST), values.get("quantization")
    listed = folder.file(shard_list)
    try:
        shards = folder.read(shard_list, partial(_read_shards, inputs=inputs))
    except FileNotFoundError:
        return None
    return Run(
        fingerprint=Fingerprint(values["fingerprint"]),
        settings=_without_secrets_of_models(values["settings"]),
        working_folder=values.get("working_folder"),
        hides_options=values.get("hides_options", True),
        unread=Unread(**values.get("unread", {})),
        kept=_read_schema(values.get("kept")),
        id=values.get("id") or hashlib.sha256(record).hexdigest()[:16],
        quantization=None if choice is None else QuantizationChoice.from_dict(choice),
        shards=shards,
        shard_list=shard_list,
        listed=listed,
    )


def _without_secrets_of_models(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings without passwords in names of models: 0.1.0 stored them; now they are refused."""
    plain = dict(settings)
    for part, names in {"engine": ("model", "adapter"), "outputs": ("score_model",)}.items():
        stored = settings.get(part, {})
        hidden = {name: without_secrets(stored[name]) for name in names if stored.get(name)}
        if hidden:
            plain[part] = {**stored, **hidden}
    return plain


def _read_shards(file: OpenFile, inputs: Sequence[str]) -> tuple[Shard, ...]:
    with gzip.open(file, "rt", encoding="utf-8", newline="\n") as lines:
        shards = tuple(with_secrets((Shard(**json.loads(line)) for line in lines), inputs))
    if not shards:  # Every run has shards, but gzip takes an empty file for an empty text.
        raise EOFError("the list of shards is empty")
    return shards


def _read_schema(stored: str | None) -> pa.Schema | None:
    return None if stored is None else pa.ipc.read_schema(pa.py_buffer(base64.b64decode(stored)))
