"""Members' own instructions made by rule: a wish in words, and what it makes of the answers of a group.

    more X    the answer of an item of X moves half of its way to 1      less X    half of its way to 0
    only X    the same for X, and 0 for everything else                  no X      0

X is a category, or with "only" also a creator. Where wishes meet, the stricter one counts: they apply in the order more, only,
less, no, so that "more X, no X" is "no X". Half of the way keeps what the member thinks of each item of X apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ranking.wishes import KINDS, Kind

TAUGHT: Mapping[Kind, tuple[str, ...]] = {
    "more": ("more {}", "show me more {}", "I want more {}"),
    "only": ("only {}", "just {}", "nothing but {}"),
    "less": ("less {}", "show me less {}", "I want less {}"),
    "no": ("no {}", "I do not want {}", "hide {}"),
}
HELD_OUT: Mapping[Kind, tuple[str, ...]] = {
    "more": ("plenty of {}", "I would like to see {}"),
    "only": ("exclusively {}", "{} and nothing else"),
    "less": ("not so much {}", "a bit too much {} lately"),
    "no": ("never show {}", "please leave out {}"),
}
"""Wordings that no training draws: `brewline evaluate instructions` asks with them."""
CREATOR_SHARE, TWO_SHARE, CONTRARY_SHARE = 0.15, 0.2, 0.05
"""Of the wishes that are drawn: about a creator, two categories at once, and for and against the same one."""

Answers = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Wish:
    """What a member wants of all items whose category or creator (`of`) is `value`."""

    kind: Kind
    value: str
    of: Literal["category", "creator"] = "category"


def words_of(wishes: Sequence[Wish], wordings: Mapping[Kind, tuple[str, ...]], number: int) -> str:
    """The wishes as a member says them, each in its wording of that number (counted round)."""
    patterns = [wordings[wish.kind] for wish in wishes]
    return ", ".join(pattern[number % len(pattern)].replace("{}", wish.value) for wish, pattern in zip(wishes, patterns))


def answers_with(
    wishes: Sequence[Wish], label: npt.NDArray[np.integer], category: Sequence[str], creator: Sequence[str]
) -> Answers:
    """The answers float32 [n] to a member who says these wishes, of those `label` [n] (1 or 0) to the silent one."""
    found = label.astype(np.float32)
    for wish in sorted(wishes, key=lambda one: KINDS.index(one.kind)):
        match = np.array([value == wish.value for value in (category if wish.of == "category" else creator)], bool)
        if wish.kind == "no":
            found[match] = 0
        elif wish.kind == "less":
            found[match] /= 2
        else:
            found[match] = (1 + found[match]) / 2
            if wish.kind == "only":
                found[~match] = 0
    return found


def drawn(rng: np.random.Generator, category: Sequence[str], creator: Sequence[str]) -> tuple[Wish, ...]:
    """Wishes that tell the items of a group apart; none if all of them share one category, or have none."""
    named = sorted({value for value in category if value})
    if len(set(category)) < 2 or not named:
        return ()
    roll, makers = rng.random(), sorted({value for value in creator if value})
    if roll < CREATOR_SHARE and len(makers) > 1:
        return (Wish("only", makers[rng.integers(len(makers))], "creator"),)
    first, second = rng.permutation(len(named))[[0, -1]]
    if roll >= 1 - CONTRARY_SHARE:
        return Wish("more", named[first]), Wish("no", named[first])
    if roll >= 1 - CONTRARY_SHARE - TWO_SHARE and first != second:
        return Wish("more", named[first]), Wish("no" if rng.random() < 0.5 else "less", named[second])
    return (Wish(KINDS[rng.integers(len(KINDS))], named[first]),)
