"""Two looks at the meters of a running server, and what happened between them."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from index.errors import BrewlineError

TIMEOUT_S, MOST_BYTES = 10.0, 16 << 20
STAGES = ("queue", "member", "encode", "search", "rank", "order")

WORKER = "worker"
"""The label of a series that bears a process's name, where several serve at one port."""

Bounds = list[tuple[float, float]]
Growth = list[tuple[dict[str, str], float]]
"""Labels of each series, and by how much it grew."""


class TopError(BrewlineError):
    """The address does not answer, or with something else than meters."""


@dataclass(frozen=True)
class Look:
    """The meters of a server at a time (seconds, monotonic): its samples by their names."""

    at: float
    told: Mapping[str, Sequence[Sample]]

    def samples(self, name: str, only: Mapping[str, str] | None = None) -> Iterator[tuple[dict[str, str], float]]:
        """Labels and value of each sample of a name (of a histogram "..._bucket" or "..._count") that has the labels `only`."""
        wanted = (only or {}).items()
        for sample in self.told.get(name, ()):
            if wanted <= sample.labels.items():
                yield sample.labels, sample.value

    def sums(self, name: str, by: str) -> dict[str, float]:
        """The samples of a meter summed by one label."""
        found: dict[str, float] = {}
        for labels, value in self.samples(name):
            found[labels.get(by, "")] = found.get(labels.get(by, ""), 0.0) + value
        return found

    def most(self, name: str, by: str) -> dict[str, float]:
        """The largest sample of a meter by one label: what each of several workers says of the one store."""
        found: dict[str, float] = {}
        for labels, value in self.samples(name):
            found[labels.get(by, "")] = max(value, found.get(labels.get(by, ""), value))
        return found

    def one(self, name: str, of: Callable[[list[float]], float] = sum) -> float | None:
        """The samples of a meter as one number (of one server, or of its workers together); None if there is none."""
        found = [value for _, value in self.samples(name)]
        return of(found) if found else None

    def series(self, name: str, only: Mapping[str, str] | None = None) -> dict[frozenset[tuple[str, str]], float]:
        """The samples of a name by all of their labels."""
        return {frozenset(labels.items()): value for labels, value in self.samples(name, only)}


def look(address: str) -> Look:
    """The meters that a server tells now. Raises TopError."""
    if not address.startswith(("http://", "https://")):
        raise TopError(f"--address {address!r} is no web address; expected http://HOST:PORT")
    # A proxy of the environment is for the web, not for a port of this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{address.rstrip('/')}/metrics", timeout=TIMEOUT_S) as reply:
            content = reply.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise TopError(f"{address} does not tell its meters ({reason}); start the server with --metrics-port") from error
    if len(content) > MOST_BYTES:
        raise TopError(f"{address} sent more than {MOST_BYTES:,} bytes; is it a server of Brewline?")
    try:
        return Look(time.monotonic(), _samples(content.decode()))
    except (ValueError, IndexError) as error:  # the parser's errors quote what it read, which is no text for a terminal
        raise TopError(f"{address} answers with something else than meters of Brewline; is it the --metrics-port?") from error


def _samples(text: str) -> dict[str, list[Sample]]:
    """The samples of a scrape by their names. Raises what the parser raises, and ValueError for a text that was cut short."""
    told: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            float(sample.labels.get("le", 0))
            told.setdefault(sample.name, []).append(sample)
    if not text.endswith("\n") or "brewline_serving_info" not in told:
        raise ValueError("no scrape of ours, or not all of it")
    return told


