"""One night's index as an immutable folder, opened: vectors, ids, FAISS index and opaque parts, each vouched for.

    STORE/snapshots/NAME/   vectors.npy  ids.bin  ids.offsets.npy  ids.hashes.npy  ids.order.npy  index.faiss
                            one file per opaque part   MANIFEST.json (facts, hashes)   RUN.json (times, outside the hashes)

A divided one has, instead of vectors.npy and index.faiss, for each of its shards 0, 1, ...

                            shard-0.vectors.npy  shard-0.index.faiss  shard-0.rows.npy (which rows of the whole these are)

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
from index.files import check_array, check_file, mapped
from index.ids import IdArrays, Ids, Rows
from index.manifest import (
    METRIC,
    Manifest,
    SnapshotError,
    SnapshotMismatch,
    SnapshotNotFound,
    SnapshotTorn,
    parse_manifest,
)
from index.recipe import BuildError, Recipe

MANIFEST_FILE, RUN_FILE = "MANIFEST.json", "RUN.json"
VECTORS_FILE, INDEX_FILE = "vectors.npy", "index.faiss"
BLOB_FILE, OFFSETS_FILE, HASHES_FILE, ORDER_FILE = "ids.bin", "ids.offsets.npy", "ids.hashes.npy", "ids.order.npy"
ROWS_FILE, SHARD_PREFIX = "rows.npy", "shard-"
ID_FILES = frozenset((BLOB_FILE, OFFSETS_FILE, HASHES_FILE, ORDER_FILE))


def snapshots_dir(store_dir: Path) -> Path:
    """The folder that holds the snapshots of a store is returned; it need not exist."""
    return store_dir / "snapshots"


def shard_file(place: int, name: str) -> str:
    """The name of a file of one shard of a divided snapshot is returned."""
    return f"{SHARD_PREFIX}{place}.{name}"


def core_files(shards: int) -> frozenset[str]:
    """The files that a snapshot of so many shards has beside its opaque parts are returned; 0: it is not divided."""
    if not shards:
        return ID_FILES | {VECTORS_FILE, INDEX_FILE}
    return ID_FILES | {shard_file(place, name) for place in range(shards) for name in (VECTORS_FILE, INDEX_FILE, ROWS_FILE)}


class Shard:
    """What one machine searches: the vectors and the index of a shard, or of all rows of a snapshot that is not divided.

    `count` is n, `manifest` the whole snapshot's. Everything is mapped at first use.
    """

    def __init__(self, path: Path, manifest: Manifest, place: int) -> None:
        self.path, self.manifest = path, manifest
        self.name = f"{path.name}/{place}"
        self.count = manifest.shards[place] if manifest.shards else manifest.count
        self._place = place

    @classmethod
    def open(cls, path: Path, place: int, *, verify: bool = True) -> Shard:
        """One shard of the snapshot in this folder is returned; of its files the manifest and the shard's own need be there.

        A snapshot that is not divided has shard 0. Raises as `Snapshot.open`.
        """
        path = Path(path).resolve()
        manifest = read_manifest(path)
        if not 0 <= place < max(1, len(manifest.shards)):
            raise SnapshotNotFound(f"snapshot {path.name} has {max(1, len(manifest.shards))} shards 0, 1, ..., no shard {place}")
        shard = cls(path, manifest, place)
        for name in sorted(shard.files):
            if name not in manifest.files:
                raise SnapshotTorn(f"snapshot {path.name}: the manifest does not know {name}; build it again")
            check_file(path / name, manifest.files[name], hashes=verify)
        shard.check_shape()
        return shard

    @property
    def files(self) -> frozenset[str]:
        """The names of the two files that are searched."""
        return frozenset((self._file(VECTORS_FILE), self._file(INDEX_FILE)))

    @cached_property
    def vectors(self) -> npt.NDArray[np.float32]:
        """The vectors as float32 [n, D]: mapped read-only, or in memory if they are kept in fewer bits."""
        return decode_rows(mapped(self.path / self._file(VECTORS_FILE)), self.manifest.dtype)

    @cached_property
    def rows(self) -> Rows:
        """Which rows of the whole these are, int64 [n], rising."""
        return mapped(self.path / self._file(ROWS_FILE)) if self.manifest.shards else np.arange(self.count)

    @cached_property
    def index(self) -> Any:
        """The FAISS index over the same rows, mapped where its kind allows it.

        Raises SnapshotTorn when it is not over these rows.
        """
        import faiss

        file, dims = self._file(INDEX_FILE), self.manifest.dims
        try:
            index = faiss.read_index(str(self.path / file), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise SnapshotTorn(f"snapshot {self.path.name}: {file} cannot be read by FAISS ({error})") from None
        try:
            width = Recipe.parse(self.manifest.recipe).width(dims)
        except BuildError as error:
            raise SnapshotTorn(f"snapshot {self.path.name}: {error}") from None
        if (index.ntotal, index.d) != (self.count, width):
            raise SnapshotTorn(
                f"snapshot {self.path.name}: {file} holds {index.ntotal} x {index.d}, expected {self.count} x {width}"
            )
        return index

    def place_of(self, rows: Rows) -> tuple[npt.NDArray[np.bool_], Rows]:
        """Which of these rows of the whole are here (bool), and what rows they are here, are returned."""
        return place_of(self.rows, rows)

    def check_shape(self) -> None:
        """The vectors are as many, as long and of the type that the manifest states. Raises SnapshotTorn."""
        facts = self.manifest
        check_array(self.path / self._file(VECTORS_FILE), facts.dtype, (self.count, facts.dims))

    def _file(self, name: str) -> str:
        return shard_file(self._place, name) if self.manifest.shards else name


class Snapshot:
    """An open snapshot. Everything is mapped, nothing is copied; safe to share between threads and processes.

    `shards` are what is searched, one if it is not divided; `ids` N texts, `manifest` the facts.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.name = path.name
        self.manifest = manifest
        self.shards = tuple(Shard(path, manifest, place) for place in range(max(1, len(manifest.shards))))

    @classmethod
    def open(cls, path: Path, *, verify: bool = True, fingerprint: str | None = None, searched_here: bool = True) -> Snapshot:
        """The snapshot in this folder is returned, its files present, of the right size and (verify) the right hash.

        `fingerprint` is the encoder's that asks. Unless it is `searched_here`, vectors and indexes are not looked at and need
        not be there. Raises SnapshotNotFound, SnapshotTorn, SnapshotMismatch, SnapshotVersion.
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
        snapshot.verify(hashes=verify, searched_here=searched_here)
        snapshot._check_shapes()
        if searched_here:
            for shard in snapshot.shards:
                shard.check_shape()
        return snapshot

    def verify(self, *, hashes: bool = True, searched_here: bool = True) -> None:
        """Every file is present and of the size, and if `hashes` of the content, that the manifest states.

        Raises SnapshotTorn, which names the file, what was expected and what is there.
        """
        elsewhere = frozenset[str]() if searched_here else frozenset[str]().union(*(shard.files for shard in self.shards))
        for name, fact in sorted(self.manifest.files.items()):
            if name not in elsewhere:
                check_file(self.path / name, fact, hashes=hashes)

    @cached_property
    def vectors(self) -> npt.NDArray[np.float32]:
        """The vectors as float32 [N, D]: mapped read-only, or in memory if they are kept in fewer bits or divided.

        For whoever needs all of them; `vectors_at` reads some.
        """
        if not self.manifest.shards:
            return self.shards[0].vectors
        return self.vectors_at(np.arange(self.manifest.count))

    def vectors_at(self, rows: Rows) -> npt.NDArray[np.float32]:
        """The vectors of these rows are returned, float32 [n, D]. Raises IndexError for a row that is not here."""
        if len(rows) and (rows.min() < 0 or rows.max() >= self.manifest.count):
            raise IndexError(f"rows {rows.min()}..{rows.max()} asked, the snapshot has rows 0..{self.manifest.count - 1}")
        if not self.manifest.shards:
            return self.shards[0].vectors[rows]
        found = np.empty((len(rows), self.manifest.dims), np.float32)
        for shard in self.shards:
            here, own = shard.place_of(rows)
            found[here] = shard.vectors[own]
        return found

    @cached_property
    def ids(self) -> Ids:
        """The ids of the rows."""
        size = self.manifest.files[BLOB_FILE].bytes
        blob = np.memmap(self.path / BLOB_FILE, np.uint8, "r") if size else np.zeros(0, np.uint8)
        return Ids(IdArrays(blob, *(mapped(self.path / name) for name in (OFFSETS_FILE, HASHES_FILE, ORDER_FILE))))

    @property
    def index(self) -> Any:
        """The FAISS index of a snapshot that is not divided, see `Shard.index`. Raises SnapshotError for one that is."""
        if self.manifest.shards:
            raise SnapshotError(f"snapshot {self.name} is divided: each of its {len(self.shards)} shards has an index of its own")
        return self.shards[0].index

    @property
    def parts(self) -> list[str]:
        """The names of the opaque parts, sorted."""
        return sorted(set(self.manifest.files) - self._core)

    def part(self, name: str) -> Path:
        """The file of an opaque part is returned. Raises SnapshotNotFound when the snapshot has no such part."""
        if name not in self.manifest.files or name in self._core:
            raise SnapshotNotFound(f"snapshot {self.name} has no part {name!r}; its parts: {', '.join(self.parts)}")
        return self.path / name

    def run(self) -> dict[str, Any]:
        """The times and durations of RUN.json are returned, {} when the file is gone: nobody vouches for them."""
        try:
            content = json.loads((self.path / RUN_FILE).read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    @property
    def _core(self) -> frozenset[str]:
        return core_files(len(self.manifest.shards))

    def _check_shapes(self) -> None:
        """Hashes prove that nothing changed since writing; this proves that what was written fits together."""
        facts = self.manifest
        missing = self._core - set(facts.files)
        if missing or facts.metric != METRIC:
            raise SnapshotTorn(
                f"snapshot {self.name}: the manifest says metric {facts.metric}, without {sorted(missing)}; "
                f"expected {METRIC} and all of {sorted(self._core)}"
            )
        check_array(self.path / OFFSETS_FILE, np.int64, (facts.count + 1,))
        check_array(self.path / HASHES_FILE, np.uint64, (facts.count,))
        check_array(self.path / ORDER_FILE, np.int64, (facts.count,))
        for place, count in enumerate(facts.shards):
            check_array(self.path / shard_file(place, ROWS_FILE), np.int64, (count,))


def place_of(members: Rows, rows: Rows) -> tuple[npt.NDArray[np.bool_], Rows]:
    """Which of the rows are among the members (rising), bool, and where those stand there, are returned."""
    if not len(members):
        return np.zeros(len(rows), np.bool_), np.zeros(0, np.int64)
    at = np.minimum(np.searchsorted(members, rows), len(members) - 1)
    here = members[at] == rows
    return here, at[here]


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
