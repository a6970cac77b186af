"""Tokens that are selected on the device but not read by the host yet.

A GPU would be idle while the host reads the tokens of a step, records them and prepares the next step. So the
next step is queued first, with tokens that only the device knows. The host learns one step late that a text
has ended, and discards what that step computed for it. A text that ends because it has all its tokens leaves
its slot in time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from blip2_actor.engine.model_runner import ModelRunner
from blip2_actor.engine.slot_table import RunningText
from blip2_actor.generation.beam_search import BeamSearch
from blip2_actor.generation.step import LateTokens


def reads_late(device: torch.device) -> bool:
    """Return whether steps are queued ahead on a device: a CPU would gain nothing."""
    return device.type == "cuda"


class UnreadTokens:
    """The tokens of the last steps and prefills, in order."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._batches: deque[tuple[LateTokens, tuple[RunningText, ...], Sequence[int]]] = deque()

    def __len__(self) -> int:
        """Return the number of steps and prefills."""
        return len(self._batches)

    def add(self, logits: Tensor, texts: Sequence[RunningText], rows: Sequence[int]) -> None:
        """Select the largest logit of each text, apart from early ends, for texts that need nothing else.

        Args:
            logits: float[rows, V].
            rows: for each text, the row of its slot.
        """
        early = [row for text, row in zip(texts, rows, strict=True) if text.end_is_banned]
        end_ids = texts[0].search.vocabulary.end_ids
        tokens = self._runner.select(logits, [text.slots[0] for text in texts], rows, early, end_ids)
        for text in texts:
            text.num_unread += 1
        self._batches.append((tokens, tuple(texts), rows))

    def read(self, num_left: int = 0) -> list[RunningText]:
        """Wait for the tokens of all steps but the last ones, and let the texts accept them.

        Returns:
            The text of each accepted token, so a text may occur twice.
        """
        accepted = []
        while len(self._batches) > num_left:
            tokens, texts, rows = self._batches.popleft()
            token_ids, logprobs = tokens.read()
            for text, row in zip(texts, rows, strict=True):
                text.num_unread -= 1
                if _is_wanted(text):
                    assert not isinstance(text.search, BeamSearch)  # it takes more than the largest logit
                    text.search.accept(token_ids[row], logprobs[row])
                    accepted.append(text)
        return accepted


def _is_wanted(text: RunningText) -> bool:
    """Return whether a text goes on: not if it has ended, or its request was begun again or dropped.

    A text that has left its slot is known only here, so this also tells those who wait for its request.
    """
    request = text.request
    is_current = any(search is text.search for search in request.searches)
    return is_current and not text.search.done and not request.is_dropped() and not request.future.done()
