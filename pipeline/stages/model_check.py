"""The model check: every machine must find the model that the driver has put into the run's fingerprint.

A local path may hold other files on another machine, and "auto" may stand for another dtype there. Rows of
two models would then share one output.
"""

from __future__ import annotations

from dataclasses import dataclass

from blip2_actor import ModelInfo
from pipeline.settings.caption_spec import CaptionSpec


@dataclass(frozen=True)
class Models:
    """The models of a job, as one machine finds them."""

    info: ModelInfo
    """The captioning model, or the retrieval checkpoint if it makes every output."""
    score_digest: str | None
    """Digest of the retrieval checkpoint that computes scores, if there is one."""
    score_model: str | None = None
    """Its name."""

    @classmethod
    def of(cls, spec: CaptionSpec, info: ModelInfo) -> Models:
        """Look up the retrieval checkpoint of a spec.

        Raises:
            ValueError: it does not fit the model.
        """
        return cls(info, spec.outputs.score_digest(spec.engine, info), spec.outputs.score_model)


def require_same_models(expected: Models, found: Models) -> None:
    """Raise ValueError unless this machine finds the models that the driver has found.

    Args:
        expected: as the driver found them.
        found: as this machine finds them.
    """
    if found.info.dtype != expected.info.dtype:
        raise ValueError(
            f"dtype must be the same on every machine, got {expected.info.dtype} where the job was started "
            f"and {found.info.dtype} where it runs; add --dtype {found.info.dtype}"
        )
    if found.info.digest != expected.info.digest:
        raise _other_files("model", found.info.model)
    if found.score_digest != expected.score_digest:
        raise _other_files("score_model", found.score_model)


def _other_files(name: str, place: str | None) -> ValueError:
    return ValueError(
        f"{name} must be the same on every machine, but the files at {place} differ between the machine "
        "where the job was started and a machine where it runs; give a place that all machines share"
    )
