"""A snapshot with changes over it answers as an index rebuilt with them, keeps what it acknowledged, refuses what is wrong."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from index.changes import MAX_RECORD_BYTES, ChangeRefused, Folded, fold
from index.durable import StoreBusy
from index.exact import exact_search
from index.filters import Column, FilterError, RowSet
from index.live import LIVE_DIR, LiveIndex, trim_folded
from index.manifest import SnapshotMismatch, SnapshotTorn
from index.publish import collect_garbage, publish
from index.search import Searcher
from index.wal import LogDamaged, segments

CORNERS = np.array(
    [*itertools.product((-0.5, 0.5), repeat=4), *(sign * np.eye(4)[axis] for axis in range(4) for sign in (1, -1))], np.float32
)
"""Unit vectors whose products are exact in float32, with ties everywhere."""
ENCODER = "encoder-one"


def corners(rng: np.random.Generator, count: int) -> np.ndarray:
    return CORNERS[rng.integers(0, len(CORNERS), count)]


def records(ids: list[str]) -> list[bytes]:
    return [f"record of {one}\x00".encode() for one in ids]


@pytest.fixture
def snapshot(make_snapshot):
    return make_snapshot(vectors=corners(np.random.default_rng(0), 30))


def answers(live: LiveIndex, query: np.ndarray, k: int = 100) -> list[str]:
    view = live.view()
    hits = view.search(query[None], k)
    return view.ids(hits.rows[0, : hits.counts[0]])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.sampled_from(["Flat", "IVF4,Flat"]))
def test_answers_are_those_of_an_index_rebuilt_from_scratch(make_snapshot, tmp_path_factory, seed: int, recipe: str) -> None:
    rng = np.random.default_rng(seed)
    store = tmp_path_factory.mktemp("live")
    snapshot = make_snapshot(vectors=corners(rng, 24), recipe=recipe, where=store)
    items = {f"item-{row}": vector for row, vector in enumerate(snapshot.vectors)}
    names = np.array([f"item-{row}" for row in range(36)])
    k, queries = int(rng.choice([1, 5, 60])), rng.integers(-2, 3, (3, 4)).astype(np.float32)
    exclude = [rng.choice(names, 4, replace=False).tolist() for _ in range(3)]
    with LiveIndex(snapshot, store, write=True) as live:
        for _ in range(int(rng.integers(1, 9))):
            batch = rng.choice(names, int(rng.integers(1, 8)), replace=False).tolist()
            for one in batch:
                items.pop(one, None)
            if rng.random() < 0.4:
                live.withdraw(batch)
            else:
                vectors = corners(rng, len(batch))
                live.upsert(batch, records(batch), vectors, ENCODER)
                items.update(zip(batch, vectors))
        view = live.view()
        searcher = view.searcher
        assert isinstance(searcher, Searcher)
        searcher.nprobe = 4 if recipe != "Flat" else 0
        hits = view.search(queries, k, [view.rows(one) for one in exclude])
    with LiveIndex(snapshot, store) as again:
        assert np.array_equal(again.view().search(queries, k).rows, view.search(queries, k).rows) or recipe != "Flat"
    assert view.items == len(items) and set(view.ids(view.rows(list(items)))) == set(items)
    ids, vectors = list(items), np.array(list(items.values()), np.float32).reshape(-1, 4)
    left_out = [np.array([ids.index(one) for one in some if one in items], np.int64) for some in exclude]
    truth = exact_search(vectors, queries, k, left_out)
    assert np.array_equal(hits.scores, truth.scores) and np.array_equal(hits.counts, truth.counts)
    for query in range(3):
        found = view.ids(hits.rows[query, : hits.counts[query]])
        sure = truth.scores[query] > truth.scores[query, max(truth.counts[query] - 1, 0)]
        expected = [ids[row] for row in truth.rows[query, : truth.counts[query]]]
        assert {one for one, certain in zip(found, sure) if certain} == {one for one, certain in zip(expected, sure) if certain}
        assert not set(found) & set(exclude[query]) and len(set(found)) == len(found)


def test_ties_go_to_the_snapshot_first_and_then_to_who_came_first(snapshot, store: Path) -> None:
    with LiveIndex(snapshot, store, write=True) as live:
        live.withdraw([f"item-{row}" for row in range(28)])
        for one in ("b", "a", "item-29", "b"):
            live.upsert([one], records([one]), CORNERS[:1], ENCODER)
        view = live.view()
        found = view.search(CORNERS[:1], 10)
        assert view.ids(found.rows[0, :3]) == ["a", "item-29", "b"], "item-29 moved behind a, b behind both"
        assert [view.record(row) for row in found.rows[0, :2]] == records(["a", "item-29"])
        assert view.record(28) is None and view.ids([28]) == ["item-28"] and view.rows(["item-29", "nobody"])[1] == -1


def test_what_was_acknowledged_is_there_after_opening_again(snapshot, store: Path) -> None:
    with LiveIndex(snapshot, store, write=True) as live:
        assert live.upsert(["new", "item-3"], records(["new", "item-3"]), CORNERS[:2], ENCODER) == 1
        assert live.withdraw(["item-4", "unheard of"]) == 2
        expected = answers(live, CORNERS[0])
    with LiveIndex(snapshot, store, write=True) as live:
        assert answers(live, CORNERS[0]) == expected and live.view().position == 2
        view = live.view()
        row = int(view.rows(["item-3"])[0])
        assert view.record(row) == b"record of item-3\x00" and np.array_equal(view.vector(row), CORNERS[1])


def test_a_view_never_changes(snapshot, store: Path) -> None:
    with LiveIndex(snapshot, store, write=True) as live:
        live.upsert(["a"], [b"1"], CORNERS[:1], ENCODER)
        before = live.view()
        expected = before.search(CORNERS[:3], 50).rows
        live.upsert(["a", "item-0"], [b"2", b"3"], CORNERS[1:3], ENCODER)
        live.withdraw(["item-1", "a"])
        for start in range(0, 3_000, 100):  # beyond the room for rows that the earlier view shares
            ids = [f"more-{row}" for row in range(start, start + 100)]
            live.upsert(ids, records(ids), np.repeat(CORNERS[:1], 100, axis=0), ENCODER)
        assert np.array_equal(before.search(CORNERS[:3], 50).rows, expected)
        assert before.record(int(before.rows(["a"])[0])) == b"1" and before.rows(["item-1"])[0] == 1
        assert live.view().rows(["a", "item-1"]).tolist() == [-1, -1] and live.view().items == 29 + 3_000


def test_another_process_sees_it_by_following(snapshot, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.live.FOLLOW_S", 0.0)
    with LiveIndex(snapshot, store) as follower, LiveIndex(snapshot, store, write=True) as live:
        for turn in range(4):
            live.upsert([f"n{turn}"], [b""], CORNERS[:1], ENCODER)
            live.withdraw([f"item-{turn}"])
            assert answers(follower, CORNERS[0]) == answers(live, CORNERS[0])
        with pytest.raises(RuntimeError, match="write=True"):
            follower.withdraw(["x"])
        with pytest.raises(StoreBusy):
            LiveIndex(snapshot, store, write=True)
        path = segments(store / LIVE_DIR)[0][1]
        with path.open("ab") as file:
            file.write(b"not a record, and long enough to be one")
        with pytest.raises(LogDamaged, match="offset"):
            follower.view()


def test_readers_see_whole_batches_while_many_write(snapshot, store: Path) -> None:
    """Each writer moves its pair of items together; a moment with only one of them, or one of each turn, is torn."""
    torn: list[object] = []
    ended = threading.Event()
    with LiveIndex(snapshot, store, write=True) as live:

        def write(who: int) -> None:
            for turn in range(15):
                pair = [f"{who}-left", f"{who}-right"]
                live.upsert(pair, [str(turn).encode()] * 2, CORNERS[[turn, turn]], ENCODER)
                if [live.view().record(int(row)) for row in live.view().rows(pair)] != [str(turn).encode()] * 2:
                    torn.append((who, turn))

        def read() -> None:
            while not ended.is_set():
                view = live.view()
                hits = view.search(CORNERS[:1], 200)
                found = [row for row in hits.rows[0, : hits.counts[0]].tolist() if row >= view.first_live]
                told = {one: view.record(row) for one, row in zip(view.ids(found), found)}
                if any(told.get(one.replace("left", "right")) != record for one, record in told.items() if "left" in one):
                    torn.append(told)

        writers = [threading.Thread(target=write, args=(who,)) for who in range(4)]
        readers = [threading.Thread(target=read) for _ in range(2)]
        for thread in (*readers, *writers):
            thread.start()
        for thread in writers:
            thread.join()
        ended.set()
        for thread in readers:
            thread.join()
        assert not torn and live.view().items == 30 + 8


NAN = np.array([[np.nan, 0, 0, 1]], np.float32)


@pytest.mark.parametrize(
    ("ids", "contents", "vectors", "said"),
    [
        (["a", "b"], [b"", b""], np.concatenate([CORNERS[:1], NAN]), "no unit vector"),
        (["a"], [b""], CORNERS[:1] * np.float32(np.inf), "no unit vector"),
        (["a"], [b""], CORNERS[:1] * 1.01, "no unit vector"),
        (["a"], [b""], CORNERS[:1, :3], "one vector of 4"),
        (["a"], [b""], CORNERS[:1].astype(np.int64), "one vector of 4"),
        (["a", "b"], [b""], CORNERS[:2], "2 ids, 1 records"),
        (["a", "b", "a"], [b""] * 3, CORNERS[:3], "'a' stands twice"),
        (["a", "b"], [b"", bytes(MAX_RECORD_BYTES + 1)], CORNERS[:2], "record of 'b'"),
        (["a"], ["text"], CORNERS[:1], "record of 'a' is str"),
        (["\ud800"], [b""], CORNERS[:1], "UTF-8"),
        ([7], [b""], CORNERS[:1], "UTF-8"),
        ([""], [b""], CORNERS[:1], "0 bytes"),
        (["x" * 2_000], [b""], CORNERS[:1], "2,000 bytes"),
        ([], [], CORNERS[:0], "without changes"),
        ([f"{n}" for n in range(70)], [bytes(MAX_RECORD_BYTES)] * 70, np.repeat(CORNERS[:1], 70, axis=0), "in parts"),
    ],
)
def test_a_batch_with_one_wrong_item_leaves_no_trace(snapshot, store: Path, ids, contents, vectors, said: str) -> None:
    with LiveIndex(snapshot, store, write=True) as live:
        live.upsert(["kept"], [b""], CORNERS[:1], ENCODER)
        size = segments(store / LIVE_DIR)[0][1].stat().st_size
        with pytest.raises(ChangeRefused, match=said):
            live.upsert(ids, contents, vectors, ENCODER)
        with pytest.raises(SnapshotMismatch, match=r"encoder-two.*encoder-one"):
            live.upsert(["a"], [b""], CORNERS[:1], "encoder-two")
        with pytest.raises(ChangeRefused):
            live.withdraw(["a", "a"])
        assert live.view().items == 31 and segments(store / LIVE_DIR)[0][1].stat().st_size == size


def test_filters_judge_both_kinds_of_rows(snapshot, store: Path) -> None:
    language = Column.of(["de" if row % 3 else "no" for row in range(30)])
    with LiveIndex(snapshot, store, write=True) as live:
        live.upsert(["x", "y", "item-0"], [b"no", b"de", b"no"], CORNERS[:3], ENCODER)
        view = live.view()
        own = Column.of([str(view.record(row), "utf-8") for row in range(view.first_live, view.count)])
        hits = view.search(CORNERS[:2], 50, allow=language.equals("no"), allow_live=own.equals("no"))
        for query in range(2):
            found = set(view.ids(hits.rows[query, : hits.counts[query]]))
            assert found == {f"item-{row}" for row in range(0, 30, 3)} | {"x"}
        for given_sets in ({"allow": language.known()}, {"allow_live": own.known()}):
            with pytest.raises(FilterError, match="both"):
                view.search(CORNERS[:1], 5, **given_sets)
        with pytest.raises(FilterError, match="another snapshot"):
            view.search(CORNERS[:1], 5, allow=language.known(), allow_live=RowSet.every(2))


def test_a_night_folds_the_changes_in_and_trims_what_no_snapshot_needs(
    snapshot, make_snapshot, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.wal_writer.SEGMENT_BYTES", 1)
    publish(store, snapshot.name)
    with LiveIndex(snapshot, store, write=True) as live:
        for turn in range(6):
            live.upsert([f"n{turn}", "item-1"], records(["a", "b"]), CORNERS[[turn, turn]], ENCODER)
        live.withdraw(["n0", "item-2"])
        folded = fold(store / LIVE_DIR, 0)
        assert folded.position == 7 and folded.withdrawn == {"n0", "item-2"}
        assert list(folded.upserts) == ["n1", "n2", "n3", "n4", "n5", "item-1"]
        assert np.array_equal(folded.upserts["item-1"].vector, CORNERS[5]) and folded.upserts["n1"].fingerprint == ENCODER
        assert set(fold(store / LIVE_DIR, 0, upto=3).upserts) == {"n0", "n1", "n2", "item-1"}
        read_back = Folded.parse(folded.to_bytes())
        assert read_back.to_bytes() == folded.to_bytes() and list(read_back.upserts) == list(folded.upserts)
        live.upsert(["n0", "late"], records(["n0", "late"]), CORNERS[:2], ENCODER)
        carried = fold(store / LIVE_DIR, 7, carried=read_back)
        assert carried.withdrawn == {"item-2"} and {"n0", "n1", "late"} <= set(carried.upserts) and carried.position == 8

        assert trim_folded(store) == 0, "the only snapshot holds none of it"
        new = make_snapshot(seed=1, vectors=corners(np.random.default_rng(1), 30), extra={"live_position": "7"})
        publish(store, new.name)
        assert trim_folded(store) == 0, "a rollback would need it"
        collect_garbage(store, keep=0)
        live.move_to(new)
        assert set(live.view().ids(range(30, live.view().count))) == {"n0", "late"} and live.view().items == 32
        newest = make_snapshot(seed=2, vectors=corners(np.random.default_rng(2), 30), extra={"live_position": "8"})
        publish(store, newest.name)
        collect_garbage(store, keep=0)
        assert trim_folded(store) > 0 and fold(store / LIVE_DIR, 7).position == 8
        live.withdraw(["item-5"])
    with LiveIndex(newest, store, write=True) as live:
        assert live.view().position == 9 and live.view().items == 29


def test_changes_of_another_encoder_wait_to_be_encoded_again(snapshot, make_snapshot, store: Path) -> None:
    with LiveIndex(snapshot, store, write=True) as live:
        live.upsert(["a", "b", "item-0"], records(["a", "b", "item-0"]), CORNERS[:3], ENCODER)
        live.withdraw(["item-9", "b"])
        other = make_snapshot(vectors=corners(np.random.default_rng(3), 30), fingerprint="encoder-two")
        live.move_to(other)
        view = live.view()
        assert view.stale == dict(zip(["a", "item-0"], records(["a", "item-0"]))) and view.items == 29
        with pytest.raises(SnapshotMismatch):
            live.upsert(["a"], [b""], CORNERS[:1], ENCODER)
        live.upsert(list(view.stale), list(view.stale.values()), CORNERS[:2], "encoder-two")
        assert not live.view().stale and live.view().items == 30
    with LiveIndex(other, store) as again:
        assert again.view().items == 30 and not again.view().stale


def test_a_snapshot_that_tells_no_position_is_refused(make_snapshot, store: Path) -> None:
    with pytest.raises(SnapshotTorn, match="live_position='seven'"):
        LiveIndex(make_snapshot(extra={"live_position": "seven"}), store)


@pytest.mark.parametrize("write", [True, False])
def test_one_that_is_closed_shows_nothing_more_and_takes_nothing(snapshot, store: Path, write: bool) -> None:
    live = LiveIndex(snapshot, store, write=write)
    before = live.view()
    _ = live.close(), live.close()
    assert live.closed and before.rows(["item-1"])[0] == 1
    for asked in (live.view, lambda: live.withdraw(["item-1"])):
        with pytest.raises(RuntimeError, match="closed"):
            asked()
