"""Who owns which slot.

A slot is one row of the key/value cache. A running text owns one slot, or one per beam. The decode step reads
the first N rows of the cache, so the running texts must own the first N slots, and those that sit out steps
(`step_shares`) the last of these: `close_gaps` moves texts there. This table only keeps the books; the
scheduler copies the cache.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection
from dataclasses import dataclass

from blip2_actor.engine.request_state import RequestState
from blip2_actor.generation.beam_search import BeamSearch
from blip2_actor.generation.search import TextSearch

MAX_CHEAP_SLOTS = 5
"""A request with more slots is costly; many callers use five beams."""


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
    is_costly: bool = False
    """Whether it may have to sit out steps; see `StepShares`."""
    num_unread: int = 0
    """Selected tokens that the host has not read yet; see `UnreadTokens`."""

    @property
    def takes_argmax(self) -> bool:
        """True if it takes the largest logit, apart from banned ends, or a known token in its place."""
        return isinstance(self.search, TextSearch) and self.search.takes_argmax

    @property
    def known_token(self) -> int | None:
        """The newest unread token, if the text takes a known token there, whatever was selected."""
        search = self.search
        assert isinstance(search, TextSearch), "beams are read at once"
        return search.known_token(len(search.token_ids) + self.num_unread - 1)

    @property
    def end_is_banned(self) -> bool:
        """True if the next token must not end the text, because it has fewer than min_new_tokens."""
        search = self.search
        return (
            isinstance(search, TextSearch)
            and len(search.token_ids) + self.num_unread < search.options.min_new_tokens
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

    def __init__(self, num_slots: int, has_costly: bool = False) -> None:
        """
        Args:
            has_costly: whether texts of requests with many slots are costly.
        """
        self.texts: list[RunningText] = []
        """The texts that hold slots, in the order in which they were placed."""
        self.num_used = 0
        """Slots with an owner; safe to read from any thread."""
        self.num_low_priority = 0
        """Slots of texts of low priority, which a request of normal priority may take."""
        self._has_costly = has_costly
        self._owners: list[RunningText | None] = [None] * num_slots
        self._free: list[int] = list(range(num_slots))
        """A heap: the lowest free slot is given away first."""

    @property
    def num_free(self) -> int:
        return len(self._free)

    def youngest_of_low_priority(self, num_slots: int) -> list[RequestState]:
        """Return the last requests of low priority that together hold at least `num_slots`, if possible.

        They are in the order in which they were placed.
        """
        chosen: dict[RequestState, None] = {}
        for text in reversed(self.texts):
            if num_slots <= 0:
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
        is_costly = self._has_costly and request.num_slots > MAX_CHEAP_SLOTS
        text = RunningText(request, search, slots, prefix_length, prefix_length, is_costly)
        self.texts.append(text)
        self._count(text, len(slots))
        for slot in slots:
            self._owners[slot] = text
        return text

    def free(self, texts: Collection[RunningText]) -> None:
        """Remove texts from the table; those that are not in it are ignored."""
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
        """Let the running texts own the first slots, and costly ones the last of these.

        Returns:
            The slots to copy from and the slots to copy to, of equal length; a slot may be among both.
        """
        others = [slot for text in self.texts if not text.is_costly for slot in text.slots]
        costly = [slot for text in self.texts if text.is_costly for slot in text.slots]
        boundary = len(others)
        moves = _moves(others, range(boundary)) + _moves(costly, range(boundary, self.num_used))
        if not moves:
            return [], []
        moving = [(self._owners[source], source, target) for source, target in moves]
        for _, source, _ in moving:
            self._owners[source] = None
        for text, source, target in moving:
            assert text is not None, "only slots with an owner move"
            text.slots[text.slots.index(source)] = target
            self._owners[target] = text
        self._free = list(range(self.num_used, len(self._owners)))
        sources, targets = zip(*moves, strict=True)
        return list(sources), list(targets)

    def shrink(self, num_slots: int) -> None:
        """Keep the first slots only; all slots must be free."""
        assert not self.texts, "texts must leave their slots before the table shrinks"
        del self._owners[num_slots:]
        self._free = list(range(num_slots))


def _moves(slots: Collection[int], places: range) -> list[tuple[int, int]]:
    """Pair the slots that are outside `places` with the places that are free."""
    outside = sorted(slot for slot in slots if slot not in places)
    return list(zip(outside, sorted(set(places).difference(slots)), strict=True)) if outside else []
