"""Load on a server, measured: a schedule is drawn, a process of its own sends it, and its columns become figures."""

from __future__ import annotations

import base64
import json
import math
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import IO, Any

import grpc
import numpy as np
import numpy.typing as npt

from index.errors import BrewlineError
from ranking.serving.load_run import Outcome, Plan

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]
"""Called with (seconds gone, seconds in all)."""

GRACE_S = 60.0
"""What a generator may take beyond its schedule and the last deadline: start, connections, the last columns."""
BATCH_OF_ARRIVALS = 1.2
"""Gaps are drawn for so many times the expected number, and more if that was not enough."""
CODES = {int(code.value[0]): code.name for code in grpc.StatusCode}
POLL_S = 0.2


class LoadError(BrewlineError):
    """The load could not be sent or measured."""


@dataclass(frozen=True)
class Target:
    """Whom to ask what: serialised requests of one method, taken in turn, each with the same deadline."""

    address: str
    method: str
    requests: Sequence[bytes]
    deadline_s: float


@dataclass(frozen=True)
class Enough:
    """When the rest of a schedule need not be sent: `late` requests failed, were degraded or took longer than `limit_ms`."""

    limit_ms: float
    late: int


@dataclass(frozen=True)
class Measured:
    """The columns of one run as arrays [N] in the order of the schedule; what they mean stands at `Outcome`.

    `seconds` is the length of the schedule, `wall_s` the time until the last answer.
    """

    seconds: float
    wall_s: float
    started: float
    cpu_share: float
    deadline_s: float
    snapshots: list[str]
    models: list[str]
    at: Floats
    late_ms: Floats
    ms: Floats
    code: Whole
    degraded: Whole
    snapshot: Whole
    model: Whole
    inside_ms: Floats
    total_ms: Floats

    @property
    def answered(self) -> npt.NDArray[np.bool_]:
        """bool [N]: which requests have an answer, degraded ones too."""
        return self.code == 0

    @property
    def goodput(self) -> float:
        """Answers per second that came before their deadline, counted from the schedule."""
        return float((self.answered & (self.ms <= self.deadline_s * 1e3)).sum()) / max(self.seconds, self.wall_s)

    @property
    def whole_p99(self) -> float:
        """Milliseconds in which 99 of 100 requests were answered in full; infinite if more than 1 of 100 never were."""
        return quantile(np.where(self.answered & (self.degraded == 0), self.ms, np.inf), 0.99)


def arrivals(rate: float, seconds: float, seed: int, *, even: bool = False) -> Floats:
    """float64 [N]: seconds from the start, rising, below `seconds`. Independent callers come at random (Poisson), or evenly."""
    if even:
        return np.arange(0, seconds, 1 / rate)
    rng = np.random.default_rng(seed)
    times = np.zeros(1)
    while times[-1] < seconds:
        gaps = rng.exponential(1 / rate, int(rate * seconds * BATCH_OF_ARRIVALS) + 10)
        times = np.concatenate([times, times[-1] + np.cumsum(gaps)])
    return times[(times > 0) & (times < seconds)]


def open_load(
    target: Target, at: Floats, seconds: float, progress: Progress | None = None, enough: Enough | None = None
) -> Measured:
    """What became of a schedule of `seconds` whose requests did not wait for each other, up to `enough`. Raises LoadError."""
    if not at.size:
        raise LoadError(f"no request falls into {seconds:g} s at this rate; give a higher --rate or more --seconds")
    plan = _plan(target, at=at.tolist())
    if enough is not None:
        plan = replace(plan, limit_ms=enough.limit_ms, enough_late=enough.late)
    return _run(target, plan, seconds, progress)


def closed_load(target: Target, concurrency: int, seconds: float, progress: Progress | None = None) -> Measured:
    """What became of the requests of so many callers who each wait for their answer before they ask again. Raises LoadError."""
    return _run(target, _plan(target, concurrency=concurrency, seconds=seconds), seconds, progress)


def _plan(target: Target, *, at: list[float] | None = None, concurrency: int = 0, seconds: float = 0.0) -> Plan:
    requests = [base64.b64encode(one).decode() for one in target.requests]
    return Plan(target.address, target.method, requests, target.deadline_s, at or [], concurrency, seconds)


