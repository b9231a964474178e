"""The files of a snapshot: mapped, and held against what its manifest states of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from index.durable import sha256_of
from index.manifest import FileFact, SnapshotError, SnapshotTorn


def mapped(path: Path) -> npt.NDArray[Any]:
    """The numpy array in a file is returned, mapped read-only. Raises SnapshotTorn if it holds none."""
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, EOFError) as error:
        raise SnapshotTorn(f"snapshot {path.parent.name}: {path.name} is not a numpy array ({error})") from None


def check_array(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> None:
    """The array in a file is of this type and shape. Raises SnapshotTorn."""
    array = mapped(path)
    if array.dtype != np.dtype(dtype) or array.shape != shape:
        raise SnapshotTorn(
            f"snapshot {path.parent.name}: {path.name} holds {array.dtype}{list(array.shape)}, "
            f"expected {np.dtype(dtype)}{list(shape)}"
        )


def check_file(path: Path, fact: FileFact, *, hashes: bool) -> None:
    """The file has the size, and if `hashes` the content, that the manifest states. Raises SnapshotTorn, SnapshotError."""
    where = f"snapshot {path.parent.name}: {path.name}"
    try:
        size = path.stat().st_size
        if size != fact.bytes:
            raise SnapshotTorn(f"{where} has {size} bytes, expected {fact.bytes}: restore it or build it again")
        actual = sha256_of(path) if hashes else fact.sha256
    except FileNotFoundError:
        raise SnapshotTorn(f"{where} is missing, expected {fact.bytes} bytes: restore it or build it again") from None
    except OSError as error:
        raise SnapshotError(f"{where} cannot be read: {error.strerror}") from None
    if actual != fact.sha256:
        raise SnapshotTorn(f"{where} has sha256 {actual}, expected {fact.sha256}: it was changed; build it again")
