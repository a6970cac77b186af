"""The contact sheet: cards with a picture and texts, which the page's script searches, filters and sorts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Piece:
    """A part of a text; in a comparison, what one side has and the other has not is marked."""

    text: str
    is_marked: bool = False


@dataclass(frozen=True)
class Text:
    """One line of a card: what it is (empty for the caption of a report), and what it says."""

    name: str
    pieces: Sequence[Piece]
    is_bad: bool = False

    @classmethod
    def plain(cls, name: str, text: str, is_bad: bool = False) -> Text:
        return cls(name, (Piece(text),), is_bad)


@dataclass(frozen=True)
class Card:
    """One row of an output, as the sheet shows it."""

    key: str
    texts: Sequence[Text]
    source: str
    """Where the row came from, and the size of its image."""
    picture: str | None = None
    """A `data:` URI."""
    groups: Sequence[str] = ()
    """Names of the groups that chose the row."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Numbers by which the sheet is sorted and filtered; a name has only letters."""


@dataclass(frozen=True)
class Sheet:
    """The cards, the groups in which they may be shown, and the values by which they may be sorted."""

    cards: Sequence[Card]
    groups: Mapping[str, str]
    """Label of each group."""
    orders: Mapping[str, str]
    """Label of each value to sort by."""

    def in_group(self, name: str) -> int:
        """Return the number of cards in a group."""
        return sum(name in card.groups for card in self.cards)


def used(labels: Mapping[str, str], cards: Iterable[Card]) -> dict[str, str]:
    """Return the groups that have a card."""
    groups = {group for card in cards for group in card.groups}
    return {name: label for name, label in labels.items() if name in groups}
