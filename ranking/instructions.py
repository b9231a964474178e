"""Whether a member's own words steer the order: the same member, the same items, with an instruction and without.

As served, with the wishes that are obeyed by rule (`ranking.wishes`), or what the ranker makes of the words alone.

Each member is asked about the same random items of the catalogue as of the test cut. The number is the rise of the items that
the instruction is about: their mean place with it less their mean place without, 1 being from the bottom of the list to its top.
"More" and "only" should rise, "less" and "no" fall, and "more X, no X" fall (`ranking.learn.wishes`: the stricter word counts).

Legend: S items of one list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata, spearmanr

from index.errors import BrewlineError
from ranking.fusion_rows import FeatureRows
from ranking.learn.batches import GroupWriter
from ranking.learn.examples import SAMPLED, Pool
from ranking.learn.wishes import HELD_OUT, TAUGHT, Wish, words_of
from ranking.ranker import Ranker
from ranking.wishes import Kind, obey, topics_of
from retrieval.counts import appeared
from retrieval.data.schema import DAY, Dataset
from retrieval.evidence.intervals import Estimate, estimate

MEMBERS, LISTED = 100, 60
LEAST = 2
"""Items of the wished category that a list must hold, and items of other categories."""

Floats = npt.NDArray[np.float64]


class NoCategories(BrewlineError):
    """Instructions are about categories, and the items of a folder have none, or all the same."""


@dataclass(frozen=True)
class Condition:
    """One kind of instruction in one set of wordings; `against`: about the category that the member's past speaks against."""

    name: str
    kinds: tuple[Kind, ...]
    wordings: Mapping[Kind, tuple[str, ...]]
    against: bool = False

    @property
    def rises(self) -> bool:
        """Whether the items it is about should go up."""
        return self.kinds[-1] in ("more", "only")


CONDITIONS = (
    *(Condition(f"{kind} X", (kind,), TAUGHT) for kind in TAUGHT),
    *(Condition(f"{kind} X, held-out words", (kind,), HELD_OUT) for kind in TAUGHT),
    Condition("more X, no X", ("more", "no"), TAUGHT),
    Condition("more X, no X, held-out words", ("more", "no"), HELD_OUT),
    Condition("more X, against the past", ("more",), TAUGHT, against=True),
    Condition("no X, against the past", ("no",), TAUGHT, against=True),
)


@dataclass(frozen=True)
class Followed:
    """What one condition did over `members`: the rise (-1 to 1), the share of members for whom it had the wished sign, and how
    alike the other items' order stayed (mean Spearman correlation)."""

    name: str
    wished: str
    members: int
    rise: Estimate
    right: float
    order_kept: float

    def as_dict(self) -> dict[str, object]:
        """The result ready for JSON."""
        facts = {"name": self.name, "wished": self.wished, "members": self.members, "rise": self.rise.as_dict()}
        return {**facts, "right_share": self.right, "order_kept": self.order_kept}


@dataclass(frozen=True)
class List:
    """One member's list: rows int64 [S], categories, and what the past says of each category (engagements less dislikes)."""

    member: int
    rows: npt.NDArray[np.int64]
    category: list[str]
    past: Mapping[str, int]

    def about(self, condition: Condition, rng: np.random.Generator) -> str:
        """The category that an instruction is about; "" if this list has none that fits."""
        counted = {name: self.category.count(name) for name in sorted(set(self.category)) if name}
        fits = [name for name, count in counted.items() if LEAST <= count <= len(self.category) - LEAST]
        if condition.against and condition.rises:
            fits = [name for name in fits if self.past.get(name, 0) <= 0]
        elif condition.against:
            most = max(self.past.values(), default=0)
            fits = [name for name in fits if self.past.get(name, 0) == most > 0]
        return fits[rng.integers(len(fits))] if fits else ""


def follow(
    dataset: Dataset,
    ranker: Ranker,
    members: int = MEMBERS,
    listed: int = LISTED,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    *,
    rules: bool = True,
) -> list[Followed]:
    """Returns what each of CONDITIONS does to the served order of a ranker's first task; without `rules` what its words alone
    do. Raises NoCategories."""
    if len({name for name in dataset.items.category if name}) < 2:
        raise NoCategories(
            f"{dataset.meta.name}: instructions are about categories, and items.parquet has fewer than two of them"
        )
    score = _scorer(dataset, ranker, rules)
    rng, found = np.random.default_rng([seed, 21]), {one.name: list[tuple[float, float]]() for one in CONDITIONS}
    lists = list(_lists(dataset, members, listed, rng))
    for number, one in enumerate(lists):
        plain = score(one, "")
        for condition in CONDITIONS:
            about = one.about(condition, rng)
            if about:
                wish = words_of([Wish(kind, about) for kind in condition.kinds], condition.wordings, int(rng.integers(1 << 16)))
                found[condition.name].append(_moved(plain, score(one, wish), np.array([name == about for name in one.category])))
        if progress is not None:
            progress(number + 1, len(lists))
    return [_followed(condition, found[condition.name]) for condition in CONDITIONS]


