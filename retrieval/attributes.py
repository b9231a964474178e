"""What a caller wants to see: conditions on an item's attributes, and the rows that meet them.

A condition on what is not known of an item is not met, and one on a column that nobody has is refused: an answer never holds an
item that nobody judged. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from index.errors import BrewlineError
from index.filters import Column, RowSet

ATTRIBUTES = ("category", "creator")
"""What every catalogue has; `language` and `region` (`schema.FACETS`) only where the night's data have such a column, and never
known of an item put in by day, which the contract gives no such words."""


class UnknownAttribute(BrewlineError):
    """A condition on a column that the catalogue does not have."""


class Attribute:
    """One column of words: `codes` [N] point into `names`, -1 and "" stand for unknown.

    A value of several words ("Action|Comedy", "art, music") is met by each of them, and by itself.
    """

    def __init__(self, codes: npt.NDArray[np.integer], names: Sequence[str]) -> None:
        self.count = len(codes)
        self._column = Column(codes.astype(np.int32), names)
        self._holding: dict[str, list[str]] = {}
        for name in names:
            for word in {name, *_words(name)} - {""}:
                self._holding.setdefault(word, []).append(name)

    @classmethod
    def of(cls, values: Sequence[str]) -> Attribute:
        """The column of these values, row by row."""
        code = {name: place for place, name in enumerate(dict.fromkeys(values))}
        return cls(np.array([code[value] for value in values], np.int32), list(code))

    def rows(self, wanted: Collection[str], *, whole: bool = False) -> RowSet:
        """The rows whose value is one of these, or (unless `whole`) holds one of these words."""
        if whole:
            return self._column.is_in({word for word in wanted if word})
        return self._column.is_in({name for word in wanted for name in self._holding.get(word, ())})


def _words(name: str) -> list[str]:
    return [word.strip() for word in name.replace("|", ",").split(",")]


@dataclass(frozen=True)
class Wanted:
    """What may be answered. Within a field one value must fit, all fields must; an empty field asks nothing.

    `by_connections`: only items whose creator the member is connected to; nothing for a member without connections. An item
    whose creator is unknown passes `blocked_creators`, and no other condition on creators.
    """

    categories: frozenset[str] = frozenset()
    creators: frozenset[str] = frozenset()
    languages: frozenset[str] = frozenset()
    regions: frozenset[str] = frozenset()
    blocked_creators: frozenset[str] = frozenset()
    by_connections: bool = False

    def rows(self, attribute: Callable[[str], Attribute], connected: Collection[str], count: int) -> RowSet:
        """The rows of `count` that may be answered, by their columns; `connected` are the ends of the member's connections.

        Raises UnknownAttribute.
        """
        allowed = RowSet.every(count)
        for name, words in (("category", self.categories), ("language", self.languages), ("region", self.regions)):
            if words:
                allowed &= attribute(name).rows(words)
        if self.creators:
            allowed &= attribute("creator").rows(self.creators, whole=True)
        if self.by_connections:
            allowed &= attribute("creator").rows(connected, whole=True)
        if self.blocked_creators:
            allowed -= attribute("creator").rows(self.blocked_creators, whole=True)
        return allowed


EVERYTHING = Wanted()
