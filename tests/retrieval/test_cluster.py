"""Units on a cluster: the same rows in the same units, and the same vectors and snapshot as in one process."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrieval.cluster import (
    ClusterError,
    ClusterReader,
    Reader,
    Reading,
    _asked,
    answers_of,
    check_cluster,
    connected,
    gathered,
    room_of,
)
from retrieval.data.schema import Dataset
from retrieval.encoder import Encoder
from retrieval.moments import end_of
from retrieval.refresh import nightly
from retrieval.units import Here, units

RAY = importlib.util.find_spec("ray") is not None
ON_RAY = """
import sys
from pathlib import Path
import numpy as np
import ray
from retrieval.cluster import ClusterError, ClusterReader
from retrieval.data.read import read_dataset
from retrieval.encoder import Encoder
from retrieval.moments import end_of
from retrieval.refresh import nightly
from retrieval.units import Here

folder, other, rows, data, store, out = map(Path, sys.argv[1:])
lengths, ids = (np.load(rows)[name] for name in ("lengths", "ids"))
rows = [row.tolist() for row in np.split(ids, np.cumsum(lengths)[:-1])]
encoder, dataset, told = Encoder.load(folder), read_dataset(data), []
try:
    ClusterReader("local", encoder, other, workers=1).embed(rows)
except ClusterError as error:
    assert "refused unit 0" in str(error) and "holds encoder" in str(error), error
else:
    raise AssertionError("another encoder was not refused")
assert not ray.is_initialized()

def shown(done, of):
    told.append((done, of))
    print("what Ray prints goes to stderr, and so does this")

reader = ClusterReader("local", encoder, folder, workers=1_000, unit=7)  # there are never so many: it must not wait for them
np.save(out, reader.embed(rows, shown))
assert told[-1] == (len(rows), len(rows)) and len(told) == 8, told
cut = encoder.truncated(16)
reader = ClusterReader("local", cut, folder, workers=2, unit=7)
report = nightly(dataset, cut, None, store, end_of(dataset), reader=reader)
assert not ray.is_initialized()
print(report.snapshot, report.embedded, report.embedded_by, sep=";")
"""
DIES = """
import os, sys
from pathlib import Path
from retrieval import cluster
from retrieval.encoder import Encoder

class Deadly(cluster.Reader):
    def __call__(self, batch):
        if batch["unit"][0].as_py() == 3:
            os._exit(9)
        return super().__call__(batch)

cluster.Reader = Deadly
encoder = Encoder.load(Path(sys.argv[1]))
try:
    cluster.ClusterReader("local", encoder, Path(sys.argv[1]), workers=1, unit=2).embed([[1, 2, 3]] * 10)
except cluster.ClusterError as error:
    print(error)
