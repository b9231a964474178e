from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from index import shortlist
from index.bench import made_items, made_queries
from index.check import GateSettings, run_gates
from index.exact import exact_search, overlap
from index.filters import RowSet
from index.hits import SearchError
from index.kinds import as_recipe
from index.manifest import SnapshotTorn
from index.recipe import BuildError, choose_short_lists
from index.serving import Serving
from index.shards import as_built
from index.shortlist import GATHERED, ShortLists
from index.shortlist_build import filled, margins_of
from index.snapshot import Shard, Snapshot

MakeSnapshot = Callable[..., Snapshot]
Floats = npt.NDArray[np.float32]
COUNT, DIMS, LISTS = 24_000, 24, 128


@pytest.fixture(scope="module")
def vectors() -> Floats:
    return made_items(COUNT, DIMS)


@pytest.fixture(scope="module")
def short(vectors: Floats) -> ShortLists:
    index = filled(vectors, LISTS, 0)
    return ShortLists(index, vectors, nprobe=20, margins=margins_of(index, vectors, made_queries(24, DIMS, 1)))


def test_more_lists_find_more_and_most_is_found(vectors: Floats, short: ShortLists) -> None:
    queries = made_queries(20, DIMS, 0)
    true = exact_search(vectors, queries, 500)
    recalls = [overlap(vectors, queries, short.search(queries, 500, nprobe=p), true).mean() for p in (16, 32, 64, 128)]
    assert recalls == sorted(recalls) and recalls[0] < 0.9 * recalls[3] and recalls[3] > 0.97


@pytest.mark.parametrize("k", [1, 200, 30_000])
def test_counts_exclusions_order_and_scores(vectors: Floats, short: ShortLists, k: int) -> None:
    rng = np.random.default_rng(4)
    queries = made_queries(5, DIMS, 1)
    exclude = [rng.permutation(COUNT)[:size] for size in (0, 500, COUNT - 3, COUNT, 4_000)]
    hits = short.search(queries, k, exclude, nprobe=2)
    for query, left_out in enumerate(exclude):
        count = int(hits.counts[query])
        rows, scores = hits.rows[query, :count], hits.scores[query, :count]
        assert count == min(k, COUNT - len(left_out)) and not np.isin(rows, left_out).any() and len(set(rows.tolist())) == count
        assert np.allclose(scores, vectors[rows] @ queries[query], atol=1e-5)
        assert (np.lexsort((rows, -scores)) == np.arange(count)).all() and (hits.rows[query, count:] == -1).all()


def test_what_is_allowed_is_found_and_nothing_else(vectors: Floats, short: ShortLists, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortlist, "GATHERED", 500)
    rng = np.random.default_rng(5)
    queries, k = made_queries(6, DIMS, 0), 100
    masks = [rng.random(COUNT) < share for share in (0.9, 0.5, 0.1, 0.01, 0.0)]
    allow = [None, *(RowSet.where(mask) for mask in masks)]
    exclude = [rng.permutation(COUNT)[:50] for _ in queries]
    hits = short.search(queries, k, exclude, allow=allow)
    recalls = []
    for query, mask in enumerate([np.ones(COUNT, bool), *masks]):
        permitted = np.setdiff1d(np.flatnonzero(mask), exclude[query])
        rows = hits.rows[query, : hits.counts[query]]
        assert hits.counts[query] == min(k, len(permitted)) and np.isin(rows, permitted).all()
        true = permitted[np.argsort(-(vectors[permitted] @ queries[query]), kind="stable")][:k]
        recalls.append(np.isin(true, rows).mean() if len(true) else 1.0)
    assert min(recalls[:4]) > 0.7 and recalls[4:] == [1.0, 1.0]  # the rarest are scored one by one


def test_a_filter_that_goes_against_the_lists_is_answered(vectors: Floats, short: ShortLists) -> None:
    query = made_queries(1, DIMS, 0)
    worst = np.argsort(vectors @ query[0])[: GATHERED + 2_000]  # none of what is allowed is anywhere near
    allow = RowSet.of(worst, COUNT)
    true = worst[np.lexsort((worst, -(vectors[worst] @ query[0])))][:50]
    few, every = (short.search(query, 50, allow=allow, nprobe=nprobe) for nprobe in (1, LISTS))
    assert np.isin(every.rows[0], true).mean() > 0.95
    for hits in (few, every):
        assert hits.counts[0] == 50 and np.isin(hits.rows, worst).all()
        assert np.allclose(hits.scores[0], vectors[hits.rows[0]] @ query[0], atol=1e-5)


