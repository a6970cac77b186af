"""Who owns which slot.

A slot is one row of the key/value cache. A running text owns one slot, or one per beam. The decode step reads
the first N rows of the cache, so the running texts must own the first N slots: `close_gaps` moves texts from
the last slots into free ones. This table only keeps the books; the scheduler copies the cache.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection
from dataclasses import dataclass

from blip2_actor.engine.request_state import RequestState
from blip2_actor.generation.beam_search import BeamSearch
from blip2_actor.generation.search import TextSearch


@dataclass(eq=False)
class RunningText:
    """A search, and the slots in which it runs."""

    request: RequestState
    search: TextSearch | BeamSearch
    slots: list[int]
    prefix_length: int
    """Cached positions that are the same in all its slots: the image and the prompt."""
    length: int
    """Cached positions in each of its slots now."""
    num_unread: int = 0
    """Tokens that are selected and that the host has not read; see `UnreadTokens`."""

    @property
    def takes_argmax(self) -> bool:
        """True if the next token is the largest logit, whatever the unread ones are."""
        search = self.search
        return (
            isinstance(search, TextSearch)
            and search.takes_argmax
            and len(search.token_ids) + self.num_unread >= search.options.min_new_tokens
        )

    @property
    def has_last_token(self) -> bool:
        """True if an unread token is the last one, because the text may have no more."""
        return (
            self.num_unread > 0
            and isinstance(self.search, TextSearch)
            and len(self.search.token_ids) + self.num_unread >= self.search.options.max_new_tokens
        )


class SlotTable:
    """The running texts and their slots."""

    def __init__(self, num_slots: int) -> None:
        self.texts: list[RunningText] = []
        """In the order in which they were placed."""
        self.num_used = 0
        """Slots with an owner; safe to read from any thread."""
        self.num_low_priority = 0
        """Slots of texts of low priority, which a request of normal priority may take."""
        self._owners: list[RunningText | None] = [None] * num_slots
        self._free: list[int] = list(range(num_slots))
        """A heap: the lowest free slot is given away first."""

    @property
    def num_free(self) -> int:
        return len(self._free)

    def youngest_of_low_priority(self, num_slots: int) -> list[RequestState]:
        """Return the last requests of low priority that hold at least `num_slots` together, if there are.

        They are in the order in which they were placed.
        """
        chosen: dict[RequestState, None] = {}
        for text in reversed(self.texts):
            if num_slots <= 0 and text.request not in chosen:
                break
            if text.request.low_priority:
                chosen[text.request] = None
                num_slots -= len(text.slots)
        return list(reversed(chosen))

    @property
    def requests(self) -> list[RequestState]:
        """The requests of the running texts, each once."""
        return list(dict.fromkeys(text.request for text in self.texts))

    def place(
        self, request: RequestState, search: TextSearch | BeamSearch, prefix_length: int
    ) -> RunningText:
        """Give a search the lowest free slots; the caller has checked that there are enough."""
        slots = [heapq.heappop(self._free) for _ in range(search.num_slots)]
        text = RunningText(request, search, slots, prefix_length, prefix_length)
        self.texts.append(text)
        self._count(text, len(slots))
        for slot in slots:
            self._owners[slot] = text
        return text

    def free(self, texts: Collection[RunningText]) -> None:
        """Remove texts from the table; those that have left it do not matter."""
        removed = set(texts).intersection(self.texts)
        self.texts = [text for text in self.texts if text not in removed]
        for text in removed:
            self._count(text, -len(text.slots))
            for slot in text.slots:
                self._owners[slot] = None
                heapq.heappush(self._free, slot)

    def _count(self, text: RunningText, num_slots: int) -> None:
        self.num_used += num_slots
        if text.request.low_priority:
            self.num_low_priority += num_slots

    def close_gaps(self) -> tuple[list[int], list[int]]:
        """Let texts in the last slots own free slots further in front, so that the used slots come first.

        Returns:
            The slots to copy from and the slots to copy to, of equal length.
        """
        num_used = self.num_used
        targets = [slot for slot in range(num_used) if self._owners[slot] is None]
        if not targets:
            return [], []
        sources = [slot for slot in range(num_used, len(self._owners)) if self._owners[slot] is not None]
        for source, target in zip(sources, targets, strict=True):
            text = self._owners[source]
            assert text is not None  # by the choice of sources
            text.slots[text.slots.index(source)] = target
            self._owners[source], self._owners[target] = None, text
        self._free = list(range(num_used, len(self._owners)))
        return sources, targets

    def shrink(self, num_slots: int) -> None:
        """Keep the first slots only; all slots must be free."""
        assert not self.texts, "texts must leave their slots before the table shrinks"
        del self._owners[num_slots:]
        self._free = list(range(num_slots))
