"""`deploy.app:build` with a fake engine; a Serve config names it as `import_path`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from ray.serve import Application

from blip2_actor.testing import FakeEngineConfig
from blip2_actor.testing.fake_engine import FakeEngine
from deploy.app import ServeArgs, compose

NO_SUCH_MODEL = "no-such-model"
LOAD_S = 2.0
ENGINE_S = 0.1


@dataclass(frozen=True, kw_only=True)
class SlowToLoad(FakeEngineConfig):
    """A fake engine that loads slowly, and fails to load while a file exists."""

    missing: str

    def build(self) -> FakeEngine:
        time.sleep(LOAD_S)
        if Path(self.missing).exists():
            raise ValueError("model must be a folder, got one that has just been deleted")
        return super().build()


def build(args: dict) -> Application:
    """Build the application from the `args` of a config that names the file."""
    missing = args.pop("missing")
    settings = ServeArgs.model_validate(args).root
    model = settings.engine.model
    engine = SlowToLoad(
        model=model,
        missing=missing,
        seconds_per_batch=ENGINE_S,
        fails_to_build="the model cannot be found" if model == NO_SUCH_MODEL else None,
    )
    return compose(engine, settings)
