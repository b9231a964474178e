"""The results of an experiment: one row per digest in Parquet, and the table for people in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval.evidence.intervals import NORMAL_95
from retrieval.learn.grid import BASE, Experiment, ExperimentError, Run
from retrieval.learn.paired import Difference, minus_default

Row = dict[str, Any]
ROWS, TABLE = "results.parquet", "results.md"
SHOWN = {
    "encoder": ("recall@10", "recall@100", "recall@2000", "cold recall@100", "popularity correlation"),
    "ranker": ("auc", "text auc", "gauc", "normalized_entropy", "calibration_error_debiased"),
}
"""What the table for people shows of each kind; the rows hold more."""
PAIRED = ("recall@10", "recall@100")
"""Of an encoder's cell, what is compared with the default's."""
FAILED, DONE = "failed", "done"
"""The states of a row."""


def read_rows(folder: Path) -> dict[str, Row]:
    """Rows by digest, none if there is no file yet. Raises ExperimentError for a file that is none of ours."""
    path = folder / ROWS
    if not path.is_file():
        return {}
    try:
        return {row["digest"]: row for row in pq.read_table(path).to_pylist()}
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        raise ExperimentError(f"{path}: no results of an experiment ({error}); remove it or choose another out") from error


def write_rows(experiment: Experiment, cells: Sequence[tuple[Run, str]], rows: Mapping[str, Row]) -> None:
    """Writes both files, each whole or not at all. `cells` are all that were planned, with the digests of their rows."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    table = pa.table({name: [row.get(name) for row in rows.values()] for name in names})
    pq.write_table(table, experiment.out / f"{ROWS}.tmp")
    (experiment.out / f"{ROWS}.tmp").replace(experiment.out / ROWS)
    (experiment.out / f"{TABLE}.tmp").write_text(markdown(experiment, cells, rows), encoding="utf-8")
    (experiment.out / f"{TABLE}.tmp").replace(experiment.out / TABLE)


def markdown(experiment: Experiment, cells: Sequence[tuple[Run, str]], rows: Mapping[str, Row]) -> str:
    """The table: a line per data set, factor and value, means over the seeds that are done; what is not done is empty."""
    length = f"{experiment.minutes:g} minutes" if experiment.steps is None else f"{experiment.steps} steps"
    lines = [
        f"# {experiment.name}\n",
        f"Each training {length}; seeds {', '.join(map(str, experiment.seeds))}. A cell is the mean over seeds and half the 95 % "
        "interval (variance over members by bootstrap plus that of the mean over seeds). Empty: not run, or "
        "failed for the reason given.\n",
    ]
    shown = SHOWN[experiment.kind]
    paired = PAIRED if experiment.kind == "encoder" and experiment.design == "one_factor" else ()
    if paired:
        lines.append("Minus default: paired over members and seeds, bold where the 95 % interval leaves 0 out.\n")
    for data in experiment.data:
        columns = [*shown, *(f"{name} minus default" for name in paired)]
        lines += [f"\n## {data}\n", "| factor | value | seeds | " + " | ".join(columns) + " | minutes | |"]
        lines += ["|---" * (5 + len(columns)) + "|"]
        done = {(*run_key(run), run.seed): digest for run, digest in cells if rows.get(digest, {}).get("status") == DONE}
        for factor, value, _ in experiment.cells():
            held = [rows[digest] for run, digest in cells if run_key(run) == (data, factor, value) and digest in rows]
            both = [((data, factor, value, seed), (data, BASE, "", seed)) for seed in experiment.seeds]
            pairs = [(done[ours], done[theirs]) for ours, theirs in both if ours in done and theirs in done]
            changed = [] if factor == BASE else [_changed(minus_default(experiment.out, pairs, name)) for name in paired]
            lines.append(_line(factor, value, held, shown, changed or [""] * len(paired)))
    return "\n".join(lines) + "\n"


def run_key(run: Run) -> tuple[str, str, str]:
    """What the seeds of a cell share."""
    return run.data, run.factor, run.value


def _changed(found: Difference | None) -> str:
    if found is None:
        return ""
    mean, half = found
    said = f"{mean:+.4f} ± {half:.4f}"
    return f"**{said}**" if abs(mean) > half else said


def _line(factor: str, value: str, held: Sequence[Row], shown: Sequence[str], changed: Sequence[str]) -> str:
    done = [row for row in held if row["status"] == DONE]
    reasons = "; ".join(sorted({_plain(str(row["reason"])) for row in held if row["status"] != DONE}))
    minutes = f"{np.mean([row['train_seconds'] for row in done]) / 60:.1f}" if done else ""
    numbers = [*(_number(done, name) for name in shown), *changed]
    return f"| {_plain(factor)} | {_plain(value)} | {len(done)} | {' | '.join(numbers)} | {minutes} | {reasons} |"


def _number(done: Sequence[Row], name: str) -> str:
    values = np.array([row[name] for row in done if row.get(name) is not None], np.float64)
    if not len(values):
        return ""
    halves = [(row[f"{name} high"] - row[f"{name} low"]) / 2 for row in done if row.get(f"{name} low") is not None]
    variance = np.mean(np.square(halves)) / NORMAL_95**2 if halves else 0.0
    if len(values) > 1:
        variance += values.var(ddof=1) / len(values)
    shown = f"{values.mean():.4f}"
    return f"{shown} ± {NORMAL_95 * np.sqrt(variance):.4f}" if variance > 0 else shown


def _plain(text: str) -> str:
    """Text that cannot leave its cell."""
    return " ".join(text.replace("|", "/").split())[:200]
