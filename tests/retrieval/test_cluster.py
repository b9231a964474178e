"""Units on a cluster: the same rows in the same units, and the same vectors as in one process."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from retrieval.cluster import ClusterEncoder, ClusterError, Reader, _asked, embed_units, units
from retrieval.encoder import Encoder

RAY = importlib.util.find_spec("ray") is not None
ON_RAY = """
import sys
from pathlib import Path
import numpy as np
from retrieval.cluster import ClusterEncoder

folder, rows, out = sys.argv[1:]
lengths, ids = (np.load(rows)[name] for name in ("lengths", "ids"))
rows = [row.tolist() for row in np.split(ids, np.cumsum(lengths)[:-1])]
encoder = ClusterEncoder(Path(folder), workers=2, unit=7)
told = []
np.save(out, encoder.embed(rows, lambda done, of: told.append((done, of))))
assert told[-1] == (len(rows), len(rows)) and len(told) == 8, told
assert encoder.embed([]).shape == (0, 32)
"""


def some_rows() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 200, rng.integers(1, 32)).tolist() for _ in range(50)]


def test_units_hold_every_row_once_in_order() -> None:
    assert units(10, 4) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert units(0) == []


def test_a_worker_gives_a_unit_the_vectors_of_one_process(encoder_folders: tuple[Path, Path]) -> None:
    encoder, rows = Encoder.load(encoder_folders[0]), some_rows()
    reader = Reader(str(encoder_folders[0]), "cpu", "float32", encoder.fingerprint)
    found = np.empty((50, encoder.dims), np.float32)
    for number, part in reversed(list(enumerate(units(50, 7)))):
        answer = reader(_asked(number, rows[part]))
        assert answer["unit"].to_pylist() == [number]
        found[part] = np.frombuffer(answer["vectors"][0].as_py(), "<f4").reshape(-1, encoder.dims)
    np.testing.assert_array_equal(found, embed_units(encoder, rows, 7))
    np.testing.assert_allclose(found, encoder.embed(rows), atol=1e-6, rtol=0)


def test_a_worker_with_another_encoder_refuses(encoder_folders: tuple[Path, Path]) -> None:
    reader = Reader(str(encoder_folders[1]), "cpu", "float32", Encoder.load(encoder_folders[0]).fingerprint)
    with pytest.raises(ClusterError, match=r"holds encoder .* here, expected"):
        reader(_asked(0, [[1, 2]]))


@pytest.mark.skipif(RAY, reason="Ray is installed")
def test_without_ray_the_error_says_what_to_install(encoder_folders: tuple[Path, Path]) -> None:
    with pytest.raises(ClusterError, match=r"pip install 'brewline\[cluster\]'"):
        ClusterEncoder(encoder_folders[0], workers=1)


@pytest.mark.skipif(not RAY, reason="needs Ray (extra cluster)")
def test_a_local_ray_gives_the_vectors_of_one_process(encoder_folders: tuple[Path, Path], tmp_path: Path) -> None:
    """In a process of its own: Ray asks the machine for its address, which the guard of these tests forbids."""
    rows = some_rows()
    np.savez(tmp_path / "rows.npz", lengths=[len(row) for row in rows], ids=np.concatenate(rows))
    files = [str(encoder_folders[0]), str(tmp_path / "rows.npz"), str(tmp_path / "out.npy")]
    done = subprocess.run([sys.executable, "-c", ON_RAY, *files], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3_000:]
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), embed_units(Encoder.load(encoder_folders[0]), rows, 7))
