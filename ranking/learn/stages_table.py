"""What a finished stage is, and the table of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ranking.learn.compress_table import metrics_of
from ranking.learn.gates import Check
from ranking.learn.questions import Raw
from ranking.learn.stages_plan import MEASURES

Labels = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Done:
    """A finished stage: its record, raw scores float32 of the held-back and the test part, the probabilities `said` of the
    latter, and why the chain stops here ("": it goes on)."""

    name: str
    folder: Path
    record: Mapping[str, Any]
    held: Raw
    test: Raw
    said: Raw
    checks: list[Check]
    refused: str


def row_of(one: Done, label: Labels, member: Labels) -> dict[str, Any]:
    """One stage's line: metrics on the test part, the suite, and its gate."""
    row: dict[str, Any] = {"stage": one.name, "folder": str(one.folder), "fingerprint": one.record["fingerprint"]}
    row |= {"seconds": one.record["seconds"], "test": metrics_of(one.test, one.said, label, member)}
    return {**row, "suite": one.record["suite"], "gate": [check.facts() for check in one.checks], "refused": one.refused}


def markdown(content: Mapping[str, Any]) -> str:
    """The file for people: what each stage made of the questions, and where the chain stopped."""
    known = [name for name in MEASURES if any(name in row["suite"] for row in content["rows"])]
    columns = ("stage", "test AUC", "NE", "ECE", *(name.replace("_", " ") for name in known), "seconds", "gate")
    lines = [
        f"# {content['name']}\n",
        f"{content['test_candidates']:,} candidates after the test cut, task {content['task']}, with the folder's calibrator. "
        f"The suite and the gates are about what was held back before it ({content['held_candidates']:,} candidates). "
        "What each column means is in docs/stages.md.\n",
        "| " + " | ".join(columns) + " |",
        "|---" + "|--:" * (len(columns) - 2) + "|---|",
    ]
    for row in content["rows"]:
        test = (f"{row['test'][name]:.4f}" for name in ("auc", "ne", "ece"))
        suite = (f"{row['suite'][name]:.4f}" if name in row["suite"] else "" for name in known)
        gate = f"stopped: {row['refused']}" if row["refused"] else "passed"
        lines.append("| " + " | ".join([row["stage"], *test, *suite, f"{row['seconds']:.0f}", gate]) + " |")
    return "\n".join(lines) + "\n"
