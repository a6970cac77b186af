"""The settings of `blip2 retry`: what may differ from the earlier run without changing its rows.

A setting that is not given is as it was when the run began; of the settings of later starts, only private
hosts are stored.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from blip2_actor import ImageLimits, Status
from blip2_actor.flags import formerly, positional, written_as
from blip2_actor.inputs.field_types import require_types
from pipeline.endpoint.settings import EndpointSettings
from pipeline.fetching.fetch_settings import FetchSettings
from pipeline.settings.deadline import stop_time
from pipeline.settings.job_settings import require_fraction
from pipeline.settings.outputs import Outputs
from pipeline.settings.placement import LABEL, Placement


def _given(**settings: Any) -> dict[str, Any]:
    """Return the settings that have a value; the others stay as in the earlier run."""
    return {name: value for name, value in settings.items() if value not in (None, ())}


@dataclass(frozen=True, kw_only=True)
class PlacementChanges:
    """What may differ from the placement of the earlier run; None leaves it as it was."""

    min_actors: int | None = None
    """Minimum number of captioning actors; default: as in the earlier run."""
    max_actors: int | None = None
    """Maximum number of captioning actors; default: as in the earlier run."""
    gpus_per_actor: float | None = field(default=None, metadata=formerly("num_gpus"))
    """GPUs per captioning actor; default: as in the earlier run."""
    accelerator: str | None = field(default=None, metadata=written_as("NAME=N"))
    """Other accelerators per captioning actor, such as NPU=1; default: as in the earlier run."""
    accelerator_type: str | None = None
    """Caption only on GPUs of this type; default: as in the earlier run."""
    caption_label: tuple[str, ...] = field(default=(), metadata=LABEL)
    """Caption only on nodes with these labels; default: as in the earlier run."""
    decode_label: tuple[str, ...] = field(default=(), metadata=LABEL)
    """Decode only on nodes with these labels; default: as in the earlier run."""
    read_label: tuple[str, ...] = field(default=(), metadata=LABEL)
    """Read the input only on nodes with these labels; default: as in the earlier run."""
    calls_per_actor: int | None = None
    """Number of calls that one actor runs at the same time; default: as in the earlier run."""
    max_decode_actors: int | None = None
    """Maximum number of decoding actors; default: as in the earlier run."""
    step_timeout_s: float | None = None
    """Seconds without progress of an engine, after which its process is replaced; default: as in the earlier
    run."""

    def __post_init__(self) -> None:
        require_types(self)
        self.apply(Placement())

    def apply(self, before: Placement) -> Placement:
        """Return a placement with these changes.

        Raises:
            ValueError: a number is out of range.
        """
        given = _given(**dataclasses.asdict(self))
        if self.accelerator is not None:  # instead of the GPUs of the earlier run
            given = {"gpus_per_actor": None, "accelerator_type": None} | given
        elif self.gpus_per_actor is not None or self.accelerator_type is not None:
            given = {"accelerator": None} | given
        return dataclasses.replace(before, **given)


@dataclass(frozen=True, kw_only=True)
class RetrySettings:
    """Run the failed rows of an output again, and read its partial shards again."""

    output: str = field(metadata=positional())
    """Folder or URI of an earlier run."""
    input: tuple[str, ...] = ()
    """The input again, if its URIs hold passwords or options: these are not stored in the output."""
    status: tuple[str, ...] = ()
    """Run only rows with one of these statuses again; default: every status but ok. A partial shard that has
    such rows is read to its end again."""
    keys: str | None = None
    """File with one key a line, or its URI: run only rows with these keys again, and of them those that are
    not ok unless --status says which."""
    calibration: str | None = None
    """The calibration of the earlier run again, if its file has been moved, or if its URI holds passwords or
    options: these are not stored in the output."""
    redo_changed: bool = False
    """Make all rows of a shard again if its input has changed since the earlier run."""
    max_failed_fraction: float | None = None
    """Exit with status 2 if a larger fraction of all rows still fails; default: as in the earlier run."""
    max_flagged_fraction: float | None = None
    """Exit with status 2 if a larger fraction of all captions is flagged, or if most are the same; default:
    as in the earlier run."""
    deadline: str | None = None
    """When the job must have ended: a duration such as 2h30m, or a UTC time such as 2026-01-31T18:00. It
    stops in time to write what is finished, and the same command resumes it."""
    image_cpu_s: float | None = None
    """Maximum CPU seconds for one image from now on; default: as in the earlier run."""
    image_wall_s: float | None = None
    """Maximum wall-clock seconds for one image from now on; default: as in the earlier run."""
    image_memory_bytes: int | None = None
    """Address space of a decoding process from now on; default: as in the earlier run."""
    fetch_timeout_s: float | None = None
    """Maximum seconds for one try to fetch an image from now on; default: as in the earlier run."""
    fetch_patience_s: float | None = None
    """Seconds for which a fetch is tried again from now on; default: as in the earlier run."""
    allow_private_hosts: tuple[str, ...] = ()
    """Further hosts that may be asked for images although their addresses are private."""
    placement: PlacementChanges = field(default=PlacementChanges())
    """actors"""
    serving: EndpointSettings = field(default=EndpointSettings())
    """captions by a running endpoint"""

    def __post_init__(self) -> None:
        require_types(self)
        for status in self.status:
            if status not in list(Status):
                raise ValueError(f"status must be one of {', '.join(Status)}, got {status}")
        if Status.OK in self.status and self.keys is None:
            raise ValueError("status must not be ok without keys, or every row runs again; name the rows")
        for name, value in self.fractions.items():
            require_fraction(name, value)
        stop_time(self.deadline)  # validates
        self.limits(ImageLimits())
        self.fetching(FetchSettings())

    @property
    def fractions(self) -> dict[str, Any]:
        """The limits for failed and flagged rows that are given, by the name of the setting."""
        return _given(
            max_failed_fraction=self.max_failed_fraction, max_flagged_fraction=self.max_flagged_fraction
        )

    def outputs(self, before: Outputs) -> Outputs:
        """Return the outputs of the earlier run, with the place of its calibration if that is given here.

        Raises:
            ValueError: the earlier run has no calibration.
        """
        if self.calibration is None:
            return before
        if before.calibration is None:
            raise ValueError(
                f"calibration must be left out for a run without one, got {self.calibration}; "
                "a new run has confidences: give another output to blip2 caption"
            )
        return dataclasses.replace(before, calibration=self.calibration)

    def limits(self, before: ImageLimits) -> ImageLimits:
        """Return the limits of the earlier run, with the changes that are given here.

        None of these limits is part of the fingerprint.

        Raises:
            ValueError: a limit is not above 0.
        """
        changes = _given(
            cpu_s=self.image_cpu_s, wall_s=self.image_wall_s, memory_bytes=self.image_memory_bytes
        )
        try:
            return dataclasses.replace(before, **changes)
        except ValueError as error:
            raise ValueError(f"image_{error}") from None  # as the settings are called here

    def fetching(self, before: FetchSettings) -> FetchSettings:
        """Return how images are fetched, with the changes that are given here.

        Raises:
            ValueError: a number is out of range, or a host is not valid.
        """
        changes = _given(fetch_timeout_s=self.fetch_timeout_s, fetch_patience_s=self.fetch_patience_s)
        hosts = (*before.allow_private_hosts, *self.allow_private_hosts)
        return dataclasses.replace(before, **changes, allow_private_hosts=tuple(dict.fromkeys(hosts)))
