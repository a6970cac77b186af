"""BLIP-2 on Ray Data: a resumable captioning job, and `caption`, which adds captions to any Ray Dataset.

`__all__` is the public interface. Importing the package imports neither Ray nor pyarrow: the command line
prints its help without Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.column_names import SCHEMA_VERSION
    from pipeline.dataset import caption
    from pipeline.fetching.fetch_settings import FetchSettings
    from pipeline.inputs.reader import ReadOptions
    from pipeline.progress import Console, ProgressSnapshot
    from pipeline.run.cluster import set_ray_environment
    from pipeline.run.prepare import prepare, prepare_retry
    from pipeline.run.run_job import run_job
    from pipeline.schema import ROW_CONTRACT
    from pipeline.settings.job_settings import CaptionSettings, EmbedSettings, ScoreSettings
    from pipeline.settings.outputs import Outputs
    from pipeline.settings.placement import Placement
    from pipeline.settings.retry_settings import RetrySettings

__all__ = [
    "CaptionSettings",
    "Console",
    "EmbedSettings",
    "FetchSettings",
    "Outputs",
    "Placement",
    "ProgressSnapshot",
    "ROW_CONTRACT",
    "ReadOptions",
    "RetrySettings",
    "SCHEMA_VERSION",
    "ScoreSettings",
    "caption",
    "prepare",
    "prepare_retry",
    "run_job",
    "set_ray_environment",
]

_MODULES = {
    "CaptionSettings": "pipeline.settings.job_settings",
    "Console": "pipeline.progress",
    "EmbedSettings": "pipeline.settings.job_settings",
    "FetchSettings": "pipeline.fetching.fetch_settings",
    "Outputs": "pipeline.settings.outputs",
    "Placement": "pipeline.settings.placement",
    "ProgressSnapshot": "pipeline.progress",
    "ROW_CONTRACT": "pipeline.schema",
    "ReadOptions": "pipeline.inputs.reader",
    "RetrySettings": "pipeline.settings.retry_settings",
    "SCHEMA_VERSION": "pipeline.column_names",
    "ScoreSettings": "pipeline.settings.job_settings",
    "caption": "pipeline.dataset",
    "prepare": "pipeline.run.prepare",
    "prepare_retry": "pipeline.run.prepare",
    "run_job": "pipeline.run.run_job",
    "set_ray_environment": "pipeline.run.cluster",
}
"""The module of each public name, imported when the name is first used."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Name what is imported late too, for completion in a notebook."""
    return sorted({*globals(), *__all__})
