"""What a night did, for Prometheus: a file in its text format, as a textfile collector reads it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from index.errors import BrewlineError

if TYPE_CHECKING:
    from retrieval.refresh import NightReport

COUNTS = {
    "items": "Items in the snapshot.",
    "embedded": "Items that were encoded anew.",
    "put": "Items put in by day that won over the data folder.",
    "withdrawn": "Items withdrawn by day that won over the data folder.",
    "members": "Members whose record was written.",
    "members_encoded": "Members that were encoded anew.",
    "removed": "Old snapshots that were removed.",
    "published": "1 if the pointer moved, 0 if the same night was served already.",
    "hysteresis": "Buckets that a number may stray before its item is encoded again.",
}
STAGES = {"embed": "seconds_embed", "index": "seconds_index", "members": "seconds_members", "all": "seconds"}
LABELS = ("snapshot", "predecessor", "encoder", "ranker", "index")


class MetricsError(BrewlineError):
    """The metrics file cannot be written."""


def check_metrics(path: Path) -> None:
    """Returns if the file's folder is there: a night must not end with the discovery that it is not. Raises MetricsError."""
    if not path.parent.is_dir() or path.is_dir():
        raise MetricsError(f"--metrics {path} is not a file in a folder that exists; make the folder, or name another file")


def write_metrics(path: Path, report: NightReport, finished: float) -> None:
    """The file tells of this night, ended at `finished` (seconds); whoever reads it meets the old one or the new one, whole.

    Raises MetricsError.
    """
    from prometheus_client import CollectorRegistry, Gauge, generate_latest

    from index.durable import write_durably

    registry, facts = CollectorRegistry(), asdict(report)
    for name, told in COUNTS.items():
        Gauge(f"brewline_night_{name}", told, registry=registry).set(facts[name])
    seconds = Gauge("brewline_night_stage_seconds", "What a stage took, and all of them.", ["stage"], registry=registry)
    for stage, name in STAGES.items():
        seconds.labels(stage).set(facts[name])
    if report.recall is not None:
        recall = Gauge("brewline_night_recall", "Recall of the index against exact search.", ["k"], registry=registry)
        recall.labels(str(report.recall_k)).set(report.recall)
    if report.overlap is not None and report.overlap_p5 is not None:
        told = "Share of the best k of the snapshot before that is among tonight's, over members."
        overlap = Gauge("brewline_night_overlap", told, ["k", "over"], registry=registry)
        overlap.labels(str(report.overlap_k), "mean").set(report.overlap)
        overlap.labels(str(report.overlap_k), "p5").set(report.overlap_p5)
    Gauge("brewline_night_as_of_seconds", "What was known before this time is in the snapshot.", registry=registry).set(
        report.as_of
    )
    Gauge("brewline_night_end_seconds", "When the last night that succeeded ended.", registry=registry).set(finished)
    words = Gauge("brewline_night_info", "What was served before and since, and who made it.", LABELS, registry=registry)
    words.labels(*(facts[name] for name in LABELS)).set(1)
    try:
        write_durably(path, generate_latest(registry))
    except OSError as error:
        raise MetricsError(f"the night is published, but --metrics {path} cannot be written: {error.strerror}") from error
