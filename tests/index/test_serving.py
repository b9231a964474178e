"""Whatever answers for a Flat snapshot answers alike, filters included, and which it is follows from rules that are said."""

from __future__ import annotations

import logging
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.build import build_index
from index.certified import Certified
from index.exact import exact_search
from index.filters import RowSet
from index.hits import ExclusionError, QueryError, SearchError
from index.live import LiveIndex
from index.recipe import Recipe
from index.search import Searcher
from index.serving import LEAST_ROWS, Serving, faiss_reason


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**32), st.booleans())
def test_certified_and_faiss_answer_alike(seed: int, scans: bool) -> None:
    """Whole numbers: products are exact in float32, and ties are everywhere. Zero vectors and zero queries are among them."""
    rng = np.random.default_rng(seed)
    count, k = int(rng.integers(0, 90)), int(rng.choice([1, 3, 20, 100]))
    vectors = rng.integers(-2, 3, (count, 3)).astype(np.float32)
    queries = np.concatenate([rng.integers(-2, 3, (3, 3)), np.zeros((1, 3))]).astype(np.float32)
    shared = RowSet.where(rng.random(count) < rng.choice([0.0, 0.1, 0.5, 0.95]))
    sets = [shared, shared, None, RowSet.where(rng.random(count) < rng.random())]
    exclude = [rng.permutation(np.arange(-1, count))[: rng.integers(0, count + 1)].astype(np.int64) for _ in range(4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("index.certified.SMALL", 0 if scans else count)
        hits = Certified(vectors, threads=1).search(queries, k, exclude, allow=sets)
    faiss = Searcher(build_index(vectors, Recipe(), 0), vectors=vectors).search(queries, k, exclude, allow=sets)
    left_out = [np.union1d(rows, [] if one is None else (~one).rows()).astype(np.int64) for rows, one in zip(exclude, sets)]
    twin = exact_search(vectors, queries, k, left_out)
    assert np.array_equal(hits.rows, twin.rows) and np.array_equal(hits.scores, twin.scores)
    assert np.array_equal(hits.counts, faiss.counts) and np.array_equal(hits.scores, faiss.scores)  # FAISS chooses among ties


def test_a_flat_snapshot_is_searched_by_the_certified_scan(
    make_snapshot, unit, store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("index.serving.LEAST_ROWS", 18_000)
    monkeypatch.setattr("index.serving.fastest_way", lambda _: "int8")
    vectors, queries = unit(20_000, 16), unit(3, 16, 9)
    snapshot = make_snapshot(vectors=vectors)
    with caplog.at_level(logging.INFO), LiveIndex(snapshot, store, write=True) as live:
        serving = live.view().serving
        assert serving.certified and "certified scan" in serving.why and serving.why in caplog.text
        live.withdraw([f"item-{row}" for row in range(0, 20_000, 3)])
        live.upsert(["new"], [b"record"], queries[:1], "encoder-one")
        hits = live.view().search(queries, 300)
        rows = np.arange(20_000)
        truth = exact_search(np.concatenate([vectors, queries[:1]]), queries, 300, [rows[::3]] * 3)
        assert hits.rows[0, 0] == 20_000 and np.array_equal(hits.rows, truth.rows)
        allow = RowSet.where(rows % 2 == 0)
        some = live.view().search(queries, 300, allow=allow, allow_live=RowSet.every(1))
        assert (some.counts == 300).all() and all(row % 6 in (2, 4) or row == 20_000 for row in some.rows.ravel())
    assert "index" not in vars(snapshot), "FAISS's file was not read"


def test_the_rules_for_faiss_are_said(make_snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "below 30,000" in Serving.of(make_snapshot(40)).why and not Serving.of(make_snapshot(40)).certified
    monkeypatch.setattr("index.serving.fastest_way", lambda _: "int8")
    assert faiss_reason("Flat", "float32", LEAST_ROWS, 128) == ""
    for recipe, dtype, dims, reason in (
        ("IVF64,Flat", "float32", 128, "recipe"),
        ("SQfp16", "float16", 128, "recipe"),
        ("Flat", "int8", 128, "kept as int8"),
        ("Flat", "float32", 1_025, "1025 dims"),
    ):
        assert reason in faiss_reason(recipe, dtype, LEAST_ROWS, dims)
    monkeypatch.setattr("index.serving.fastest_way", lambda _: "float32")
    assert "multiplies int8" in faiss_reason("Flat", "float32", LEAST_ROWS, 128)


def test_what_is_damaged_or_does_not_fit_gives_no_answer(unit) -> None:
    vectors = unit(100, 8)
    searcher = Certified(vectors, threads=1)
    with pytest.raises(QueryError):
        searcher.search(np.full((1, 8), np.inf, np.float32), 3)
    for allow in (RowSet.every(99), [None, None], RowSet(np.zeros(12, np.uint8), 100)):
        with pytest.raises(ExclusionError):
            searcher.search(vectors[:1], 3, allow=allow)
    vectors[7, 1] = np.nan
    with pytest.raises(SearchError, match="vector 7"):
        Certified(vectors)


def test_a_snapshot_that_is_open_is_served_while_another_is_being_opened(
    make_snapshot, store, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, other = make_snapshot(40), make_snapshot(60, seed=1)
    begun, go_on = threading.Event(), threading.Event()
    expected = Serving.of(here)

    def long(*facts: object) -> str:
        begun.set()
        go_on.wait(60)
        return faiss_reason(*facts)

    monkeypatch.setattr("index.serving.faiss_reason", long)
    loading = threading.Thread(target=Serving.of, args=(other,))
    loading.start()
    assert begun.wait(20)
    writing = threading.Thread(target=lambda: LiveIndex(here, store, write=True).close())
    writing.start()
    writing.join(20)
    stood_still = writing.is_alive()
    go_on.set()
    loading.join(20)
    writing.join(20)
    assert not stood_still and Serving.of(here) is expected
