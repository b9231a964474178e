"""Rows are embedded on many machines by Ray Data, in the units of `retrieval.units`.

A unit is one row of the Ray data set, so no scheduler can divide or mix it. Each worker computes on as many threads as this
process would: on machines of one kind the vectors are those of `retrieval.units.Here`, bit for bit. What travels is Arrow: token
ids out, float32 vectors back. The encoder is read from its folder on every machine, and refused there if it is another one. A
unit whose worker dies is read again, a few times: that is Ray's work. What is here sees to it that each comes back once. Ray is
connected to while units are read, and no longer.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from retrieval.encoder import Encoder, Progress, Vectors
from retrieval.units import UNIT, units

ANSWER = ["unit", "vectors", "refused"]
LOCAL = "local"
"""The address of a Ray that is started on this machine, and ends when the units are read."""
AUTO = "auto"
"""The address of the cluster that this machine is part of."""
TRIES_AGAIN = 3
"""How often Ray starts a worker that died, and asks for its unit, again. By itself Ray Data would do so for ever."""
ANSWERS_S = 10.0


class ClusterError(BrewlineError):
    """Rows cannot be embedded on the cluster."""


@dataclass(frozen=True)
class Reading:
    """With what a worker reads: the encoder of a folder on its machine, the leading `dims` numbers, on `threads` threads."""

    folder: str
    fingerprint: str
    dims: int
    threads: int


class ClusterReader:
    """Reads units by Ray's workers: processes that each hold the model and compute on as many threads as this one."""

    where = "ray"

    def __init__(self, address: str, encoder: Encoder, folder: Path, *, workers: int | None = None, unit: int = UNIT) -> None:
        """`encoder` is what `folder` holds, perhaps truncated; `address` as `connected` takes it, at most so many `workers`.

        With None there are as many as the cluster has room for.
        """
        self._address, self._workers, self._unit = address, workers, unit
        self._reading = Reading(str(folder.resolve()), encoder.fingerprint, encoder.dims, torch.get_num_threads())

    def embed(self, rows: Sequence[Sequence[int]], progress: Progress | None = None) -> Vectors:
        """Unit vectors [n, D] of id rows in input order. Without rows no Ray is asked for.

        Raises ClusterError if nobody answers or has room, the cluster is lost, or a unit fails, is lost or comes back twice.
        """
        parts = units(len(rows), self._unit)
        if not parts:
            return np.empty((0, self._reading.dims), np.float32)
        asked = [_asked(number, rows[part]) for number, part in enumerate(parts)]
        with connected(self._address) as ray:
            return gathered(self._answers(ray, asked), parts, self._reading.dims, progress)

    def _answers(self, ray: Any, tables: list[pa.Table]) -> Iterator[tuple[int, Vectors]]:
        """Units' numbers and vectors as they come back."""
        data = ray.data
        data.DataContext.get_current().enable_progress_bars = False  # the night shows its own
        try:
            room = room_of(ray.nodes(), self._reading.threads)
            asked = data.from_arrow(tables).map_batches(
                Reader,
                batch_size=1,
                batch_format="pyarrow",
                fn_constructor_args=(self._reading,),
                compute=data.ActorPoolStrategy(size=min(self._workers or room, room, len(tables))),
                num_cpus=self._reading.threads,
                max_restarts=TRIES_AGAIN,
                max_task_retries=TRIES_AGAIN,
            )
            for batch in asked.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                yield from answers_of(batch)
        except ray.exceptions.RayTaskError:
            raise  # a bug in what the worker ran, with its traceback: none that a person at the command line can mend
        except ray.exceptions.RayError as error:
            raise ClusterError(
                f"the cluster was lost, or a unit ended its worker {TRIES_AGAIN + 1} times ({error}); look at `ray status` and "
                "at the memory of its machines, and start the night again"
            ) from error


