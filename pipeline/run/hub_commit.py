"""The commit of a model on the hub: the driver asks for it once, and its run keeps it.

Its workers, and later starts, take that commit, whatever the branch of the hub names then.
"""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

from blip2_actor import EngineBuilder, ModelInfo
from pipeline.ledger.run_record import Run
from pipeline.settings.job_settings import CaptionSettings

_COMMIT = re.compile("[0-9a-f]{40}")


def without_idle_revision(engine: EngineBuilder) -> EngineBuilder:
    """Return the engine without a revision of a model that is not on the hub.

    Version 0.1.0 took one without effect, and so a run may have one.
    """
    known: Any = engine
    is_idle = getattr(known, "revision", None) is not None and not is_on_hub(known.model)
    return dataclasses.replace(known, revision=None) if is_idle else engine


def pinned(engine: EngineBuilder, commit: str | None) -> EngineBuilder:
    """Return the engine with the commit of its model on the hub, if the user has named no revision."""
    known: Any = engine
    if getattr(known, "revision", "") is not None or not is_on_hub(known.model):
        return engine
    return dataclasses.replace(known, revision=commit) if commit and _COMMIT.fullmatch(commit) else engine


def with_pinned_scores(
    settings: CaptionSettings, engine: EngineBuilder, info: ModelInfo, run: Run | None
) -> CaptionSettings:
    """Return the settings with the commit of a retrieval checkpoint on the hub; see `pinned`."""
    outputs = settings.outputs
    found: Any = outputs.matching(engine)
    if found is None:
        return settings
    if outputs.only_matches:
        found = engine
    else:
        commit = None
        if run is not None:
            found, commit = without_idle_revision(found), run.commit_of(outputs.score_model)
        found = pinned(found, commit or outputs.score_digest(engine, info))
    revision = getattr(found, "revision", outputs.score_revision)
    return dataclasses.replace(settings, outputs=dataclasses.replace(outputs, score_revision=revision))


def is_on_hub(model: str) -> bool:
    """Return whether a model is named as the hub does."""
    return model != "demo" and "://" not in model and not os.path.exists(model)
