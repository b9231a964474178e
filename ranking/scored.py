"""A ranker's probabilities for labelled events, written and scored exactly as it would serve them at that moment.

"live": history and connections end strictly before the event, numbers at the start of its day. "frozen": all of it ends at the
test cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ranking.baselines import Scored
from ranking.calibrate import fit
from ranking.evaluate import RankingEvidenceError, Rows, rows_of
from ranking.fusion_rows import FeatureRows
from ranking.learn.batches import Choice, GroupWriter
from ranking.learn.examples import GroupSettings, Pool, pools_of, sampled
from ranking.metrics import auc, debiased_calibration_error, log_loss, member_aucs, normalized_entropy
from ranking.ranker import Ranker
from ranking.scores import OrderOnly, Scores
from ranking.tasks import LABEL
from retrieval.data.schema import DAY, Dataset
from retrieval.encoder import Encoder, stored_fingerprint
from retrieval.evidence.baselines import Knowledge
from retrieval.provenance import saw_past

Floats = npt.NDArray[np.float64]
GROUPS_PER_PASS = 64
TASK_CANDIDATES = 4_000
"""Candidates that each further task is judged on."""
SCALED_ON = 1_000
"""Labelled events that turn the first stage's cosine into a probability."""


def score_rows(
    dataset: Dataset,
    rows: Rows,
    ranker: Ranker,
    counts: Knowledge,
    encoder: Encoder | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Returns every probability of a ranker for each row. Rows of one member at one moment share a prefix.

    Raises RankingEvidenceError if the ranker was not taught labels, FusionError if its head does not fit the folder.
    """
    if LABEL not in ranker.tasks:
        raise RankingEvidenceError(
            f"This ranker was not taught labels, its tasks are {', '.join(ranker.tasks)}: the folder that it was trained on had "
            "no labelled event before its test cut, or its tasks file no 'label'. Train one where there are some, or judge a "
            "task that it knows with --task."
        )
    pool, back = moments(dataset, rows, counts)
    until = known_until(dataset, counts)
    writer = GroupWriter(dataset, ranker.prompts, ranker.tasks, until)
    logits = text_logits(ranker, writer, pool, [(LABEL, group) for group in range(len(pool))], progress)
    text = ranker.text_probabilities(logits, LABEL).astype(np.float64)[back]
    cosine = None if encoder is None else cosines(dataset, pool, until, encoder)
    seen = None if cosine is None else cosine[back]
    if ranker.head is None:
        return Scores(text, text, None, seen)
    head = ranker.head
    found = FeatureRows(dataset, until, head.base, head.static).of(pool, range(len(pool)), cosine)
    fused, alone = head.probabilities(logits, found), head.without_text(found)
    return Scores(fused.astype(np.float64)[back], text, alone.astype(np.float64)[back], seen)


def text_logits(
    ranker: Ranker,
    writer: GroupWriter,
    pool: Pool,
    chosen: Sequence[Choice],
    progress: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.float32]:
    """Returns the raw scores float32 [n] of the candidates of the chosen groups of one task's pool."""
    yes, no = (ranker.engine.label_ids.index(token) for token in ranker.facts.labels[pool.task])
    parts = []
    for begin in range(0, len(chosen), GROUPS_PER_PASS):
        now = chosen[begin : begin + GROUPS_PER_PASS]
        logits = np.concatenate(ranker.engine.score(writer.write({pool.task: pool}, now).requests))
        parts.append(logits[:, yes] - logits[:, no])
        if progress is not None:
            progress(begin + len(now), len(chosen))
    return np.concatenate(parts)


def other_tasks(dataset: Dataset, ranker: Ranker, counts: Knowledge) -> dict[str, dict[str, float]]:
    """Returns AUC, per-member AUC, log loss, NE and ECE of every task but labels on a fixed sample of its test groups.

    A group is one member's day. Tasks that the test window does not ask about are left out. `held_out` says that a task was never
    trained on, so that its numbers are zero-shot.
    """
    found = {}
    writer = GroupWriter(dataset, ranker.prompts, ranker.tasks, known_until(dataset, counts))
    asked = {name: task for name, task in ranker.tasks.items() if name != LABEL}
    until = known_until(dataset, "live")
    for name, pool in pools_of(dataset, asked, dataset.meta.cut_test, until, GroupSettings(least=1), 0).items():
        chosen = sampled(pool, TASK_CANDIDATES)
        kept = [pool.candidates(group) for _, group in chosen]
        if counts == "frozen":
            cut = dataset.meta.cut_test
            pool = replace(pool, moment=np.full(len(pool), cut), day=np.full(len(pool.day), cut // DAY))
        label = np.concatenate([pool.label[part] for part in kept]).astype(np.float64)
        member = np.concatenate([np.full(part.stop - part.start, pool.member[group]) for (_, group), part in zip(chosen, kept)])
        said = ranker.text_probabilities(text_logits(ranker, writer, pool, chosen), name).astype(np.float64)
        found[name] = {"held_out": asked[name].held_out, **task_metrics(label, said, member)}
    return found


def task_metrics(label: Floats, said: Floats, member: npt.NDArray[np.integer]) -> dict[str, float]:
    """Returns the numbers of one task; NaN where only one answer occurs."""
    within, _ = member_aucs(label, said, member)
    both = 0 < label.mean() < 1
    return {
        "candidates": float(len(label)),
        "positive_share": float(label.mean()),
        "auc": auc(label, said),
        "member_auc": float(within.mean()) if len(within) else float("nan"),
        "log_loss": log_loss(label, said),
        "normalized_entropy": normalized_entropy(label, said) if both else float("nan"),
        "calibration_error_debiased": debiased_calibration_error(label, said),
    }


def cosines(dataset: Dataset, pool: Pool, until: int, encoder: Encoder) -> Floats:
    """Returns float64 [n]: the first stage's cosine of a pool's candidates."""
    return FeatureRows(dataset, until, 0.5).cosines(pool, range(len(pool)), encoder)


def retrieval_alone(dataset: Dataset, cosine: Floats, encoder: Encoder, counts: Knowledge) -> Scored:
    """The first stage's cosines [E] as a ranking baseline: probabilities by Platt on the newest labels before the test cut.

    An encoder that was trained on those labels' days is sure of what it knows by heart, and too few of them fit nothing: then
    the baseline is an order only.
    """
    log = dataset.events
    event = np.flatnonzero((log.label >= 0) & (log.timestamp < dataset.meta.cut_test))[-SCALED_ON:]
    order = OrderOnly("Retrieval score", counts, np.clip((1 + cosine) / 2, 0, 1))
    if not len(event) or saw_past(encoder.facts.get("training", {}), dataset, int(log.timestamp[event[0]])):
        return order
    pool, back = moments(dataset, rows_of(dataset, event), "live")
    scale = fit(cosines(dataset, pool, dataset.meta.cut_test, encoder)[back], log.label[event])
    if scale.method == "identity":
        return order
    return Scored("Retrieval score", counts, scale.probabilities(cosine).astype(np.float64))


def known_until(dataset: Dataset, counts: Knowledge) -> int:
    """The time (seconds) from which on nothing is counted."""
    return int(dataset.events.timestamp.max()) + 1 if counts == "live" else dataset.meta.cut_test


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
