"""The gates between a written snapshot and a published one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from index.build import sample_queries, sample_rows, summarise
from index.errors import BrewlineError
from index.hits import Hits, Vectors
from index.manifest import SnapshotTorn
from index.serving import exact_twin
from index.shards import as_built, by_hash
from index.snapshot import Snapshot

_BLOCK_ROWS = 65_536


class GateFailed(BrewlineError):
    """A snapshot must not be published; the message lists every gate that failed."""


@dataclass(frozen=True, slots=True)
class GateSettings:
    """What a snapshot must be to be published. Ratios compare its count with the snapshot published before it."""

    min_ratio: float = 0.5
    max_ratio: float = 2.0
    norm_tolerance: float = 1e-3
    self_samples: int = 500
    min_self: float = 0.99
    recall_k: int = 2_000
    recall_queries: int = 64
    min_recall: float = 0.9
    tie_tolerance: float = 1e-5
    seed: int = 1


@dataclass(frozen=True, slots=True)
class GateResult:
    """One gate: what was seen, what was expected, and whether they agree."""

    name: str
    passed: bool
    seen: str
    expected: str


def run_gates(
    snapshot: Snapshot,
    previous: Snapshot | None,
    settings: GateSettings | None = None,
    *,
    queries: Vectors | None = None,
) -> list[GateResult]:
    """Every gate's result is returned; nothing is raised for a gate that fails, see `require_gates`.

    `queries` [Q, D] are real query vectors for the recall gate; without them sampled rows of the snapshot are asked.
    A snapshot that is torn or holds NaN is not searched: the later gates are then reported as not run, and failed.
    """
    settings = settings or GateSettings()
    results = [_checksums(snapshot), _count(snapshot, previous, settings)]
    if not results[0].passed:
        return results + [_not_run(name) for name in ("finite", "norms", "ids", "self-retrieval", "recall")]
    results += [*_numbers(snapshot, settings), _ids(snapshot), *_shards(snapshot)]
    if not all(one.passed for one in results if one.name in ("finite", "shards")) or snapshot.manifest.count == 0:
        return results + [_not_run(name) for name in ("self-retrieval", "recall")]
    return [*results, _self_retrieval(snapshot, settings), _recall(snapshot, settings, queries)]


def require_gates(results: list[GateResult]) -> None:
    """Every gate passed. Raises GateFailed, which lists those that did not."""
    failed = [f"{one.name}: saw {one.seen}, expected {one.expected}" for one in results if not one.passed]
    if failed:
        raise GateFailed(f"{len(failed)} of {len(results)} gates failed, nothing is published: " + "; ".join(failed))


def _not_run(name: str) -> GateResult:
    return GateResult(name, False, "not run", "an earlier gate to pass")


def _checksums(snapshot: Snapshot) -> GateResult:
    files = snapshot.manifest.files
    expected = f"{len(files)} files as the manifest states"
    try:
        snapshot.verify()
    except SnapshotTorn as error:
        return GateResult("checksums", False, str(error), expected)
    return GateResult("checksums", True, f"{len(files)} files, {sum(f.bytes for f in files.values())} bytes", expected)


def _count(snapshot: Snapshot, previous: Snapshot | None, settings: GateSettings) -> GateResult:
    count = snapshot.manifest.count
    before = previous.manifest.count if previous is not None else 0
    if before == 0:
        return GateResult("count", count > 0, f"{count}", "at least 1 (compared with no other night)")
    low, high = before * settings.min_ratio, before * settings.max_ratio
    expected = f"{settings.min_ratio:g} to {settings.max_ratio:g} times the {before} before"
    return GateResult("count", count > 0 and low <= count <= high, f"{count}", expected)


def _blocks(vectors: Vectors) -> Iterator[Vectors]:
    for start in range(0, len(vectors), _BLOCK_ROWS):
        yield vectors[start : start + _BLOCK_ROWS]


def _numbers(snapshot: Snapshot, settings: GateSettings) -> list[GateResult]:
    broken, odd, worst = 0, 0, 0.0
    for block in (block for shard in snapshot.shards for block in _blocks(shard.vectors)):
        finite = np.isfinite(block).all(axis=1)
        away = np.abs(np.linalg.norm(block[finite].astype(np.float64), axis=1) - 1)
        broken += int(np.count_nonzero(~finite))
        odd += int(np.count_nonzero(away > settings.norm_tolerance))
        worst = max(worst, float(away.max(initial=0.0)))
    tolerance = f"norms within {settings.norm_tolerance:g} of 1"
    return [
        GateResult("finite", broken == 0, f"{broken} vectors with NaN or infinity", "0"),
        GateResult("norms", odd == 0, f"{odd} vectors away from norm 1, the worst by {worst:.3g}", tolerance),
    ]


def _ids(snapshot: Snapshot) -> GateResult:
    twice = snapshot.ids.duplicates()
    named = f" ({', '.join(repr(one[:40]) for one in twice[:3])})" if twice else ""
    return GateResult("ids", not twice, f"{len(twice)} ids in more than one row{named}", "each id once")


def _shards(snapshot: Snapshot) -> list[GateResult]:
    """Nothing of a snapshot that is not divided. An item of another shard would move at the next night, or be there twice."""
    counts = snapshot.manifest.shards
    if not counts:
        return []
    named = by_hash(list(snapshot.ids), len(counts))
    wrong = sum(len(np.setxor1d(shard.rows, rows)) for shard, rows in zip(snapshot.shards, named))
    seen = f"{len(counts)} shards of {min(counts)} to {max(counts)} items, {wrong} rows missing or in another's place"
    return [GateResult("shards", wrong == 0, seen, "every item in the shard that the hash of its id names")]


def _self_retrieval(snapshot: Snapshot, settings: GateSettings) -> GateResult:
    """An item's own vector finds the item, or one that lies as near (two listings of the same text are one vector)."""
    asked = _sampled(snapshot, settings.self_samples, settings.seed)
    hits: Hits = as_built(snapshot).search(asked, 1)
    found = snapshot.vectors_at(hits.rows[:, 0])
    own = np.einsum("qd,qd->q", asked, asked)
    share = float(np.mean(np.einsum("qd,qd->q", asked, found) >= own - settings.tie_tolerance))
    seen = f"{share:.4f} of {len(asked)} vectors find themselves"
    return GateResult("self-retrieval", share >= settings.min_self, seen, f"at least {settings.min_self:g}")