def _run(target: Target, plan: Plan, seconds: float, progress: Progress | None) -> Measured:
    with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+") as found, tempfile.TemporaryFile("w+") as words:
        json.dump(asdict(plan), told)
        told.seek(0)
        command = [sys.executable, "-m", "ranking.serving.load_run"]
        with subprocess.Popen(command, stdin=told, stdout=found, stderr=words) as generator:
            try:
                _wait(generator, seconds, target.deadline_s, progress)
            finally:
                generator.kill()
        if generator.returncode:
            raise LoadError(f"the load generator for {target.address} failed: {last_line(words)}")
        found.seek(0)
        return _measured(Outcome(**json.load(found)), seconds, target.deadline_s)


def _wait(generator: subprocess.Popen[Any], seconds: float, deadline_s: float, progress: Progress | None) -> None:
    began = time.monotonic()
    most = seconds + deadline_s + GRACE_S
    while True:
        try:
            generator.wait(POLL_S)
            if progress is not None:
                progress(round(seconds), round(seconds))
            return
        except subprocess.TimeoutExpired:
            gone = time.monotonic() - began
            if gone > most:
                raise LoadError(f"the load generator did not end within {most:.0f} s; the machine is too slow for it") from None
            if progress is not None and gone < round(seconds):
                progress(int(gone), round(seconds))


def _measured(outcome: Outcome, seconds: float, deadline_s: float) -> Measured:
    order = np.argsort(outcome.at, kind="stable")

    def floats(values: list[float]) -> Floats:
        return np.array(values, np.float64)[order]

    def whole(values: list[int]) -> Whole:
        return np.array(values, np.int64)[order]

    return Measured(
        seconds=seconds,
        wall_s=outcome.wall_s,
        started=outcome.started,
        cpu_share=outcome.cpu_share,
        deadline_s=deadline_s,
        snapshots=outcome.snapshots,
        models=outcome.models,
        at=floats(outcome.at),
        late_ms=floats(outcome.late_ms),
        ms=floats(outcome.ms),
        inside_ms=whole(outcome.inside_us) / 1e3,
        total_ms=whole(outcome.total_us) / 1e3,
        code=whole(outcome.code),
        degraded=whole(outcome.degraded),
        snapshot=whole(outcome.snapshot),
        model=whole(outcome.model),
    )


def last_line(file: IO[str]) -> str:
    """The last line that a process wrote, for a message of one line."""
    file.seek(0)
    return ([line.strip() for line in file if line.strip()] or ["it said nothing"])[-1][-400:]


def quantile(values: Floats, share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed, NaN of none. Nothing is interpolated."""
    if not values.size:
        return float("nan")
    return float(np.sort(values)[max(math.ceil(share * values.size) - 1, 0)])


def figures(found: Measured) -> dict[str, object]:
    """The figures of a run. Latencies are those of answers, degraded ones too, from the scheduled moment, in milliseconds.

    `failed`: everything that is not an answer, `codes` says what. `goodput`: answers in time per second. `inside_p50_ms`: the
    server's own time of an answer without encode, search and rank, `server_p50_ms` all of its time, `outside_p99_ms` what came
    before and after that (the way, and the server's event loop). `late_p99_ms`: how late the generator itself was; figures
    smaller than that mean nothing. `generator_cpu`: its share of one core.
    """
    answered = found.answered
    ms = found.ms[answered]
    codes = Counter(CODES[code] for code in found.code.tolist())
    return {
        "sent": int(found.at.size),
        "answered": int(answered.sum()),
        "failed": int((~answered).sum()),
        "degraded": int((found.degraded[answered] != 0).sum()),
        "codes": dict(sorted(codes.items())),
        "seconds": found.seconds,
        "rate": found.at.size / found.seconds,
        "goodput": found.goodput,
        "p50_ms": quantile(ms, 0.5),
        "p90_ms": quantile(ms, 0.9),
        "p99_ms": quantile(ms, 0.99),
        "max_ms": quantile(ms, 1.0),
        "server_p50_ms": quantile(found.total_ms[answered], 0.5),
        "inside_p50_ms": quantile(found.inside_ms[answered], 0.5),
        "outside_p99_ms": quantile((found.ms - found.total_ms)[answered], 0.99),
        "late_p99_ms": quantile(found.late_ms, 0.99),
        "generator_cpu": found.cpu_share,
    }
