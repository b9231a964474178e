"""Rows are embedded on many machines by Ray Data, in the units of `retrieval.units`.

A unit is one row of the Ray data set, so no scheduler can divide or mix it. Each worker computes on as many threads as this
process would: on machines of one kind the vectors are those of `retrieval.units.Here`, bit for bit. What travels is Arrow: token
ids out, float32 vectors back. The encoder is read from its folder on every machine, and refused there if it is another one. A
unit whose worker dies is read again by another one: that is Ray's work. What is here sees to it that each comes back once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from index.errors import BrewlineError
from retrieval.encoder import Encoder, Precision, Progress, Vectors
from retrieval.units import UNIT, units

ANSWER = ["unit", "vectors", "refused"]
LOCAL = "local"
"""The address of a Ray that is started on this machine, and ends with the night."""


class ClusterError(BrewlineError):
    """Rows cannot be embedded on the cluster."""


@dataclass(frozen=True)
class Reading:
    """With what a worker reads: the encoder of a folder on its machine, the leading `dims` numbers, on `threads` threads."""

    folder: str
    fingerprint: str
    dims: int
    threads: int
    device: str = "cpu"
    precision: Precision = "float32"


class ClusterReader:
    """Reads units by Ray's workers: processes that each hold the model and compute on as many threads as this one."""

    def __init__(
        self,
        ray: Any,
        encoder: Encoder,
        folder: Path,
        *,
        workers: int | None = None,
        device: str = "cpu",
        precision: Precision = "float32",
        unit: int = UNIT,
    ) -> None:
        """`encoder` is what `folder` holds, perhaps truncated; `workers`: None for as many as the cluster has room for.

        Raises ClusterError if it has room for none.
        """
        threads = torch.get_num_threads()
        self._ray, self._unit = ray, unit
        self._reading = Reading(str(folder.resolve()), encoder.fingerprint, encoder.dims, threads, device, precision)
        self._needs = ("CPU", threads) if device == "cpu" else ("GPU", 1)
        self._workers = workers or _room(ray, *self._needs)
        self.where = f"ray, at most {self._workers} workers of {threads} thread{'s' * (threads > 1)} each"

    def embed(self, rows: Sequence[Sequence[int]], progress: Progress | None = None) -> Vectors:
        """Unit vectors [n, D] of id rows in input order. Raises ClusterError if a unit fails, is lost or comes back twice."""
        dims = self._reading.dims
        found = np.empty((len(rows), dims), np.float32)
        parts = units(len(rows), self._unit)
        waiting, done = set(range(len(parts))), 0
        for number, vectors in self._answers([_asked(place, rows[part]) for place, part in enumerate(parts)]):
            if number not in waiting or vectors.size != (parts[number].stop - parts[number].start) * dims:
                raise ClusterError(f"unit {number} came back twice, or with {vectors.size} numbers; start the night again")
            waiting.remove(number)
            found[parts[number]] = vectors.reshape(-1, dims)
            done += len(vectors) // dims
            if progress is not None:
                progress(done, len(rows))
        if waiting:
            raise ClusterError(f"{len(waiting)} of {len(parts)} units did not come back; start the night again")
        return found

    def _answers(self, tables: list[pa.Table]) -> Iterator[tuple[int, Vectors]]:
        """Units' numbers and vectors as they come back."""
        if not tables:
            return
        kind, count = self._needs
        data = self._ray.data
        data.DataContext.get_current().enable_progress_bars = False  # the night shows its own
        asked = data.from_arrow(tables).map_batches(
            Reader,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_args=(self._reading,),
            compute=data.ActorPoolStrategy(size=min(self._workers, len(tables))),
            num_cpus=count if kind == "CPU" else None,
            num_gpus=count if kind == "GPU" else None,
        )
        try:
            for batch in asked.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for number, content, refused in zip(*(batch[name].to_pylist() for name in ANSWER)):
                    if refused:
                        raise ClusterError(f"a worker refused unit {number}: {refused}")
                    yield number, np.frombuffer(content, "<f4")
        except self._ray.exceptions.RayTaskError:
            raise  # a bug in what the worker ran, with its traceback: none that a person at the command line can mend
        except self._ray.exceptions.RayError as error:
            raise ClusterError(f"the cluster was lost ({error}); look at `ray status`, and start the night again") from error


class Reader:
    """What a worker runs: the encoder of a folder, and one unit after the other."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._loaded: Encoder | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Numbers of units, their vectors, little-endian float32 [n, D], and why there are none, "" where there are.

        An error that a person can mend is told and not raised: Ray would hand on its traceback in many lines.
        """
        torch.set_num_threads(self._reading.threads)
        made, refused = [], []
        for lengths, ids in zip(batch["lengths"], batch["ids"]):
            try:
                made.append(self._read(lengths.as_py(), ids.as_py()))
                refused.append("")
            except BrewlineError as error:
                made.append(b"")
                refused.append(str(error))
        return pa.table([batch["unit"], pa.array(made, pa.large_binary()), pa.array(refused, pa.large_string())], ANSWER)

    def _read(self, lengths: bytes, ids: bytes) -> bytes:
        """A unit's vectors. Raises ClusterError if the folder of this machine holds another encoder, and the encoder's errors."""
        rows = np.split(np.frombuffer(ids, "<i4"), np.cumsum(np.frombuffer(lengths, "<i8"))[:-1])
        return self._encoder().embed([row.tolist() for row in rows]).astype("<f4").tobytes()

    def _encoder(self) -> Encoder:
        """Loaded with the first unit: Ray tries a constructor that fails again for ever."""
        if self._loaded is None:
            wanted = self._reading
            found = Encoder.load(Path(wanted.folder), wanted.device, precision=wanted.precision)
            if found.dims != wanted.dims:
                found = found.truncated(wanted.dims)
            if found.fingerprint != wanted.fingerprint:
                raise ClusterError(
                    f"{wanted.folder} holds encoder {found.fingerprint} here, expected {wanted.fingerprint}: copy it"
                )
            self._loaded = found
        return self._loaded


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Yields Ray, connected to the cluster at `address` as Ray writes it ("auto": the one of this machine), or started here
    ("local"). At the end that connection, or that Ray, is closed; until then what this process prints to stdout goes to stderr.

    Raises ClusterError without Ray, and if nobody answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported: it would report to its makers
    try:
        ray = import_module("ray")
        import_module("ray.data")
    except ImportError as error:
        raise ClusterError(f"many machines need Ray ({error}); pip install 'brewline[cluster]'") from error
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # it would tell of every plan
    shown = {"include_dashboard": False} if address == LOCAL else {}
    with redirect_stdout(sys.stderr):  # Ray prints there that a worker died; stdout is for the caller's answer
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **shown)
        except (OSError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"no Ray answers at {address!r} ({error}); start one (`ray start --head`), or say local"
            ) from error
        try:
            yield ray
        finally:
            ray.shutdown()


def _room(ray: Any, kind: str, needed: int) -> int:
    """How many workers that need so many of a resource the machines have room for. Raises ClusterError if that is none."""
    has = [int(node["Resources"].get(kind, 0)) for node in ray.nodes() if node["Alive"]]
    room = sum(count // needed for count in has)
    if not room:
        raise ClusterError(
            f"a worker needs {needed} {kind}s, and no machine of the cluster has more than {max(has, default=0)}; a worker "
            "computes on as many threads as this process would: set OMP_NUM_THREADS to what each machine has"
        )
    return room


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
