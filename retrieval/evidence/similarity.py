"""Does a vector know how popular an item is? Cosine against log popularity, the probe of arXiv 2510.14223 section 6."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from retrieval.evidence.intervals import Estimate, estimate
from retrieval.evidence.protocol import Queries
from retrieval.evidence.rank import Floats

PROBED_QUERIES, PROBED_ITEMS = 200, 2000


@dataclass(frozen=True)
class Similarity:
    """S sampled pairs of a member and a candidate: float32 [S] cosine and log(1 + engagements known at that moment).

    `pearson` and `spearman` over all pairs (the paper prints the former); `within_member` the mean Pearson of each member's own
    pairs, with its interval over members. NaN where one side does not vary.
    """

    cosine: Floats
    log_count: Floats
    pearson: float
    spearman: float
    within_member: Estimate

    def as_dict(self) -> dict[str, object]:
        """The numbers without the pairs, ready for JSON."""
        numbers = {"pairs": len(self.cosine), "pearson": self.pearson, "spearman": self.spearman}
        return {**numbers, "pearson_within_member": self.within_member.as_dict()}


class Probe:
    """Keeps the pairs of evenly spaced queries with a seeded sample of items, history left out, while lists are made."""

    def __init__(self, queries: int, items: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.items = np.sort(rng.choice(items, min(items, PROBED_ITEMS), replace=False))
        self.stride = max(1, queries // PROBED_QUERIES)
        self._seen = 0
        self._pairs: list[tuple[Floats, Floats]] = []

    def see(self, queries: Queries, members: Floats, items: Floats, moment: int) -> None:
        """Takes the pairs of a block: vectors [B, D] and [N, D], popularity as known at `moment`."""
        picked = np.flatnonzero((self._seen + np.arange(len(queries))) % self.stride == 0)
        self._seen += len(queries)
        if not len(picked):
            return
        log = queries.events
        known = log.item[: np.searchsorted(log.timestamp, moment)]
        log_count = np.log1p(np.bincount(known, minlength=len(items))[self.items]).astype(np.float32)
        cosine = _unit(members[picked]) @ _unit(items[self.items]).T
        for row, values in zip(picked.tolist(), cosine):
            candidate = ~np.isin(self.items, queries.excluded[row])
            self._pairs.append((values[candidate], log_count[candidate]))

    def found(self) -> Similarity:
        """What the pairs say; at least one block must have been seen."""
        own = np.array([correlation(*pair) for pair in self._pairs])
        cosine, log_count = (np.concatenate(side) for side in zip(*self._pairs))
        spearman = correlation(rankdata(cosine), rankdata(log_count))
        return Similarity(cosine, log_count, correlation(cosine, log_count), spearman, estimate(own[~np.isnan(own)]))


def _unit(vectors: Floats) -> Floats:
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(norm > 0, norm, 1), np.float32)


def correlation(one: npt.NDArray[np.floating], other: npt.NDArray[np.floating]) -> float:
    """Returns Pearson's correlation, NaN if a side does not vary."""
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(np.corrcoef(one.astype(np.float64), other.astype(np.float64))[0, 1])
