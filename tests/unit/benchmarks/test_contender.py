"""A contender runs in its own process, and its figures are those of this process."""

from __future__ import annotations

import pytest

from benchmarks.sides.contender import Contender

LARGE_MIB = 1500


@pytest.mark.slow
def test_the_peak_memory_of_a_contender_is_not_that_of_its_parent() -> None:
    """For a moment the kernel counts the memory of the parent as that of a new process."""
    large = bytearray(b"x") * (LARGE_MIB << 20)
    contender = Contender(list, (1, 2))
    assert contender.call("count", 1) == 1
    assert contender.close() < LARGE_MIB / 2**10
    assert len(large) == LARGE_MIB << 20
