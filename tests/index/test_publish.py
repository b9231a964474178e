from __future__ import annotations

import fcntl
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

import index.durable
import index.publish
from index.durable import StoreBusy, exclusive
from index.manifest import SnapshotNotFound, SnapshotTorn
from index.publish import PublishError, collect_garbage, current, list_snapshots, publish, rollback


class Crash(BaseException):
    pass


@pytest.fixture
def three(make_snapshot) -> list[str]:
    """Three snapshots, written in this order as far as the clock of the file system tells."""
    names = []
    for seed in range(3):
        snapshot = make_snapshot(seed=seed)
        os.utime(snapshot.path / "RUN.json", (seed + 1, seed + 1))
        names.append(snapshot.name)
    return names


def served(store: Path) -> str | None:
    path = current(store)
    return path.name if path else None


def test_publish_and_roll_back_like_a_stack(store: Path, three: list[str]) -> None:
    a, b, c = three
    assert current(store) is None
    for name in (a, a, b, c):
        assert publish(store, name).name == name == served(store)
    assert (store / "CURRENT").read_text() == f"{c}\n"
    assert rollback(store) == b == served(store)
    assert publish(store, c).name == c
    assert [rollback(store), rollback(store)] == [b, a]
    with pytest.raises(PublishError, match="no earlier"):
        rollback(store)
    assert served(store) == a


@pytest.mark.parametrize("crash_at", ["HISTORY", "CURRENT"])
@pytest.mark.parametrize("move", ["publish", "rollback"])
def test_a_crash_between_the_two_files_is_harmless(
    store: Path, three: list[str], monkeypatch: pytest.MonkeyPatch, crash_at: str, move: str
) -> None:
    a, b, c = three
    for name in (a, b):
        publish(store, name)
    real = index.publish._write_names

    def crashing(path: Path, names: list[str]) -> None:
        if path.name == crash_at:
            raise Crash
        real(path, names)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(index.publish, "_write_names", crashing)
        publish(store, c) if move == "publish" else rollback(store)
    if move == "publish":
        assert served(store) == b and rollback(store) == a
    else:
        assert served(store) == (a if crash_at == "HISTORY" else b)
        if served(store) == a:
            with pytest.raises(PublishError, match="no earlier"):
                rollback(store)


def test_a_crash_before_the_rename_keeps_the_old_pointer(store: Path, three: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    publish(store, three[0])
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(Crash))
    with pytest.raises(Crash):
        publish(store, three[1])
    monkeypatch.undo()
    assert served(store) == three[0]
    assert {path.name for path in store.iterdir()} == {"CURRENT", "LOCK", "snapshots"}


@pytest.mark.parametrize("name", ["../../etc", "", "x", "20231114-000000000000", "20231114-000000000000/.."])
def test_only_a_snapshot_can_be_published(store: Path, three: list[str], name: str) -> None:
    publish(store, three[0])
    with pytest.raises(SnapshotNotFound):
        publish(store, name)
    assert served(store) == three[0]


def test_a_torn_snapshot_is_not_published_nor_gone_back_to(store: Path, three: list[str]) -> None:
    a, b, _ = three
    publish(store, a)
    publish(store, b)
    os.truncate(store / "snapshots" / a / "vectors.npy", 3)
    for move in (lambda: publish(store, a), lambda: rollback(store)):
        with pytest.raises(SnapshotTorn):
            move()
        assert served(store) == b
    torn = next(info for info in list_snapshots(store) if info.name == a)
    assert "vectors.npy has 3 bytes" in torn.problem and torn.rollback and not torn.current
    assert collect_garbage(store, keep=0) == [three[2]]  # damaged ones wait for a person


@pytest.mark.parametrize("content", [b"", b"../../etc\n", b"a\nb\n", b"\xff\xfe", b"x" * 1000])
def test_a_damaged_pointer_is_an_error_not_a_guess(store: Path, three: list[str], content: bytes) -> None:
    publish(store, three[0])
    (store / "CURRENT").write_bytes(content)
    with pytest.raises(PublishError, match="CURRENT"):
        current(store)


def test_a_pointer_to_nothing_says_so(store: Path, three: list[str]) -> None:
    publish(store, three[0])
    shutil.rmtree(store / "snapshots" / three[0])
    with pytest.raises(PublishError, match="not there"):
        current(store)


def test_the_collector_spares_the_served_and_the_way_back(store: Path, three: list[str], make_snapshot) -> None:
    a, b, c = three
    d = make_snapshot(seed=7).name
    for name in (b, c, a):
        publish(store, name)
    (store / "snapshots" / ".trash-old").mkdir()
    assert collect_garbage(store, keep=1) == [b]
    assert sorted(path.name for path in (store / "snapshots").iterdir()) == sorted([a, c, d])
    infos = {info.name: info for info in list_snapshots(store)}
    assert infos[a].current and infos[c].rollback and infos[d].count == 40 and infos[d].fingerprint == "encoder-one"
    assert rollback(store) == c
    with pytest.raises(PublishError, match="no earlier"):
        rollback(store)
    assert collect_garbage(store, keep=0) == [a, d]
    with pytest.raises(PublishError):
        collect_garbage(store, keep=-1)


def test_a_collector_that_crashed_does_not_stop_the_next(store: Path, make_snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    name = make_snapshot().name
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(shutil, "rmtree", lambda *_: (_ for _ in ()).throw(Crash))
        collect_garbage(store, keep=0)
    assert make_snapshot().name == name, "the same inputs make the same name again"
    assert collect_garbage(store, keep=0) == [name]
    assert not list((store / "snapshots").iterdir())


def test_a_night_at_work_keeps_what_it_is_about_to_publish(store: Path, three: list[str]) -> None:
    """Written, gated, not yet published: while members are loaded nothing but the night's lock speaks for it."""
    a, b, c = three
    publish(store, a)
    (store / "NIGHT").touch()
    with closing(os.fdopen(os.open(store / "NIGHT", os.O_RDONLY))) as night:
        fcntl.flock(night, fcntl.LOCK_EX)
        assert collect_garbage(store, keep=0) == []
        assert publish(store, c).name == served(store) == c
        assert collect_garbage(store, keep=0, own_night=True) == [b]
    assert collect_garbage(store, keep=0) == [] and rollback(store) == a
    assert collect_garbage(store, keep=0) == [c], "the night is over, and nothing leads to it"


def test_a_mapped_snapshot_survives_its_removal(store: Path, make_snapshot, unit) -> None:
    snapshot = make_snapshot()
    vectors, found = snapshot.vectors, snapshot.index
    assert collect_garbage(store, keep=0) == [snapshot.name]
    assert vectors.sum() == pytest.approx(unit(40, 8).sum(), abs=1e-4) and found.search(vectors[:1], 1)[1].tolist() == [[0]]


def test_two_publishers_wait_for_each_other(store: Path, three: list[str]) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda turn: publish(store, three[turn % 3]), range(24)))
    assert served(store) in three
    with exclusive(store), pytest.raises(StoreBusy, match="LOCK"), exclusive(store, wait_s=0.0):
        pass
    publish(store, three[0])


def test_an_empty_store_lists_nothing(store: Path) -> None:
    assert list_snapshots(store) == [] and current(store) is None and collect_garbage(store, keep=0) == []
    with pytest.raises(PublishError):
        rollback(store)
