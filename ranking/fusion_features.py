"""The numbers that late fusion sees of a candidate: what a snapshot's catalogue and the member's own history hold, no more.

One function computes them offline and in the service. Item: as-of counts and rate, static numbers. Member: their labels, how
harsh they are beside everybody else, how long ago they came. Both: what they made of the same categories and the same creator,
and retrieval's cosine. Unknown is NaN; the head has a place of its own for it.

Legend: C candidates, H history entries, F features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ranking.prompts import relations_of
from retrieval.catalog import Catalog
from retrieval.counts import NUMBERS
from retrieval.data.schema import DAY, Engagement, MemberView
from retrieval.pooled_rate import POOLED, categories_of

Floats = npt.NDArray[np.float64]
Features = npt.NDArray[np.float32]

RATE, COSINE, LABELS = "positive_rate", "retrieval", "member_labels"
ITEM = (*NUMBERS, POOLED)
MEMBER = ("member_rate", "member_residual", "member_recent", "member_strength", LABELS, "member_days")
PAIR = ("category_affinity", "category_seen", "creator_affinity", "creator_seen", "connected", COSINE)
SHRINK = 3.0
"""Entries that "nothing known" is worth where a member's opinion of a category or a creator is averaged."""
RECENT = 5
"""Newest labels that count as the member's present mood."""
NEWEST = 200
"""Newest history entries that are looked at."""


@dataclass(frozen=True)
class Facts:
    """C items at one moment: `numbers` name -> float64 [C] as-of and static, NaN unknown; `category`, `creator` [C] words."""

    numbers: Mapping[str, Floats]
    category: Sequence[str]
    creator: Sequence[str]

    def __len__(self) -> int:
        return len(self.category)


@dataclass(frozen=True)
class Asked:
    """One member before C candidates, when numbers were as of `as_of` (seconds).

    `history` [H] oldest first, and `rate` float64 [H] the positive rate of its items as of the same day (NaN unknown);
    `connected` float64 [C] 0 or 1; `cosine` float64 [C] of the first stage, NaN unknown.
    """

    as_of: int
    history: Sequence[Engagement]
    rate: Floats
    candidates: Facts
    connected: Floats
    cosine: Floats


def feature_names(static: Iterable[str]) -> tuple[str, ...]:
    """The names of F features of a folder whose items have these numbers of their own, in the columns' order."""
    return (*ITEM, *MEMBER, *PAIR, *(f"item {name}" for name in static))


def features(asked: Asked, static: Sequence[str], base: float) -> Features:
    """Returns float32 [C, F] in the order of `feature_names`; `base` is the rate of an item without labels.

    It is the pooled rate, too, of an item put in since the night: in a log each has one, so trees have learned nothing of NaN.
    """
    facts = asked.candidates
    own, opinions = _member(asked, base)
    columns = [*(facts.numbers[name] for name in NUMBERS), np.nan_to_num(facts.numbers[POOLED], nan=base)]
    columns += [np.full(len(facts), value) for value in own]
    held = [categories_of(done.item.category) for done in asked.history]
    columns += _affinity(opinions, held, list(map(categories_of, facts.category)))
    columns += _affinity(opinions, [_name(done.item.creator) for done in asked.history], list(map(_name, facts.creator)))
    columns += [asked.connected, asked.cosine, *(facts.numbers[name] for name in static)]
    return np.column_stack(columns).astype(np.float32)


def asked_of(
    view: MemberView, catalog: Catalog, rows: npt.NDArray[np.int64], static: Sequence[str], cosine: Floats | None = None
) -> Asked:
    """What the service knows of a member and C rows of tonight's catalogue, whose own numbers `static` names.

    `cosine` [C] of member and item vectors; None if nobody computed it.
    """
    history = view.history[-NEWEST:]
    known = catalog.rows([done.item.item_id for done in history])
    rate = np.full(len(history), np.nan)
    rate[known >= 0] = catalog.columns_of(known[known >= 0], [RATE], [])[RATE]
    numbers = catalog.columns_of(rows, ITEM, static)
    facts = Facts(numbers, catalog.words("category", rows), catalog.words("creator", rows))
    connected = connected_to(relations_of(view.connections, facts.creator))
    said = np.full(len(rows), np.nan) if cosine is None else np.asarray(cosine, np.float64)
    return Asked(catalog.as_of, history, rate, facts, connected, said)


def connected_to(relations: Sequence[str]) -> Floats:
    """Float64 [C]: 1 where the member has a connection to the item's creator."""
    return np.array([bool(relation) for relation in relations], np.float64)


def _name(creator: str) -> tuple[str, ...]:
    return (creator,) if creator else ()


def _member(asked: Asked, base: float) -> tuple[list[float], dict[int, float]]:
    """The member's own numbers (`MEMBER`), and by place in the history how each labelled entry differs from what was to be
    expected of that item and that member."""
    rows = [row for row, done in enumerate(asked.history) if done.label is not None]
    label = np.array([asked.history[row].label for row in rows], np.float64)
    residual = label - np.nan_to_num(asked.rate[rows], nan=base)
    mean = _shrunk(residual)
    strength = [value for done in asked.history if (value := _strength(done.action)) is not None]
    ago = (asked.as_of // DAY * DAY - asked.history[-1].timestamp) / DAY if asked.history else np.nan
    own = [
        base + _shrunk(label - base),
        mean,
        _shrunk(residual[-RECENT:]),
        float(np.mean(strength)) if strength else np.nan,
        float(len(label)),
        float(np.maximum(ago, 0.0)),
    ]
    return own, dict(zip(rows, (residual - mean).tolist()))


def _shrunk(values: Floats) -> float:
    return float(values.sum() / (len(values) + SHRINK))


def _strength(action: str) -> float | None:
    """The number that an action carries after its colon ("rating:7")."""
    _, _, value = action.partition(":")
    try:
        return float(value)
    except ValueError:
        return None


def _affinity(opinions: Mapping[int, float], held: Sequence[Sequence[str]], offered: Sequence[Sequence[str]]) -> list[Floats]:
    """Two float64 [C]: mean over a candidate's words of the member's shrunken opinion, and of the entries that it rests on."""
    total, count = dict[str, float](), dict[str, int]()
    for row, value in opinions.items():
        for word in held[row]:
            total[word] = total.get(word, 0.0) + value
            count[word] = count.get(word, 0) + 1
    known: dict[Sequence[str], tuple[float, float]] = {(): (0.0, 0.0)}
    for words in offered:
        if words not in known:
            liked = sum(total.get(word, 0.0) / (count.get(word, 0) + SHRINK) for word in words)
            known[words] = (liked / len(words), sum(count.get(word, 0) for word in words) / len(words))
    found = np.array([known[words] for words in offered], np.float64).reshape(-1, 2)
    return [found[:, 0], found[:, 1]]
