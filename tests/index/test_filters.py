"""A filtered answer is what numpy finds among the permitted rows, whatever way a search takes; what does not fit gives none."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import index.search
from index.build import build_index
from index.exact import exact_search
from index.filters import Column, Filter, FilterError, RowSet
from index.hits import ExclusionError, FilterIgnored
from index.recipe import Recipe
from index.search import Searcher

LANGUAGES = ("de", "fr", "no", None)


@st.composite
def masks(draw: st.DrawFn) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], np.random.Generator]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.sampled_from([0, 1, 7, 8, 9, 40, 203]))
    one, other = rng.random((2, count)) < draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    return one, other, rng


@settings(max_examples=100, deadline=None)
@given(masks())
def test_sets_compose_as_numpy_does(drawn) -> None:
    one, other, rng = drawn
    count = len(one)
    a, b = RowSet.where(one), RowSet.of(rng.permutation(np.append(np.flatnonzero(other), [-1, -1])), count)
    every = np.arange(count)
    for made, expected in (
        (a & b, one & other),
        (a | b, one | other),
        (a - b, one & ~other),
        (~a, ~one),
        (~(a | ~b) & b, ~one & other),
        (RowSet.every(count), np.ones(count, bool)),
        (a.plus(every[::3]), one | (every % 3 == 0)),
    ):
        assert np.array_equal(made.rows(), np.flatnonzero(expected)) and made.size == expected.sum()
        assert np.array_equal(made.has(every), expected)
    assert np.array_equal(a.rows(), np.flatnonzero(one)), "a set never changes"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0, 3, 100]), st.sets(st.sampled_from(["de", "fr", "no", "unknown"])))
def test_columns_answer_as_comparison_does(seed: int, count: int, wanted: set[str]) -> None:
    values = np.random.default_rng(seed).choice(np.array(LANGUAGES, object), count).tolist()
    column = Column.of(values)
    assert column.is_in(wanted).rows().tolist() == [row for row, value in enumerate(values) if value in wanted]
    assert column.equals("no").rows().tolist() == [row for row, value in enumerate(values) if value == "no"]
    assert column.known().rows().tolist() == [row for row, value in enumerate(values) if value is not None]
    assert column.is_in(LANGUAGES[:3]).size == column.known().size


def truth(vectors, queries, k: int, exclude, allow):
    left_out = [
        np.union1d(rows, [] if one is None else (~one).rows()).astype(np.int64) for rows, one in zip(exclude, allow, strict=True)
    ]
    return exact_search(vectors, queries, k, left_out)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 6), st.integers(1, 6), st.booleans(), st.booleans())
def test_a_filtered_answer_is_numpys(seed: int, lists: int, nprobe: int, gather: bool, full: bool) -> None:
    rng = np.random.default_rng(seed)
    count, asked, k = int(rng.integers(0, 60)), int(rng.integers(1, 4)), int(rng.choice([1, 3, 20, 90]))
    vectors = rng.integers(-2, 3, (count, 3)).astype(np.float32)
    queries = rng.integers(-2, 3, (asked, 3)).astype(np.float32)
    shared = RowSet.where(rng.random(count) < rng.choice([0.0, 0.1, 0.5, 0.95]))
    own = [None if rng.random() < 0.3 else RowSet.where(rng.random(count) < rng.random()) for _ in range(asked)]
    exclude = [rng.permutation(np.arange(-1, count))[: rng.integers(0, count + 1)].astype(np.int64) for _ in range(asked)]
    lists = min(lists, count)
    index = build_index(vectors, Recipe(lists), 0)
    searcher = Searcher(index, nprobe=lists if full else min(nprobe, lists), vectors=vectors if gather else None)
    for allow, sets in ((shared, [shared] * asked), (own, own)):
        hits, expected = searcher.search(queries, k, exclude, allow=allow), truth(vectors, queries, k, exclude, sets)
        assert np.array_equal(hits.counts, expected.counts), "never short, whatever nprobe"
        for query in range(asked):
            rows = hits.rows[query, : hits.counts[query]]
            assert Filter(count, np.unique(exclude[query][exclude[query] >= 0]), sets[query]).permits(rows).all()
            assert np.array_equal(vectors[rows] @ queries[query], hits.scores[query, : hits.counts[query]])
        if searcher.nprobe in (0, lists):
            assert np.array_equal(hits.scores, expected.scores)


@pytest.mark.parametrize("lists", [0, 16])
@pytest.mark.parametrize("share", [0.01, 0.03, 0.4, 0.999])
def test_every_way_finds_the_same(unit, lists: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = unit(3_000, 16), unit(4, 16, 9)
    allowed = RowSet.where(np.random.default_rng(1).random(3_000) < share)
    expected = truth(vectors, queries, 50, [[]] * 4, [allowed] * 4)
    searcher = Searcher(build_index(vectors, Recipe(lists), 0), nprobe=lists, vectors=vectors)
    for most in (0, 3_000):
        monkeypatch.setattr(index.search, "_GATHER_ROWS", most)
        monkeypatch.setattr(index.search, "_GATHER_SHARE", 1)
        hits = searcher.search(queries, 50, allow=allowed)
        assert np.array_equal(hits.rows, expected.rows) and np.allclose(hits.scores, expected.scores, atol=1e-6)


def test_few_permitted_rows_need_no_selector(unit, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit(100, 4)
    searcher = Searcher(build_index(vectors, Recipe(), 0), vectors=vectors)
    monkeypatch.setattr(searcher._faiss, "IDSelectorBitmap", None)
    assert searcher.search(vectors[7:8], 5, allow=RowSet.of(np.array([7, 9]), 100)).rows[0].tolist() == [7, 9, -1, -1, -1]


def test_an_index_that_ignores_the_set_gives_no_answer(unit, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit(100, 4)
    searcher = Searcher(build_index(vectors, Recipe(), 0))
    monkeypatch.setattr(searcher._faiss, "SearchParameters", lambda **_: None)
    with pytest.raises(FilterIgnored, match="query 1"):
        searcher.search(vectors[:2], 5, allow=[None, RowSet.of(np.arange(90, 100), 100)])


@pytest.mark.parametrize(
    "allow",
    [RowSet.every(99), RowSet.every(101), [RowSet.every(100)], [None] * 3, RowSet(np.zeros(12, np.uint8), 100)],
)
def test_sets_of_another_snapshot_give_no_answer(unit, allow) -> None:
    vectors = unit(100, 4)
    with pytest.raises(FilterError):
        Searcher(build_index(vectors, Recipe(), 0)).search(vectors[:2], 5, allow=allow)


def test_what_is_no_set_and_no_column_is_refused() -> None:
    with pytest.raises(FilterError, match="compose"):
        RowSet.every(9) & RowSet.every(10)
    for rows in ([10], [-2], [0.5]):
        with pytest.raises(ExclusionError):
            RowSet.of(np.array(rows), 10)
    for codes, names in (([0, 2], "ab"), ([-2], "a"), ([0], "aa")):
        with pytest.raises(FilterError):
            Column(np.array(codes, np.int32), list(names))
    with pytest.raises(FilterError, match="mask"):
        RowSet.where(np.zeros(3, np.uint8))  # type: ignore[arg-type]
