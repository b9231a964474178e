"""What batches are worth: many callers at once against one after another."""

from __future__ import annotations

from typing import Any

from ranking.serving.load import LoadError, Measured, Progress, Target, closed_load

CALLERS = (4, 8, 16, 32)
"""Of the closed loop."""


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