"""


def some_rows() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 200, rng.integers(1, 32)).tolist() for _ in range(50)]


def reading(folder: Path, encoder: Encoder) -> Reading:
    return Reading(str(folder), encoder.fingerprint, encoder.dims, 1)


def test_units_hold_every_row_once_in_order() -> None:
    assert units(10, 4) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert units(0) == []


@pytest.mark.parametrize("dims", [32, 16])
def test_a_worker_gives_a_unit_the_vectors_of_one_process(encoder_folders: tuple[Path, Path], dims: int) -> None:
    whole, rows = Encoder.load(encoder_folders[0]), some_rows()
    encoder = whole if dims == whole.dims else whole.truncated(dims)
    reader = Reader(reading(encoder_folders[0], encoder))
    found = np.empty((50, dims), np.float32)
    for number, part in reversed(list(enumerate(units(50, 7)))):
        answer = reader(_asked(number, rows[part]))
        assert (answer["unit"].to_pylist(), answer["refused"].to_pylist()) == ([number], [""])
        found[part] = np.frombuffer(answer["vectors"][0].as_py(), "<f4").reshape(-1, dims)
    told: list[tuple[int, int]] = []
    np.testing.assert_array_equal(found, Here(encoder, 7).embed(rows, lambda done, of: told.append((done, of))))
    assert told[-1] == (50, 50) and [done for done, _ in told] == sorted({done for done, _ in told})
    np.testing.assert_allclose(found, encoder.embed(rows), atol=1e-6, rtol=0)


def test_a_worker_with_another_encoder_or_none_says_so(encoder_folders: tuple[Path, Path], tmp_path: Path) -> None:
    wanted = reading(encoder_folders[1], Encoder.load(encoder_folders[0]))
    for asked, why in ((wanted, "holds encoder"), (replace(wanted, folder=str(tmp_path / "nowhere")), "expected an encoder")):
        with pytest.raises(ClusterError, match=f"refused unit 5: .*{why}"):
            list(answers_of(Reader(asked)(_asked(5, [[1, 2]]))))


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # an import of it fails then, as it does where it is not installed
    with pytest.raises(ClusterError, match=r"pip install 'brewline\[cluster\]'"), connected("local"):
        pass
    with pytest.raises(ClusterError, match=r"pip install 'brewline\[cluster\]'"):
        check_cluster("local")


def test_without_rows_no_ray_is_asked_for(encoder_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    encoder = Encoder.load(encoder_folders[0])
    assert ClusterReader("local", encoder.truncated(16), encoder_folders[0]).embed([]).shape == (0, 16)
    with pytest.raises(ClusterError):
        ClusterReader("local", encoder, encoder_folders[0]).embed([[1]])


def test_an_address_where_nobody_listens_is_told_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ray", "ray.data"):
        monkeypatch.setitem(sys.modules, name, socket)  # anything that can be imported: what is looked at here is the address
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        check_cluster(f"127.0.0.1:{port}")
        check_cluster(f"ray://127.0.0.1:{port}")
    with pytest.raises(ClusterError, match=f"no Ray answers at '127.0.0.1:{port}'"):
        check_cluster(f"127.0.0.1:{port}")
    for wrong in ("localhost", ":6379", "head:", "head:port"):
        with pytest.raises(ClusterError, match="expected local, auto or HOST:PORT"):
            check_cluster(wrong)
    with pytest.raises(ClusterError, match="no Ray answers at"):
        check_cluster("127.0.0.1:70000")


def test_answers_in_any_order_are_put_where_they_belong() -> None:
    wanted, told = np.arange(20, dtype=np.float32).reshape(10, 2), list[tuple[int, int]]()
    parts = units(10, 4)
    answers = [(number, wanted[parts[number]].ravel()) for number in (2, 0, 1)]
    found = gathered(iter(answers), parts, 2, lambda done, of: told.append((done, of)))
    np.testing.assert_array_equal(found, wanted)
    assert told == [(2, 10), (6, 10), (10, 10)]
    assert gathered([], [], 2).shape == (0, 2)


@pytest.mark.parametrize(
    ("numbers", "sizes", "why"),
    [
        ((0, 1, 0), (8, 8, 8), "unit 0 of 3 came back twice"),
        ((0, 1, 3), (8, 8, 4), "unit 3 of 3 came back twice, or was not asked for"),
        ((-1,), (4,), "unit -1 of 3"),
        ((0, 2), (8, 4), "1 of 3 units did not come back"),
        ((), (), "3 of 3 units did not come back"),
        ((0, 2), (8, 8), "unit 2 came back with 8 numbers, expected 2 x 2"),
        ((1,), (0,), "unit 1 came back with 0 numbers, expected 4 x 2"),
    ],
)
def test_a_unit_that_is_lost_or_wrong_or_comes_twice_ends_the_night(
    numbers: tuple[int, ...], sizes: tuple[int, ...], why: str
) -> None:
    answers = ((number, np.zeros(size, np.float32)) for number, size in zip(numbers, sizes))
    with pytest.raises(ClusterError, match=why):
        gathered(answers, units(10, 4), 2)


def test_room_is_counted_machine_by_machine_and_only_on_those_that_live() -> None:
    nodes: list[dict[str, Any]] = [
        {"Alive": True, "Resources": {"CPU": 5.0, "memory": 1e9}},
        {"Alive": True, "Resources": {"CPU": 3.0}},
        {"Alive": True, "Resources": {}},
        {"Alive": False, "Resources": {"CPU": 64.0}},
    ]
    assert [room_of(nodes, threads) for threads in (1, 2, 3, 5)] == [8, 3, 2, 1]
    with pytest.raises(ClusterError, match="needs 6 CPUs, and no machine of the cluster has more than 5"):
        room_of(nodes, 6)
    with pytest.raises(ClusterError, match="has more than 0"):
        room_of(nodes[3:], 1)


@pytest.mark.skipif(not RAY, reason="needs Ray (extra cluster)")
def test_a_night_on_a_local_ray_is_the_night_of_one_process(
    encoder_folders: tuple[Path, Path], tiny_dataset: Dataset, tiny_folder: Path, tmp_path: Path
) -> None:
    """In a process of its own: Ray asks the machine for its address, which the guard of these tests forbids."""
    rows, encoder = some_rows(), Encoder.load(encoder_folders[0])
    np.savez(tmp_path / "rows.npz", lengths=[len(row) for row in rows], ids=np.concatenate(rows))
    out = tmp_path / "out.npy"
    files = map(str, (*encoder_folders, tmp_path / "rows.npz", tiny_folder, tmp_path / "store", out))
    done = subprocess.run([sys.executable, "-c", ON_RAY, *files], capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3_000:]
    np.testing.assert_array_equal(np.load(out), Here(encoder, 7).embed(rows))
    cut = encoder.truncated(16)
    report = nightly(tiny_dataset, cut, None, tmp_path / "here", end_of(tiny_dataset), reader=Here(cut, 7))
    assert done.stdout.split(";") == [report.snapshot, "60", "ray\n"]
    assert (report.embedded, report.embedded_by) == (60, "this process")


@pytest.mark.skipif(not RAY, reason="needs Ray (extra cluster)")
def test_a_unit_that_always_kills_its_worker_ends_the_night(encoder_folders: tuple[Path, Path]) -> None:
    words = [sys.executable, "-c", DIES, str(encoder_folders[0])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0 and "ended its worker 4 times" in done.stdout, (done.stdout, done.stderr[-3_000:])
