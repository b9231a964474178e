"""A divided snapshot is one snapshot: found, checked, published, searched and changed by day as the undivided one is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from index.build import build
from index.certified import Certified
from index.check import GateSettings, require_gates, run_gates
from index.diff import compare
from index.drift import drift
from index.exact import exact_search, overlap
from index.filters import RowSet
from index.hits import Hits, Rows
from index.int8 import fastest_way
from index.live import LiveIndex
from index.manifest import FileFact, Manifest, Recall, SnapshotError, SnapshotNotFound, SnapshotTorn, SnapshotVersion, digest
from index.publish import collect_garbage, current, list_snapshots, publish, rollback
from index.recipe import Recipe
from index.search import Search, Searcher
from index.serving import LEAST_ROWS, Serving, exact_twin
from index.shadow import Shadow
from index.shards import as_built, by_hash, joined
from index.snapshot import Shard, Snapshot
from index.writer import SnapshotWriter

Array = npt.NDArray[np.float32]
MakeSnapshot = Callable[..., Snapshot]
Divide = Callable[..., Snapshot]


@pytest.fixture
def divide(store: Path) -> Divide:
    """The rows of a snapshot as another one, divided by the hash of the id, or as the rows say."""

    def made(
        whole: Snapshot, shards: int, *, recipe: Recipe | None = None, parts: list[Rows] | None = None, target: float = 0.95
    ) -> Snapshot:
        facts, rows = whole.manifest, parts or by_hash(list(whole.ids), shards)
        built = build(whole.vectors, recipe=recipe, codes=facts.dtype, k=10, target=target, samples=8, shards=rows)
        with SnapshotWriter(store, fingerprint=facts.fingerprint, as_of=facts.as_of, parent=whole.name) as writer:
            writer.vectors(whole.vectors, facts.dtype, rows)
            writer.ids(list(whole.ids))
            writer.indexes(built.indexes, recipe=str(built.recipe), facts=built.facts, recall=built.recall)
            writer.part("catalog.arrow", b"opaque")
        return Snapshot.open(writer.path)

    return made


def same(found: Hits, wanted: Hits) -> None:
    for name in ("rows", "scores", "counts"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))


def exact(snapshot: Snapshot) -> Search:
    return joined(snapshot, [Certified(shard.vectors, threads=1) for shard in snapshot.shards])


def test_exact_answers_are_the_undivided_ones_to_the_bit(
    make_snapshot: MakeSnapshot, divide: Divide, unit: Callable[..., Array]
) -> None:
    vectors, queries = unit(300, 24), unit(9, 24, 1)
    vectors[200:220] = vectors[40:60]  # ties across shards
    whole = make_snapshot(vectors=vectors)
    rng = np.random.default_rng(2)
    excluded = [rng.integers(-1, 300, 40) for _ in range(9)]
    allow = [RowSet.where(rng.random(300) < 0.5)] * 4 + [None] * 5
    wanted = Certified(whole.vectors, threads=1)
    for count in (1, 2, 3, 7):
        snapshot = divide(whole, count)
        assert len(snapshot.shards) == count and sum(snapshot.manifest.shards) == 300
        same(exact(snapshot).search(queries, 120), wanted.search(queries, 120))
        same(exact(snapshot).search(queries, 300, excluded, allow=allow), wanted.search(queries, 300, excluded, allow=allow))
        np.testing.assert_array_equal(snapshot.vectors, whole.vectors)
        np.testing.assert_array_equal(snapshot.vectors_at(np.array([299, 0, 7, 7])), whole.vectors[[299, 0, 7, 7]])
        for row in (-1, 300):
            for one in (whole, snapshot):
                with pytest.raises(IndexError, match=r"rows 0\.\.299"):
                    one.vectors_at(np.array([0, row]))
        np.testing.assert_array_equal(as_built(snapshot).search(queries, 120).rows, Searcher.of(whole).search(queries, 120).rows)
        np.testing.assert_array_equal(exact_twin(snapshot).search(queries, 99).rows, wanted.search(queries, 99).rows)


def test_what_is_put_in_and_withdrawn_by_day_is_the_same(
    make_snapshot: MakeSnapshot, divide: Divide, unit: Callable[..., Array], tmp_path: Path
) -> None:
    vectors, queries = unit(200, 8), unit(6, 8, 1)
    whole = make_snapshot(vectors=vectors)
    found = []
    for snapshot in (whole, *(divide(whole, count) for count in (2, 3, 7))):
        Serving.lend(snapshot, exact(snapshot), "exact")
        shadow = Shadow(1.0)
        with LiveIndex(snapshot, tmp_path / snapshot.name, write=True, shadow=shadow) as live:
            live.upsert(["item-3", "fresh", "other"], [b"a", b"b", b"c"], unit(3, 8, 5), "encoder-one")
            live.withdraw(["item-9", "item-120", "other"])
            view = live.view()
            allow, allow_live = RowSet.where(np.arange(200) % 3 > 0), RowSet.every(view.count - 200)
            hits = [
                view.search(queries, 202),
                view.search(queries, 40, [np.array([5, 201])] * 6, allow=allow, allow_live=allow_live),
            ]
            shadow.drain()
            shadow.close()
            assert (shadow.seen().recall, shadow.seen().compared, shadow.seen().failed) == (1, 2, 0)
            found.append((hits, view.ids(hits[0].rows[0, :199]), view.vector(17).tolist()))
    for hits, ids, vector in found[1:]:
        for here, there in zip(hits, found[0][0]):
            same(here, there)
        assert (ids, vector) == found[0][1:] and not {"item-9", "item-120", "other"} & set(ids) and "fresh" in ids


@pytest.mark.skipif(fastest_way(8) != "int8", reason="this processor multiplies int8 wrongly or slowly")
def test_what_serves_a_divided_snapshot_is_chosen_by_the_whole(
    make_snapshot: MakeSnapshot, divide: Divide, unit: Callable[..., Array]
) -> None:
    whole, queries = make_snapshot(LEAST_ROWS), unit(5, 8, 1)
    wanted, found = Serving.of(whole), Serving.of(divide(whole, 2))
    assert wanted.certified and found.certified and found.why.startswith("2 shards, each by certified scan")
    same(found.searcher.search(queries, 2_000), wanted.searcher.search(queries, 2_000))
    lists = divide(make_snapshot(400), 3, recipe=Recipe(4))
    served = Serving.of(lists)
    assert not served.certified and served.why == "3 shards, each by FAISS IVF4,Flat: the recipe asks for it"
    same(served.searcher.search(queries, 50), as_built(lists).search(queries, 50))


def test_gates_judge_the_merged_answer(make_snapshot: MakeSnapshot, divide: Divide, unit: Callable[..., Array]) -> None:
    whole = make_snapshot(vectors=unit(400, 8))
    snapshot = divide(whole, 3, recipe=Recipe(4))
    assert snapshot.manifest.recipe == "IVF4,Flat" and all(shard.index.nlist == 4 for shard in snapshot.shards)
    results = {one.name: one for one in run_gates(snapshot, whole)}
    assert all(one.passed for one in results.values()), results
    assert "3 shards of " in results["shards"].seen and "recall@400 1.0000" in results["recall"].seen
    few, queries = divide(whole, 3, recipe=Recipe(4), target=0.01), unit(20, 8, 1)
    recall = overlap(whole.vectors, queries, as_built(few).search(queries, 10), exact_search(whole.vectors, queries, 10)).mean()
    (judged,) = [one for one in run_gates(few, None, GateSettings(recall_k=10), queries=queries) if one.name == "recall"]
    assert f"recall@10 {recall:.4f}" in judged.seen and 0.1 < recall < 0.9 and not judged.passed
    moved = by_hash(list(whole.ids), 3)
    moved[0], moved[1] = np.sort(np.append(moved[0], moved[1][:1])), moved[1][1:]
    gates = run_gates(divide(whole, 3, parts=moved), None)
    assert [one.name for one in gates if not one.passed] == ["shards", "self-retrieval", "recall"]
    writing = SnapshotWriter(whole.path.parents[1], fingerprint="encoder-one", as_of=0)
    with pytest.raises(SnapshotError, match=r"expected 0\.\.399, each once"), writing as writer:
        writer.vectors(whole.vectors, shards=[np.arange(200), np.arange(199, 400)])
    assert not [one for one in run_gates(whole, None) if one.name == "shards"]


def test_the_store_looks_after_a_divided_snapshot(
    make_snapshot: MakeSnapshot, divide: Divide, store: Path, unit: Callable[..., Array]
) -> None:
    whole = make_snapshot(80)
    three, two = divide(whole, 3), divide(whole, 2)
    for one in (whole, three, two):
        require_gates(run_gates(one, None))
        publish(store, one.name)
    assert rollback(store) == three.name and current(store) == three.path
    infos = {info.name: info for info in list_snapshots(store)}
    assert infos[three.name].count == 80 and infos[three.name].bytes > 80 * 8 * 4 and not infos[three.name].problem
    found = compare(whole, three)
    assert (found.added, found.removed, found.moved, found.parts) == (0, 0, 0, ["catalog.arrow"])
    seen = drift(whole, three, unit(5, 8, 1))
    assert seen is not None and seen.mean == 1
    assert three.parts == ["catalog.arrow"] and collect_garbage(store, 0) == [two.name]


def test_a_shard_is_opened_without_the_others_and_what_is_left_without_any(
    make_snapshot: MakeSnapshot, divide: Divide, tmp_path: Path, unit: Callable[..., Array]
) -> None:
    whole = make_snapshot(90)
    snapshot, queries = divide(whole, 3), unit(2, 8, 1)
    for place in range(3):
        alone = tmp_path / str(place) / snapshot.name
        alone.mkdir(parents=True)
        for name in ("MANIFEST.json", f"shard-{place}.vectors.npy", f"shard-{place}.index.faiss"):
            shutil.copy(snapshot.path / name, alone / name)
        shard = Shard.open(alone, place)
        same(Searcher.of(shard).search(queries, 9), Searcher.of(snapshot.shards[place]).search(queries, 9))
        with pytest.raises(SnapshotTorn, match="is missing"):
            Shard.open(alone, (place + 1) % 3)
    with pytest.raises(SnapshotNotFound, match="has 3 shards"):
        Shard.open(snapshot.path, 3)
    rest = tmp_path / "rest" / snapshot.name
    shutil.copytree(snapshot.path, rest, ignore=shutil.ignore_patterns("*.vectors.npy", "*.faiss"))
    assert list(Snapshot.open(rest, searched_here=False).ids) == list(whole.ids)
    with pytest.raises(SnapshotTorn, match=r"shard-0\.index\.faiss is missing"):
        Snapshot.open(rest)
    assert Shard.open(whole.path, 0).count == 90, "what is not divided has one shard"


def test_every_file_of_a_shard_is_vouched_for(make_snapshot: MakeSnapshot, divide: Divide) -> None:
    snapshot = divide(make_snapshot(50), 2)
    for name in ("shard-0.vectors.npy", "shard-1.rows.npy", "shard-1.index.faiss"):
        path = snapshot.path / name
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(SnapshotTorn, match=name):
            Snapshot.open(snapshot.path)
        path.write_bytes(good)
    with pytest.raises(SnapshotError, match="is divided: each of its 2 shards"):
        Searcher.of(snapshot)
    with pytest.raises(SnapshotNotFound, match="has no part"):
        snapshot.part("shard-0.rows.npy")


def rewritten(snapshot: Snapshot, **changed: object) -> Path:
    """The snapshot with another manifest, whose hash its name is."""
    facts = json.loads((snapshot.path / "MANIFEST.json").read_bytes()) | changed
    content = json.dumps(facts, sort_keys=True, indent=1).encode()
    path = snapshot.path.with_name(f"{snapshot.name[:8]}-{digest(content)}")
    shutil.copytree(snapshot.path, path)
    (path / "MANIFEST.json").write_bytes(content)
    return path


def test_only_a_divided_snapshot_has_the_new_format(make_snapshot: MakeSnapshot, divide: Divide) -> None:
    whole = make_snapshot(50)
    written = json.loads((whole.path / "MANIFEST.json").read_bytes())
    assert written["format_version"] == 1 and "shards" not in written and whole.manifest.shards == ()
    ids = {f"ids.{name}" for name in ("bin", "hashes.npy", "offsets.npy", "order.npy")}
    files = {"MANIFEST.json", "RUN.json", "catalog.arrow", "index.faiss", "vectors.npy"}
    assert {path.name for path in whole.path.iterdir()} == ids | files
    facts = Manifest(
        2, 3, "encoder", 1_700_000_000, "Flat", {"seed": 0, "nprobe": 0}, {"ids.bin": FileFact("ab", 4)}, extra={"a": "b"}
    )
    assert replace(facts, recall=Recall(10, 1.0, 1.0, 2, "items")).name == "20231114-f6a773a8b459", (
        "as it was before there were shards"
    )
    snapshot = divide(whole, 2)
    assert asdict(snapshot.manifest)["format_version"] == 2
    for wrong in ([10, 39], [], "two", [51, -1], [True, 49]):
        with pytest.raises(SnapshotTorn, match="expected counts that make up 50"):
            Snapshot.open(rewritten(snapshot, shards=wrong))
    with pytest.raises(SnapshotVersion, match="format version 4, this program reads 1 to 3"):
        Snapshot.open(rewritten(snapshot, format_version=4))
    with pytest.raises(SnapshotTorn, match="expected inner_product and all of"):
        Snapshot.open(rewritten(snapshot, format_version=1))
