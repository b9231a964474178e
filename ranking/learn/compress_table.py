"""The table of a chain: what each model weighs, how it orders, how well it is calibrated and how fast it is, and its gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ranking.learn.chain import ONNX, SCORES, WORK, Done
from ranking.learn.gates import METRICS, resamples_of
from ranking.metrics import auc
from retrieval.evidence.intervals import NORMAL_95, interval

RESAMPLES = 500

Labels = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """AUC of one route's last trained model minus another's: mean over seeds, 95 % interval that knows members and seeds."""

    ours: str
    theirs: str
    seeds: int
    difference: float
    low: float
    high: float

    def facts(self) -> dict[str, object]:
        """The comparison ready for JSON."""
        return asdict(self)


def row_of(one: Done, root: Done, label: Labels, member: Labels) -> dict[str, Any]:
    """One model's line: metrics on the test part, AUC lost against the teacher as a share, and its gate."""
    low, high, lost = _lost(label, member, *(each.test.astype(np.float64) for each in (one, root)))
    row: dict[str, Any] = {"route": one.route, "seed": one.seed, "step": one.name, "folder": str(one.folder)}
    row |= {name: one.record[name] for name in ("fingerprint", "parameters", "outside_embeddings", "bytes", "steps", "seconds")}
    row |= {"items_per_second": one.record["items_per_second"], **metrics_of(one.test, one.said, label, member)}
    row |= {"auc_lost": lost, "auc_lost_low": low, "auc_lost_high": high}
    row |= {"gate": [check.facts() for check in one.checks], "refused": one.refused}
    if ONNX in one.record:
        row[ONNX] = {name: held for name, held in one.record[ONNX].items() if name != "measured"}
        if not one.record[ONNX]["refused"]:
            with np.load(one.folder / WORK / f"{ONNX}-{SCORES}") as held:
                row[ONNX] |= metrics_of(held["test"], held["said"], label, member)
    return row


def metrics_of(raw: npt.NDArray[np.floating], said: npt.NDArray[np.floating], label: Labels, member: Labels) -> dict[str, float]:
    """Every metric of raw scores and probabilities [n]."""
    _, code = np.unique(member, return_inverse=True)
    columns = (np.asarray(label, np.float64), np.asarray(raw, np.float64), np.asarray(said, np.float64), code)
    return {name: metric(*columns) for name, metric in METRICS.items()}


def _lost(label: Labels, member: Labels, ours: Floats, root: Floats) -> tuple[float, float, float]:
    """Low, high and value of the share of the teacher's AUC that is lost, paired over members."""
    truth = label.astype(np.float64)
    whole = auc(truth, root)
    value = (whole - auc(truth, ours)) / whole
    _, code = np.unique(member, return_inverse=True)
    drawn = []
    for rows in resamples_of(code, truth, RESAMPLES):
        best = auc(truth[rows], root[rows])
        drawn.append((best - auc(truth[rows], ours[rows])) / best)
    return (*interval(np.array(drawn)), value)


def compared(ours: str, theirs: str, our: Sequence[Floats], their: Sequence[Floats], label: Labels, member: Labels) -> Comparison:
    """Two routes' last trained models, raw scores [n] of each seed; the same members are drawn for all of them."""
    truth = label.astype(np.float64)
    _, code = np.unique(member, return_inverse=True)
    gaps = np.array([auc(truth, one) - auc(truth, two) for one, two in zip(our, their)])
    drawn = [
        np.mean([auc(truth[rows], one[rows]) - auc(truth[rows], two[rows]) for one, two in zip(our, their)])
        for rows in resamples_of(code, truth, RESAMPLES)
    ]
    spread = gaps.var(ddof=1) / len(gaps) if len(gaps) > 1 else 0.0
    half = NORMAL_95 * float(np.sqrt(np.var(drawn) + spread))
    value = float(gaps.mean())
    return Comparison(ours, theirs, len(gaps), value, value - half, value + half)


COLUMNS = ("model", "parameters", "outside embeddings", "learned", "AUC", "NE", "ECE", "AUC lost, %", "items/s", "gate")


def markdown(content: Mapping[str, Any]) -> str:
    """The file for people: models, gates that were broken, comparisons, and what the head's precision does."""
    lines = [f"# {content['name']}\n"]
    lines += [
        f"{content['test_candidates']:,} candidates after the test cut, task {content['task']}; gates on "
        f"{content['held_candidates']:,} that were held back before it. Means over seeds. AUC lost: share of the teacher's, with "
        "the 95 % interval of the seed that lost most (bootstrap over members). Items per second: this machine, prefixes cold.\n"
    ]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---" + "|--:" * (len(COLUMNS) - 2) + "|---|"]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in content["rows"]:
        groups.setdefault((row["route"], row["step"]), []).append(row)
    for (route, step), rows in groups.items():
        lines += _lines(f"{route}: {step}" if route else step, rows)
    if content["stopped"]:
        lines += ["\n## Stopped\n", *(f"- {where}: {why}" for where, why in content["stopped"].items())]
    if content["comparisons"]:
        lines += [
            "\n## AUC of one route's last trained model minus the other's\n",
            "| | difference | 95 % | seeds |",
            "|---|--:|---|--:|",
        ]
        for one in content["comparisons"]:
            told = f"{one['difference']:+.4f} | {one['low']:+.4f} .. {one['high']:+.4f} | {one['seeds']}"
            lines.append(f"| {one['ours']} - {one['theirs']} | {told} |")
    lines += ["\n## The teacher's head in other precisions\n"]
    lines += ["| head | distinct scores | tied pairs in a list | AUC | ECE | ECE refitted |", "|---" + "|--:" * 5 + "|"]
    for row in content["head"]:
        told = f"{row['distinct']:,} | {row['tied']:.2%} | {row['auc']:.5f} | {row['ece']:.4f} | {row['refitted']:.4f}"
        lines.append(f"| {row['head']} | {told} |")
    return "\n".join(lines) + "\n"


def _lines(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A model's line, and one more for its onnxruntime engine."""
    first, worst = rows[0], max(rows, key=lambda row: row["auc_lost"])
    mean = {key: _mean([row[key] for row in rows]) for key in ("auc", "ne", "ece", "auc_lost", "items_per_second")}
    lost = f"{mean['auc_lost']:+.2%} ({worst['auc_lost_low']:+.2%} .. {worst['auc_lost_high']:+.2%})"
    failed = sum(bool(row["refused"]) for row in rows)
    gate = "" if not first["gate"] else "passed" if not failed else f"failed {failed} of {len(rows)}"
    numbers = f"{mean['auc']:.4f} | {mean['ne']:.4f} | {mean['ece']:.4f}"
    size = f"{first['parameters']:,} | {first['outside_embeddings']:,} | {first['steps']:,}"
    found = [f"| {name} | {size} | {numbers} | {lost} | {mean['items_per_second']:,.0f} | {gate} |"]
    engines = [row[ONNX] for row in rows if ONNX in row and not row[ONNX]["refused"]]
    if refused := sum(bool(row[ONNX]["refused"]) for row in rows if ONNX in row):
        found.append(f"| {name}, onnxruntime int8 | {size} | | | | | | its own gate refused {refused} of {len(rows)} |")
    if engines:
        parts = {key: _mean([one[key] for one in engines]) for key in ("auc", "ne", "ece", "items_per_second")}
        numbers = f"{parts['auc']:.4f} | {parts['ne']:.4f} | {parts['ece']:.4f}"
        found.append(f"| {name}, onnxruntime int8 | {size} | {numbers} | | {parts['items_per_second']:,.0f} | |")
    return found


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
