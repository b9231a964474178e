"""Metrics against ir-measures and against numbers worked out by hand; lists against a full sort."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from retrieval.data.schema import Dataset
from retrieval.evidence.intervals import estimate, paired_differences
from retrieval.evidence.metrics import judge, member_slices, per_query_values, target_places
from retrieval.evidence.protocol import EvidenceError, last_after_cut
from retrieval.evidence.ragged import Ragged
from retrieval.evidence.rank import Ranked, rank_queries, rank_targets, tie_order, top_rows, write_ranked


def test_metrics_equal_those_of_ir_measures() -> None:
    ir_measures = pytest.importorskip("ir_measures")
    rng = np.random.default_rng(1)
    queries, items, depth = 40, 300, 120
    rows = np.stack([rng.permutation(items)[:depth] for _ in range(queries)]).astype(np.int32)
    sizes = rng.integers(1, 15, queries)
    drawn = [rng.permutation(items)[:size] for size in sizes]
    targets = Ragged.from_pairs(np.repeat(np.arange(queries), sizes), np.concatenate(drawn), queries)
    values = per_query_values(target_places(rows, targets), targets, (10, 100))

    judged = [ir_measures.Qrel(str(q), str(item), 1) for q in range(queries) for item in targets[q].tolist()]
    run = [
        ir_measures.ScoredDoc(str(q), str(item), float(depth - place))
        for q in range(queries)
        for place, item in enumerate(rows[q].tolist())
    ]
    measures = {"recall@10": "R@10", "recall@100": "R@100", "ndcg@10": "nDCG@10", "mrr": "RR"}
    parsed = {name: ir_measures.parse_measure(text) for name, text in measures.items()}
    theirs = {name: np.full(queries, np.nan) for name in measures}
    names = {str(measure): name for name, measure in parsed.items()}
    for found in ir_measures.iter_calc(list(parsed.values()), judged, run):
        theirs[names[str(found.measure)]][int(found.query_id)] = found.value
    for name in measures:
        np.testing.assert_allclose(values[name], theirs[name], atol=1e-9, err_msg=name)


def test_metrics_by_hand() -> None:
    rows = np.array([[4, 2, 0], [1, 0, -1]], np.int32)
    targets = Ragged.from_pairs(np.array([0, 0, 1]), np.array([2, 3, 5]), 2)
    places = target_places(rows, targets)
    assert places.tolist() == [1, -1, -1]
    values = per_query_values(places, targets, (10,))
    assert values["recall@10"].tolist() == [0.5, 0.0]
    assert values["mrr"].tolist() == [0.5, 0.0]
    np.testing.assert_allclose(values["ndcg@10"], [(1 / np.log2(3)) / (1 + 1 / np.log2(3)), 0])


@pytest.mark.parametrize("depth", [1, 7, 50])
def test_lists_equal_a_full_stable_sort_also_with_many_ties(depth: int) -> None:
    rng = np.random.default_rng(depth)
    scores = rng.integers(0, 4, (20, 50)).astype(np.float32)
    scores[:, :5] = -np.inf
    ties = rng.permutation(50)
    ranked = top_rows(scores, depth, ties)
    for row in range(20):
        order = ties[np.argsort(-scores[row, ties], kind="stable")][:depth]
        expected = np.where(np.isneginf(scores[row, order]), -1, order)
        assert ranked.rows[row].tolist() == expected.tolist()


def test_ranking_leaves_out_the_history_and_agrees_with_the_places_used_for_tuning(tiny_dataset: Dataset) -> None:
    queries = last_after_cut(tiny_dataset)
    items = len(tiny_dataset.items)
    noise = np.random.default_rng(0).integers(0, 3, (len(tiny_dataset.members), items)).astype(np.float32)
    ranked = rank_queries(queries, lambda block: noise[block.member], items)
    for row in range(len(queries)):
        listed = ranked.rows[row][ranked.rows[row] >= 0].tolist()
        assert sorted([*listed, *queries.excluded[row].tolist()]) == list(range(items))
    places = rank_targets(queries, lambda block: noise[block.member], items)
    assert places.tolist() == target_places(ranked.rows, queries.targets).tolist()


def test_scores_that_are_no_numbers_are_refused(tiny_dataset: Dataset) -> None:
    queries = last_after_cut(tiny_dataset)
    items = len(tiny_dataset.items)
    with pytest.raises(EvidenceError, match="NaN"):
        rank_queries(queries, lambda block: np.full((len(block), items), np.nan, np.float32), items)
    with pytest.raises(EvidenceError, match="returned"):
        rank_queries(queries, lambda block: np.zeros((len(block), 3), np.float32), items)


def test_perfect_lists_score_one_in_every_slice(tiny_dataset: Dataset) -> None:
    queries = last_after_cut(tiny_dataset)
    items = len(tiny_dataset.items)
    perfect = np.zeros((len(queries), items), np.float32)
    perfect[queries.targets.rows, queries.targets.values] = 1
    row_of = {member: row for row, member in enumerate(queries.member.tolist())}
    ranked = rank_queries(queries, lambda block: perfect[[row_of[m] for m in block.member.tolist()]], items)
    quality = judge(ranked, queries, items)
    assert {name: metric.value for name, metric in quality.metrics.items()} == dict.fromkeys(quality.metrics, 1.0)
    assert sum(quality.slices[name]["n"] for name in ("history < 5", "history 5-20", "history > 20")) == len(queries)
    assert all(slice_["recall@10"] == 1 for slice_ in quality.slices.values() if slice_["n"])


def test_a_cutoff_deeper_than_the_lists_is_left_out(tiny_dataset: Dataset) -> None:
    queries = last_after_cut(tiny_dataset)
    rows = np.zeros((len(queries), 20), np.int32)
    quality = judge(Ranked(rows, rows.astype(np.float32)), queries, items=60)
    assert "recall@10" in quality.metrics
    assert "recall@100" not in quality.metrics
    assert list(quality.curve) == [1, 2, 5, 10, 20]


def test_the_curve_and_the_slices_are_read_from_the_same_places(tiny_dataset: Dataset) -> None:
    queries = last_after_cut(tiny_dataset)
    items = len(tiny_dataset.items)
    noise = np.random.default_rng(3).random((len(tiny_dataset.members), items)).astype(np.float32)
    ranked = rank_queries(queries, lambda block: noise[block.member], items)
    quality = judge(ranked, queries, items)
    assert quality.curve[10] == quality.metrics["recall@10"].value
    assert list(quality.curve.values()) == sorted(quality.curve.values())
    assert 0 < quality.curve[5] < quality.curve[20] < quality.curve[2000] == 1
    length = queries.excluded.lengths
    long = quality.per_query["recall@10"][length > 20]
    middle = quality.per_query["recall@10"][(length >= 5) & (length <= 20)]
    found = quality.slices["history 5-20"]
    assert (found["recall@10"], found["n"]) == (middle.mean(), len(middle))
    np.testing.assert_allclose(found["recall@10 error"], middle.std(ddof=1) / np.sqrt(len(middle)))
    assert quality.slices["history > 20"]["n"] == len(long)
    first_seen = [queries.events.timestamp[queries.history[row][0]] for row in range(len(queries))]
    assert quality.slices["new members"]["n"] == sum(moment >= queries.cut for moment in first_seen)


def test_every_slice_holds_its_members_and_no_other(tiny_dataset: Dataset) -> None:
    """Histories of 4, 5, 20 and 21 items by turns, and a cut before which half of the members did nothing."""
    queries = last_after_cut(tiny_dataset)
    size = len(queries)
    lengths = np.resize([4, 5, 20, 21], size)
    start = np.concatenate([[0], np.cumsum(lengths)])
    oldest = queries.events.timestamp[queries.history.values[queries.history.start[:-1]]]
    cut = int(np.median(oldest)) + 1
    asked = replace(queries, excluded=Ragged(start, np.zeros(start[-1], np.int64)), cut=cut)
    values = {"recall@10": np.arange(size, dtype=np.float64)}
    slices = member_slices(values, asked)
    for name, members in {
        "history < 5": lengths == 4,
        "history 5-20": (lengths == 5) | (lengths == 20),
        "history > 20": lengths == 21,
        "new members": oldest >= cut,
    }.items():
        assert 0 < members.sum() < size
        assert (slices[name]["n"], slices[name]["recall@10"]) == (members.sum(), values["recall@10"][members].mean())


def test_what_is_recommended_is_counted(tiny_dataset: Dataset) -> None:
    """Everybody is shown items 0..9 in a turned order: ten of sixty items, with their own mean popularity."""
    queries = last_after_cut(tiny_dataset)
    rows = np.stack([np.roll(np.arange(10), row) for row in range(len(queries))]).astype(np.int32)
    facts = judge(Ranked(rows, rows.astype(np.float32)), queries, items=60).lists
    known = tiny_dataset.engagements.before(tiny_dataset.meta.cut_test)
    assert facts["coverage@10"] == facts["coverage@100"] == 10 / 60
    np.testing.assert_allclose(facts["popularity@10"], np.bincount(known.item, minlength=60)[:10].mean())


def test_intervals_are_seeded_cover_the_mean_and_are_tighter_when_paired() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(400)
    better = base + 0.02 + rng.normal(0, 0.01, 400)
    assert estimate(base) == estimate(base)
    found = estimate(base)
    assert found.low < base.mean() < found.high
    np.testing.assert_allclose((found.high - found.low) / (2 * 1.96), found.error, rtol=0.1)
    lead = paired_differences({"x": better}, {"x": base})["x"]
    assert 0 < lead.low < 0.02 < lead.high < found.high - found.low
    with pytest.raises(ValueError, match="same members"):
        paired_differences({"x": base}, {"x": base[1:]})


def test_ranked_parquet_holds_the_lists_best_first(tiny_dataset: Dataset, tmp_path: Path) -> None:
    queries = last_after_cut(tiny_dataset)
    items = len(tiny_dataset.items)
    ranked = rank_queries(queries, lambda block: np.tile(np.arange(items, dtype=np.float32), (len(block), 1)), items)
    write_ranked(tmp_path / "ranked.parquet", ranked, queries, tiny_dataset.members, tiny_dataset.items)
    table = pq.read_table(tmp_path / "ranked.parquet").to_pylist()
    assert [row["query_timestamp"] for row in table] == queries.timestamp.tolist()
    first = table[0]
    assert first["member_id"] == tiny_dataset.members.member_id[queries.member[0]]
    assert len(first["item_ids"]) == items - len(queries.excluded[0])
    assert first["scores"] == sorted(first["scores"], reverse=True)
    assert first["item_ids"][0] == f"i{int(first['scores'][0])}"


def test_equal_scores_stand_in_order_of_popularity(tiny_dataset: Dataset) -> None:
    queries = last_after_cut(tiny_dataset)
    order = tie_order(queries, len(tiny_dataset.items))
    known = tiny_dataset.engagements.before(tiny_dataset.meta.cut_test)
    counts = np.bincount(known.item, minlength=len(tiny_dataset.items))[order]
    assert (np.diff(counts) <= 0).all()
