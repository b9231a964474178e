"""A ranker's engine for machines without torch: exported, and held against the original on real groups."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ranking.learn.batches import GroupWriter
from ranking.learn.examples import GroupSettings, pools_of
from ranking.learn.validate import sampled
from ranking.prefill.onnx_engine import OnnxEngine
from ranking.prefill.onnx_gate import quality_gate
from ranking.prefill.onnx_graphs import export_engine
from ranking.prefill.request import Request
from ranking.ranker import Ranker, RankerError
from retrieval.data.schema import Dataset

CANDIDATES = 2_000
"""Candidates that the two engines are compared on, about."""


def export_ranker(folder: Path, dataset: Dataset, out: Path, *, int8: bool) -> dict[str, Any]:
    """`out` holds the ONNX engine of a ranker folder; returns what was measured on groups from between the data's two cuts.

    `max_abs_diff` compares label logits; `requests` to `apart` are the gate's record (`ranking.prefill.onnx_folder.GateRecord`);
    seconds are of scoring the same requests with cold prefixes. Raises RankerError if the data has no such group, NotAdmitted if
    the engine ranks differently or the groups are too few to tell.
    """
    ranker = Ranker.load(folder)
    requests = _requests(ranker, dataset)
    export_engine(ranker.engine.model, ranker.engine.label_ids, out, quantize=int8)
    candidate = OnnxEngine(out, on_trial=int8)
    began = time.perf_counter()
    ours = ranker.engine.score(requests)
    middle = time.perf_counter()
    theirs = candidate.score(requests)
    seconds = time.perf_counter() - middle
    yes, no = (ranker.engine.label_ids.index(token) for token in ranker.facts.labels[next(iter(ranker.tasks))])
    record = quality_gate(ranker.engine, candidate, requests, pairs=[(yes, no)])
    return {
        "folder": str(out),
        "ranker": ranker.fingerprint,
        "arithmetic": "int8" if int8 else "float32",
        "bytes": sum(file.stat().st_size for file in out.iterdir()),
        "requests": record.requests,
        "items": record.items,
        "top": record.top,
        "max_abs_diff": float(max(np.abs(left - right).max() for left, right in zip(ours, theirs))),
        "kendall": record.kendall,
        "overlap": record.overlap,
        "apart": record.apart,
        "seconds_torch": round(middle - began, 4),
        "seconds_onnx": round(seconds, 4),
    }


def _requests(ranker: Ranker, dataset: Dataset) -> Sequence[Request]:
    """Groups of the main task from between the cuts, as the ranker is asked."""
    name, task = next(iter(ranker.tasks.items()))
    meta = dataset.meta
    pools = pools_of(dataset, {name: task}, meta.cut_valid, meta.cut_test, GroupSettings(), 0)
    if not pools:
        raise RankerError(
            f"{meta.name}: nothing between the two cuts asks task {name!r}; give the folder the ranker was made from"
        )
    writer = GroupWriter(dataset, ranker.prompts, ranker.tasks, meta.cut_test)
    return writer.write(pools, sampled(pools[name], CANDIDATES)).requests
