"""What is fitted before any weight moves: number boundaries and a tokenizer, from training data only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from index.errors import BrewlineError
from retrieval.counts import NUMBERS, Counts, appeared
from retrieval.data.schema import DAY, Dataset
from retrieval.features import Kind, Quantizer
from retrieval.learn.sessions import MADE_UP
from retrieval.learn.timeline import Timeline
from retrieval.prompts import MAX_FIELD_CHARS, special_tokens
from retrieval.tokens import Tokens
from retrieval.writer import Budgets

SAMPLE = 50_000
"""Values per number field that boundaries are fitted on."""
TEXTS = 200_000
"""Texts of each kind that a new tokenizer learns from."""
MOST_ENTRY = 32
"""Tokens of a history entry, at most, where histories are short enough to leave it more."""


class NothingToLearn(BrewlineError):
    """The data folder has nothing that this model could be trained on."""


def fit_quantizer(dataset: Dataset, before: int, kind: Kind, seed: int) -> Quantizer:
    """Boundaries of the as-of and static numbers, half from engaged items at the moment of engagement, half from the catalogue.

    A percentile over the catalogue alone spends most buckets on items that nobody asks for, one over engagements alone cannot
    tell the tail apart. Only items that had appeared before `before` count, and a random one only on a day on which it had.
    Fields without two different known values are left out: they would cost a token and say nothing.
    """
    rng = np.random.default_rng([seed, 1])
    rows = known_items(dataset, before)
    values = {name: np.asarray(column, np.float64)[rows] for name, column in dataset.items.numbers.items()}
    timeline = Timeline.of(dataset, before)
    if len(timeline) and MADE_UP not in dataset.meta.extra:
        engaged = rng.permutation(len(timeline))[: SAMPLE // 2]
        other = rows[rng.integers(0, len(rows), len(engaged))]
        there = appeared(dataset)[other] // DAY <= timeline.day[engaged]
        item = np.concatenate([timeline.item[engaged], other[there]])
        day = np.concatenate([timeline.day[engaged], timeline.day[engaged][there]])
        asof = Counts.from_dataset(dataset, before).at(item, day)
        values = {name: asof[name] for name in NUMBERS} | values
    known = {name: column[np.isfinite(column)] for name, column in values.items()}
    return Quantizer.fit({name: column for name, column in known.items() if len(np.unique(column)) > 1}, kind)


def fit_tokens(dataset: Dataset, before: int, quantizer: Quantizer, vocabulary: int, extra: tuple[str, ...] = ()) -> Tokens:
    """A tokenizer learned from the members and the items known before a time; `extra` words become single tokens.

    Raises NothingToLearn if no item has any text.
    """
    specials = [*special_tokens(quantizer), *extra]
    if not any(map(str.strip, dataset.items.title)) and not any(map(str.strip, dataset.items.text)):
        raise NothingToLearn(f"{dataset.meta.name}: no item has a title or a text; a model that reads needs words")
    return Tokens.train(_texts(dataset, before), vocabulary + len(specials), specials)


def base_tokens(path: str, quantizer: Quantizer, extra: tuple[str, ...] = ()) -> Tokens:
    """The tokenizer of a checkpoint with the field tokens added."""
    tokens = Tokens.load(Path(path))
    tokens.add([*special_tokens(quantizer), *extra])
    return tokens


def known_items(dataset: Dataset, before: int) -> npt.NDArray[np.int64]:
    """Rows of the items that had appeared strictly before a time (seconds); all rows where the folder knows no time at all."""
    return np.flatnonzero(appeared(dataset) < before)


def _texts(dataset: Dataset, before: int) -> Iterator[str]:
    items, rows = dataset.items, known_items(dataset, before)
    for row in rows[:: max(1, len(rows) // TEXTS)].tolist():
        for text in (items.title[row], items.category[row], items.creator[row], items.text[row]):
            if text:
                yield text[:MAX_FIELD_CHARS]
    for name, column in dataset.members.profile.items():
        for text in column[:: max(1, len(column) // TEXTS)]:
            if text:
                yield f"{name}: {text[:MAX_FIELD_CHARS]}"
    if dataset.connections is not None:
        yield from sorted(set(dataset.connections.kind))


def fit_entries(dataset: Dataset, before: int, budgets: Budgets) -> Budgets:
    """The budgets with as much room for a history entry as the median history before a time leaves it, at most MOST_ENTRY.

    Where that is more than the entry had, it shows the whole item (creator and text behind title and category) and not just what
    it is called: with three entries in a history each can be read closely, with fifty more of them say more.
    """
    earlier = Timeline.of(dataset, before).earlier
    if not (earlier > 0).any():
        return budgets
    room = (budgets.member - budgets.profile) // max(1, int(np.median(earlier[earlier > 0])))
    entry = min(room, MOST_ENTRY)
    return replace(budgets, entry=entry, whole_entries=True) if entry > budgets.entry else budgets
