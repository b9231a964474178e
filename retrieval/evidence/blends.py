"""The tuned sum of simple models, and how a baseline's settings are chosen on the validation window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from retrieval.data.schema import Dataset
from retrieval.evidence.baselines import Baseline, Ease, Floats, ItemNeighbours, Knowledge, Past
from retrieval.evidence.popularity import Freshness, LivePopularity, Popularity
from retrieval.evidence.protocol import EvidenceError, Queries, last_after_cut
from retrieval.evidence.rank import Scorer, rank_targets
from retrieval.evidence.text_baselines import TfIdf

TUNED_AT = 100
"""Settings are chosen by recall at this cut-off."""
TUNING_QUERIES = 5000
BLEND_QUERIES = 1000
BLEND_WEIGHTS = (0.0, 0.3, 1.0)


@dataclass(frozen=True)
class Blend:
    """A weighted sum of collaborative, text, popularity and freshness scores, each standardised per query."""

    parts: tuple[Baseline, ...]
    weights: tuple[float, ...]
    knowledge: Knowledge

    @property
    def name(self) -> str:
        return "Blend, live" if self.knowledge == "live" else "Blend"

    @property
    def setting(self) -> str:
        return " + ".join(f"{part.name}*{weight:g}" for part, weight in zip(self.parts, self.weights))

    def fit(self, past: Past) -> Scorer:
        used = [(part.fit(past), weight) for part, weight in zip(self.parts, self.weights, strict=True) if weight]

        def score(queries: Queries) -> Floats:
            total = np.zeros((len(queries), len(past.dataset.items)), np.float32)
            for scorer, weight in used:
                total += weight * standardised(scorer(queries))
            return total

        return score


def standardised(scores: Floats) -> Floats:
    """Returns each row with mean 0 and deviation 1; a constant row becomes 0."""
    centred = scores - scores.mean(axis=1, keepdims=True)
    deviation = centred.std(axis=1, keepdims=True)
    return np.asarray(centred / np.where(deviation > 0, deviation, 1), np.float32)


def validation_recall(baseline: Baseline, past: Past, queries: Queries) -> float:
    """Returns mean recall at `TUNED_AT` on the validation queries."""
    return _recall(baseline.fit(past), queries, len(past.dataset.items))


def _recall(score: Scorer, queries: Queries, items: int) -> float:
    found = rank_targets(queries, score, items) < TUNED_AT
    return float((np.bincount(queries.targets.rows, found, len(queries)) / queries.targets.lengths).mean())


def tuned(tried: Sequence[Baseline], past: Past, queries: Queries) -> Baseline:
    """Returns the first of the tried settings with the best validation recall."""
    if len(tried) == 1:
        return tried[0]
    return max(tried, key=lambda baseline: validation_recall(baseline, past, queries))


def validation_queries(dataset: Dataset) -> Queries | None:
    """Returns the validation queries, or None if that window asks nothing."""
    try:
        return last_after_cut(dataset, "valid")
    except EvidenceError:
        return None


def untuned_blends(chosen: Sequence[Baseline], past: Past, queries: Queries | None) -> list[list[Blend]]:
    """Returns the frozen blend of the chosen baselines and the live one with each live popularity, not yet weighted."""
    collaborative = [one for one in chosen if isinstance(one, (ItemNeighbours, Ease))]
    best = collaborative[0] if queries is None else tuned(collaborative, past, queries.sample(TUNING_QUERIES))
    text = next(one for one in chosen if isinstance(one, TfIdf))
    recent = next(one for one in chosen if isinstance(one, Popularity) and one.half_life is not None)
    live = [one for one in chosen if isinstance(one, LivePopularity)]
    age = [one for one in chosen if isinstance(one, Freshness)]
    return [[_equal((best, text, recent), "frozen")], [_equal((best, text, one, *age), "live") for one in live]]


def _equal(parts: tuple[Baseline, ...], knowledge: Knowledge) -> Blend:
    return Blend(parts, (1.0,) * len(parts), knowledge)


def weighted(tried: Sequence[Blend], past: Past, queries: Queries) -> Blend:
    """Returns the blend with the weights of the grid that do best; each part is scored once."""
    row_of = {member: row for row, member in enumerate(queries.member.tolist())}
    parts = {part: standardised(part.fit(past)(queries)) for blend in tried for part in blend.parts}

    def recall(blend: Blend) -> float:
        def score(block: Queries) -> Floats:
            rows = [row_of[member] for member in block.member.tolist()]
            total = np.zeros((len(block), len(past.dataset.items)), np.float32)
            for part, weight in zip(blend.parts, blend.weights, strict=True):
                if weight:
                    total += weight * parts[part][rows]
            return total

        return _recall(score, queries, len(past.dataset.items))

    return max((replace(blend, weights=weights) for blend in tried for weights in weight_grid(len(blend.parts))), key=recall)


def weight_grid(parts: int) -> list[tuple[float, ...]]:
    """Returns all weights that differ in more than their scale: the largest is 1."""
    return [weights for weights in product(BLEND_WEIGHTS, repeat=parts) if max(weights) == max(BLEND_WEIGHTS)]
