"""Users delete captions with flags: a flag on a good caption is as wrong as none on a bad one."""

import pytest

from blip2_actor import GenerationOptions, find_quality_flags, stricter_options


@pytest.mark.parametrize(
    "text",
    [
        "a red circle above a blue square on a grey background",
        "a man and a woman and a dog and a cat on a very very very large sofa",
        "very very very large dogs",
        "no. 7",
        "猫",
    ],
)
def test_ordinary_captions_have_no_flags(text):
    assert find_quality_flags(text) == find_quality_flags(text, "a photo of") == []


@pytest.mark.parametrize("text", ["", "  \n", "...", "- -"])
def test_a_caption_without_words_is_empty(text):
    assert find_quality_flags(text, "a photo of") == ["empty"]


@pytest.mark.parametrize(
    "text",
    [
        "dog dog dog dog",
        "a dog, dog, dog, Dog",
        "a photo of a cat of a cat of a cat",
        "the quick brown fox and the quick brown fox and the quick brown fox and",
        "it starts well and then then again then again then again",
    ],
)
def test_words_that_are_repeated_several_times_loop(text):
    assert find_quality_flags(text) == ["looping"]


@pytest.mark.parametrize(
    ("text", "prompt", "echoes"),
    [
        ("a photo of a cat", "a photo of", True),
        ("A photo of", "a photo of", True),
        ("what color is it", "Question: what color is it? Answer:", True),
        ("a cat", "Question: is it a cat or a dog? Answer:", False),
        ("a cat", "a", False),
        ("a cat", None, False),
    ],
)
def test_a_repeated_prompt_is_an_echo_but_a_short_answer_from_it_is_not(text, prompt, echoes):
    assert find_quality_flags(text, prompt) == (["echoes_prompt"] if echoes else [])


def test_a_caption_may_have_several_flags():
    assert find_quality_flags("a photo of a photo of a photo of", "a photo of") == [
        "looping",
        "echoes_prompt",
    ]


def test_options_for_generating_again_are_stricter_and_never_weaker():
    first = GenerationOptions(max_new_tokens=2, repetition_penalty=2.0, no_repeat_ngram_size=2)
    second = stricter_options(first.resolve())
    assert (second.repetition_penalty, second.no_repeat_ngram_size, second.min_new_tokens) == (2.0, 2, 2)
    second = stricter_options(GenerationOptions().resolve())
    assert (second.repetition_penalty, second.no_repeat_ngram_size, second.min_new_tokens) == (1.5, 3, 3)
