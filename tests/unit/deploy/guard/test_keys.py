"""The key file: written by its command, reread when it changes, and never shown."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deploy.guard import keys
from deploy.guard.keys import KeyFile, main


def new_key(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    """Return the line for the file, and the key."""
    assert main(list(arguments)) == 0
    said = capsys.readouterr()
    return said.out, said.err.split()[-1]


@pytest.fixture(autouse=True)
def look_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "READ_AGAIN_AFTER_S", 0.0)


def test_a_new_key_opens_and_its_line_does_not_hold_it(tmp_path: Path, capsys) -> None:
    line, key = new_key(capsys, "alice", "--max-in-flight", "3")
    assert key not in line and len(key) >= 43
    path = tmp_path / "keys.txt"
    path.write_text(f"# who may ask\n\n{line}")
    file = KeyFile(str(path))
    caller = file.caller_of(key)
    assert caller is not None and (caller.name, caller.max_in_flight) == ("alice", 3)
    for wrong in ("", key[:-1], key + "x", line.split()[1], "é"):
        assert file.caller_of(wrong) is None


@pytest.mark.parametrize("quota", [(), ("--max-in-flight", "3")], ids=["plain", "quota"])
def test_a_key_may_send_batch_work_only_if_its_line_says_so(tmp_path: Path, quota, capsys) -> None:
    plain, plain_key = new_key(capsys, "batch", *quota)
    line, key = new_key(capsys, "nightly", *quota, "--batch")
    path = tmp_path / "keys.txt"
    path.write_text(plain + line)
    file = KeyFile(str(path))
    callers = [file.caller_of(plain_key), file.caller_of(key)]
    assert [caller.may_send_batches for caller in callers if caller] == [False, True]
    assert [caller.max_in_flight for caller in callers if caller] == [3 if quota else None] * 2


def test_keys_are_rotated_by_writing_the_file(tmp_path: Path, capsys, caplog) -> None:
    old_line, old_key = new_key(capsys, "alice")
    new_line, new_key_ = new_key(capsys, "alice")
    path = tmp_path / "keys.txt"
    path.write_text(old_line)
    file = KeyFile(str(path))
    path.write_text(old_line + new_line)
    assert file.caller_of(old_key) and file.caller_of(new_key_)
    replacement = tmp_path / "new"  # as Kubernetes does it: another file replaces it
    replacement.write_text(new_line)
    os.replace(replacement, path)
    assert file.caller_of(old_key) is None and file.caller_of(new_key_)
    for broken in ("alice nohash\n", ""):
        path.write_text(broken)
        assert file.caller_of(new_key_), "a broken file must lock nobody out"
    path.unlink()
    assert file.caller_of(new_key_)
    assert "cannot be read again" in caplog.text


@pytest.mark.parametrize("line", ["alice", "alice secret-key", "al/ice " + "0" * 64, "a " + "0" * 64 + " 0"])
def test_a_wrong_line_is_named_and_not_shown(tmp_path: Path, line: str) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(f"\n{line}\n")
    with pytest.raises(ValueError, match=r"line 2 of .* must be NAME SHA256") as caught:
        KeyFile(str(path))
    assert "secret-key" not in str(caught.value)


def test_a_file_without_keys_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_text("# nobody yet\n")
    with pytest.raises(ValueError, match="must have a key"):
        KeyFile(str(path))


@pytest.mark.parametrize("arguments", [["a b"], ["alice", "--max-in-flight", "0"]])
def test_wrong_arguments_are_refused(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 3