def test_a_batch_a_lone_query_and_one_thread_agree(short: ShortLists, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = made_queries(150, DIMS, 0)
    before = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(2)
        together = short.search(queries, 300)
        pairs = [short.search(queries[at : at + 1], 300).rows[0] for at in range(len(queries))]
        assert faiss.omp_get_max_threads() == 2, "the caller's threads are as they were"
        monkeypatch.setattr(short, "_threads", 1)
        alone = short.search(queries, 300)
    finally:
        faiss.omp_set_num_threads(before)
    assert np.array_equal(together.rows, alone.rows) and np.array_equal(together.rows, np.stack(pairs))


def test_looks_are_counted(vectors: Floats, short: ShortLists) -> None:
    easy = ShortLists(short._index, vectors, nprobe=64, margins={1: 1.0, 10_000: 1.0})
    easy.search(made_queries(5, DIMS, 0), 100)
    assert easy.looks.seen() == {"once": 5, "again": 0, "everything": 0}
    easy.search(made_queries(2, DIMS, 0), COUNT // 4)
    assert easy.looks.seen() == {"once": 5, "again": 0, "everything": 2}, "a quarter of all is scored at once"
    proud = ShortLists(short._index, vectors, nprobe=4, margins={1: -0.5, 10_000: -0.5})
    proud.search(made_queries(6, DIMS, 0), 100)
    seen = proud.looks.seen()
    assert seen["once"] == 0 and sum(seen.values()) == 6, "bars that nothing reaches"


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e7, 1e25])
def test_length_changes_scores_and_nothing_else(short: ShortLists, scale: float) -> None:
    queries = made_queries(20, DIMS, 0)
    plain = short.search(queries, 200)
    queries[3] *= np.float32(scale)
    scaled = short.search(queries, 200)
    overlaps = [np.isin(one, other).mean() for one, other in zip(plain.rows, scaled.rows)]
    assert min(overlaps) > 0.99 and all(len(set(rows.tolist())) == 200 for rows in scaled.rows)
    assert np.allclose(scaled.scores[3] / np.float32(scale), plain.scores[3], rtol=1e-5)


@pytest.mark.parametrize("dims", [2, 3, 24])
@pytest.mark.parametrize("length", [1.0, 1000.0, 0.001])
def test_vectors_of_any_length(dims: int, length: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortlist, "GATHERED", 0)
    vectors, queries = made_items(4_000, dims) * np.float32(length), made_queries(3, dims, 0)
    index = filled(vectors, 6, 0)
    odd = ShortLists(index, vectors, nprobe=6, margins=margins_of(index, vectors, queries))
    hits = odd.search(queries, 100)
    assert all(len(set(rows.tolist())) == 100 for rows in hits.rows)
    true = exact_search(vectors, queries, 100)
    assert overlap(vectors, queries, hits, true, tolerance=1e-5 * length).mean() > 0.95
    nothing = odd.search(np.zeros((1, dims), np.float32), 7)
    assert nothing.rows[0].tolist() == list(range(7)) and not nothing.scores.any()


def test_lengths_that_differ_from_row_to_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortlist, "GATHERED", 0)
    rng = np.random.default_rng(0)
    vectors = made_items(6_000, 16) * rng.lognormal(0, 1.5, (6_000, 1)).astype(np.float32)
    queries = made_queries(10, 16, 0)
    index = filled(vectors, 8, 0)
    for nprobe in (1, 8):
        hits = ShortLists(index, vectors, nprobe=nprobe, margins=margins_of(index, vectors, queries)).search(queries, 60)
        assert all(len(set(rows.tolist())) == 60 for rows in hits.rows) and (hits.counts == 60).all()


@pytest.mark.parametrize("equal", [20_000, 19_000, 0])
def test_vectors_that_are_the_same(equal: int) -> None:
    vectors = made_items(20_000, 8)
    vectors[:equal] = vectors[0]
    index = filled(vectors, 64, 0)
    lists = ShortLists(index, vectors, nprobe=8, margins=margins_of(index, vectors, vectors[:30]))
    hits = lists.search(vectors[:1], 50)
    assert np.allclose(hits.scores[0, 0], 1, atol=1e-6) and len(set(hits.rows[0].tolist())) == 50


