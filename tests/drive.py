"""The caption command in a process of its own with a fake engine, so that tests can kill it.

python -m tests.drive '{"settings": {...}, "engine": {...}}'
"""

from __future__ import annotations

import json
import sys

from pipeline.commands import caption
from pipeline.settings import CaptionSettings, from_plain
from tests.fake_engine import FakeEngineConfig

if __name__ == "__main__":
    values = json.loads(sys.argv[1])
    sys.exit(
        caption(
            from_plain(CaptionSettings, values["settings"]), from_plain(FakeEngineConfig, values["engine"])
        )
    )
