"""The precedence of given, stored and default options."""

from __future__ import annotations

import dataclasses
import doctest
import pickle
from typing import Any, cast

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
    """The value alone does not tell whether somebody wants it."""
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
    """The message names the stored option, because nobody would recognize a value that was never given."""
    source = "of the checkpoint's generation_config.json counts until another value is given"
    with pytest.raises(ValueError, match=rf"at most num_beams \(5\) unless .*; num_beams=5 {source}"):
        GenerationOptions(do_sample=True, num_return_sequences=6).resolve({"num_beams": 5})
    with pytest.raises(ValueError, match=rf"at most num_beams \(1\).*; num_return_sequences=3 {source}"):
        GenerationOptions(num_beams=1).resolve({"num_beams": 5, "num_return_sequences": 3, "top_k": 7})
    with pytest.raises(ValueError, match=rf"at most max_new_tokens \(5\), got 8; max_new_tokens=5 {source}"):
        GenerationOptions(min_new_tokens=8).resolve({"max_new_tokens": 5})
    with pytest.raises(ValueError, match=r"at most max_new_tokens \(30\), got 40$"):
        GenerationOptions(min_new_tokens=40).resolve()


def test_a_stored_minimum_ends_at_a_given_maximum() -> None:
    """transformers continues with a warning; here texts shorter than eight tokens could not be requested."""
    options = GenerationOptions(max_new_tokens=5).resolve({"min_new_tokens": 8})
    assert (options.min_new_tokens, options.max_new_tokens) == (5, 5)


def test_what_temperature_0_contradicts_says_so() -> None:
    """The temperature means greedy search, so "set do_sample" did not help those who had set it."""
    with pytest.raises(ValueError, match="set do_sample with num_beams 1 and no temperature of 0"):
        GenerationOptions(do_sample=True, temperature=0, num_return_sequences=3).resolve()


def test_a_switch_that_a_checkpoint_may_set_can_be_switched_off_on_the_command_line() -> None:
    parser = flags.Parser(prog="x")
    flags.add_flags(parser, GenerationOptions)
    given = vars(parser.parse_args(["--no-do-sample"]))
    assert flags.build(GenerationOptions, given) == GenerationOptions(do_sample=False)
    assert flags.build(GenerationOptions, vars(parser.parse_args([]))) == GenerationOptions()


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("max_length", "give max_new_tokens; max_length of the reference also counts"),
        ("min_length", "give min_new_tokens; min_length of the reference also counts"),
        ("logits_processor", "give it to the Request"),
        ("num_beam", r"do you mean num_beams\?"),
        ("wind", "the options are max_new_tokens, min_new_tokens, num_beams"),
    ],
)
def test_unknown_options_are_refused_with_what_to_do(name: str, remedy: str) -> None:
    """Reading max_length as max_new_tokens would give texts of another length than the reference."""
    with pytest.raises(TypeError, match=f"{name} is not an option; {remedy}"):
        GenerationOptions(**cast("dict[str, Any]", {name: 20}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"typical_p": 0.0}, "typical_p must be above 0 and at most 1, got 0"),
        ({"min_p": 1.5}, "min_p must be from 0 to 1, got 1.5"),
        ({"suppress_tokens": [-1]}, r"suppress_tokens must be token ids from 0, got \(-1,\)"),
        ({"bad_words_ids": [[]]}, "bad_words_ids must be sequences of token ids"),
        ({"do_sample": False, "min_p": 0.1}, "min_p must be left at 0.0 without do_sample"),
        ({"max_new_tokens": 5.5}, "max_new_tokens must be a whole number"),
        ({"num_beams": True}, "num_beams must be a whole number"),
        ({"temperature": 1e-40, "do_sample": True}, "temperature must be from 1e-06"),
        ({"temperature": float("nan"), "do_sample": True}, "temperature must be"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be from 0.001 to 1000"),
        ({"length_penalty": 1e10, "num_beams": 2}, "length_penalty must be from -50 to 50"),
        ({"seed": -1, "do_sample": True}, "seed must be at least 0"),
        ({"seed": 1 << 64, "do_sample": True}, "seed must be below"),
        ({"stop": (5,)}, "stop must be texts"),
        (
            {"num_beams": 1, "renormalize_logits": True},
            "renormalize_logits must be left at False without beam",
        ),
    ],
)
def test_values_that_cannot_be_used_are_refused(options: dict[str, Any], message: str) -> None:
    """Some would raise, or sample from NaN, in a batch that others share."""
    with pytest.raises(ValueError, match=message):
        GenerationOptions(**options)


def test_token_ids_are_read_from_the_command_line_and_from_stored_lists() -> None:
    parser = flags.Parser(prog="x")
    flags.add_flags(parser, GenerationOptions)
    arguments = ["--suppress-tokens", "3", "5", "--bad-words-ids", "7", "8,9"]
    expected = GenerationOptions(suppress_tokens=(3, 5), bad_words_ids=((7,), (8, 9)))
    assert flags.build(GenerationOptions, vars(parser.parse_args(arguments))) == expected
    assert GenerationOptions(suppress_tokens=[3, 5], bad_words_ids=[[7], [8, 9]]) == expected  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"--suppress-tokens must be whole numbers, got \('x',\)"):
        flags.build(GenerationOptions, vars(parser.parse_args(["--suppress-tokens", "x"])))
    assert GenerationOptions(suppress_tokens=()).resolve({"suppress_tokens": [3]}).suppress_tokens == ()


def test_options_can_be_copied_and_sent_to_workers() -> None:
    options = GenerationOptions(num_beams=3, bad_words_ids=((7, 8),))
    assert pickle.loads(pickle.dumps(options)) == options
    assert dataclasses.replace(options, num_beams=4).bad_words_ids == ((7, 8),)
