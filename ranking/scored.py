"""A ranker's probabilities for labelled events, written and scored exactly as it would serve them at that moment.

"live": history and connections end strictly before the event, numbers at the start of its day. "frozen": all of it ends at the
test cut.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ranking.calibrate import Calibrator
from ranking.evaluate import RankingEvidenceError, Rows
from ranking.learn.batches import GroupWriter
from ranking.learn.examples import Pool
from ranking.ranker import Ranker
from ranking.tasks import LABEL, task_named
from retrieval.data.schema import DAY, Dataset
from retrieval.encoder import stored_fingerprint
from retrieval.evidence.baselines import Knowledge

Floats = npt.NDArray[np.float64]
GROUPS_PER_PASS = 64


def score_rows(
    dataset: Dataset, rows: Rows, ranker: Ranker, counts: Knowledge, progress: Callable[[int, int], None] | None = None
) -> Floats:
    """Returns the calibrated probability of a positive label for each row, float64 [E].

    Rows of one member at one moment share a prefix. Raises TaskError if the ranker was not taught labels.
    """
    task = task_named(ranker.tasks, LABEL)
    pool, back = moments(dataset, rows, counts)
    until = int(dataset.events.timestamp.max()) + 1 if counts == "live" else dataset.meta.cut_test
    writer = GroupWriter(dataset, ranker.prompts, ranker.tasks, until)
    yes, no = (ranker.engine.label_ids.index(token) for token in ranker.facts.labels[LABEL])
    parts = []
    for begin in range(0, len(pool), GROUPS_PER_PASS):
        chosen = [(task.name, group) for group in range(begin, min(begin + GROUPS_PER_PASS, len(pool)))]
        logits = np.concatenate(ranker.engine.score(writer.write({task.name: pool}, chosen).requests))
        parts.append(logits[:, yes] - logits[:, no])
        if progress is not None:
            progress(begin + len(chosen), len(pool))
    calibrator = ranker.facts.calibrators.get(LABEL, Calibrator())
    return calibrator.probabilities(np.concatenate(parts)).astype(np.float64)[back]


def moments(dataset: Dataset, rows: Rows, counts: Knowledge) -> tuple[Pool, npt.NDArray[np.int64]]:
    """Returns the rows as groups of one member at one moment, and the place of each row among the groups' candidates."""
    cut = np.full(len(rows), dataset.meta.cut_test)
    moment = dataset.events.timestamp[rows.event] if counts == "live" else cut
    order = np.lexsort((rows.event, moment, rows.member))
    member, when = rows.member[order].astype(np.int64), moment[order]
    new = np.concatenate([[True], (np.diff(member) != 0) | (np.diff(when) != 0)])
    first = np.flatnonzero(new)
    pool = Pool(
        task=LABEL,
        member=member[first],
        moment=when[first],
        start=np.concatenate([first, [len(rows)]]),
        item=rows.item[order].astype(np.int64),
        day=when // DAY,
        event=rows.event[order],
        label=rows.label[order].astype(np.int8),
    )
    return pool, np.argsort(order)


def check_encoder(ranker: Ranker, encoder: Path) -> None:
    """Returns if the ranker belongs to the encoder of a folder, or names none. Raises RankingEvidenceError with both values."""
    if ranker.facts.encoder is None:
        return
    found = stored_fingerprint(encoder)
    if found != ranker.facts.encoder:
        raise RankingEvidenceError(
            f"The ranker was trained beside encoder {ranker.facts.encoder}, {encoder} is {found}. Name the encoder it belongs to."
        )