def _followed(condition: Condition, moved: Sequence[tuple[float, float]]) -> Followed:
    rise, kept = (np.array(column, np.float64) for column in zip(*moved)) if moved else (np.zeros(0), np.zeros(0))
    right = float(((rise > 0) == condition.rises)[rise != 0].sum() / len(rise)) if len(rise) else float("nan")
    order = float(kept[np.isfinite(kept)].mean()) if np.isfinite(kept).any() else float("nan")
    return Followed(condition.name, "up" if condition.rises else "down", len(rise), estimate(rise), right, order)


def _moved(plain: Floats, wished: Floats, match: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """How far the matching items rose, and how alike the order of the others stayed."""
    before, after = ((rankdata(scores) - 1) / (len(scores) - 1) for scores in (plain, wished))
    others = ~match
    same = len(np.unique(plain[others])) < 2 or len(np.unique(wished[others])) < 2
    kept = float("nan") if same else float(spearmanr(plain[others], wished[others]).statistic)
    return float(after[match].mean() - before[match].mean()), kept


def _lists(dataset: Dataset, members: int, listed: int, rng: np.random.Generator) -> Iterator[List]:
    """A random list for each of some members, those with a past before the cut first: an instruction meets a taste."""
    cut, log = dataset.meta.cut_test, dataset.engagements.before(dataset.meta.cut_test)
    there = np.flatnonzero(appeared(dataset) < cut)
    there = there if len(there) else np.arange(len(dataset.items))
    order = rng.permutation(len(dataset.members))
    known = np.bincount(log.member, minlength=len(dataset.members)) > 0
    chosen = np.concatenate([order[known[order]], order[~known[order]]])[:members]
    for member in chosen.tolist():
        rows = rng.permutation(there)[:listed].astype(np.int64)
        past: dict[str, int] = {}
        for at in np.flatnonzero(log.member == member).tolist():
            name = dataset.items.category[int(log.item[at])]
            past[name] = past.get(name, 0) + (-1 if log.label[at] == 0 else 1)
        yield List(member, rows, [dataset.items.category[row] for row in rows.tolist()], past)


def _scorer(dataset: Dataset, ranker: Ranker, rules: bool) -> Callable[[List, str], Floats]:
    """Scores float64 [S] of a list for a wish, as of the test cut: those that the service orders by."""
    cut, task, items = dataset.meta.cut_test, next(iter(ranker.tasks.values())), dataset.items
    writer = GroupWriter(dataset, ranker.prompts, ranker.tasks, cut)
    head = ranker.head if ranker.fuses(task.name) else None
    features = None if head is None else FeatureRows(dataset, cut, head.base, head.static)

    def score(one: List, wish: str) -> Floats:
        day = np.full(len(one.rows), cut // DAY)
        relations = writer.relations(one.member, one.rows, cut)
        prefix = writer.prefix(one.member, cut, task, wish if ranker.facts.reads_wishes or not rules else "")
        logits = ranker.logits(prefix, writer.item_rows(one.rows, day), task.name, relations)
        if head is None or features is None:
            said = ranker.text_probabilities(logits, task.name)
        else:
            said = head.probabilities(logits, features.of(_pool(task.name, one, cut), [0]))
        if rules:
            topics = [topics_of(items.category[row], items.creator[row]) for row in one.rows.tolist()]
            said, _ = obey(wish, said, topics)
        return said.astype(np.float64)

    return score


def _pool(task: str, one: List, cut: int) -> Pool:
    """The list as the single group of a pool."""
    size = len(one.rows)
    return Pool(
        task=task,
        member=np.array([one.member]),
        moment=np.array([cut]),
        start=np.array([0, size]),
        item=one.rows,
        day=np.full(size, cut // DAY),
        event=np.full(size, SAMPLED),
        label=np.zeros(size, np.int8),
    )
