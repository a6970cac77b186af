"""`Job`: a checked command with its engine, its run and its output, ready to run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property

import pyarrow as pa

from blip2_actor import EngineBuilder, ModelInfo
from pipeline.inputs.shards import RunSlice
from pipeline.ledger.commit import RUN_KEY
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.retry import RowChoice
from pipeline.ledger.run_record import Run
from pipeline.placement.first_worker import WorkerAnswer, as_answered
from pipeline.schema import FINGERPRINT_KEY, RUN_ID_KEY, output_schema
from pipeline.settings.job_settings import CaptionSettings


@dataclass(frozen=True)
class Job:
    """A job whose settings have been checked against model, input and output; nothing is written yet."""

    settings: CaptionSettings
    engine: EngineBuilder
    info: ModelInfo
    ledger: Ledger
    """The output; its requests are retried once `run_job` holds the lease."""
    run: Run
    is_new: bool
    """Whether the run must still be begun in its output."""
    asks_worker: bool = False
    """Whether the first captioning worker of a new run must say what dtype "auto" means, or what it
    quantizes."""
    stop_at: datetime | None = None
    """When to stop in good order, so that the job has ended by its deadline."""
    is_retry: bool = False
    """Whether the job runs the rows of finished shards again that are not ok."""
    choice: RowChoice = field(default=RowChoice())
    """Which rows a retry runs."""
    redone: tuple[str, ...] = ()
    """Names of the shards whose output is no longer valid, because their input has changed."""
    is_revised: bool = False
    """Whether `run` has other shards or settings than its stored record."""
    notes: tuple[str, ...] = ()
    """What a person must know about the input; said at the start."""

    @property
    def run_slice(self) -> RunSlice | None:
        """The part of the shards that this job works on, next to other drivers; None means all."""
        return self.settings.run_slice

    @cached_property
    def part(self) -> Run:
        """The run with the shards that this job works on."""
        part = self.run_slice
        if part is None:
            return self.run
        return self.run.with_shards(shard for shard in self.run.shards if part.has(shard.name))

    def with_answer(self, answer: WorkerAnswer) -> Job:
        """Return the job with the model as the first captioning worker describes it."""
        info = answer.info
        fingerprint = self.settings.fingerprint(info)
        run = replace(self.run, fingerprint=fingerprint, quantization=answer.quantization)
        engine = as_answered(self.engine, info.dtype, answer.quantization)
        return replace(self, engine=engine, info=info, run=run, asks_worker=False)

    def joining(self, run: Run) -> Job:
        """Return the job as part of a run that another driver has begun."""
        engine = as_answered(self.engine, self.info.dtype, run.quantization)
        return replace(self, engine=engine, ledger=self.ledger.of(run), run=run, is_new=False)

    @property
    def metadata(self) -> dict[bytes, bytes]:
        """The run's metadata in the footer of every file."""
        fingerprint = self.run.fingerprint
        return {
            FINGERPRINT_KEY: fingerprint.digest.encode(),
            RUN_KEY: fingerprint.canonical.encode(),
            RUN_ID_KEY: self.run.id.encode(),
        }

    @property
    def empty_schema(self) -> pa.Schema:
        """The schema of a shard without rows."""
        outputs = self.settings.outputs
        # Runs of version 0.1.0 did not store the types of kept columns.
        kept = self.run.kept or [pa.field(name, pa.null()) for name in self.settings.reading.kept]
        has_member = self.settings.reading.schema_version > 1
        return output_schema(kept, outputs.fields, outputs.caption, has_member)
