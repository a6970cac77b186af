"""`pipeline.__all__` is what users, tests and benchmarks import; removing a name breaks their code."""

from __future__ import annotations

import subprocess
import sys

import pipeline

PUBLIC = [
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


def test_the_public_names_are_frozen_and_exist() -> None:
    assert pipeline.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(pipeline, name) is not None


def test_the_package_and_the_settings_import_neither_ray_nor_pyarrow() -> None:
    """The command line prints its help without them, and sets Ray's environment before importing Ray."""
    code = (
        "import sys, pipeline\n"
        "pipeline.set_ray_environment, pipeline.CaptionSettings, pipeline.Console\n"
        "assert not {'ray', 'pyarrow', 'torch'} & set(sys.modules), 'too much imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