def gathered(
    answers: Iterable[tuple[int, Vectors]], parts: Sequence[slice], dims: int, progress: Progress | None = None
) -> Vectors:
    """Vectors [n, D] of all rows, of answers (number of a unit, its vectors in one row) in any order.

    Raises ClusterError unless each of the units `parts` comes once, with as many numbers as it has to.
    """
    count = parts[-1].stop if parts else 0
    found, waiting, done = np.empty((count, dims), np.float32), set(range(len(parts))), 0
    for number, vectors in answers:
        if number not in waiting:
            raise ClusterError(f"unit {number} of {len(parts)} came back twice, or was not asked for; start the night again")
        part = parts[number]
        if vectors.size != (part.stop - part.start) * dims:
            raise ClusterError(
                f"unit {number} came back with {vectors.size} numbers, expected {part.stop - part.start} x {dims}; does each "
                "machine have the same version of Brewline?"
            )
        waiting.remove(number)
        found[part] = vectors.reshape(-1, dims)
        done += part.stop - part.start
        if progress is not None:
            progress(done, count)
    if waiting:
        raise ClusterError(f"{len(waiting)} of {len(parts)} units did not come back; start the night again")
    return found


def answers_of(batch: pa.Table) -> Iterator[tuple[int, Vectors]]:
    """Numbers and vectors of the units that a `Reader` answered. Raises ClusterError for one that it refused."""
    for number, content, refused in zip(*(batch[name].to_pylist() for name in ANSWER)):
        if refused:
            raise ClusterError(f"a worker refused unit {number}: {refused}")
        yield number, np.frombuffer(content, "<f4")


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
            found = Encoder.load(Path(wanted.folder))
            if found.dims != wanted.dims:
                found = found.truncated(wanted.dims)
            if found.fingerprint != wanted.fingerprint:
                raise ClusterError(
                    f"{wanted.folder} holds encoder {found.fingerprint} here, expected {wanted.fingerprint}: copy it"
                )
            self._loaded = found
        return self._loaded


def check_cluster(address: str) -> None:
    """Ray can be imported, and something listens at an address HOST:PORT. Nothing is started, and nobody is connected to.

    Raises ClusterError at once, where Ray itself would try for minutes.
    """
    _ray()
    if address in (LOCAL, AUTO):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ClusterError(f"{address!r} is no address of a Ray cluster: expected {LOCAL}, {AUTO} or HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWERS_S).close()
    except (OSError, OverflowError) as error:
        raise _silent(address, error) from error


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Yields Ray, connected to the cluster at `address` as Ray writes it ("auto": the one of this machine), or started here
    ("local"). At the end that connection, or that Ray, is closed; until then what this process prints to stdout goes to stderr.

    Raises ClusterError without Ray, and if nobody answers.
    """
    ray = _ray()
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # it would tell of every plan
    shown = {"include_dashboard": False} if address == LOCAL else {}
    with redirect_stdout(sys.stderr):  # Ray prints there that a worker died; stdout is for the caller's answer
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **shown)
        except (OSError, RuntimeError, ValueError) as error:
            raise _silent(address, error) from error
        try:
            yield ray
        finally:
            ray.shutdown()


def room_of(nodes: Iterable[Mapping[str, Any]], threads: int) -> int:
    """How many workers of so many threads a cluster's nodes, as Ray tells of them, have room for: a thread is a CPU.

    Raises ClusterError if that is none.
    """
    has = [int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]]
    room = sum(count // threads for count in has)
    if not room:
        raise ClusterError(
            f"a worker needs {threads} CPUs, and no machine of the cluster has more than {max(has, default=0)}; a worker "
            "computes on as many threads as this process would: set OMP_NUM_THREADS to what each machine has"
        )
    return room


def _ray() -> Any:
    """The package. Raises ClusterError without it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported: it would report to its makers
    try:
        ray = import_module("ray")
        import_module("ray.data")
    except ImportError as error:
        raise ClusterError(f"many machines need Ray ({error}); pip install 'brewline[cluster]'") from error
    return ray


def _silent(address: str, error: Exception) -> ClusterError:
    return ClusterError(f"no Ray answers at {address!r} ({error}); start one (`ray start --head`), or say {LOCAL}")


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