def compared(before: Look, now: Look) -> dict[str, object]:
    """What happened between two looks, and how it stands."""
    seconds = max(now.at - before.at, 1e-9)
    calls = _summed(_grown(before, now, "brewline_requests_total"), "method")
    info = next((labels for labels, _ in now.samples("brewline_serving_info")), {})
    return {
        "seconds": seconds,
        "qps": sum(calls.values()) / seconds,
        "methods": {method: _method(before, now, method, count / seconds) for method, count in calls.items()},
        "stages": {stage: _latency(before, now, "brewline_stage_seconds", {"stage": stage}) for stage in _stages(now)},
        "codes": _rates(before, now, "brewline_requests_total", "code", seconds),
        "rejected": _rates(before, now, "brewline_rejected_total", "reason", seconds),
        "degraded": _rates(before, now, "brewline_degraded_total", "reason", seconds),
        "queue": {"length": now.one("brewline_queue_length"), "oldest_seconds": now.one("brewline_queue_oldest_seconds", max)},
        "cache": _cache(before, now),
        "snapshot": {**info, "age_seconds": now.most("brewline_snapshot_age_seconds", "since")},
        "items": now.most("brewline_items", "which"),
        "swaps": now.sums("brewline_swaps_total", "result"),
        "recall": now.one("brewline_recall", fmean),
        "drift": {" ".join(labels.values()): value for labels, value in now.samples("brewline_score_drift")},
        "memory_bytes": now.one("process_resident_memory_bytes", max),  # workers share pages: a sum would count them again
        "cpu": _cpu(before, now, seconds),
    }


def quantile(bounds: Bounds, share: float) -> float | None:
    """The value below which a share of a histogram lies: `bounds` are (upper bound, cumulative count), rising.

    Within a bucket values are taken to lie evenly; beyond the last finite bound that bound is returned. None without any.
    """
    if not bounds or bounds[-1][1] <= 0:
        return None
    wanted, low, below = share * bounds[-1][1], 0.0, 0.0
    for bound, count in bounds:
        if count >= wanted:
            inside = count - below
            return low if bound == float("inf") else low + (bound - low) * ((wanted - below) / inside if inside else 1.0)
        low, below = bound, count
    return low


def _method(before: Look, now: Look, method: str, qps: float) -> dict[str, object]:
    return {"qps": qps, **_latency(before, now, "brewline_request_seconds", {"method": method, "outcome": "answered"})}


def _latency(before: Look, now: Look, name: str, only: Mapping[str, str]) -> dict[str, object]:
    counts = _summed(_grown(before, now, f"{name}_bucket", only), "le")
    bounds = sorted((float(bound), count) for bound, count in counts.items())
    p50, p99 = (quantile(bounds, share) for share in (0.5, 0.99))
    return {"p50_ms": None if p50 is None else p50 * 1e3, "p99_ms": None if p99 is None else p99 * 1e3}


def _grown(before: Look, now: Look, name: str, only: Mapping[str, str] | None = None) -> Growth:
    """By how much each series of a counter grew, worker by worker: one of whose series any is less than it was began again, and
    of one that told nothing before nobody knows when it counted what it tells."""
    was = before.series(name, only)
    known = {labels.get(WORKER, "") for labels, _ in before.samples("brewline_serving_info")}
    here = now.series(name, only)
    again = {dict(key).get(WORKER, "") for key, value in was.items() if here.get(key, 0.0) < value}
    found: Growth = []
    for key, value in here.items():
        labels = dict(key)
        worker = labels.get(WORKER, "")
        start = value if worker not in known else 0.0 if worker in again else was.get(key, 0.0)
        found.append((labels, value - start))
    return found


def _summed(grown: Growth, by: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for labels, count in grown:
        found[labels.get(by, "")] = found.get(labels.get(by, ""), 0.0) + count
    return found


def _rates(before: Look, now: Look, name: str, by: str, seconds: float) -> dict[str, float]:
    grown = _summed(_grown(before, now, name), by)
    return {label: count / seconds for label, count in grown.items() if count}


def _cache(before: Look, now: Look) -> dict[str, object]:
    name = "brewline_prefix_cache_tokens_total"
    grown = _summed(_grown(before, now, name), "source")
    tokens = sum(grown.values())
    return {"reused": grown.get("cache", 0.0) / tokens if tokens else None, "bytes": now.one("brewline_prefix_cache_bytes")}


def _cpu(before: Look, now: Look, seconds: float) -> float | None:
    grown = _grown(before, now, "process_cpu_seconds_total")
    return sum(seconds_of_it for _, seconds_of_it in grown) / seconds if grown else None


def _stages(now: Look) -> list[str]:
    there = {labels.get("stage", "") for labels, _ in now.samples("brewline_stage_seconds_count")}
    return [*(stage for stage in STAGES if stage in there), *sorted(there.difference(STAGES))]
