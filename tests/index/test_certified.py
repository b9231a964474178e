from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import index.int8
from index import certified, certified_scan
from index.certified import SMALL, Certified
from index.certified_codes import BLOCK, Asked, code
from index.exact import best, dot, exact_search, exhaustive
from index.filters import RowSet
from index.hits import ExclusionError, Hits, QueryError, SearchError
from index.int8 import Bytes, Crew, Sums, Way, products

Floats = npt.NDArray[np.float32]
ROWS = SMALL + 3_000
"""Just more than what is scored without a scan."""


def clustered(rng: np.random.Generator, count: int, dims: int) -> Floats:
    return rng.standard_normal((40, dims))[rng.integers(0, 40, count)] + 0.7 * rng.standard_normal((count, dims))


def near_ties(rng: np.random.Generator, count: int, dims: int) -> Floats:
    """One vector, moved by less than a step of int8 can tell."""
    return rng.standard_normal(dims) + 1e-6 * rng.standard_normal((count, dims))


def spread(rng: np.random.Generator, count: int, dims: int) -> Floats:
    """Lengths over ten powers of ten, a few vectors of nothing among them."""
    made = rng.standard_normal((count, dims)) * 10.0 ** rng.uniform(-5, 5, (count, 1))
    made[:: count // 5] = 0
    return made


KINDS = {
    "normal": lambda rng, count, dims: rng.standard_normal((count, dims)),
    "clustered": clustered,
    "duplicates": lambda rng, count, dims: rng.standard_normal((500, dims))[rng.integers(0, 500, count)],
    "one vector": lambda rng, count, dims: np.tile(rng.standard_normal(dims), (count, 1)),
    "near ties": near_ties,
    "spread": spread,
    "whole numbers": lambda rng, count, dims: rng.integers(-2, 3, (count, dims)),
}


def strict(vectors: Floats, query: Floats, k: int, left_out: npt.NDArray[np.int64]) -> tuple[list[int], Floats]:
    """Every vector scored on its own, sorted, by another road than the code under test takes."""
    scores = dot(vectors, query)
    order = np.lexsort((np.arange(len(vectors)), -scores))
    order = order[~np.isin(order, left_out)][:k]
    return order.tolist(), scores[order]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 300, 2 * ROWS])
def test_the_answer_is_the_sorted_list(kind: str, k: int) -> None:
    rng = np.random.default_rng(len(kind))
    vectors = KINDS[kind](rng, ROWS, 24).astype(np.float32)
    queries = np.concatenate([rng.standard_normal((2, 24)), vectors[:1], np.zeros((1, 24))]).astype(np.float32)
    seen = [rng.permutation(ROWS)[:n] for n in (0, 700, ROWS - 50, 10)]
    hits, proof = Certified(vectors, threads=1).prove(queries, k, seen)
    for query, left_out in enumerate(seen):
        rows, scores = strict(vectors, queries[query], k, left_out)
        assert hits.counts[query] == len(rows)
        assert hits.rows[query, : len(rows)].tolist() == rows
        assert (hits.scores[query, : len(rows)] == scores).all()
    if kind in ("normal", "clustered") and k == 300:
        assert (proof.rounds[:2] >= 1).all() and (proof.scored[:2] < ROWS // 4).all()


@pytest.mark.parametrize("kind", ["normal", "clustered", "duplicates", "spread"])
@pytest.mark.parametrize("share", [0.0, 0.0005, 0.05, 0.4, 0.999])
def test_a_filtered_answer_is_the_sorted_list_of_what_is_permitted(kind: str, share: float) -> None:
    rng = np.random.default_rng(len(kind))
    vectors, queries = KINDS[kind](rng, ROWS, 12).astype(np.float32), rng.standard_normal((4, 12)).astype(np.float32)
    seen = [rng.permutation(np.arange(-1, ROWS))[:n] for n in (0, 700, 40, 0)]
    shared = RowSet.where(rng.random(ROWS) < share)
    sets = [shared, shared, None, RowSet.where(rng.random(ROWS) < 0.5)]
    hits, proof = Certified(vectors, threads=1).prove(queries, 200, seen, allow=sets)
    for query, (left_out, one) in enumerate(zip(seen, sets)):
        forbidden = np.union1d(left_out, [] if one is None else (~one).rows())
        rows, scores = strict(vectors, queries[query], 200, forbidden)
        assert hits.counts[query] == len(rows) and hits.rows[query, : len(rows)].tolist() == rows
        assert (hits.scores[query, : len(rows)] == scores).all() and (hits.rows[query, len(rows) :] == -1).all()
    if kind == "normal":
        assert (proof.rounds[2:] >= 1).all() and (proof.rounds[0] >= 1) == (share >= 0.4)
        assert share > 0.1 or proof.scored[0] == shared.size, "few are permitted: these are scored, and nothing else"


@pytest.mark.parametrize("asked", [1, 7, 300])
@pytest.mark.parametrize("threads", [1, 2])
def test_batches_and_threads_change_nothing(asked: int, threads: int) -> None:
    rng = np.random.default_rng(asked)
    vectors, queries = clustered(rng, ROWS, 16).astype(np.float32), clustered(rng, asked, 16).astype(np.float32)
    found = Certified(vectors, threads=threads).search(queries, 50)
    for query in range(0, asked, 60):
        rows, scores = strict(vectors, queries[query], 50, np.zeros(0, np.int64))
        assert found.rows[query].tolist() == rows and (found.scores[query] == scores).all()
    twin = exact_search(vectors, queries, 50)
    assert np.abs(found.scores - twin.scores).max() < 1e-4 and (found.rows == twin.rows).mean() > 0.999


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(sorted(KINDS)), st.integers(1, 70), st.integers(1, 3))
def test_no_product_lies_further_from_the_truth_than_its_bound(seed: int, kind: str, dims: int, asked: int) -> None:
    rng = np.random.default_rng(seed)
    vectors, queries = KINDS[kind](rng, 600, dims).astype(np.float32), rng.standard_normal((asked, dims)).astype(np.float32)
    coded = code(vectors)
    ask = Asked.of(queries, coded)
    sums = np.empty((asked, len(coded.codes)), np.int32)
    products(ask.codes, coded.codes, sums, "int8")
    real = coded.rows >= 0
    near = sums[:, real] * (ask.scales[:, None] * np.repeat(coded.scales, BLOCK)[real])
    for query in range(asked):
        truth = dot(vectors[coded.rows[real]], queries[query])
        assert (np.abs(near[query] - truth) <= np.repeat(ask.errors[query], BLOCK)[real]).all()
        bars = ask.bars(np.full(asked, float(np.median(truth))), coded)
        assert (sums[query, real] > np.repeat(bars[query], BLOCK)[real])[truth >= np.median(truth)].all()