def test_items_that_ask_do_not_count_as_found(vectors: Floats) -> None:
    index = filled(vectors, LISTS, 0)
    items, members = (margins_of(index, vectors, asked) for asked in (vectors[::1000], made_queries(24, DIMS, 0)))
    assert min(items[depth] for depth in (1, 10, 100)) >= 0 and items[100] == pytest.approx(members[100], abs=0.1)


def test_the_same_seed_gives_the_same_file_and_a_file_the_same_answers(
    vectors: Floats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shortlist, "GATHERED", 0)
    some, queries = vectors[:3_000], made_queries(4, DIMS, 0)
    first, same, other = (filled(some, 16, seed) for seed in (1, 1, 2))
    written = [faiss.serialize_index(one) for one in (first, same, other)]
    assert np.array_equal(written[0], written[1]) and not np.array_equal(written[0], written[2])
    faiss.write_index(first, str(tmp_path / "i"))
    read = faiss.read_index(str(tmp_path / "i"), faiss.IO_FLAG_MMAP_IFC)
    answers = [ShortLists(one, some, nprobe=8, margins={1: 0.05}).search(queries, 200).rows for one in (first, read)]
    assert np.array_equal(*answers)


def test_what_is_refused(vectors: Floats, short: ShortLists) -> None:
    for count, lists in ((24_000, 30_000), (100, 8), (24_000, 127), (24_000, 0)):
        with pytest.raises(BuildError, match=rf"over {count} vectors: expected at least .* multiple of 2 lists"):
            filled(vectors[:count], lists, 0)
    for nprobe in (0, 129):
        with pytest.raises(SearchError, match=r"expected 1\.\.128"):
            short.search(vectors[:1], 5, nprobe=nprobe)
    index = filled(vectors[:2_000], 8, 0)
    with pytest.raises(SearchError, match="holds 2000 x 26, expected 1000 x 26"):
        ShortLists(index, vectors[:1_000], nprobe=1, margins={1: 0.0})
    for margins in ({}, {0: 0.1}):
        with pytest.raises(SearchError, match="each of 1 or more"):
            ShortLists(index, vectors[:2_000], nprobe=1, margins=margins)
    assert choose_short_lists(1_000_000) == 4096 and choose_short_lists(100) == choose_short_lists(118) == 2


def test_a_snapshot_is_served_by_its_short_list(make_snapshot: MakeSnapshot, unit) -> None:
    snapshot = make_snapshot(20_000, recipe="IVF64,ShortList")
    queries = unit(30, 8, 3)
    serving = Serving.of(snapshot)
    assert isinstance(serving.searcher, ShortLists) and not serving.certified
    assert serving.searcher.nprobe == snapshot.manifest.build["nprobe"]
    assert serving.looked() == {"once": 0, "again": 0, "everything": 0}
    true = exact_search(snapshot.vectors, queries, 10)
    assert overlap(snapshot.vectors, queries, serving.searcher.search(queries, 10), true).mean() > 0.9
    assert (snapshot.path / "index.faiss").stat().st_size < 0.5 * (snapshot.path / "vectors.npy").stat().st_size
    assert sum(serving.looked().values()) == 30
    gates = {one.name: one for one in run_gates(snapshot, None, GateSettings(recall_k=10))}
    assert gates["self-retrieval"].passed and gates["recall"].passed, gates


def test_a_short_list_over_other_vectors_is_torn(make_snapshot: MakeSnapshot) -> None:
    snapshot, flat = make_snapshot(2_000, recipe="IVF8,ShortList"), make_snapshot(2_000)
    (snapshot.path / "index.faiss").write_bytes((flat.path / "index.faiss").read_bytes())
    with pytest.raises(SnapshotTorn, match="holds 2000 x 8, expected 2000 x 10"):
        as_built(snapshot)


@pytest.mark.parametrize("fact", ["nprobe", "margin@1"])
def test_a_manifest_that_says_too_little_is_torn(make_snapshot: MakeSnapshot, fact: str) -> None:
    snapshot = make_snapshot(2_000, recipe="IVF8,ShortList")
    assert snapshot.manifest.format_version == 3
    kept = {name: value for name, value in snapshot.manifest.build.items() if not name.startswith(fact.split("@")[0])}
    shard = Shard(snapshot.path, replace(snapshot.manifest, build=kept), 0)
    with pytest.raises(SnapshotTorn, match="do not open a short list"):
        as_recipe(shard)
