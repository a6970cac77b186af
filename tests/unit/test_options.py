"""Which of the given, the stored and the default options count."""

from __future__ import annotations

import doctest
from typing import Any

import pytest

from blip2_actor import GenerationOptions, flags, options


def test_the_example_in_the_docstring_runs() -> None:
    result = doctest.testmod(options)
    assert result.attempted >= 3
    assert result.failed == 0


def test_given_options_come_before_stored_ones_and_stored_ones_before_defaults() -> None:
    stored: dict[str, Any] = {"num_beams": 5, "length_penalty": 2.0, "max_new_tokens": 7, "top_k": None}
    assert GenerationOptions().resolve(stored) == GenerationOptions(**stored).resolve()
    chosen = GenerationOptions(num_beams=3, max_new_tokens=30).resolve(stored)
    assert (chosen.num_beams, chosen.max_new_tokens, chosen.length_penalty, chosen.top_k) == (3, 30, 2.0, 0)
    assert chosen.resolve({"num_beams": 9}) == chosen


def test_a_given_default_is_given() -> None:
    """The value alone does not say whether somebody wants it."""
    stored = {"num_beams": 5, "do_sample": False, "repetition_penalty": 1.5}
    chosen = GenerationOptions(num_beams=1, repetition_penalty=1.0).resolve(stored)
    assert (chosen.num_beams, chosen.repetition_penalty) == (1, 1.0)


def test_stored_options_without_effect_next_to_given_ones_are_left_out() -> None:
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 50}
    assert GenerationOptions(do_sample=False).resolve(sampling) == GenerationOptions().resolve()
    beams = {"num_beams": 5, "early_stopping": True, "length_penalty": -1.0}
    assert GenerationOptions(num_beams=1).resolve(beams) == GenerationOptions().resolve()
    with pytest.raises(ValueError, match=r"length_penalty must be left at 1\.0 without beam search"):
        GenerationOptions(num_beams=1, length_penalty=-1.0).resolve(beams)


def test_options_that_contradict_stored_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="num_beams must be 1 with do_sample, got 5"):
        GenerationOptions(do_sample=True).resolve({"num_beams": 5})
    with pytest.raises(ValueError, match=r"min_new_tokens must be at most max_new_tokens \(5\), got 8"):
        GenerationOptions(max_new_tokens=5).resolve({"min_new_tokens": 8})


def test_a_switch_that_a_checkpoint_may_set_can_be_switched_off_on_the_command_line() -> None:
    parser = flags.Parser(prog="x")
    flags.add_flags(parser, GenerationOptions)
    given = vars(parser.parse_args(["--no-do-sample"]))
    assert flags.build(GenerationOptions, given) == GenerationOptions(do_sample=False)
    assert flags.build(GenerationOptions, vars(parser.parse_args([]))) == GenerationOptions()
