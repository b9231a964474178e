"""Units on a cluster: the same rows in the same units, and the same vectors and snapshot as in one process."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from retrieval.cluster import ClusterError, Reader, Reading, _asked, connected
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
from retrieval.cluster import ClusterError, ClusterReader, connected
from retrieval.data.read import read_dataset
from retrieval.encoder import Encoder
from retrieval.moments import end_of
from retrieval.refresh import nightly
from retrieval.units import Here

folder, other, rows, data, store, out = map(Path, sys.argv[1:])
lengths, ids = (np.load(rows)[name] for name in ("lengths", "ids"))
rows = [row.tolist() for row in np.split(ids, np.cumsum(lengths)[:-1])]
encoder, dataset, told = Encoder.load(folder), read_dataset(data), []
with connected("local") as ray:
    try:
        ClusterReader(ray, encoder, other, workers=1).embed(rows)
    except ClusterError as error:
        assert "refused unit 0" in str(error) and "holds encoder" in str(error), error
    else:
        raise AssertionError("another encoder was not refused")
    reader = ClusterReader(ray, encoder, folder, workers=2, unit=7)
    np.save(out, reader.embed(rows, lambda done, of: told.append((done, of))))
    assert told[-1] == (len(rows), len(rows)) and len(told) == 8, told
    assert reader.embed([]).shape == (0, 32) and reader.where == "ray, at most 2 workers of 1 thread each"
    cut = encoder.truncated(16)
    reader = ClusterReader(ray, cut, folder, workers=2, unit=7)
    report = nightly(dataset, cut, None, store, end_of(dataset), reader=reader)
    print("what Ray prints goes to stderr, and so does this")
assert not ray.is_initialized()
print(report.snapshot, report.embedded, report.embedded_by, sep=";")
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
        (refused,) = Reader(asked)(_asked(0, [[1, 2]]))["refused"].to_pylist()
        assert why in refused


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # an import of it fails then, as it does where it is not installed
    with pytest.raises(ClusterError, match=r"pip install 'brewline\[cluster\]'"), connected("local"):
        pass


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
    assert done.stdout.split(";") == [report.snapshot, "60", "ray, at most 2 workers of 1 thread each\n"]
    assert (report.embedded, report.embedded_by) == (60, "this process")
