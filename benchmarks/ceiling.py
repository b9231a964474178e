"""How far could anyone take the first ten of a folder? Boosted trees order each day's popular items by everything at hand.

    python benchmarks/ceiling.py data/movietweets --days 45
    python benchmarks/ceiling.py data/movietweets --days 45 --counts frozen

Counts of ten windows and of three half-lives, rate of positive labels, age, static numbers; what the member's history was
chosen together with, likeness of words, and the member's habits: how many items they chose, how popular these are, how long
ago. Taught on the engagements of the last days before the test cut, judged on the questions of `brewline evaluate retrieval`.
A ceiling and no contender: which columns there are was decided with test windows in view. Items outside the day's popular ones
count as missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from sklearn.ensemble import HistGradientBoostingClassifier

from ranking.features import FeatureTable
from retrieval.counts import appeared
from retrieval.data.read import read_dataset
from retrieval.data.schema import DAY, MISSING_TIME, Dataset
from retrieval.evidence.protocol import Queries, cold_items, last_after_cut

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


WINDOWS = (1, 2, 3, 5, 7, 14, 30, 60, 120)
HALF_LIVES = (4.0, 15.0, 90.0)
NEWEST = 30
"""Engagements of a history that are looked at."""
KEPT = 0.35
"""Share of the items not chosen that the trees are taught."""
TOGETHER, WORDS, HABITS = 5, 4, 6
"""Columns of a pair: chosen with the member's own items, likeness of words and creator, the member's habits."""
TOGETHER_DAYS = 10
"""How long what was chosen together is not counted anew."""


@dataclass(frozen=True, eq=False)
class Log:
    """A folder's engagements, read as of any day; `most` items of each of two windows, a week and a month, are put in order."""

    dataset: Dataset
    most: int

    @cached_property
    def table(self) -> FeatureTable:
        return FeatureTable(self.dataset)

    @cached_property
    def by_member(self) -> tuple[Ints, Ints]:
        """Places in the log by member, then time, and where each member's begin."""
        log = self.dataset.engagements
        order = np.lexsort((log.timestamp, log.member))
        return order, np.searchsorted(log.member[order], np.arange(len(self.dataset.members) + 1))

    def history(self, member: int, before: int) -> tuple[Ints, Ints]:
        """Items and times of a member's engagements strictly before a time, oldest first."""
        log, (order, start) = self.dataset.engagements, self.by_member
        rows = order[start[member] : start[member + 1]]
        rows = rows[log.timestamp[rows] < before]
        return log.item[rows].astype(np.int64), log.timestamp[rows]

    @lru_cache(maxsize=4)  # noqa: B019  one log lives as long as the program
    def items(self, day: int) -> Floats:
        """Float64 [N, F]: what is known of every item before a day; first all engagements, then those of WINDOWS."""
        everything = np.arange(len(self.dataset.items))
        total = self.table.engaged.before(everything, np.full(len(everything), day))
        windows = [total - self.table.engaged.before(everything, np.full(len(everything), day - one)) for one in WINDOWS]
        log = self.dataset.engagements.before(day * DAY)
        fading = [np.bincount(log.item, 0.5 ** ((day - 1 - log.day) / half), len(everything)) for half in HALF_LIVES]
        created, first = self.dataset.items.created_at, appeared(self.dataset)
        age = np.where(first < day * DAY, day - first / DAY, np.nan)
        made = np.where(created == MISSING_TIME, np.nan, day - created / DAY)
        rate = self.table.rate("item", everything, np.full(len(everything), day))[0]
        static = [column for column in (made, *self.dataset.items.numbers.values()) if np.isfinite(column).any()]
        return np.column_stack([total, *windows, *fading, rate, age, *static])

    def popular(self, day: int) -> Ints:
        """The items that are put in order on a day."""
        known = self.items(day)
        week, month = known[:, 1 + WINDOWS.index(7)], known[:, 1 + WINDOWS.index(30)]
        return np.union1d(*(np.argsort(-one - 1e-6 * known[:, 0], kind="stable")[: self.most] for one in (week, month)))

    @lru_cache(maxsize=2)  # noqa: B019
    def together(self, before: int) -> tuple[sp.csr_matrix, Floats]:
        """How many members chose each two items before a time, [N, N], and each item, [N]."""
        log = self.dataset.engagements.before(before)
        shape = (len(self.dataset.members), len(self.dataset.items))
        met = sp.csr_matrix((np.ones(len(log)), (log.member, log.item)), shape=shape)
        met.data[:] = 1
        return (met.T @ met).tocsr(), np.asarray(met.sum(0)).ravel()

    def pairs(self, member: int, moment: int, day: int, known_until: int, offered: Ints) -> Floats:
        """Float64 [C, F] of C items for a member at a moment."""
        held, times = self.history(member, moment)
        held = held[-NEWEST:]
        chosen, alone = self.together(known_until // (TOGETHER_DAYS * DAY) * (TOGETHER_DAYS * DAY))
        both = chosen[held][:, offered].toarray()
        likely = both / (alone[held][:, None] + 5)
        alike = both / np.sqrt(alone[held][:, None] * alone[offered] + 5)
        text = self.table.text_vectors / (np.linalg.norm(self.table.text_vectors, axis=1, keepdims=True) + 1e-9)
        words = text[held] @ text[offered].T
        author = self.table.author
        own = [alike.sum(0), alike[-1], likely.max(0), likely.sum(0), likely[-1], words.max(0), words.mean(0), words[-1]]
        own += [((author[held][:, None] == author[offered]) & (author[offered] >= 0)).sum(0)]
        heat = np.log1p(self.items(day)[held][:, [0, 1 + WINDOWS.index(30)]])
        said = [len(held), heat[:, 0].mean(), heat[-1, 0], heat[:, 1].mean()]
        said += [(moment - times[-1]) / DAY, (moment - times[0]) / DAY]
        return np.column_stack([*own, np.tile(said, (len(offered), 1))])


@dataclass(frozen=True)
class Asked:
    """One question: `excluded` items are no candidates, `day` is that of the counts, `until` when knowledge ends (seconds)."""

    member: int
    moment: int
    day: int
    until: int
    targets: Ints
    excluded: Ints


def lessons(log: Log, days: int, frozen_days: int, rng: np.random.Generator) -> Iterator[Asked]:
    """First engagements of members with a history in the last days before the cut; with `frozen_days` the counts are up to so
    many days old."""
    events, cut = log.dataset.engagements, log.dataset.meta.cut_test
    rows = np.flatnonzero((events.timestamp >= cut - days * DAY) & (events.timestamp < cut))
    for row in rows[np.argsort(events.timestamp[rows], kind="stable")].tolist():
        member, item, moment = int(events.member[row]), int(events.item[row]), int(events.timestamp[row])
        held = log.history(member, moment)[0]
        if len(held) and item not in held:
            day = moment // DAY - (int(rng.integers(frozen_days)) if frozen_days else 0)
            yield Asked(member, moment, day, day * DAY, np.array([item]), held)


def questions(queries: Queries, frozen: bool) -> Iterator[Asked]:
    """The questions of the test window, in order of time."""
    for row in np.argsort(queries.timestamp, kind="stable").tolist():
        day = queries.cut // DAY if frozen else int(queries.day[row])
        member, moment = int(queries.member[row]), int(queries.timestamp[row])
        yield Asked(member, moment, day, day * DAY, queries.targets[row], queries.excluded[row])


def seen(log: Log, asked: Asked) -> tuple[Ints, Floats]:
    """The candidates [C] of a question and their features [C, F], the items' own columns first."""
    offered = log.popular(asked.day)
    offered = offered[~np.isin(offered, asked.excluded)]
    own = log.items(asked.day)[offered]
    return offered, np.hstack([own, log.pairs(asked.member, asked.moment, asked.day, asked.until, offered)])


@dataclass(frozen=True)
class Reader:
    """Trees that read some columns."""

    columns: Ints
    trees: list[Any]

    def scores(self, features: Floats) -> Floats:
        """Float64 [C]: their mean chance that an item is chosen."""
        return np.asarray(
            np.mean([tree.predict_proba(features[:, self.columns])[:, 1] for tree in self.trees], axis=0), np.float64
        )


def taught(log: Log, asked: Iterator[Asked], rng: np.random.Generator, seeds: Sequence[int]) -> dict[str, Reader]:
    """Trees that see everything, the items' numbers alone, and these with one kind of column about the member."""
    parts, labels = [], []
    for one in asked:
        offered, found = seen(log, one)
        chosen = np.isin(offered, one.targets)
        if chosen.any():
            kept = chosen | (rng.random(len(offered)) < KEPT)
            parts.append(found[kept].astype(np.float32))
            labels.append(chosen[kept])
    features, label = np.concatenate(parts), np.concatenate(labels)
    sys.stdout.write(f"taught on {len(parts):,} choices among {len(label):,} candidates\n")
    own, *kinds = np.split(
        np.arange(features.shape[1]), np.cumsum([features.shape[1] - TOGETHER - WORDS - HABITS, TOGETHER, WORDS])
    )
    sets = {"trees, everything": np.arange(features.shape[1]), "trees, the items' numbers": own}
    sets |= {f"  and {name}": np.append(own, kind) for name, kind in zip(("chosen together", "words", "habits"), kinds)}
    return {
        name: Reader(columns, [_trees(seed).fit(features[:, columns], label) for seed in seeds]) for name, columns in sets.items()
    }


def _trees(seed: int) -> Any:
    return HistGradientBoostingClassifier(
        max_iter=200, learning_rate=0.04, max_leaf_nodes=15, min_samples_leaf=200, l2_regularization=20, random_state=seed
    )


def judged(log: Log, models: dict[str, Reader], asked: Iterator[Asked], cold: npt.NDArray[np.bool_]) -> dict[str, Floats]:
    """Name -> float64 [B, 4]: recall at 10 and 100 of each question, and over its targets that are `cold` [N], NaN without."""
    found: dict[str, list[list[float]]] = {}
    for one in asked:
        offered, features = seen(log, one)
        scores = {name: reader.scores(features) for name, reader in models.items()}
        columns = {f"last {days} days": 1 + WINDOWS.index(days) for days in (7, 30)}
        columns |= {f"half-life {half:g} d": 1 + len(WINDOWS) + place for place, half in enumerate(HALF_LIVES)}
        scores |= {name: features[:, column] + 1e-6 * features[:, 0] for name, column in columns.items()}
        orders = {name: offered[np.argsort(-score, kind="stable")] for name, score in scores.items()}
        wanted = (one.targets, one.targets[cold[one.targets]])
        for name, order in orders.items():
            found.setdefault(name, []).append([_share(some, order[:k]) for some in wanted for k in (10, 100)])
        found.setdefault("any order of them", []).append([_share(some, offered) for some in wanted for _ in range(2)])
    return {name: np.array(rows) for name, rows in found.items()}


def _share(targets: Ints, listed: Ints) -> float:
    return float(np.isin(targets, listed).mean()) if len(targets) else np.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--days", type=int, default=45, help="last days before the cut whose engagements teach (45)")
    parser.add_argument("--counts", choices=("live", "frozen"), default="live")
    parser.add_argument("--most", type=int, default=150, help="most popular items of a week and of a month to put in order (150)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    dataset, rng = read_dataset(given.data), np.random.default_rng(given.seed)
    log, queries, frozen = Log(dataset, given.most), last_after_cut(dataset), given.counts == "frozen"
    span = int(queries.day.max()) - queries.cut // DAY + 1 if frozen else 0
    models = taught(log, lessons(log, given.days, span, rng), rng, (given.seed, given.seed + 1))
    sys.stdout.write(
        f"{dataset.meta.name}, {given.counts} counts, {len(queries):,} members; Recall@10 / @100, cold targets @10 / @100\n"
    )
    cold = cold_items(queries, len(dataset.items))
    for name, recall in judged(log, models, questions(queries, frozen), cold).items():
        known = [one[np.isfinite(one)] for one in recall.T]
        said = (f"{one.mean():.4f} ± {one.std() / len(one) ** 0.5:.4f}" for one in known)
        sys.stdout.write(f"  {name:28} {' / '.join(said)}\n")


if __name__ == "__main__":
    main()
