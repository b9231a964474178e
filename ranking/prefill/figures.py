"""The figures that a benchmark reports, from the seconds it measured and the operations that were needed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ranking.prefill import operations
from ranking.prefill.contenders import WAYS
from ranking.prefill.entrants import Entrant
from ranking.prefill.operations import Body, PrefillShape

Facts = dict[str, object]


@dataclass
class Times:
    """Seconds of every repetition: the engine from nothing and with its prefix cached, bare products, and the plain ways."""

    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    linear: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)
    plain: dict[tuple[str, torch.dtype], list[float]] = field(default_factory=dict)


def speed(times: Times, shape: PrefillShape) -> Facts:
    """Our own seconds; the 0.99 quantile of fewer than 100 repetitions is close to the longest."""
    seconds = statistics.median(times.cold)
    return {
        "seconds": seconds,
        "seconds_p99": float(np.quantile(times.cold, 0.99)),
        "seconds_max": max(times.cold),
        "seconds_warm": statistics.median(times.warm),
        "items_per_second": shape.items / seconds,
    }


def speedups(rows: Sequence[Facts], seconds: float, dtypes: Mapping[str, str]) -> Facts:
    """For each ending and its dtype: every way's seconds over ours, those of the fastest, and who that is; None if not timed."""
    found: Facts = {}
    for ending, dtype in dtypes.items():
        measured = {one["name"]: one["seconds"] for one in rows if one["dtype"] == dtype}
        ratios = {str(name): spent / seconds for name, spent in measured.items() if isinstance(spent, float)}
        best = min(ratios, key=ratios.__getitem__, default=None)
        found |= {f"speedup_{name}{ending}": ratios.get(name) for name in WAYS}
        found |= {f"speedup_best_contender{ending}": best and ratios[best], f"best_contender{ending}": best}
    return found


def shares(times: Times, body: Body, shape: PrefillShape) -> Facts:
    """What of our time bare products and the fewest operations would take, and what counts of operations alone say.

    `operation_ratio_*` divides a plain way's operations by the fewest possible: the speedup at an equal rate. A larger one comes
    from a better rate, a smaller one from a worse one.
    """
    seconds, warm, linear, attention = map(statistics.median, (times.cold, times.warm, times.linear, times.attention))
    rate = operations.linear_operations(body, shape) / linear
    least = operations.lower_bound(body, shape)
    ratio = operations.warm_lower_bound(body, shape) / least
    plain, cached = operations.one_by_one(body, shape), operations.prefix_cached(body, shape)
    return {
        "matmul_share": linear / seconds,
        "attention_matmul_share": (linear + attention) / seconds,
        "lower_bound_share": least / rate / seconds,
        "lower_bound_operations": least,
        "operations_one_by_one": plain,
        "operations_prefix_cached": cached,
        "operation_ratio_one_by_one": plain / least,
        "operation_ratio_prefix_cached": cached / least,
        "warm_operation_ratio": ratio,
        "warm_share": ratio / (warm / seconds),
    }


def row(one: Entrant, times: Times, shape: PrefillShape, apart: float | None) -> Facts:
    """What is reported about a contender; without `seconds` its `reason` says why."""
    many = times.plain[one.key]
    seconds = statistics.median(many) if many else None
    return {
        "name": one.name,
        "dtype": name_of(one.dtype),
        "seconds": seconds,
        "items_per_second": seconds and shape.items / seconds,
        "batch": one.batch,
        "largest_batch_tried": one.tried,
        "items_timed": one.items,
        "repetitions": len(many),
        "max_abs_diff": apart,
        "reason": one.reason,
    }


def name_of(dtype: torch.dtype) -> str:
    """The dtype as options spell it."""
    return str(dtype).removeprefix("torch.")
