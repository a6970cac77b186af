"""The example in the docstring of `GenerationOptions` runs as it is written."""

from __future__ import annotations

import doctest

from blip2_actor import options


def test_the_example_in_the_docstring_runs() -> None:
    result = doctest.testmod(options)
    assert result.attempted >= 3
    assert result.failed == 0
