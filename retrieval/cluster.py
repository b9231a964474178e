"""Rows are embedded on many machines by Ray Data, in units of fixed membership and order.

A unit is a run of consecutive rows. It is one row of the Ray data set, so no scheduler can divide or mix it, and its vectors are
those that the same rows have when one process reads them unit by unit (`embed_units`). What travels is Arrow: token ids out,
float32 vectors back. The encoder is read from its folder on every machine, and refused there if it is another one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from index.errors import BrewlineError
from retrieval.encoder import Encoder, Precision, Progress, Vectors

UNIT = 4_096
"""Rows of a unit."""


class ClusterError(BrewlineError):
    """Rows cannot be embedded on the cluster."""


class ClusterEncoder(Encoder):
    """An encoder whose rows are read by Ray's workers. `workers` processes each hold the model, on `device` of their machine.

    `address` is the cluster's, as Ray writes it; None starts Ray on this machine. The folder must be there on every machine.
    """

    def __init__(
        self,
        folder: Path,
        *,
        workers: int,
        address: str | None = None,
        device: str = "cpu",
        precision: Precision = "float32",
        unit: int = UNIT,
    ) -> None:
        """Raises ClusterError without Ray, and what `Encoder.load` raises."""
        local = Encoder.load(folder, precision=precision)
        super().__init__(local.model, local.writer, local.fingerprint, local.facts)
        self._ray = _started(address)
        self._folder, self._workers, self._device, self._precision, self._unit = (
            folder.resolve(),
            workers,
            device,
            precision,
            unit,
        )

    def embed(self, rows: Sequence[Sequence[int]], progress: Progress | None = None) -> Vectors:
        """Unit vectors [n, D] of id rows in input order. Raises ClusterError if a unit is lost or comes back twice."""
        found = np.empty((len(rows), self.dims), np.float32)
        parts = units(len(rows), self._unit)
        waiting = set(range(len(parts)))
        for number, vectors in self._answers([_asked(place, rows[part]) for place, part in enumerate(parts)]):
            if number not in waiting or vectors.size != (parts[number].stop - parts[number].start) * self.dims:
                raise ClusterError(f"unit {number} came back twice, or with {vectors.size} numbers; start the night again")
            waiting.remove(number)
            found[parts[number]] = vectors.reshape(-1, self.dims)
            if progress is not None:
                progress(sum(part.stop - part.start for place, part in enumerate(parts) if place not in waiting), len(rows))
        if waiting:
            raise ClusterError(f"{len(waiting)} of {len(parts)} units did not come back; start the night again")
        return found

    def truncated(self, dims: int) -> Encoder:
        """Not given: raises ClusterError."""
        raise ClusterError(f"vectors of {dims} dims were asked of a cluster; it gives whole ones. Truncate a loaded encoder")

    def _embed_all(self, count: int, written: Callable[[slice], list[list[int]]], progress: Progress | None) -> Vectors:
        return self.embed(written(slice(0, count)), progress)

    def _answers(self, tables: list[pa.Table]) -> Iterator[tuple[int, Vectors]]:
        """Units' numbers and vectors as they come back."""
        if not tables:
            return
        options: dict[str, Any] = {"num_gpus": 1} if self._device != "cpu" else {"num_cpus": 1}
        asked = self._ray.data.from_arrow(tables).map_batches(
            Reader,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_args=(str(self._folder), self._device, self._precision, self.fingerprint),
            concurrency=min(self._workers, len(tables)),
            **options,
        )
        for batch in asked.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for number, content in zip(batch["unit"].to_pylist(), batch["vectors"].to_pylist()):
                yield number, np.frombuffer(content, "<f4")


class Reader:
    """What a worker runs: the encoder of a folder, and one unit after the other."""

    def __init__(self, folder: str, device: str, precision: Precision, fingerprint: str) -> None:
        self._folder, self._device, self._precision, self._fingerprint = Path(folder), device, precision, fingerprint
        self._loaded: Encoder | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Numbers of units and their vectors, little-endian float32 [n, D].

        Raises ClusterError if the folder of this machine holds another encoder, and what `Encoder.load` raises.
        """
        encoder, made = self._encoder(), []
        for lengths, ids in zip(batch["lengths"], batch["ids"]):
            cuts = np.cumsum(np.frombuffer(lengths.as_py(), "<i8"))[:-1]
            rows = np.split(np.frombuffer(ids.as_py(), "<i4"), cuts)
            made.append(encoder.embed([row.tolist() for row in rows]).astype("<f4").tobytes())
        return pa.table({"unit": batch["unit"], "vectors": pa.array(made, pa.large_binary())})

    def _encoder(self) -> Encoder:
        """Loaded with the first unit: Ray retries a constructor that fails for ever, but hands on what a unit raises."""
        if self._loaded is None:
            found = Encoder.load(self._folder, self._device, precision=self._precision)
            if found.fingerprint != self._fingerprint:
                raise ClusterError(
                    f"{self._folder} holds encoder {found.fingerprint} here, expected {self._fingerprint}: copy it"
                )
            self._loaded = found
        return self._loaded


def units(count: int, size: int = UNIT) -> list[slice]:
    """0..count-1 in runs of `size`, the last one shorter: the same units for the same rows, wherever they are read."""
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def embed_units(encoder: Encoder, rows: Sequence[Sequence[int]], size: int = UNIT) -> Vectors:
    """Unit vectors [n, D] of id rows, read unit by unit in this process: what the cluster gives, on the same kind of machine."""
    found = np.empty((len(rows), encoder.dims), np.float32)
    for part in units(len(rows), size):
        found[part] = encoder.embed(rows[part])
    return found


def _asked(number: int, rows: Sequence[Sequence[int]]) -> pa.Table:
    lengths = np.fromiter(map(len, rows), "<i8", len(rows))
    ids = np.fromiter(chain.from_iterable(rows), "<i4", int(lengths.sum()))
    return pa.table(
        {
            "unit": pa.array([number], pa.int64()),
            "lengths": pa.array([lengths.tobytes()], pa.large_binary()),
            "ids": pa.array([ids.tobytes()], pa.large_binary()),
        }
    )


def _started(address: str | None) -> Any:
    """Ray, connected to the cluster at the address, or started on this machine; one that runs already is used."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported: it would report to its makers
    try:
        ray = import_module("ray")
        import_module("ray.data")
    except ImportError as error:
        raise ClusterError(f"many machines need Ray ({error}); pip install 'brewline[cluster]'") from error
    if not ray.is_initialized():
        ray.init(address=address, include_dashboard=False if address is None else None, log_to_driver=False)
    return ray
