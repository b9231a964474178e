"""Answered examples in a prompt: what other members made of some items, for members of whom little is known.

An example is an item's words and the answer to the task's question, without the member who gave it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from index.errors import BrewlineError


class ShotsError(BrewlineError):
    """Examples that a folder holds cannot be read, or so many of them were asked for as no prompt can show."""


MOST = 16
"""Examples of one prompt."""


@dataclass(frozen=True, slots=True)
class Shot:
    """One item in words, and whether the answer was the positive one."""

    title: str
    category: str
    positive: bool


Shots = Mapping[str, tuple[Shot, ...]]
"""Task -> its examples in the order in which prompts show them."""


def shots_facts(shots: Shots) -> dict[str, list[dict[str, Any]]]:
    """The examples as JSON can hold them."""
    return {task: [asdict(shot) for shot in found] for task, found in shots.items()}


def shots_of(facts: Mapping[str, Sequence[Mapping[str, Any]]]) -> Shots:
    """The examples that `facts` described. Raises ShotsError."""
    try:
        found = {task: tuple(Shot(**shot) for shot in some) for task, some in facts.items()}
    except (TypeError, AttributeError) as error:
        raise ShotsError(f"examples need title, category and positive ({error}); train the ranker again") from error
    for some in found.values():
        if not all(isinstance(one.title, str) and isinstance(one.category, str) for one in some) or len(some) > MOST:
            raise ShotsError(f"examples are words, at most {MOST} for a task; train the ranker again")
    return found


def check_shots(count: int) -> int:
    """The same number, if a prompt may show so many examples. Raises ShotsError."""
    if not 0 <= count <= MOST:
        raise ShotsError(f"{count} examples were asked for; expected 0 to {MOST}")
    return count
