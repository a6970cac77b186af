"""The guard for degenerate captions: empty ones, loops, echoes of the prompt.

It only says what it sees; a person, or `--regenerate`, decides. Words are compared, in any case and
without punctuation.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

from blip2_actor import GenerationOptions

EMPTY = "empty"
"""No letter and no digit."""
LOOPING = "looping"
"""The same words several times on end."""
ECHOES_PROMPT = "echoes_prompt"
"""The prompt again, or a piece of it instead of an answer."""
REGENERATED = "regenerated"
"""Made a second time because the first one was marked."""

MAX_LOOP_WORDS = 16
MIN_TURNS = 3
MIN_TURNS_OF_ONE_WORD = 4
"""People write "very, very, very", and nobody a fourth one."""
MIN_ECHO_WORDS = 3
"""A shorter piece of a question may well be its answer: "is it a cat or a dog?" - "a cat"."""

_WORD = re.compile(r"\w+")


def find_flags(text: str, prompt: str | None = None) -> list[str]:
    """What is degenerate about a caption; empty for nearly all."""
    words = _WORD.findall(text.lower())
    if not words:
        return [EMPTY]
    found = []
    if _loops(words):
        found.append(LOOPING)
    if prompt and _echoes(words, _WORD.findall(prompt.lower())):
        found.append(ECHOES_PROMPT)
    return found


def stricter(options: GenerationOptions) -> GenerationOptions:
    """The options of a second try: no three words twice, repetition is dear, and not empty."""
    return dataclasses.replace(
        options,
        repetition_penalty=max(1.5, options.repetition_penalty),
        no_repeat_ngram_size=options.no_repeat_ngram_size or 3,
        min_new_tokens=max(options.min_new_tokens, min(3, options.max_new_tokens)),
    )


def _loops(words: list[str]) -> bool:
    """Whether a run of words follows itself so often; in time linear in the words."""
    if max(Counter(words).values()) < MIN_TURNS:
        return False
    for length in range(1, min(MAX_LOOP_WORDS, len(words) // MIN_TURNS) + 1):
        turns = MIN_TURNS_OF_ONE_WORD if length == 1 else MIN_TURNS
        same = 0
        for word, later in zip(words, words[length:], strict=False):
            same = same + 1 if word == later else 0
            if same == length * (turns - 1):
                return True
    return False


def _echoes(words: list[str], prompt: list[str]) -> bool:
    """A prompt of one word, such as "a", is not an echo wherever it occurs."""
    if len(prompt) > 1 and _holds(words, prompt):
        return True
    return len(words) >= MIN_ECHO_WORDS and _holds(prompt, words)


def _holds(words: list[str], part: list[str]) -> bool:
    return any(words[at : at + len(part)] == part for at in range(len(words) - len(part) + 1))
