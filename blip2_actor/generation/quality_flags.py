"""The quality check for degenerate captions: empty ones, loops, echoes of the prompt.

The rule: the check only sets flags; a person, or `--regenerate`, decides what to do. Words are compared
without case and punctuation.
"""

from __future__ import annotations

import dataclasses
import re

from blip2_actor.options import GenerationOptions

EMPTY = "empty"
"""The caption has no letter and no digit."""
LOOPING = "looping"
"""The same words follow each other several times."""
ECHOES_PROMPT = "echoes_prompt"
"""The caption repeats the prompt, or repeats a part of it instead of answering."""

MAX_LOOP_WORDS = 16
MIN_REPEATS = 3
MIN_REPEATS_OF_ONE_WORD = 4
"""People write "very, very, very", but not a fourth one."""
MIN_ECHO_WORDS = 3
"""A shorter part of a question may be its answer: "is it a cat or a dog?" - "a cat"."""

_WORD = re.compile(r"\w+")


def find_quality_flags(text: str, prompt: str | None = None) -> list[str]:
    """Return what is degenerate about a caption; empty for nearly all captions."""
    words = _WORD.findall(text.lower())
    if not words:
        return [EMPTY]
    flags = []
    if _loops(words):
        flags.append(LOOPING)
    if prompt and _echoes(words, _WORD.findall(prompt.lower())):
        flags.append(ECHOES_PROMPT)
    return flags


def stricter_options(options: GenerationOptions) -> GenerationOptions:
    """Return options for generating a caption again.

    They penalize repetition, forbid repeated trigrams and empty texts. No option becomes weaker than it was.
    """
    return dataclasses.replace(
        options,
        repetition_penalty=max(1.5, options.repetition_penalty),
        no_repeat_ngram_size=options.no_repeat_ngram_size or 3,
        min_new_tokens=max(options.min_new_tokens, min(3, options.max_new_tokens)),
    )


def _loops(words: list[str]) -> bool:
    """Return whether a run of words follows itself often enough; takes time linear in the number of words."""
    if len(words) - len(set(words)) < MIN_REPEATS - 1:  # no word has come often enough
        return False
    for length in range(1, min(MAX_LOOP_WORDS, len(words) // MIN_REPEATS) + 1):
        repeats = MIN_REPEATS_OF_ONE_WORD if length == 1 else MIN_REPEATS
        num_equal = 0
        for word, later in zip(words, words[length:], strict=False):
            num_equal = num_equal + 1 if word == later else 0
            if num_equal == length * (repeats - 1):
                return True
    return False


def _echoes(words: list[str], prompt: list[str]) -> bool:
    """Return whether a caption repeats the prompt; a prompt of one word, such as "a", is never an echo."""
    if len(prompt) > 1 and _contains(words, prompt):
        return True
    return len(words) >= MIN_ECHO_WORDS and _contains(prompt, words)


def _contains(words: list[str], part: list[str]) -> bool:
    return any(words[at : at + len(part)] == part for at in range(len(words) - len(part) + 1))
