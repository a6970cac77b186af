"""The settings of placement: how many actors run, and on which accelerators and nodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from blip2_actor.flags import formerly, written_as
from blip2_actor.inputs.field_types import require_types

LABEL = written_as("KEY=VALUE")
Stage = Literal["read", "decode", "caption"]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How many actors caption and decode, and the accelerators that each captioning actor takes."""

    min_actors: int = 1
    """Minimum number of captioning actors, which run from start to end."""
    max_actors: int | None = None
    """Maximum number of captioning actors; default: one per accelerator that the cluster has or gets, one per
    node on the CPUs of a cluster, or one on the CPUs of one machine."""
    gpus_per_actor: float | None = field(default=None, metadata=formerly("num_gpus"))
    """GPUs per captioning actor, such as 0.5 for two actors on one GPU; default: 1, or all of a node with
    --device-map. On one machine without a GPU, and with --device cpu, 0."""
    accelerator: str | None = field(default=None, metadata=written_as("NAME=N"))
    """Other accelerators per captioning actor by their name in Ray, such as NPU=1, instead of GPUs."""
    accelerator_type: str | None = None
    """Caption only on GPUs of this type as Ray names it, such as L40S or H100; default: of any type."""
    caption_label: tuple[str, ...] = field(default=(), metadata=LABEL)
    """Caption only on nodes whose label in Ray has this value, such as pool=accelerator."""
    decode_label: tuple[str, ...] = field(default=(), metadata=LABEL)
    """Decode only on nodes whose label in Ray has this value."""
    read_label: tuple[str, ...] = field(default=(), metadata=LABEL)
    """Read the input only on nodes whose label in Ray has this value."""
    calls_per_actor: int = 8
    """Number of calls, each with one block of images, that one actor runs at the same time."""
    max_decode_actors: int | None = None
    """Maximum number of decoding actors, with one decoding process each; default: as many
    as fit into the cluster."""

    step_timeout_s: float = 600.0
    """Seconds without progress of an engine that has work, after which its process is replaced and its images
    go again. The first result may take three times as long, because a model may be compiled before it."""

    def __post_init__(self) -> None:
        require_types(self)
        if not self.step_timeout_s > 0:
            raise ValueError(f"step_timeout_s must be above 0, got {self.step_timeout_s}")
        for name in ("min_actors", "max_actors", "calls_per_actor", "max_decode_actors"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.max_actors is not None and self.max_actors < self.min_actors:
            raise ValueError(
                f"max_actors must be at least min_actors ({self.min_actors}), got {self.max_actors}"
            )
        number = self.gpus_per_actor
        if number is not None and (not number >= 0 or (number > 1 and number % 1)):
            raise ValueError(
                f"gpus_per_actor must be a whole number, or a fraction of one GPU, got {number:g}"
            )
        if self.accelerator is not None and (number is not None or self.accelerator_type is not None):
            raise ValueError(
                "accelerator must be left out with gpus_per_actor and accelerator_type, which are about GPUs"
            )
        _ = self.accelerators, self.labels("read"), self.labels("decode"), self.labels("caption")  # validates

    @property
    def accelerators(self) -> dict[str, float] | None:
        """Accelerators that the user gives each captioning actor, by their name in Ray; None if not given."""
        if self.gpus_per_actor is not None:
            return {"GPU": self.gpus_per_actor, **self.of_accelerator_type} if self.gpus_per_actor else {}
        if self.accelerator is None:
            return None
        name, _, number = self.accelerator.partition("=")
        if not name or not number.isdecimal() or int(number) < 1 or name == "CPU":
            raise ValueError(f"accelerator must be NAME=N such as NPU=1, got {self.accelerator!r}")
        return {name: float(number)}

    @property
    def of_accelerator_type(self) -> dict[str, float]:
        """The resource by which Ray knows the type of a node's GPUs."""
        return {f"accelerator_type:{self.accelerator_type}": 0.001} if self.accelerator_type else {}

    def labels(self, stage: Stage) -> dict[str, str]:
        """Return the label selectors of the nodes on which a stage may run."""
        selectors = {}
        for given in getattr(self, f"{stage}_label"):
            name, equals, value = given.partition("=")
            if not name or not equals or not value:
                raise ValueError(f"{stage}_label must be KEY=VALUE such as pool=gpu, got {given!r}")
            selectors[name] = value
        return selectors

    def check(self, device: str | None) -> None:
        """Refuse accelerators for an engine that runs on CPUs.

        Args:
            device: the engine's; None if it has none to choose.
        """
        if device == "cpu" and (self.accelerators or self.accelerator_type):
            raise ValueError(
                "device must be auto with gpus_per_actor, accelerator or accelerator_type, got cpu"
            )
