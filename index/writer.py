"""Writes a snapshot beside the others and renames it into place: whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from index.codes import Codes, encode_rows
from index.durable import exclusive, fsync_path, sha256_of, try_lock
from index.ids import Rows, encode_ids
from index.manifest import Fact, FileFact, Manifest, Recall, SnapshotError, SnapshotTorn
from index.recipe import Recipe
from index.snapshot import (
    BLOB_FILE,
    HASHES_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    OFFSETS_FILE,
    ORDER_FILE,
    ROWS_FILE,
    RUN_FILE,
    SHARD_PREFIX,
    VECTORS_FILE,
    Snapshot,
    core_files,
    shard_file,
    snapshots_dir,
)

PARTIAL_PREFIX, TRASH_PREFIX = ".partial-", ".trash-"
"""A folder so named is being written; it holds a lock on itself, and one without is what a crash left behind. Or it is to be
swept by the garbage collector."""
_PART_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_BLOCK_ROWS = 65_536


class SnapshotWriter:
    """Collects the files of one snapshot: leaving the block normally makes it appear whole, an exception leaves nothing.

        with SnapshotWriter(store, fingerprint=encoder.fingerprint, as_of=as_of) as writer:
            writer.vectors(vectors); writer.ids(ids); writer.index(index, recipe="Flat"); writer.part("catalog.arrow", path)
        writer.path                      # the snapshot's folder: not published yet, see index.publish

    The same inputs give byte-identical files and therefore the same name: writing a snapshot twice is harmless. `run` takes
    times and durations (RUN.json, outside the hashes), `extra` further facts as text.
    """

    def __init__(
        self, store_dir: Path, *, fingerprint: str, as_of: int, parent: str = "", extra: Mapping[str, str] | None = None
    ) -> None:
        self.extra: dict[str, str] = dict(extra or {})
        self.run: dict[str, Fact] = {}
        self._store_dir = Path(store_dir).resolve()
        self._fingerprint, self._as_of, self._parent = fingerprint, int(as_of), parent
        self._folder: Path | None = None
        self._lock: int | None = None
        self._shape: tuple[int, int] | None = None
        self._codes: Codes = "float32"
        self._shards: tuple[int, ...] = ()
        self._id_count: int | None = None
        self._index_facts: tuple[str, dict[str, Fact], Recall | None, list[tuple[int, int]]] | None = None
        self._started = 0.0
        self._path: Path | None = None

    def __enter__(self) -> Self:
        self._started = time.time()
        parent = snapshots_dir(self._store_dir)
        with _disk(parent):
            # Under the store's lock, so that the garbage collector never meets a partial folder without its own lock.
            with exclusive(self._store_dir):
                parent.mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=parent))
                self._lock = try_lock(self._folder)
            self._folder.chmod(0o755)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        folder = self._beside()
        try:
            if kind is None:
                with _disk(folder):
                    self._path = self._commit(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            self._folder = None
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    @property
    def path(self) -> Path:
        """The folder of the finished snapshot. Raises SnapshotError before the block has ended."""
        if self._path is None:
            raise SnapshotError("the snapshot is not written yet: its path is known after the writer's block")
        return self._path

    @property
    def name(self) -> str:
        """The name of the finished snapshot."""
        return self.path.name

    def vectors(self, vectors: npt.NDArray[Any], codes: Codes = "float32", shards: Sequence[Rows] = ()) -> None:
        """The vectors [N, D] are written in these codes, in blocks, so a mapped array of any size will do.

        With `shards`, the rows int64 of each, rising, the snapshot is divided so: each shard has a file of its own. Before the
        indexes. Raises CodesError for a vector that has no such codes, SnapshotError unless each row is in one shard.
        """
        if vectors.ndim != 2 or vectors.dtype.kind != "f" or vectors.shape[1] == 0:
            raise SnapshotError(f"vectors are {vectors.dtype}{list(vectors.shape)}, expected floats [N, D] with D > 0")
        folder = self._beside()
        if not shards:
            _write_vectors(folder / VECTORS_FILE, vectors, None, codes)
        elif not np.array_equal(np.sort(np.concatenate(shards)), np.arange(len(vectors))):
            raise SnapshotError(f"the shards hold {sum(map(len, shards))} rows, expected 0..{len(vectors) - 1}, each once")
        for place, rows in enumerate(shards):
            with _disk(folder):
                np.save(folder / shard_file(place, ROWS_FILE), rows.astype("<i8"))
            _write_vectors(folder / shard_file(place, VECTORS_FILE), vectors, rows, codes)
        self._shape, self._codes = (vectors.shape[0], vectors.shape[1]), codes
        self._shards = tuple(len(rows) for rows in shards)

    def ids(self, ids: Sequence[str]) -> None:
        """The ids of the rows are written. Raises SnapshotError for one that is not UTF-8 text."""
        arrays = encode_ids(ids)
        folder = self._beside()
        with _disk(folder):
            (folder / BLOB_FILE).write_bytes(arrays.blob.tobytes())
            np.save(folder / OFFSETS_FILE, arrays.offsets)
            np.save(folder / HASHES_FILE, arrays.hashes)
            np.save(folder / ORDER_FILE, arrays.order)
        self._id_count = len(ids)

    def index(self, index: Any, *, recipe: str, facts: Mapping[str, Fact] | None = None, recall: Recall | None = None) -> None:
        """The FAISS index over the same rows is written, with how it was built and how well it recalls."""
        self.indexes([index], recipe=recipe, facts=facts, recall=recall)

    def indexes(
        self, indexes: Sequence[Any], *, recipe: str, facts: Mapping[str, Fact] | None = None, recall: Recall | None = None
    ) -> None:
        """The FAISS index of each shard is written, or the only one, with how they were built and how well they recall."""
        import faiss

        for place, index in enumerate(indexes):
            path = self._beside() / (shard_file(place, INDEX_FILE) if self._shards else INDEX_FILE)
            try:
                faiss.write_index(index, str(path))
            except RuntimeError as error:
                raise SnapshotError(f"FAISS cannot write {path}: {error}") from None
        shapes = [(int(index.ntotal), int(index.d)) for index in indexes]
        self._index_facts = (recipe, dict(facts or {}), recall, shapes)

    def part(self, name: str, content: bytes | Path) -> None:
        """An opaque part is written from bytes or copied from a file."""
        path = self.part_path(name)
        with _disk(path):
            if isinstance(content, Path):
                shutil.copyfile(content, path)
            else:
                path.write_bytes(content)

    def part_path(self, name: str) -> Path:
        """The place is returned where the caller writes a large part itself, before the block ends.

        Raises SnapshotError for a name that is taken or that is not a plain lower-case file name.
        """
        path = self._beside() / name
        taken = core_files(0)
        if _PART_NAME.fullmatch(name) is None or name in taken or name.startswith(SHARD_PREFIX):
            raise SnapshotError(f"{name!r} cannot name a part: expected a-z, 0-9, . _ -, no shard-..., none of {sorted(taken)}")
        if path.exists():
            raise SnapshotError(f"part {name!r} is written twice")
        return path

    def _beside(self) -> Path:
        if self._folder is None:
            raise SnapshotError("a SnapshotWriter is used inside its `with` block only")
        return self._folder

    def _manifest(self, folder: Path) -> Manifest:
        if self._shape is None or self._id_count is None or self._index_facts is None:
            raise SnapshotError("a snapshot needs vectors, ids and an index: write all three before the block ends")
        recipe, facts, recall, indexed = self._index_facts
        counts, dims = self._shards or self._shape[:1], self._shape[1]
        width = Recipe.parse(recipe).width(dims)
        if indexed != [(count, width) for count in counts] or self._shape[0] != self._id_count:
            wider = f" ({width} numbers a vector of {dims} for {recipe})" if width != dims else ""
            raise SnapshotError(
                f"vectors are {_by([(count, dims) for count in counts])}, the index holds {_by(indexed)}{wider} and there are "
                f"{self._id_count} ids: they must be of the same rows"
            )
        files = {path.name: FileFact(sha256_of(path), path.stat().st_size) for path in sorted(folder.iterdir())}
        return Manifest(
            count=self._shape[0],
            dims=self._shape[1],
            fingerprint=self._fingerprint,
            as_of=self._as_of,
            recipe=recipe,
            build=facts,
            files=files,
            recall=recall,
            parent=self._parent,
            extra=self.extra,
            dtype=self._codes,
            shards=self._shards,
        )

    def _commit(self, folder: Path) -> Path:
        manifest = self._manifest(folder)
        target = folder.parent / manifest.name
        if target.exists():
            # Same name, same content: if it is whole, this work was done before.
            with suppress(SnapshotTorn):
                return Snapshot.open(target).path
        (folder / MANIFEST_FILE).write_bytes(manifest.to_bytes())
        finished = time.time()
        times = {"started_at": self._started, "written_at": finished, "seconds": finished - self._started}
        (folder / RUN_FILE).write_text(json.dumps({**self.run, **times}, sort_keys=True, indent=1) + "\n")
        for path in folder.iterdir():
            fsync_path(path)
        fsync_path(folder)
        if target.exists():
            # A torn one must not keep its name from the whole one for ever.
            with exclusive(self._store_dir):
                target.rename(target.with_name(f"{TRASH_PREFIX}{folder.name}"))
        folder.rename(target)
        fsync_path(target.parent)
        return target


def _write_vectors(path: Path, vectors: npt.NDArray[Any], rows: Rows | None, codes: Codes) -> None:
    """The file holds these rows of the vectors (None: all), in these codes."""
    count, dims = len(vectors) if rows is None else len(rows), vectors.shape[1]
    descr = encode_rows(np.zeros((0, dims), np.float32), codes).dtype.str
    with _disk(path), path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (count, dims)})
        for start in range(0, count, _BLOCK_ROWS):
            some = slice(start, start + _BLOCK_ROWS)
            file.write(encode_rows(vectors[some if rows is None else rows[some]], codes).data)


def _by(shapes: Sequence[tuple[int, int]]) -> str:
    return " + ".join(f"{count} x {dims}" for count, dims in shapes)


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """A full disk or a missing right becomes one clear line."""
    try:
        yield
    except OSError as error:
        raise SnapshotError(f"cannot write {path}: {error.strerror or error}") from error
