"""Signs that a data set knows its own future: each is a warning with numbers, never an error.

A leak makes an offline number better than the service will ever be. No check here proves one; each names what to look at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from scipy.stats import rankdata

from retrieval.data.meta import uncounted
from retrieval.data.schema import COUNT_COLUMNS, MISSING_TIME, TEST, TRAIN, Dataset

LIKE_A_TIME = (631_152_000, 4_102_444_800)
"""Seconds of 1990 to 2100: a number column that lies within is taken for a time."""
FORESEEN = 0.3
"""Partial rank correlation with test popularity, train popularity held fixed, from which a number is suspicious."""
FEWEST_ITEMS = 50
FEWEST_LABELS = 200
MOST_LEVELS = 0.5
COMMON = 0.01


@dataclass(frozen=True)
class Warned:
    """One warning: `kind` is a stable word for programs, `says` a sentence with numbers for people."""

    kind: str
    says: str


def folder_warnings(folder: Path) -> list[Warned]:
    """Columns that hold counts over the log. They are never read, but whoever else uses the files should know."""
    found = []
    for file in ("items.parquet", "members.parquet"):
        path = folder / file
        names = [name for name in pq.read_schema(path).names if name in COUNT_COLUMNS] if path.exists() else []
        if names:
            says = (
                f"{file} has counts over the log ({', '.join(names)}): an example is inside its own count, so they are not read"
            )
            found.append(Warned("count-columns", says))
    return found


def warnings_of(dataset: Dataset) -> list[Warned]:
    """What the loaded data set shows, in a fixed order."""
    checks: tuple[Callable[[Dataset], list[Warned]], ...] = (
        _uncounted, _born_late, _profile_late, _split_against_cuts, _repeated, _label_of_a_number, _foresight,
    )  # fmt: skip
    return [warning for check in checks for warning in check(dataset)] if len(dataset.events) else []


def _uncounted(dataset: Dataset) -> list[Warned]:
    """A log of which nothing counts: models would learn from text alone, and retrieval could not be judged."""
    why = uncounted(dataset)
    return [Warned("no-engagement", why)] if why else []


def _born_late(dataset: Dataset) -> list[Warned]:
    """Items whose `created_at` is after their first event."""
    events, created = dataset.events, dataset.items.created_at
    first = np.full(len(dataset.items), np.iinfo(np.int64).max)
    np.minimum.at(first, events.item, events.timestamp)
    late = int(((created != MISSING_TIME) & (first < np.iinfo(np.int64).max) & (created > first)).sum())
    if not late:
        return []
    return [Warned("created-late", f"{late:,} items have created_at after their first event: is it the time of the export?")]


def _profile_late(dataset: Dataset) -> list[Warned]:
    """Number columns of members that are times after the member's first event: the profile is younger than its examples."""
    events, found = dataset.events, []
    first = np.full(len(dataset.members), np.inf)
    np.minimum.at(first, events.member, events.timestamp)
    for name, column in dataset.members.numbers.items():
        known = column[~np.isnan(column)]
        if not len(known) or known.min() < LIKE_A_TIME[0] or known.max() > LIKE_A_TIME[1]:
            continue
        late = int((np.isfinite(first) & (column > first)).sum())
        if late:
            says = f"{late:,} members have {name} after their first event: their profile may say what they did later"
            found.append(Warned("profile-late", says))
    return found


def _split_against_cuts(dataset: Dataset) -> list[Warned]:
    """Events whose split disagrees with the cuts."""
    events, meta = dataset.events, dataset.meta
    after = int(((events.split == TRAIN) & (events.timestamp >= meta.cut_valid)).sum())
    before = int(((events.split == TEST) & (events.timestamp < meta.cut_test)).sum())
    found = []
    if after:
        found.append(Warned("train-after-cut", f"{after:,} events of the train split are not before cut_valid"))
    if before:
        found.append(Warned("test-before-cut", f"{before:,} events of the test split are before cut_test"))
    return found


def _repeated(dataset: Dataset) -> list[Warned]:
    """The same member, item, time and action more than once."""
    events = dataset.events
    order = np.lexsort((events.action, events.timestamp, events.item, events.member))
    same = np.ones(max(len(order) - 1, 0), bool)
    for column in (events.member, events.item, events.timestamp, events.action):
        same &= column[order][1:] == column[order][:-1]
    again = int(same.sum())
    if not again:
        return []
    return [Warned("repeated-events", f"{again:,} events repeat the member, item, time and action of another one")]


def _label_of_a_number(dataset: Dataset) -> list[Warned]:
    """Item numbers that settle the label alone: each value (of few) has only one label."""
    events = dataset.events
    labelled = events.take(events.label >= 0)
    if len(labelled) < FEWEST_LABELS or labelled.label.min() == labelled.label.max():
        return []
    found = []
    for name, column in dataset.items.numbers.items():
        value = column[labelled.item]
        known = ~np.isnan(value)
        levels, code = np.unique(value[known], return_inverse=True)
        label = labelled.label[known]
        # A number that is another one for each item is a name of the item, and proves nothing about labels.
        if known.mean() < MOST_LEVELS or not 1 < len(levels) <= MOST_LEVELS * len(np.unique(labelled.item[known])):
            continue
        ones, total = np.bincount(code, label), np.bincount(code)
        if np.all((ones == 0) | (ones == total)) and 0 < ones.sum() < total.sum():
            found.append(Warned("label-is-a-number", f"the label is a function of the item number {name!r}: it knows the answer"))
    return found


def _foresight(dataset: Dataset) -> list[Warned]:
    """Item numbers that tell test popularity beyond what train popularity tells: made after the test window?"""
    past, future = _popularity(dataset)
    found = []
    for name, column in dataset.items.numbers.items():
        known = ~np.isnan(column)
        if known.sum() < FEWEST_ITEMS or (future[known] > 0).sum() < FEWEST_ITEMS * COMMON:
            continue
        strength = _partial(column[known], future[known], past[known])
        if abs(strength) >= FORESEEN:
            says = (
                f"item number {name!r} goes with test popularity (partial rank correlation {strength:+.2f}, train popularity"
                " held fixed): was it counted after the test window?"
            )
            found.append(Warned("foresight", says))
    return found


def _popularity(dataset: Dataset) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Engagements per item before `cut_valid` and from `cut_test` on; float64 [N] each."""
    events, size = dataset.engagements, len(dataset.items)
    early, late = events.timestamp < dataset.meta.cut_valid, events.timestamp >= dataset.meta.cut_test
    past, future = (np.bincount(events.item[mask], minlength=size) for mask in (early, late))
    return past.astype(np.float64), future.astype(np.float64)


def _partial(one: npt.NDArray[np.float64], two: npt.NDArray[np.float64], given: npt.NDArray[np.float64]) -> float:
    """Spearman's correlation of the first two with the third held fixed; 0 where one of them does not vary."""
    ranks = [rankdata(values) for values in (one, two, given)]
    ranks = [values - values.mean() for values in ranks]
    rest = []
    for values in ranks[:2]:
        power = float(ranks[2] @ ranks[2])
        rest.append(values - ranks[2] * (float(values @ ranks[2]) / power) if power else values)
    scale = float(np.sqrt((rest[0] @ rest[0]) * (rest[1] @ rest[1])))
    return float(rest[0] @ rest[1]) / scale if scale > 1e-9 * len(one) else 0.0
