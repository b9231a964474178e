"""What an evaluation leaves in a folder.

`metrics.json` for machines, `ranked.parquet` (the model's lists) for checks, `per_query.parquet` (every system's numbers for
every query) for paired tests, `report.html` for people.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval.data.schema import Dataset
from retrieval.evidence.evaluate import RetrievalReport
from retrieval.evidence.page import render_page
from retrieval.evidence.plots import runs_of
from retrieval.evidence.protocol import cold_members
from retrieval.evidence.rank import write_ranked
from retrieval.evidence.report import METRICS_FILE, without_nan

RANKED_FILE, PER_QUERY_FILE, PAGE_FILE = "ranked.parquet", "per_query.parquet", "report.html"
COLD = "cold "
"""Begins the columns of per_query.parquet that are about cold targets only."""


def write_report(report: RetrievalReport, dataset: Dataset, folder: Path, command: str = "") -> None:
    """Writes all files of an evaluation into `folder` (made if need be); ranked.parquet only if a model was judged.

    `command` stands in the page as what made it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(without_nan(report.as_dict()), indent=1, allow_nan=False)
    (folder / METRICS_FILE).write_text(text + "\n", encoding="utf-8")
    if report.ranked is not None:
        write_ranked(folder / RANKED_FILE, report.ranked, report.queries, dataset.members, dataset.items)
    pq.write_table(_per_query(report, dataset), folder / PER_QUERY_FILE)
    (folder / PAGE_FILE).write_text(render_page(report, command), encoding="utf-8")


def _per_query(report: RetrievalReport, dataset: Dataset) -> pa.Table:
    """One row per system and query: its keys, what slices need, every metric, and recall over its cold targets ("cold ...")."""
    runs, size = runs_of(report), len(report.queries)
    members = [dataset.members.member_id[row] for row in report.queries.member.tolist()]
    columns: dict[str, Any] = {
        "member_id": pa.array(members * len(runs), pa.string()),
        "query_timestamp": pa.array(np.tile(report.queries.timestamp, len(runs)), pa.int64()),
        "system": pa.array([run.name for run in runs for _ in range(size)], pa.string()),
        "counts": pa.array([run.knowledge for run in runs for _ in range(size)], pa.string()),
    }
    columns["history"] = np.tile(report.queries.excluded.lengths, len(runs))
    columns["new_member"] = np.tile(cold_members(report.queries), len(runs))
    for metric in runs[0].quality.per_query if runs else ():
        columns[metric] = np.concatenate([run.quality.per_query[metric] for run in runs])
    for metric in runs[0].quality.cold if runs else ():
        columns[f"{COLD}{metric}"] = np.concatenate([run.quality.cold[metric] for run in runs])
    return pa.table(columns)
