"""The demo goes small: the ranker that was trained teaches a smaller one step by step, and what passed its gates is served."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from ranking.cli.output import words

SHARE = 0.3
"""Time in which the smaller models learn, as a share of the time in which the two large ones did."""
REFIT = 0.7
"""Share of a ranker's training time that the steps of its final fit take, which are the ones that its report counts."""
STUDENT, READ = 0.7, 0.4
"""Seconds of a student's step, and of the teacher reading one step's candidates, where a step of the teacher's training is 1."""
TAUGHT, AGAIN = 0.75, 0.25
"""Shares of the steps: the student's, and what is left of it after the cut."""
LEAST_STEPS, CANDIDATES, JUDGED = 10, 80, 8_000
STEPS = 660
"""Of both smaller models of the demo's own world, which is not trained by the clock."""
LABEL = 0.1
"""Weight of the labels in what students learn: a short training hears more from a teacher, which is no noise, than from them."""
INT8, ONNX = "int8", "onnx"
GATES = {"auc": 0.02, "gauc": 0.03, "ndcg": 0.05, "ne": 0.03, "ece": 0.02, "judged_by": "better_bound"}
"""Wider than the defaults, and a step is stopped where it surely broke one: on a few hundred held-back answers the measured loss
of a chain that lost nothing is at times above any useful limit (a run of .021 +- .013 was .009 better after the test cut)."""


@dataclass(frozen=True)
class Small:
    """Which ranker the demo serves, `why` in words, and the chain's rows, the teacher first (none: it never began)."""

    folder: Path
    model: str
    why: str
    rows: list[dict[str, Any]]

    def facts(self) -> dict[str, Any]:
        """The same ready for JSON."""
        return {"served": self.model, "folder": str(self.folder), "why": self.why, "rows": self.rows}


def write_plan(place: Path, data: Path, teacher: Path, report: Mapping[str, Any], minutes: float | None, seed: int) -> Path:
    """Writes the chain's plan beside the teacher's folder and returns it: sizes from the teacher's, steps from the seconds
    that its own took (`report` of its training) and the minutes that the demo gives to training; None: STEPS."""
    config = json.loads((teacher / "config.json").read_text(encoding="utf-8"))
    student, pruned = sizes_of(config)
    a_second = report["steps"] / (report["seconds"] * REFIT * (STUDENT + READ))
    steps = STEPS if minutes is None else max(LEAST_STEPS, int(60 * minutes * SHARE * a_second))
    lengths = (max(1, round(share * steps)) for share in (TAUGHT, AGAIN))
    learn, again = ({"steps": length, "candidates": CANDIDATES, "label": LABEL} for length in lengths)
    content = {
        "name": "the demo goes small",
        "data": str(data),
        "teacher": str(teacher),
        "out": str(place / "compress"),
        "seeds": [seed],
        "judged": JUDGED,
        "taught": learn["steps"] * CANDIDATES,
        "gates": GATES,
        "routes": {
            "small": [
                {"name": "student", "kind": "prune", "keep": student, "one_shot": True, "learn": learn},
                {"name": "pruned", "kind": "prune", "keep": pruned, "teacher": "root", "learn": again},
                {"name": INT8, "kind": "quantize", "to": "int8", "onnx": find_spec("onnx") is not None},
            ]
        },
    }
    path = place / "compress.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def sizes_of(config: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """What student and pruned model keep of a teacher of that configuration, as a plan names it: half the width and half the
    neurons, then a third of the neurons, which leaves about a quarter of the weights outside the embeddings."""
    heads, mlp = config["num_attention_heads"], config["intermediate_size"]
    return {"hidden": max(heads, config["hidden_size"] // 2 // heads * heads), "mlp": mlp // 2}, {"mlp": mlp // 3}


def served(found: Mapping[str, Any], teacher: Path) -> Small:
    """The model to serve after a chain printed `found`: the last one that passed its gate, in float32, at worst the teacher.

    The service computes in float32 whatever a folder's values were rounded to, so int8 would cost there and save nothing.
    """
    if "refused" in found:
        return Small(teacher, "teacher", f"the chain did not begin: {found['refused']}", [])
    rows = found["rows"]
    stop = next((row for row in rows if row["refused"]), None)
    last = [row for row in rows if not row["refused"] and row["step"] != INT8][-1]
    why = _all_passed(rows) if stop is None else f"the chain stopped at {stop['step']}: {stop['refused']}"
    return Small(Path(last["folder"]), last["step"], why, rows)


def _all_passed(rows: list[dict[str, Any]]) -> str:
    """What is said of a chain that came to its end: how much smaller its model is, and why int8 is only shown."""
    times, body = (rows[0][name] / rows[-1][name] for name in ("parameters", "outside_embeddings"))
    fewer = f"every gate passed, {times:.1f} times fewer parameters than its teacher, {body:.1f} outside the embeddings"
    if ONNX not in rows[-1]:
        return f"{fewer}; no int8 engine was exported: the package onnx is missing (pip install 'brewline[dev]')"
    ours, theirs = rows[-1]["items_per_second"], rows[-1][ONNX]["items_per_second"]
    speeds = f"the service computes in float32 ({ours:,.0f} items/s here), onnxruntime's int8 engine ({theirs:,.0f})"
    return f"{fewer}; {speeds} is for machines without torch"


def side_by_side(small: Small) -> Table:
    """Teacher, student, pruned and quantized models: size, speed, order and calibration of the words alone."""
    table = Table(title="The ranker goes small (the words alone, after the test cut)", title_justify="left")
    for name in ("model", "parameters", "items/s", "AUC", "NE", "ECE", "gate"):
        table.add_column(name, justify="left" if name in ("model", "gate") else "right", no_wrap=True)
    for name, row, gate in _lines(small):
        numbers = (_number(row[metric], ".4f") for metric in ("auc", "ne", "ece"))
        table.add_row(words(name), f"{row['parameters']:,}", _number(row["items_per_second"], ",.0f"), *numbers, gate)
    return table


def _lines(small: Small) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """A name, numbers and the gate's word for each model, and one more for an exported int8 engine."""
    for row in small.rows:
        broken = any(not line["passed"] for line in row["gate"])
        gate = "failed" if broken else "passed" if row["gate"] else ""
        yield f"{row['step']}{' (served)' if row['step'] == small.model else ''}", row, gate
        if ONNX in row:
            unknown = dict.fromkeys(("items_per_second", "auc", "ne", "ece"))
            yield f"{row['step']}, onnxruntime", {**row, **unknown, **row[ONNX]}, "refused" if row[ONNX]["refused"] else gate


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