def _recall(snapshot: Snapshot, settings: GateSettings, queries: Vectors | None) -> GateResult:
    source = "items" if queries is None else "members"
    wanted = settings.recall_queries, settings.seed
    asked = _sampled(snapshot, *wanted) if queries is None else sample_queries(queries, *wanted)
    k = min(settings.recall_k, snapshot.manifest.count)
    found, true = as_built(snapshot).search(asked, k), exact_twin(snapshot).search(asked, k)
    # Only what was found is gathered: the vectors of a divided snapshot stand in no one place.
    met, places = np.unique(found.rows, return_inverse=True)
    seen_rows = Hits(places.reshape(found.rows.shape), found.scores, found.counts)
    recall = summarise(snapshot.vectors_at(np.maximum(met, 0)), asked, seen_rows, true, source)
    seen = f"recall@{k} {recall.mean:.4f} (5th percentile {recall.p5:.4f}) on {recall.queries} {source}"
    return GateResult("recall", recall.mean >= settings.min_recall, seen, f"at least {settings.min_recall:g}")


def _sampled(snapshot: Snapshot, wanted: int, seed: int) -> Vectors:
    """Some of the snapshot's own vectors, as float32 [Q, D]."""
    return np.asarray(snapshot.vectors_at(sample_rows(snapshot.manifest.count, wanted, seed)), np.float32)
