"""How good ranked lists are, for all queries at once; every number follows from the place of each target in its list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from retrieval.evidence.intervals import Estimate, estimates, standard_error
from retrieval.evidence.protocol import Queries, cold_items, cold_members, popularity_before_cut
from retrieval.evidence.ragged import Ragged
from retrieval.evidence.rank import Ranked

CUTOFFS = (10, 100, 1000, 2000)
CURVE = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
"""Where the recall curve is read."""
SHORT_LIST = 10
LIST_FACTS = (10, 100)
_PLACES_AT_ONCE = 1 << 24

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Quality:
    """What one run achieved.

    `per_query` name -> float64 [B] in query order (for paired tests), `metrics` their means with uncertainty, `lists` facts
    about the lists themselves (coverage, popularity), `slices` name -> metric -> value, with "n" members or cold targets and
    the standard error of each recall as "recall@K error"; `curve` K -> mean recall@K; `cold` recall@K -> float64 [B] over the
    cold targets of each query, NaN where it has none (for paired tests).
    """

    per_query: dict[str, Values]
    metrics: dict[str, Estimate]
    lists: dict[str, float]
    slices: dict[str, dict[str, float]] = field(default_factory=dict)
    curve: dict[int, float] = field(default_factory=dict)
    cold: dict[str, Values] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """Everything but the columns per query, ready for JSON."""
        metrics = {name: value.as_dict() for name, value in self.metrics.items()}
        curve = {str(cutoff): value for cutoff, value in self.curve.items()}
        return {"metrics": metrics, "lists": self.lists, "slices": self.slices, "recall_curve": curve}


def target_places(rows: npt.NDArray[np.int32], targets: Ragged) -> npt.NDArray[np.int64]:
    """Returns int64 [T]: the place (0 = best) of each target in the list of its query, -1 if it is not listed."""
    places = np.full(len(targets.values), -1, np.int64)
    step = max(1, _PLACES_AT_ONCE // max(rows.shape[1], 1))
    for begin in range(0, len(places), step):
        part = slice(begin, begin + step)
        equal = rows[targets.rows[part]] == targets.values[part, None]
        places[part] = np.where(equal.any(axis=1), equal.argmax(axis=1), -1)
    return places


def per_query_values(places: npt.NDArray[np.int64], targets: Ragged, cutoffs: tuple[int, ...] = CUTOFFS) -> dict[str, Values]:
    """Returns recall@K, ndcg@10 (binary gain, ideal list of the query's own targets) and mrr, each float64 [B]."""
    values = {f"recall@{cutoff}": _recall(places, targets, cutoff) for cutoff in cutoffs}
    gain = np.where(_within(places, SHORT_LIST), 1 / np.log2(places + 2.0, where=places >= 0, out=np.ones(len(places))), 0)
    best = np.cumsum(1 / np.log2(np.arange(SHORT_LIST) + 2.0))[np.minimum(targets.lengths, SHORT_LIST) - 1]
    values[f"ndcg@{SHORT_LIST}"] = np.bincount(targets.rows, gain, len(targets)) / best
    reciprocal = np.zeros(len(targets))
    np.maximum.at(reciprocal, targets.rows, np.where(places >= 0, 1 / np.maximum(places + 1, 1), 0))
    values["mrr"] = reciprocal
    return values


def _within(places: npt.NDArray[np.int64], cutoff: int) -> npt.NDArray[np.bool_]:
    return (places >= 0) & (places < cutoff)


def _recall(places: npt.NDArray[np.int64], targets: Ragged, cutoff: int) -> Values:
    return np.bincount(targets.rows, _within(places, cutoff), len(targets)) / targets.lengths


def judge(ranked: Ranked, queries: Queries, items: int, seed: int = 0) -> Quality:
    """Returns the quality of the lists of all queries.

    A cut-off deeper than the lists is left out, unless the lists hold the whole catalogue: then nothing lies deeper.
    """
    depth = ranked.rows.shape[1]

    def readable(wanted: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(cutoff for cutoff in wanted if cutoff <= depth or depth >= items)

    cutoffs = readable(CUTOFFS)
    places = target_places(ranked.rows, queries.targets)
    per_query = per_query_values(places, queries.targets, cutoffs)
    metrics = estimates(per_query, seed)
    slices = member_slices(per_query, queries)
    slices["cold targets"] = cold_slice(places, queries, items, cutoffs)
    curve = {cutoff: float(_recall(places, queries.targets, cutoff).mean()) for cutoff in readable(CURVE)}
    cold = cold_per_query(places, queries, items, cutoffs)
    return Quality(per_query, metrics, list_facts(ranked, queries, items), slices, curve, cold)


def member_slices(per_query: Mapping[str, Values], queries: Queries) -> dict[str, dict[str, float]]:
    """Returns the mean of each metric over members with short, middling and long histories (distinct items), and over
    members first seen after the cut; each slice says its size "n", an empty one holds nothing else."""
    masks = slice_masks(queries.excluded.lengths, cold_members(queries))
    return {name: _means(per_query, mask) for name, mask in masks.items()}


def slice_masks(history: npt.NDArray[np.int64], new: npt.NDArray[np.bool_]) -> dict[str, npt.NDArray[np.bool_]]:
    """Returns which queries [B] belong to each slice, from the distinct items of their history and who is new."""
    return {
        "history < 5": history < 5,
        "history 5-20": (history >= 5) & (history <= 20),
        "history > 20": history > 20,
        "new members": new,
    }


def _means(per_query: Mapping[str, Values], mask: npt.NDArray[np.bool_]) -> dict[str, float]:
    means = {name: float(values[mask].mean()) for name, values in per_query.items()} if mask.any() else {}
    errors = {f"{name} error": standard_error(per_query[name][mask]) for name in means if name.startswith("recall")}
    return {"n": int(mask.sum()), **means, **errors}


def cold_slice(places: npt.NDArray[np.int64], queries: Queries, items: int, cutoffs: tuple[int, ...]) -> dict[str, float]:
    """Returns recall over the targets that nobody had engaged with before the cut; "n" counts targets, not members."""
    cold = places[cold_items(queries, items)[queries.targets.values]]
    found = {f"recall@{cutoff}": _within(cold, cutoff).astype(np.float64) for cutoff in cutoffs}
    return {**_means(found, np.ones(len(cold), bool)), "n": len(cold)}


def cold_per_query(places: npt.NDArray[np.int64], queries: Queries, items: int, cutoffs: tuple[int, ...]) -> dict[str, Values]:
    """Returns recall@K of each query [B] over its cold targets, NaN where it has none."""
    cold = cold_items(queries, items)[queries.targets.values]
    rows, size = queries.targets.rows[cold], len(queries)
    asked = np.bincount(rows, minlength=size)
    found = {cutoff: np.bincount(rows, _within(places[cold], cutoff), size) for cutoff in cutoffs}
    return {f"recall@{cutoff}": np.where(asked > 0, hits / np.maximum(asked, 1), np.nan) for cutoff, hits in found.items()}


def list_facts(ranked: Ranked, queries: Queries, items: int) -> dict[str, float]:
    """Returns what the top 10 and top 100 are made of: share of the catalogue ever shown, mean engagements before the cut."""
    popularity = popularity_before_cut(queries, items)
    facts = {}
    for cutoff in LIST_FACTS:
        shown = ranked.rows[:, :cutoff]
        shown = shown[shown >= 0]
        facts[f"coverage@{cutoff}"] = len(np.unique(shown)) / items
        facts[f"popularity@{cutoff}"] = float(popularity[shown].mean()) if len(shown) else 0.0
    return facts
