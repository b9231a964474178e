"""How late fusion is trained: the blend on answers that neither the text model nor the trees have seen, the trees again on all.

The validation run scores the window between the cuts; trees that end where that run ended score it too; the blend joins the
two. The refit gets trees of everything before the test cut, and a scale for its own logits from members held back in the
newest days: a training of another length has logits of another scale. So has its encoder's cosine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ranking.calibrate import ENOUGH, Calibrator
from ranking.fusion import Blend, Head, centre_of, fit_blend
from ranking.fusion_features import feature_names
from ranking.fusion_rows import FeatureRows, base_rate, training_pool
from ranking.learn.examples import Pool
from ranking.learn.positions import Answers, Positions, at_mean_place_alone
from ranking.tasks import LABEL
from ranking.trees import Boosting, Trees, grow
from retrieval.data.schema import Dataset

NO_HEAD_NOTE = "too few labels before and between the cuts for late fusion: the ranker is the text model alone"


def blend_facts(
    dataset: Dataset,
    pool: Pool,
    groups: Sequence[int],
    text: npt.NDArray[np.floating],
    label: Answers,
    calibrator: Calibrator,
    encoder: Path | None,
    seed: int,
    positions: Positions | None = None,
) -> Mapping[str, object] | None:
    """The blend for scores [n] of the text model on groups of the validation window, as facts; None without enough labels.

    `encoder` saw nothing of that window, nor did `calibrator` need more than these scores. Where there are `positions`, labels
    are those expected at the mean place (`ranking.learn.positions` says why).
    """
    if min(label.sum(), len(label) - label.sum()) < ENOUGH:
        return None
    cut = dataset.meta.cut_valid
    base = base_rate(dataset, cut)
    trees = trees_before(dataset, cut, base, seed, positions)
    if trees is None:
        return None
    rows = FeatureRows(dataset, dataset.meta.cut_test, base)
    cosine = None if encoder is None else _cosines(rows, pool, groups, encoder)
    found = rows.of(pool, groups, cosine)
    scale = calibrator.a * np.asarray(text, np.float64) + calibrator.b
    return fit_blend(scale, trees.logits(found), found, feature_names(rows.static), base, label).facts()


def head_of(
    dataset: Dataset,
    blend: Mapping[str, object],
    pool: Pool,
    groups: Sequence[int],
    calibrator: Calibrator,
    encoder: Path | None,
    seed: int,
    positions: Positions | None = None,
) -> Head:
    """The head to serve: trees of everything before the test cut under the blend. Raises FusionError.

    The blend's cosine is standardised anew for `encoder`, the one that serves, on the groups that the blend was fitted on:
    its weight was learned in spreads of another encoder's cosines, and no label is needed to find these.
    """
    cut = dataset.meta.cut_test
    base = base_rate(dataset, cut)
    trees = trees_before(dataset, cut, base, seed, positions) or Trees.nothing(base)
    head = Head(tuple(dataset.items.numbers), base, trees, calibrator, Blend.from_facts(blend))
    if encoder is None or not head.reads_cosine:
        return head
    centre, spread = centre_of(_cosines(FeatureRows(dataset, cut, base), pool, groups, encoder))
    return replace(head, blend=replace(head.blend, centre=centre, spread=spread))


def _cosines(rows: FeatureRows, pool: Pool, groups: Sequence[int], encoder: Path) -> npt.NDArray[np.float64]:
    from retrieval.encoder import Encoder

    return rows.cosines(pool, groups, Encoder.load(encoder))


def trees_before(dataset: Dataset, cut: int, base: float, seed: int, positions: Positions | None = None) -> Trees | None:
    """Trees of the labelled events before a time (seconds), each as it was known then; None without enough labels."""
    settings = Boosting()
    pool = training_pool(dataset, cut, settings.most, seed)
    if min(pool.label.sum(dtype=int), len(pool.label) - pool.label.sum(dtype=int)) < ENOUGH:
        return None
    rows = FeatureRows(dataset, cut, base).of(pool, range(len(pool)))
    label = pool.label.astype(np.float64)
    if positions is not None:
        label = at_mean_place_alone(pool.label, base, positions.shifts(LABEL, pool.event))
    return grow(rows, label, settings, seed)