def test_a_bar_that_was_too_high_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    vectors, queries = rng.standard_normal((ROWS, 16)).astype(np.float32), rng.standard_normal((3, 16)).astype(np.float32)
    searcher = Certified(vectors, threads=1)
    truth = searcher.search(queries, 40)
    last = truth.scores[:, -1].astype(np.float64)
    monkeypatch.setattr(searcher, "_foretell", lambda *_: np.array([truth.scores[0, 30], last[1] + 1e-6, np.inf]))
    before = searcher.looks.seen()
    hits, proof = searcher.prove(queries, 40)
    assert (hits.rows == truth.rows).all() and (hits.scores == truth.scores).all()
    assert proof.rounds.tolist()[1:] == [2, 0] and proof.scored[2] == ROWS
    after, ways = searcher.looks.seen(), {"once": proof.rounds == 1, "again": proof.rounds > 1, "everything": proof.rounds == 0}
    assert {way: after[way] - before[way] for way in before} == {way: int(queries.sum()) for way, queries in ways.items()}


def test_products_are_whole_numbers_either_way() -> None:
    rng = np.random.default_rng(1)
    left, right = rng.choice(np.array([-127, 127], np.int8), (5, 1024)), rng.choice(np.array([-127, 127], np.int8), (64, 1024))
    left[0] = right[0] = 127
    for way in ("int8", "float32"):
        out = np.empty((5, 64), np.int32)
        products(left, right, out, way)
        assert (out == left.astype(np.int64) @ right.T.astype(np.int64)).all()
    assert index.int8.fastest_way(1024) in ("int8", "float32")


