from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from index.manifest import SnapshotError, SnapshotMismatch, SnapshotNotFound, SnapshotTorn, SnapshotVersion, digest
from index.publish import collect_garbage, list_snapshots
from index.snapshot import Snapshot
from index.writer import SnapshotWriter


def contents(snapshot: Snapshot) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in snapshot.path.iterdir() if path.name != "RUN.json"}


def names(store: Path) -> list[str]:
    return [path.name for path in (store / "snapshots").iterdir()]


def test_what_is_written_is_read_back(make_snapshot, unit) -> None:
    snapshot = make_snapshot(40, seed=3)
    assert np.array_equal(snapshot.vectors, unit(40, 8, 3)) and not snapshot.vectors.flags.writeable
    assert snapshot.ids.many([0, 39]) == ["item-0", "item-39"]
    assert snapshot.index.ntotal == 40
    assert snapshot.parts == ["catalog.arrow"] and snapshot.part("catalog.arrow").read_bytes() == b"opaque\x00bytes"
    facts = snapshot.manifest
    assert (facts.count, facts.dims, facts.fingerprint, facts.recipe) == (40, 8, "encoder-one", "Flat")
    assert facts.extra == {"ranker": "r1"} and facts.build["seed"] == 3
    assert facts.recall is not None and facts.recall.mean == 1.0 and facts.recall.k == 10
    assert snapshot.name.startswith("20231114-") and snapshot.run()["seconds"] >= 0
    with pytest.raises(SnapshotNotFound, match=r"catalog\.arrow"):
        snapshot.part("vectors.npy")


def test_same_inputs_give_the_same_bytes_and_name(make_snapshot, tmp_path: Path) -> None:
    first = make_snapshot(300, recipe="IVF4,Flat", where=tmp_path / "one")
    second = make_snapshot(300, recipe="IVF4,Flat", where=tmp_path / "two")
    assert first.path != second.path and first.name == second.name
    assert contents(first) == contents(second)
    assert make_snapshot(300, recipe="IVF4,Flat", fingerprint="other").name != first.name


def test_writing_again_is_harmless(make_snapshot, store: Path) -> None:
    first = make_snapshot()
    before = (first.path / "RUN.json").read_bytes()
    assert make_snapshot().path == first.path
    assert names(store) == [first.name] and (first.path / "RUN.json").read_bytes() == before


def test_an_empty_snapshot_opens(make_snapshot) -> None:
    snapshot = make_snapshot(vectors=np.zeros((0, 8), np.float32))
    assert snapshot.vectors.shape == (0, 8) and len(snapshot.ids) == 0 and snapshot.index.ntotal == 0
    assert snapshot.ids.rows(["x"]).tolist() == [-1]


@pytest.mark.parametrize("name", ["vectors.npy", "ids.bin", "index.faiss", "catalog.arrow", "ids.order.npy"])
def test_a_truncated_file_is_named_with_both_sizes(make_snapshot, name: str) -> None:
    path = make_snapshot().path
    size = (path / name).stat().st_size
    os.truncate(path / name, size - 1)
    for verify in (True, False):
        with pytest.raises(SnapshotTorn, match=rf"{name} has {size - 1} bytes, expected {size}"):
            Snapshot.open(path, verify=verify)


@pytest.mark.parametrize("name", ["vectors.npy", "ids.bin", "index.faiss", "catalog.arrow", "MANIFEST.json"])
def test_one_flipped_bit_anywhere_is_found(make_snapshot, name: str) -> None:
    path = make_snapshot().path
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(SnapshotTorn, match=name):
        Snapshot.open(path)


@pytest.mark.parametrize("name", ["MANIFEST.json", "vectors.npy", "ids.bin"])
def test_a_missing_file_is_named(make_snapshot, name: str) -> None:
    path = make_snapshot().path
    (path / name).unlink()
    with pytest.raises(SnapshotTorn, match=name):
        Snapshot.open(path, verify=False)


def test_times_are_outside_the_hashes(make_snapshot) -> None:
    path = make_snapshot().path
    (path / "RUN.json").write_text("not json")
    assert Snapshot.open(path).run() == {}


def test_another_encoder_is_refused_with_both_fingerprints(make_snapshot) -> None:
    path = make_snapshot(fingerprint="aaa").path
    assert Snapshot.open(path, fingerprint="aaa").name == path.name
    with pytest.raises(SnapshotMismatch, match=r"aaa.*bbb"):
        Snapshot.open(path, fingerprint="bbb")


def test_a_renamed_folder_and_a_missing_one(make_snapshot, store: Path) -> None:
    path = make_snapshot().path
    with pytest.raises(SnapshotTorn, match="renamed"):
        Snapshot.open(path.rename(path.with_name("20231114-0123456789ab")))
    with pytest.raises(SnapshotNotFound):
        Snapshot.open(store / "snapshots" / "nowhere")


