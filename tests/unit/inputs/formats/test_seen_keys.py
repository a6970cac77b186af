"""The keys of a tar are remembered, without their names."""

from __future__ import annotations

import tracemalloc

import pytest

from pipeline.inputs.formats import seen_keys
from pipeline.inputs.formats.seen_keys import SeenKeys


@pytest.mark.parametrize("max_recent", [7, 1 << 16])
def test_every_key_that_was_added_is_found_and_no_other(
    monkeypatch: pytest.MonkeyPatch, max_recent: int
) -> None:
    monkeypatch.setattr(seen_keys, "MAX_RECENT", max_recent)
    seen = SeenKeys()
    keys = [f"a/{number}" for number in range(100)] + ["\udcff.jpg", ""]
    for key in keys:
        assert key not in seen
        seen.add(key)
        seen.add(key)
    assert all(key in seen for key in keys)
    assert not any(f"b/{number}" in seen for number in range(100))


def test_keys_take_eight_bytes_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of 10^7 samples used to take more than a gigabyte."""
    monkeypatch.setattr(seen_keys, "MAX_RECENT", 1 << 10)
    seen = SeenKeys()
    tracemalloc.start()
    try:
        for number in range(1 << 15):
            seen.add(f"some/folder/with/a/long/name/{number:09}")
        assert tracemalloc.get_traced_memory()[0] < 9 << 15
    finally:
        tracemalloc.stop()
