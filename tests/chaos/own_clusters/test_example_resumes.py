"""The example that kills its own run keeps the finished rows, and captions the rest when it resumes."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import resume_after_a_kill

ROOT = Path(__file__).parents[3]


def test_a_killed_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    num_pictures = 800
    keys = resume_after_a_kill.kill_and_resume(tmp_path, num_pictures)
    assert sorted(set(keys)) == sorted(keys) and len(keys) == num_pictures
    (before,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("killed")]
    assert not before.startswith(f"killed; {num_pictures} rows")
