"""Two saved evaluations on the same queries, compared in pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.table import Table
from rich.text import Text

from retrieval.evidence.intervals import Estimate, Values, estimates, paired_differences
from retrieval.evidence.metrics import slice_masks
from retrieval.evidence.protocol import EvidenceError
from retrieval.evidence.report import METRICS_FILE, PLAIN, SLICE_SHOWN, verdict, with_error
from retrieval.evidence.saved import COLD, PER_QUERY_FILE

SAME = ("dataset", "window", "cut", "members", "targets", "candidates")
"""Facts of metrics.json that two comparable runs share."""
NO_METRIC = ("member_id", "query_timestamp", "system", "counts", "history", "new_member")


@dataclass(frozen=True)
class SavedRun:
    """One system of a saved evaluation: queries (member_id, timestamp) in order of member_id, its metrics [Q] (NaN only in
    those of cold targets), and slice name -> bool [Q]."""

    folder: Path
    name: str
    counts: str
    facts: tuple[object, ...]
    queries: tuple[tuple[str, int], ...]
    values: dict[str, Values]
    slices: dict[str, npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class Compared:
    """First run(s) against second, paired over members; several first runs (seeds) count as their mean per member."""

    first: str
    second: str
    runs: int
    members: int
    means: dict[str, tuple[Estimate, Estimate]]
    differences: dict[str, Estimate]
    slices: dict[str, dict[str, Estimate]]

    def as_dict(self) -> dict[str, object]:
        """The comparison ready for JSON."""
        metrics = {
            name: {
                "first": self.means[name][0].as_dict(),
                "second": self.means[name][1].as_dict(),
                "first_minus_second": {**lead.as_dict(), "verdict": verdict(lead)},
            }
            for name, lead in self.differences.items()
        }
        slices = {name: {metric: lead.as_dict() for metric, lead in of.items()} for name, of in self.slices.items()}
        told = {"first": self.first, "second": self.second, "runs": self.runs, "members": self.members}
        return {**told, "metrics": metrics, "slices_first_minus_second": slices}


def read_run(folder: Path, system: str | None = None) -> SavedRun:
    """The named system of a folder that `write_report` wrote, by default its model. Raises EvidenceError."""
    try:
        stored: dict[str, Any] = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
        facts = tuple(stored[name] for name in SAME)
        name = system or (stored["model"] or {}).get("name")
        table = pq.read_table(folder / PER_QUERY_FILE)
        names = sorted(set(table["system"].to_pylist()))
        rows = table.filter(pc.equal(table["system"], name)) if name else table.slice(0, 0)
        rows = rows.sort_by("member_id")
        keys = tuple(zip(rows["member_id"].to_pylist(), rows["query_timestamp"].to_pylist()))
        values = {column: rows[column].to_numpy().astype(np.float64) for column in table.column_names if column not in NO_METRIC}
        slices = slice_masks(rows["history"].to_numpy(), np.array(rows["new_member"].to_pylist(), bool))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        raise EvidenceError(
            f"{folder}: no readable {METRICS_FILE} and {PER_QUERY_FILE} as `brewline evaluate ... --out` writes them ({error})."
        ) from error
    if not keys:
        wanted = f"no system {name!r}" if name else "no model, so a system must be named"
        raise EvidenceError(f"{folder}: {wanted}; it holds {', '.join(names)}.")
    if len(set(keys)) < len(keys) or not all(
        np.isfinite(column).all() for metric, column in values.items() if not metric.startswith(COLD)
    ):
        raise EvidenceError(f"{folder}/{PER_QUERY_FILE}: {name!r} answers a query twice or with something that is no number.")
    return SavedRun(folder, str(name), str(rows["counts"][0].as_py()), facts, keys, values, slices)


def compare(first: Sequence[SavedRun], second: SavedRun, seed: int = 0) -> Compared:
    """Returns the mean of the first runs minus the second, with paired bootstrap intervals over members.

    Raises EvidenceError unless all answered the same queries under the same protocol with the same metrics.
    """
    for run in first:
        _check_same(run, second)
    shared = [name for name in second.values if all(name in run.values for run in first)]
    ours = {name: np.mean([run.values[name] for run in first], axis=0) for name in shared}
    metrics = [name for name in shared if not name.startswith(COLD)]
    one, other = (estimates({name: values[name] for name in metrics}, seed) for values in (ours, second.values))
    return Compared(
        first=_title(first[0], len(first)),
        second=_title(second, 1),
        runs=len(first),
        members=len(second.queries),
        means={name: (one[name], other[name]) for name in metrics},
        differences=_differences(ours, second.values, metrics, np.ones(len(second.queries), bool), seed),
        slices={
            **{name: _differences(ours, second.values, metrics, mask, seed) for name, mask in second.slices.items()},
            **_cold_differences(ours, second.values, [name for name in shared if name.startswith(COLD)], seed),
        },
    )


def _differences(
    ours: Mapping[str, Values], theirs: Mapping[str, Values], names: Sequence[str], mask: npt.NDArray[np.bool_], seed: int
) -> dict[str, Estimate]:
    return paired_differences({name: ours[name][mask] for name in names}, {name: theirs[name][mask] for name in names}, seed)


def _cold_differences(
    ours: Mapping[str, Values], theirs: Mapping[str, Values], names: Sequence[str], seed: int
) -> dict[str, dict[str, Estimate]]:
    """Over the members who have a cold target; each member counts once, however many they have."""
    if not names:
        return {}
    found = _differences(ours, theirs, names, ~np.isnan(theirs[names[0]]), seed)
    return {"cold targets": {name.removeprefix(COLD): lead for name, lead in found.items()}}


def _title(run: SavedRun, runs: int) -> str:
    return f"{run.name} ({run.counts})" + (f", mean of {runs} runs" if runs > 1 else "")


def _check_same(one: SavedRun, other: SavedRun) -> None:
    for name, ours, theirs in zip(SAME, one.facts, other.facts):
        if ours != theirs:
            raise EvidenceError(
                f"{one.folder} and {other.folder} cannot be paired: {name} is {ours!r} there and {theirs!r} here."
            )
    if one.queries != other.queries:
        differing = len(set(one.queries) ^ set(other.queries))
        raise EvidenceError(
            f"{one.folder} and {other.folder} cannot be paired: {differing} queries (member, time) stand in one of them only. "
            "Evaluate both on the same data folder and window."
        )


def compared_table(found: Compared) -> Table:
    """Returns one row per metric of two saved runs: both means, the difference, its interval and what it says."""
    title = f"{found.first} minus {found.second}: {found.members:,} members, paired bootstrap, 95 %"
    table = Table(title=Text(title), **PLAIN)
    for column in ("slice", "metric", "first", "second", "difference", "interval", "verdict"):
        table.add_column(column, justify="left" if column in ("slice", "metric", "verdict") else "right")
    for metric, lead in found.differences.items():
        table.add_row("all", metric, *(with_error(mean) for mean in found.means[metric]), *_lead_cells(lead))
    for name, of_slice in found.slices.items():
        for metric in SLICE_SHOWN:
            if metric in of_slice and not np.isnan(of_slice[metric].value):
                table.add_row(name, metric, "", "", *_lead_cells(of_slice[metric]))
    return table


def _lead_cells(lead: Estimate) -> tuple[str, str, str]:
    return f"{lead.value:+.4f}", f"{lead.low:+.4f} .. {lead.high:+.4f}", verdict(lead)
