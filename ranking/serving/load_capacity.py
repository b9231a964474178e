"""How much a server bears: the highest rate at which it is still quick, what it does far beyond that, what batches are worth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

from ranking.serving.load import CODES, LoadError, Measured, Progress, Target, arrivals, closed_load, figures, open_load, quantile

SLACK = 2.0
"""A rate is borne while its 99th percentile is at most so many times the unloaded one."""
FIRST_SHARE = 0.25
"""Of what one caller after another gets; the search for the highest rate begins there."""
MOST_STEPS, CLOSE_ENOUGH = 10, 1.08
PROBE_REQUESTS, MOST_STRETCH = 300, 4
"""A percentile of few requests is chance: a probe lasts until it has so many, but at most so many times the seconds asked for."""
CALLERS = (4, 8, 16, 32)
"""Of the closed loop of `batching`."""

Probe = Callable[[float], Measured]


class NoCapacity(LoadError):
    """Even a nearly idle server is late."""


@dataclass(frozen=True)
class Unloaded:
    """One caller after another: 99th percentile in ms of so many requests, and answers per second."""

    p99_ms: float
    rate: float
    requests: int


@dataclass(frozen=True)
class Capacity:
    """The highest rate that was borne, the lowest that was not, in requests per second, and every rate that was tried."""

    rate: float
    too_much: float
    unloaded: Unloaded
    best: Measured
    tried: list[dict[str, object]]

    def figures(self) -> dict[str, object]:
        """As facts of a report."""
        return {
            "capacity": self.rate,
            "capacity_exceeded_at": self.too_much,
            "p99_ms_unloaded": self.unloaded.p99_ms,
            "rate_unloaded": self.unloaded.rate,
            "requests_unloaded": self.unloaded.requests,
            "tried": self.tried,
        }


def unloaded(target: Target, seconds: float, progress: Progress | None = None) -> Unloaded:
    """What one caller sees who asks one thing after another, for `seconds` or, if that was too short, for as long as a probe may
    last. Raises LoadError if anything but answers in full comes back."""
    found = closed_load(target, 1, seconds, progress)
    if found.at.size < PROBE_REQUESTS:
        lasts = seconds * min(PROBE_REQUESTS / max(found.at.size, 1), MOST_STRETCH)
        found = closed_load(target, 1, lasts, progress)
    p99 = found.whole_p99
    if not math.isfinite(p99):
        seen = figures(found)
        raise LoadError(
            f"of {seen['sent']} requests one by one {seen['failed']} failed and {seen['degraded']} were degraded "
            f"({seen['codes']}); give a longer --deadline-ms or a smaller --fanout"
        )
    return Unloaded(p99, found.goodput, int(found.at.size))


def find_capacity(probe: Probe, idle: Unloaded) -> Capacity:
    """The highest rate at which 99 of 100 requests are answered in full within twice the unloaded 99th percentile.

    Doubled until it is too much, then halved in between. A rate is too much if it fails twice: other processes disturb a
    single run, and nothing makes one too good. Raises NoCapacity.
    """
    tried: list[dict[str, object]] = []

    def borne(rate: float) -> Measured | None:
        for _ in range(2):
            found = probe(rate)
            p99 = found.whole_p99
            passed = p99 <= SLACK * idle.p99_ms
            tried.append({"rate": rate, "sent": int(found.at.size), "p99_ms": p99, "borne": passed})
            if passed:
                return found
        return None

    low, best = 0.0, None
    high, rate = math.inf, FIRST_SHARE * idle.rate
    for _ in range(MOST_STEPS):
        found = borne(rate)
        if found is None:
            high = rate
        else:
            low, best = rate, found
        if low and high / low <= CLOSE_ENOUGH:
            break
        rate = _between(low, high)
    if best is None:
        raise NoCapacity(
            f"at {high:.3g} requests/s the 99th percentile is beyond {SLACK * idle.p99_ms:.1f} ms, twice the unloaded one; "
            "is something else running on this machine?"
        )
    return Capacity(low, high, idle, best, tried)


def _between(low: float, high: float) -> float:
    """The next rate to try: twice what was borne, half of what was not, or the geometric middle."""
    if math.isinf(high):
        return 2 * low
    return math.sqrt(low * high) if low else high / 2


def prober(target: Target, seconds: float, seed: int, *, even: bool, progress: Progress | None = None) -> Probe:
    """A probe of `find_capacity`: open loop for `seconds`, or longer where the rate is low. No two have the same arrivals."""
    seeds = count(seed)

    def probe(rate: float) -> Measured:
        lasts = min(max(seconds, PROBE_REQUESTS / rate), MOST_STRETCH * seconds)
        return open_load(target, arrivals(rate, lasts, next(seeds), even=even), lasts, progress)

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


def batching(
    target: Target, seconds: float, budget_ms: float, progress: Progress | None = None
) -> tuple[dict[str, Any], Measured]:
    """Throughput of one caller after another and of many at once, both with the 99th percentile within `budget_ms`.

    Returns the figures and the best run. Raises LoadError if not even one caller stays within the budget.
    """
    alone = closed_load(target, 1, seconds, progress)
    if not alone.whole_p99 <= budget_ms:
        raise LoadError(
            f"one by one the 99th percentile is {alone.whole_p99:.1f} ms, more than the budget of {budget_ms:g} ms; "
            "give a larger --budget-ms"
        )
    rows = [(1, alone)]
    for callers in CALLERS:
        rows.append((callers, closed_load(target, callers, seconds, progress)))
        if not rows[-1][1].whole_p99 <= budget_ms:
            break
    within = [(found.goodput, callers, found) for callers, found in rows if found.whole_p99 <= budget_ms]
    rate, callers, best = max(within, key=lambda row: row[0])
    told = {
        "budget_ms": budget_ms,
        "one_by_one_per_second": alone.goodput,
        "together_per_second": rate,
        "callers": callers,
        "ratio": rate / alone.goodput,
        "rows": [{"callers": n, "per_second": one.goodput, "p99_ms": one.whole_p99} for n, one in rows],
    }
    return told, best