def rewritten(path: Path, change: Callable[[dict], None]) -> Path:
    """A manifest that somebody wrote on purpose: its hash fits the folder's name."""
    facts = json.loads((path / "MANIFEST.json").read_bytes())
    change(facts)
    content = json.dumps(facts).encode()
    (path / "MANIFEST.json").write_bytes(content)
    return path.rename(path.with_name(f"{path.name[:9]}{digest(content)}"))


def test_manifests_that_do_not_fit_are_refused(make_snapshot) -> None:
    path = rewritten(make_snapshot().path, lambda facts: facts.update(format_version=99))
    with pytest.raises(SnapshotVersion, match="99"):
        Snapshot.open(path)
    path = rewritten(path, lambda facts: facts.update(format_version=1, dims=9))
    with pytest.raises(SnapshotTorn, match=r"vectors\.npy"):
        Snapshot.open(path)
    path = rewritten(path, lambda facts: facts.update(count="many"))
    with pytest.raises(SnapshotTorn, match="count='many'"):
        Snapshot.open(path)
    path = rewritten(path, lambda facts: facts.update(count=40, dims=8, files={}))
    with pytest.raises(SnapshotTorn, match="without"):
        Snapshot.open(path)


def test_an_index_over_other_rows_is_refused_at_writing(make_snapshot, unit) -> None:
    for wrong in ({"indexed": unit(39, 8)}, {"ids": ["just one"]}, {"indexed": unit(40, 4)}):
        with pytest.raises(SnapshotError, match="same rows"):
            make_snapshot(40, **wrong)


def test_an_exception_leaves_nothing(store: Path, unit) -> None:
    with pytest.raises(ZeroDivisionError), SnapshotWriter(store, fingerprint="f", as_of=0) as writer:
        writer.vectors(unit(3, 4))
        _ = 1 / 0
    assert names(store) == []
    with pytest.raises(SnapshotError, match="vectors, ids and an index"), SnapshotWriter(store, fingerprint="f", as_of=0):
        pass
    assert names(store) == []
    with pytest.raises(SnapshotError, match="inside its"):
        writer.vectors(unit(3, 4))


@pytest.mark.parametrize("name", ["../x", ".hidden", "A", "", "vectors.npy", "MANIFEST.json", "a/b"])
def test_part_names_stay_inside_the_folder(store: Path, name: str) -> None:
    with pytest.raises(SnapshotError, match="part"), SnapshotWriter(store, fingerprint="f", as_of=0) as writer:
        writer.part(name, b"")


def test_parts_come_from_files_too_and_only_once(store: Path, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"from a file")
    with pytest.raises(SnapshotError, match="twice"), SnapshotWriter(store, fingerprint="f", as_of=0) as writer:
        writer.part("a.bin", tmp_path / "source")
        writer.part("a.bin", b"again")
    with pytest.raises(SnapshotError, match="cannot write"), SnapshotWriter(store, fingerprint="f", as_of=0) as writer:
        writer.part("b.bin", tmp_path / "no such file")


def test_a_time_in_milliseconds_far_away_is_refused(make_snapshot) -> None:
    with pytest.raises(SnapshotError, match="milliseconds"):
        make_snapshot(as_of=1_700_000_000_000_000)


CRASH = """
import os, pathlib, sys
import numpy as np
from index.build import build_index
from index.recipe import Recipe
from index.writer import SnapshotWriter
pathlib.Path.rename = lambda *_: os._exit(9)     # the power goes between the last write and the rename
with SnapshotWriter(pathlib.Path(sys.argv[1]), fingerprint="f", as_of=0) as writer:
    vectors = np.eye(4, dtype=np.float32)
    writer.vectors(vectors); writer.ids(list("abcd")); writer.index(build_index(vectors, Recipe(), 0), recipe="Flat")
"""


def test_a_crash_before_the_rename_leaves_no_snapshot(make_snapshot, store: Path) -> None:
    whole = make_snapshot()
    root = Path(__file__).parents[2]
    died = subprocess.run([sys.executable, "-c", CRASH, str(store)], cwd=root, check=False, timeout=60)
    assert died.returncode == 9
    assert len(names(store)) == 2 and [info.name for info in list_snapshots(store)] == [whole.name]
    assert collect_garbage(store, keep=1) == []
    assert names(store) == [whole.name]


def test_the_collector_leaves_a_working_writer_alone(store: Path, unit) -> None:
    with pytest.raises(SnapshotError), SnapshotWriter(store, fingerprint="f", as_of=0) as writer:
        writer.vectors(unit(3, 4))
        collect_garbage(store, keep=0)
        writer.ids(["a", "b", "c"])  # its folder is still there
        assert len(names(store)) == 1
