"""How much a server bears: the highest rate at which it is still quick, and what it does far beyond that."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np

from ranking.serving.load import (
    CODES,
    Enough,
    Floats,
    LoadError,
    Measured,
    Progress,
    Target,
    arrivals,
    closed_load,
    figures,
    open_load,
    quantile,
)

SLACK = 2.0
"""A rate is borne while its 99th percentile is at most so many times the unloaded one."""
STEP, LEAST_SHARE = 1.5, 0.25
"""The search goes by such steps from the rate that is foreseen, and no lower than this share of it: what is late even there is
late by something else than a queue."""
SIMULATED, HALVINGS = 20_000, 12
"""Requests and halvings of what is foreseen: to a hundredth, in some milliseconds."""
MOST_PROBES, CLOSE_ENOUGH = 16, 1.12
"""Random arrivals of 200 requests scatter what is found by a fifth (simulated), so steps finer than these would be chance."""
NEEDED, PLENTY = 120, 300
"""Requests of a percentile. Of fewer than 100 the 99th is the latest of all, one that chance chose, and random arrivals may
bring a sixth less than are expected; more than the second number say little more."""
PROBES_FORESEEN, IDLE_PART = 6, 0.25
"""How the seconds of a search are dealt out: so many probes in full (others end early), so much of all for one caller."""
BESIDE_S = 3.0
"""What a probe takes beyond its schedule and the last deadline: its process starts, and its columns are read."""

Probe = Callable[[float], Measured]
Told = Callable[[str, int, int], None]
"""Called with (what is measured, seconds gone, seconds in all)."""


class NoCapacity(LoadError):
    """Even a nearly idle server is late."""


class SearchTooShort(LoadError):
    """The seconds of a search were over before it could say anything."""


@dataclass(frozen=True)
class Search:
    """How a capacity is looked for: within `seconds` in all, by probes of `probe_seconds` or more with arrivals of `seed`."""

    seconds: float
    probe_seconds: float
    seed: int = 0
    even: bool = False


@dataclass(frozen=True)
class Unloaded:
    """One caller after another: 99th percentile in ms of so many requests, answers per second, and the rate `foreseen` of it."""

    p99_ms: float
    rate: float
    requests: int
    foreseen: float


@dataclass(frozen=True)
class Capacity:
    """The highest rate that was borne, the lowest that was not, in requests per second, and every rate that was tried."""

    rate: float
    too_much: float
    unloaded: Unloaded
    best: Measured
    tried: list[dict[str, Any]]

    def figures(self) -> dict[str, object]:
        """As facts of a report. `capacity_settled`: the two rates are as close as a search goes; else its seconds were over."""
        return {
            "capacity": self.rate,
            "capacity_exceeded_at": self.too_much,
            "capacity_settled": self.too_much / self.rate <= CLOSE_ENOUGH,
            "p99_ms_unloaded": self.unloaded.p99_ms,
            "rate_unloaded": self.unloaded.rate,
            "requests_unloaded": self.unloaded.requests,
            "capacity_foreseen": self.unloaded.foreseen,
            "tried": self.tried,
        }


def capacity_of(target: Target, search: Search, told: Told) -> Capacity:
    """The capacity of a server, found within `search.seconds`. Raises NoCapacity, SearchTooShort, LoadError."""
    ends = time.monotonic() + search.seconds
    idle = unloaded(target, search, partial(told, "one caller"))
    requests = requests_of_a_probe(idle.foreseen, ends - time.monotonic())

    def fits(rate: float) -> bool:
        lasts = lasting(rate, search.probe_seconds, requests)
        return time.monotonic() + lasts + target.deadline_s + BESIDE_S <= ends

    return find_capacity(prober(target, search, requests, SLACK * idle.p99_ms, told), idle, fits)


def requests_of_a_probe(foreseen: float, seconds: float) -> int:
    """As many requests as leave time for the other probes of a search of so many seconds, but `NEEDED` to `PLENTY`."""
    return round(min(max(foreseen * seconds / PROBES_FORESEEN, NEEDED), PLENTY))


def foresee(ms: Floats) -> float:
    """Requests per second that one server of such service times (float64 [N], ms) would bear if it took them one by one.

    A simulated queue of random arrivals: no measure, but where a search begins.
    """
    rng = np.random.default_rng(0)
    work, gaps = rng.choice(ms, SIMULATED), rng.exponential(float(ms.mean()), SIMULATED - 1)
    limit, low, high = SLACK * quantile(ms, 0.99), 0.0, 1.0
    for _ in range(HALVINGS):
        busy = (low + high) / 2
        drift = np.cumsum(work[:-1] - gaps / busy)
        waits = drift - np.minimum(np.minimum.accumulate(drift), 0)
        low, high = (busy, high) if quantile(waits + work[1:], 0.99) <= limit else (low, busy)
    return low / float(ms.mean()) * 1e3


def lasting(rate: float, seconds: float, requests: int) -> float:
    """Seconds of a probe: `seconds`, or until it has so many requests."""
    return max(seconds, requests / rate)


def unloaded(target: Target, search: Search, progress: Progress | None = None) -> Unloaded:
    """What one caller sees who asks one thing after another, `PLENTY` times or for `IDLE_PART` of the search.

    Raises LoadError if anything but answers in full comes back, SearchTooShort if there were fewer than `NEEDED` of them.
    """
    most = IDLE_PART * search.seconds
    found = closed_load(target, 1, min(search.probe_seconds, most), progress)
    if found.at.size < PLENTY:
        each = found.wall_s / found.at.size
        found = closed_load(target, 1, min(PLENTY * each, max(most - found.wall_s, search.probe_seconds)), progress)
    _in_full(found)
    if found.at.size < NEEDED:
        enough = 1.5 * NEEDED * found.wall_s / found.at.size / IDLE_PART
        raise SearchTooShort(
            f"one caller after another got {found.at.size} answers in {found.wall_s:.0f} s, and a 99th percentile needs "
            f"{NEEDED}: give --search-seconds {math.ceil(enough / 60) * 60} or more, or a smaller --fanout"
        )
    return Unloaded(found.whole_p99, found.goodput, int(found.at.size), foresee(found.ms))


def _in_full(found: Measured) -> None:
    if math.isfinite(found.whole_p99):
        return
    seen = figures(found)
    raise LoadError(
        f"of {seen['sent']} requests one by one {seen['failed']} failed and {seen['degraded']} were degraded "
        f"({seen['codes']}); give a longer --deadline-ms, a smaller --fanout or a quieter machine"
    )


def find_capacity(probe: Probe, idle: Unloaded, fits: Callable[[float], bool] = lambda _: True) -> Capacity:
    """The highest rate at which 99 of 100 requests are answered in full within twice the unloaded 99th percentile.

    By steps up or down from what is foreseen, then halved in between, until it is close or a probe of the next rate does not
    fit. A rate is too much if it fails twice: other processes disturb a single run, and nothing makes one too good. Raises
    NoCapacity and SearchTooShort.
    """
    tried: list[dict[str, Any]] = []

    def again(rate: float) -> bool:
        return len(tried) < MOST_PROBES and fits(rate)

    def borne(rate: float) -> Measured | None:
        for first in (True, False):
            if not first and not again(rate):
                break
            found = probe(rate)
            p99 = found.whole_p99
            passed = p99 <= SLACK * idle.p99_ms
            tried.append({"rate": rate, "sent": int(found.at.size), "p99_ms": p99, "borne": passed})
            if passed:
                return found
        return None

    low, high, rate, best = 0.0, math.inf, idle.foreseen, None
    while not (low and high / low <= CLOSE_ENOUGH) and rate >= LEAST_SHARE * idle.foreseen and again(rate):
        found = borne(rate)
        if found is None:
            high = rate
        else:
            low, best = rate, found
        rate = _between(low, high)
    if best is None or math.isinf(high):
        raise _nothing_found(low, high, rate, idle)
    return Capacity(low, high, idle, best, tried)


def _nothing_found(low: float, high: float, rate: float, idle: Unloaded) -> LoadError:
    """Why a search ended without a rate that is borne and one that is not."""
    if rate < LEAST_SHARE * idle.foreseen:
        return NoCapacity(
            f"at {high:.3g} requests/s the 99th percentile is beyond {SLACK * idle.p99_ms:.1f} ms, twice the unloaded one, and "
            f"a queue would bear {idle.foreseen:.3g} a second: something else runs on this machine, or the server refuses what "
            "comes at once; measure it alone, or with a smaller --fanout"
        )
    seen = "no rate was tried" if math.isinf(high) else f"{high:.3g} requests/s are too many and no rate was borne"
    seen = f"{low:.3g} requests/s are borne and no rate was too much" if low else seen
    return SearchTooShort(
        f"{seen}; {rate:.3g} would be tried next, for {NEEDED / rate:.0f} s or more: give as many more --search-seconds, "
        "or a smaller --fanout"
    )


def _between(low: float, high: float) -> float:
    """The next rate to try: a step up, a step down, or the geometric middle."""
    if math.isinf(high):
        return STEP * low
    return math.sqrt(low * high) if low else high / STEP


def prober(target: Target, search: Search, requests: int, limit_ms: float, told: Told) -> Probe:
    """A probe of `find_capacity`: open loop, which ends early once too many are later than `limit_ms`. No two have the same
    arrivals."""
    numbers = count()

    def probe(rate: float) -> Measured:
        number, lasts = next(numbers), lasting(rate, search.probe_seconds, requests)
        at = arrivals(rate, lasts, search.seed + number, even=search.even)
        too_many = Enough(limit_ms, at.size - math.ceil(0.99 * at.size) + 1)
        return open_load(target, at, lasts, partial(told, f"probe {number + 1}, {rate:.3g}/s"), too_many)

    return probe


def overload_figures(found: Measured, capacity: Capacity) -> dict[str, object]:
    """What became of a rate beyond capacity: how late the accepted were, how many came in time, how the rest was refused."""
    accepted = found.ms[found.answered]
    rejected = found.code[~found.answered].tolist()
    return {
        "rate": found.at.size / found.seconds,
        "times_capacity": found.at.size / found.seconds / capacity.rate,
        "accepted": int(accepted.size),
        "accepted_p99_ms": quantile(accepted, 0.99),
        "accepted_p99_over_unloaded": quantile(accepted, 0.99) / capacity.unloaded.p99_ms,
        "goodput": found.goodput,
        "goodput_over_capacity": found.goodput / capacity.rate,
        "rejected": {CODES[code]: rejected.count(code) for code in sorted(set(rejected))},
        "rejected_p99_ms": quantile(found.ms[~found.answered], 0.99),
    }
