"""One night's index as an immutable folder, opened: vectors, ids, FAISS index and opaque parts, each vouched for.

    STORE/snapshots/NAME/   vectors.npy  ids.bin  ids.offsets.npy  ids.hashes.npy  ids.order.npy  index.faiss
                            one file per opaque part   MANIFEST.json (facts, hashes)   RUN.json (times, outside the hashes)

Written by `index.writer.SnapshotWriter`.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from index.codes import decode_rows
from index.durable import sha256_of
from index.ids import IdArrays, Ids
from index.manifest import (
    METRIC,
    FileFact,
    Manifest,
    SnapshotError,
    SnapshotMismatch,
    SnapshotNotFound,
    SnapshotTorn,
    parse_manifest,
)

MANIFEST_FILE, RUN_FILE = "MANIFEST.json", "RUN.json"
VECTORS_FILE, INDEX_FILE = "vectors.npy", "index.faiss"
BLOB_FILE, OFFSETS_FILE, HASHES_FILE, ORDER_FILE = "ids.bin", "ids.offsets.npy", "ids.hashes.npy", "ids.order.npy"
CORE_FILES = frozenset((VECTORS_FILE, INDEX_FILE, BLOB_FILE, OFFSETS_FILE, HASHES_FILE, ORDER_FILE))


def snapshots_dir(store_dir: Path) -> Path:
    """The folder that holds the snapshots of a store is returned; it need not exist."""
    return store_dir / "snapshots"


class Snapshot:
    """An open snapshot. Everything is mapped, nothing is copied; safe to share between threads and processes.

    `vectors` float32 [N, D], `ids` N texts, `manifest` the facts. `index` is loaded at first use.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.name = path.name
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path, *, verify: bool = True, fingerprint: str | None = None) -> Snapshot:
        """The snapshot in this folder is returned, its files present, of the right size and (verify) the right hash.

        `fingerprint` is the encoder's that asks. Raises SnapshotNotFound, SnapshotTorn, SnapshotMismatch, SnapshotVersion.
        """
        path = Path(path).resolve()
        if not path.is_dir():
            raise SnapshotNotFound(f"there is no snapshot at {path}: list the store, or build one with `nightly`")
        manifest = read_manifest(path)
        if fingerprint is not None and fingerprint != manifest.fingerprint:
            raise SnapshotMismatch(
                f"snapshot {path.name} was made by encoder {manifest.fingerprint}, this one is {fingerprint}: "
                "load the encoder that made it, or build a snapshot with this one"
            )
        snapshot = cls(path, manifest)
        snapshot.verify(hashes=verify)
        snapshot._check_shapes()
        return snapshot

    def verify(self, *, hashes: bool = True) -> None:
        """Every file is present and of the size, and if `hashes` of the content, that the manifest states.

        Raises SnapshotTorn, which names the file, what was expected and what is there.
        """
        for name, fact in sorted(self.manifest.files.items()):
            _check_file(self.path / name, fact, hashes=hashes)

    @cached_property
    def vectors(self) -> npt.NDArray[np.float32]:
        """The vectors as float32 [N, D]: mapped read-only, or in memory if they are kept in fewer bits."""
        return decode_rows(self._array(VECTORS_FILE), self.manifest.dtype)

    @cached_property
    def ids(self) -> Ids:
        """The ids of the rows."""
        size = self.manifest.files[BLOB_FILE].bytes
        blob = np.memmap(self.path / BLOB_FILE, np.uint8, "r") if size else np.zeros(0, np.uint8)
        return Ids(IdArrays(blob, self._array(OFFSETS_FILE), self._array(HASHES_FILE), self._array(ORDER_FILE)))

    @cached_property
    def index(self) -> Any:
        """The FAISS index over the same rows, mapped where its kind allows it.

        Raises SnapshotTorn when it is not over these rows.
        """
        import faiss

        try:
            index = faiss.read_index(str(self.path / INDEX_FILE), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise SnapshotTorn(f"snapshot {self.name}: {INDEX_FILE} cannot be read by FAISS ({error})") from None
        if (index.ntotal, index.d) != (self.manifest.count, self.manifest.dims):
            raise SnapshotTorn(
                f"snapshot {self.name}: {INDEX_FILE} holds {index.ntotal} x {index.d}, "
                f"expected {self.manifest.count} x {self.manifest.dims}"
            )
        return index

    @property
    def parts(self) -> list[str]:
        """The names of the opaque parts, sorted."""
        return sorted(set(self.manifest.files) - CORE_FILES)

    def part(self, name: str) -> Path:
        """The file of an opaque part is returned. Raises SnapshotNotFound when the snapshot has no such part."""
        if name not in self.manifest.files or name in CORE_FILES:
            raise SnapshotNotFound(f"snapshot {self.name} has no part {name!r}; its parts: {', '.join(self.parts)}")
        return self.path / name

    def run(self) -> dict[str, Any]:
        """The times and durations of RUN.json are returned, {} when the file is gone: nobody vouches for them."""
        try:
            content = json.loads((self.path / RUN_FILE).read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _array(self, name: str) -> npt.NDArray[Any]:
        try:
            return np.asarray(np.load(self.path / name, mmap_mode="r", allow_pickle=False))
        except (ValueError, EOFError) as error:
            raise SnapshotTorn(f"snapshot {self.name}: {name} is not a numpy array ({error})") from None

    def _check_shapes(self) -> None:
        """Hashes prove that nothing changed since writing; this proves that what was written fits together."""
        facts = self.manifest
        missing = CORE_FILES - set(facts.files)
        if missing or facts.metric != METRIC:
            raise SnapshotTorn(
                f"snapshot {self.name}: the manifest says metric {facts.metric}, without {sorted(missing)}; "
                f"expected {METRIC} and all of {sorted(CORE_FILES)}"
            )
        expected: dict[str, tuple[npt.DTypeLike, tuple[int, ...]]] = {
            VECTORS_FILE: (facts.dtype, (facts.count, facts.dims)),
            OFFSETS_FILE: (np.int64, (facts.count + 1,)),
            HASHES_FILE: (np.uint64, (facts.count,)),
            ORDER_FILE: (np.int64, (facts.count,)),
        }
        for name, (dtype, shape) in expected.items():
            array = self._array(name)
            if array.dtype != np.dtype(dtype) or array.shape != shape:
                raise SnapshotTorn(
                    f"snapshot {self.name}: {name} holds {array.dtype}{list(array.shape)}, "
                    f"expected {np.dtype(dtype)}{list(shape)}"
                )


def read_manifest(path: Path) -> Manifest:
    """The manifest of the snapshot folder is returned; no other file is looked at.

    Raises SnapshotTorn when it is missing or changed, SnapshotVersion when it is newer than this program.
    """
    try:
        content = (path / MANIFEST_FILE).read_bytes()
    except FileNotFoundError:
        raise SnapshotTorn(f"{path} has no {MANIFEST_FILE}: it is not a whole snapshot; build it again") from None
    except OSError as error:
        raise SnapshotError(f"{path / MANIFEST_FILE} cannot be read: {error.strerror}") from None
    return parse_manifest(content, path.name)


def _check_file(path: Path, fact: FileFact, *, hashes: bool) -> None:
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
