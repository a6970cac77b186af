"""A model of the service, as the routes see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from blip2_actor import Calibration, GenerationOptions, ModelInfo
from deploy.http.errors import ApiError, shorten


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedModel:
    """One of the models of the service, as its engines have described it."""

    name: str
    """The name by which requests choose the model."""
    is_first: bool
    """Whether this model answers requests that name none."""
    info: ModelInfo
    options: GenerationOptions
    """The options of the service, for what a request leaves out."""
    matching: ModelInfo | None = None
    """The retrieval model next to it; None if it has none."""
    calibration: Calibration | None = None
    """Gives captions their confidence; None if the service has none."""
    min_confidence: float = 0.0
    """A caption with a lower confidence gets the flag `abstained`."""

    def made_by(self, info: ModelInfo | None) -> ServedModel:
        """Return the model as described by the engine that made an answer; None stands for this one."""
        if info is None or info == self.info:
            return self
        # The first model alone is named after its checkpoint; the others keep the names they were given.
        name = info.model if self.is_first else self.name
        return replace(self, name=name, info=info)


def require_name(names: Sequence[str], name: str) -> None:
    """Raise ApiError 404, in the shape of OpenAI, unless a model has this name."""
    if name not in names:
        known = " or ".join(names)
        raise ApiError(404, "model_not_found", f"model must be {known}, got {shorten(name)}")