@pytest.mark.parametrize(("slow", "way"), [(3, "int8"), (10**6, "float32")])
def test_a_slow_moment_does_not_choose_the_way(slow: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first calls of int8 take longer than any of float32; only if all of them do, float32 is taken."""
    calls = 0

    def multiply(left: Bytes, right: Bytes, out: Sums, by: Way) -> None:
        nonlocal calls
        calls += by == "int8"
        time.sleep(0.03 if by == "int8" and calls <= slow else 0.002)
        out[...] = left.astype(np.int64) @ right.T.astype(np.int64)

    monkeypatch.setattr(index.int8, "products", multiply)
    index.int8.fastest_way.cache_clear()
    try:
        assert index.int8.fastest_way(12) == way
    finally:
        index.int8.fastest_way.cache_clear()


def test_wrong_products_are_never_taken(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def multiply(left: Bytes, right: Bytes, out: Sums, by: Way) -> None:
        out[...] = left.astype(np.int64) @ right.T.astype(np.int64) - (by == "int8")

    monkeypatch.setattr(index.int8, "products", multiply)
    index.int8.fastest_way.cache_clear()
    try:
        assert index.int8.fastest_way(12) == "float32" and "wrong or slow" in caplog.text
    finally:
        index.int8.fastest_way.cache_clear()


def test_the_other_way_answers_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(2).standard_normal((ROWS, 8)).astype(np.float32)
    first = Certified(vectors, threads=1).search(vectors[:4], 30)
    monkeypatch.setattr("index.certified.fastest_way", lambda _: "float32")
    second = Certified(vectors, threads=1).search(vectors[:4], 30)
    assert (first.rows == second.rows).all() and (first.scores == second.scores).all()


def test_a_mapped_file_will_do(tmp_path: Path) -> None:
    vectors = np.random.default_rng(3).standard_normal((ROWS, 8)).astype(np.float32)
    np.save(tmp_path / "v.npy", vectors)
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    assert (Certified(mapped, threads=1).search(vectors[:2], 9).rows == exact_search(vectors, vectors[:2], 9).rows).all()


@pytest.mark.parametrize("count", [0, 1, 5, BLOCK])
def test_few_vectors(count: int) -> None:
    vectors = np.random.default_rng(4).standard_normal((count, 4)).astype(np.float32)
    found = Certified(vectors, threads=1).search(np.ones((2, 4), np.float32), 7)
    assert (found.counts == min(count, 7)).all() and (found.rows[:, count:] == -1).all()


def test_what_is_refused() -> None:
    good = np.ones((10, 4), np.float32)
    searcher = Certified(good, threads=1)
    with pytest.raises(QueryError):
        searcher.search(np.full((1, 4), np.nan, np.float32), 1)
    with pytest.raises(ExclusionError):
        searcher.search(good[:1], 1, [np.array([10])])
    with pytest.raises(SearchError, match="k is 0"):
        searcher.search(good[:1], 0)
    with pytest.raises(SearchError, match="vector 3"):
        Certified(np.where(np.arange(10)[:, None] == 3, np.inf, good).astype(np.float32))
    with pytest.raises(SearchError, match="1025 dims"):
        Certified(np.ones((2, 1025), np.float32))
    with pytest.raises(SearchError, match="infinite"):
        dot(np.full((1, 4), 3e38, np.float32), np.full(4, 3e38, np.float32))


def test_best_is_put() -> None:
    rng = np.random.default_rng(5)
    scores = rng.choice(np.array([-1.5, -0.0, 0.0, 0.25, 7.0], np.float32), 200)
    rows = rng.permutation(10_000)[:200]
    one, other = Hits.empty(1, 150), Hits.empty(1, 150)
    one.put(0, rows, scores)
    best(other, 0, rows, scores)
    assert (one.rows == other.rows).all() and (one.scores == other.scores).all() and other.counts[0] == 150


def test_exhaustive_keeps_the_first_of_equals_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.exact._SCORED_ROWS", 7)
    vectors = np.random.default_rng(6).integers(-1, 2, (60, 2)).astype(np.float32)
    hits = Hits.empty(1, 11)
    exhaustive(vectors, np.ones(2, np.float32), np.delete(np.arange(60), np.arange(0, 60, 3)), hits, 0)
    assert hits.rows[0].tolist() == exact_search(vectors, np.ones((1, 2), np.float32), 11, [np.arange(0, 60, 3)]).rows[0].tolist()


def test_a_crew_shares_everything_once() -> None:
    crew = Crew(2)
    assert [list(part) for part in crew.shares(3)] in ([[0], [1, 2]], [[0, 1], [2]]) and crew.shares(0) == []
    assert crew.each(lambda x: x * x, [1, 2, 3]) == [1, 4, 9]


def test_each_of_a_crew_computes_with_one_thread() -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert Crew(2).each(lambda _: torch.get_num_threads(), [0] * 8) == [1] * 8 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(usual)


def test_what_a_crew_does_apart_is_computed_with_one_thread() -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert Crew(2).apart(torch.get_num_threads) == 1 and torch.get_num_threads() == 2
        assert Crew(1).apart(lambda: threading.current_thread()) is threading.current_thread()
        with pytest.raises(ZeroDivisionError):
            Crew(2).apart(lambda: 1 // 0)
    finally:
        torch.set_num_threads(usual)


def test_a_lone_query_wakes_no_team_of_its_callers_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a team goes on spinning for milliseconds beside the threads that scan: a third of a lone query's time."""
    faiss: Any = pytest.importorskip("faiss")
    names, teams, inner = [], [], faiss.fvec_inner_products_by_idx

    def multiply(*asked: Any) -> None:
        names.append(threading.current_thread().name)
        products(*asked)

    def score(*asked: Any) -> None:
        teams.append(faiss.omp_get_max_threads())
        inner(*asked)

    for room in (certified, certified_scan):
        monkeypatch.setattr(room, "products", multiply)
    monkeypatch.setattr(faiss, "fvec_inner_products_by_idx", score)
    vectors = clustered(np.random.default_rng(3), ROWS, 16).astype(np.float32)
    usual = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(2)
    try:
        Certified(vectors, threads=2).search(vectors[:1], 10)
        assert len(names) > 2 and all(name.startswith("scan") for name in names)
        assert set(teams) == {1} and faiss.omp_get_max_threads() == 2
    finally:
        faiss.omp_set_num_threads(usual)
