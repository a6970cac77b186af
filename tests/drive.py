"""Run the caption command with a fake engine, in a separate process that tests can kill.

python -m tests.drive '{"settings": {...}, "engine": {...}}'
"""

from __future__ import annotations

import json
import sys

from pipeline.run.cluster import set_ray_environment


def drive(arguments: str) -> int:
    set_ray_environment()
    from blip2_actor.testing import FakeEngineConfig
    from pipeline.cli.commands import caption
    from pipeline.run.signals import StopRequest
    from pipeline.settings.from_dict import from_dict
    from pipeline.settings.job_settings import CaptionSettings

    values = json.loads(arguments)
    settings = from_dict(CaptionSettings, values["settings"])
    with StopRequest(is_command=True).by_signals():
        return caption(settings, from_dict(FakeEngineConfig, values["engine"]))


if __name__ == "__main__":
    sys.exit(drive(sys.argv[1]))
