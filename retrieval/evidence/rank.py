"""From scores to lists: exact top K with a fixed order for equal scores, streamed in blocks of queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from retrieval.data.schema import Items, Members
from retrieval.evidence.protocol import EvidenceError, Queries, popularity_before_cut

DEPTH = 2000
"""How deep a list goes: what the first stage hands to the ranker."""
BLOCK_SCORES = 1 << 24
"""Scores held at once (64 MiB as float32)."""

Floats = npt.NDArray[np.float32]
Scorer = Callable[[Queries], Floats]
"""Scores [B, N] of every item for each query of a block."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Ranked:
    """B lists, best first: `rows` int32 [B, K] of Items (-1 where a list is shorter), `scores` float32 [B, K] (-inf there)."""

    rows: npt.NDArray[np.int32]
    scores: Floats


def tie_order(queries: Queries, items: int) -> npt.NDArray[np.int64]:
    """Int64 [N]: item rows in the order in which equal scores are listed: more popular before the cut first, then one
    fixed random order, the same for every model."""
    fixed = np.random.default_rng(20_131_012).permutation(items)
    return fixed[np.argsort(-popularity_before_cut(queries, items)[fixed], kind="stable")]


def top_rows(scores: Floats, depth: int, ties: npt.NDArray[np.int64] | None = None) -> Ranked:
    """Returns the best `depth` columns of each row, best first; a score of -inf is never listed.

    Equal scores are listed in the order of `ties` (default: ascending columns), also across the edge of the list, so the
    result does not depend on the sorting algorithm.
    """
    ordered = scores if ties is None else scores[:, ties]
    count = min(depth, scores.shape[1])
    columns = np.tile(np.arange(count), (len(scores), 1)) if count == scores.shape[1] else _largest(ordered, count)
    values = np.take_along_axis(ordered, columns, axis=1)
    best = np.argsort(-values, axis=1, kind="stable")
    columns, values = np.take_along_axis(columns, best, axis=1), np.take_along_axis(values, best, axis=1)
    rows = columns if ties is None else ties[columns]
    return Ranked(np.where(np.isneginf(values), -1, rows).astype(np.int32), values)


def _largest(scores: Floats, count: int) -> npt.NDArray[np.int64]:
    """Columns of the `count` largest scores of each row, ascending; of scores equal to the last one the first columns."""
    edge = np.partition(scores, -count, axis=1)[:, -count][:, None]
    chosen = scores > edge
    at_edge = scores == edge
    room = count - chosen.sum(axis=1, keepdims=True)
    chosen |= at_edge & (np.cumsum(at_edge, axis=1, dtype=np.int32) <= room)
    return np.nonzero(chosen)[1].reshape(len(scores), count)


def rank_queries(queries: Queries, score: Scorer, items: int, depth: int = DEPTH, progress: Progress | None = None) -> Ranked:
    """Returns the list of every query over the whole catalogue minus its history.

    `score` is called with blocks of queries and returns [B, N]; the block shrinks as the catalogue grows.
    """
    ties = tie_order(queries, items)
    parts = []
    done = 0
    for block, scores in scored_blocks(queries, score, items):
        parts.append(top_rows(scores, depth, ties))
        done += len(block)
        if progress is not None:
            progress(done, len(queries))
    return Ranked(np.concatenate([part.rows for part in parts]), np.concatenate([part.scores for part in parts]))


def rank_targets(queries: Queries, score: Scorer, items: int) -> npt.NDArray[np.int64]:
    """Returns int64 [T]: the place (0 = best) of each target among all candidates of its query, without making the lists.

    The same places as in the lists of `rank_queries`, at a fraction of the cost: what tuning needs.
    """
    ties = tie_order(queries, items)
    order = np.empty(items, np.int32)
    order[ties] = np.arange(items)
    return np.concatenate([_places(block, scores, order) for block, scores in scored_blocks(queries, score, items)])


def _places(block: Queries, scores: Floats, order: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    row, target = block.targets.rows, block.targets.values
    others, own = scores[row], scores[row, target][:, None]
    before = (others > own) | ((others == own) & (order < order[target][:, None]))
    return before.sum(axis=1, dtype=np.int64)


def scored_blocks(queries: Queries, score: Scorer, items: int) -> Iterator[tuple[Queries, Floats]]:
    """Yields blocks of queries with their scores [B, N], history at -inf. Raises EvidenceError on a wrong shape or NaN."""
    step = max(1, BLOCK_SCORES // max(items, 1))
    for begin in range(0, len(queries), step):
        block = queries.take(slice(begin, begin + step))
        scores = np.array(score(block), np.float32)
        if scores.shape != (len(block), items):
            raise EvidenceError(f"A scorer returned {scores.shape} for {len(block)} queries and {items} items.")
        if np.isnan(scores).any():
            raise EvidenceError(f"{int(np.isnan(scores).sum())} scores are NaN; a list cannot be ordered by them.")
        scores[block.excluded.rows, block.excluded.values] = -np.inf
        yield block, scores


def write_ranked(path: Path, ranked: Ranked, queries: Queries, members: Members, items: Items) -> None:
    """Writes one row per query: member_id, query_timestamp, item_ids and scores (lists, best first)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    listed = ranked.rows >= 0
    start = np.concatenate([[0], np.cumsum(listed.sum(axis=1))]).astype(np.int32)
    ids = pa.array(items.item_id, pa.string()).take(pa.array(ranked.rows[listed]))
    table = pa.table(
        {
            "member_id": pa.array([members.member_id[row] for row in queries.member.tolist()], pa.string()),
            "query_timestamp": pa.array(queries.timestamp, pa.int64()),
            "item_ids": pa.ListArray.from_arrays(pa.array(start), ids),
            "scores": pa.ListArray.from_arrays(pa.array(start), pa.array(ranked.scores[listed], pa.float32())),
        }
    )
    pq.write_table(table, path)
