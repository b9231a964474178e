"""A model given as vectors, judged beside the simple baselines on the same questions.

"live": the item vectors are rebuilt at the start of each query's day, as a nightly job does. "frozen": one set of item
vectors, as of the cut. The member is always read as of the query. Candidates are the whole catalogue minus the history,
searched exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from retrieval import records
from retrieval.data.schema import DAY, Dataset, MemberView
from retrieval.evidence.baselines import Baseline, Knowledge, Oracle, Past, Random, Truth
from retrieval.evidence.intervals import Estimate, paired_differences
from retrieval.evidence.metrics import Quality, judge
from retrieval.evidence.protocol import EvidenceError, Queries, Window, cold_items, last_after_cut, member_views
from retrieval.evidence.rank import DEPTH, Floats, Progress, Ranked, Scorer, rank_queries
from retrieval.evidence.similarity import Probe, Similarity


class VectorModel(Protocol):
    """A model whose score is the inner product of a member's and an item's vector."""

    @property
    def name(self) -> str: ...
    def item_vectors(self, day_start: int) -> Floats:
        """Float32 [N, D] of the whole catalogue with what was known at that second (the start of a day, or the cut)."""
        ...

    def member_vectors(self, views: Sequence[MemberView]) -> Floats:
        """Float32 [B, D] of members as of their queries."""
        ...


@dataclass(frozen=True)
class Run:
    """One system's result; `setting` is what was chosen on the validation window."""

    name: str
    knowledge: Knowledge
    setting: str
    quality: Quality

    def as_dict(self) -> dict[str, object]:
        """The run ready for JSON."""
        return {"name": self.name, "counts": self.knowledge, "setting": self.setting, **self.quality.as_dict()}


@dataclass(frozen=True)
class RetrievalReport:
    """All runs on one window. `model` is None when only baselines were asked for; `ranked` are the model's lists.

    `best` names, for each metric, the simple baseline to beat: the highest on these very queries among those that know no
    more than the model does. `differences` baseline -> metric -> model minus baseline, paired over members. `left_out`
    baseline -> why it does not stand in the table though it does by default.
    """

    dataset: str
    queries: Queries
    facts: Mapping[str, object]
    counts: Knowledge
    model: Run | None
    baselines: Sequence[Run]
    best: Mapping[str, str]
    differences: Mapping[str, Mapping[str, Estimate]]
    ranked: Ranked | None
    similarity: Similarity | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """The report ready for JSON: everything but the lists."""
        differences = {
            name: {metric: estimate.as_dict() for metric, estimate in of_metric.items()}
            for name, of_metric in self.differences.items()
        }
        return {
            "dataset": self.dataset,
            "counts": self.counts,
            **self.facts,
            "model": None if self.model is None else self.model.as_dict(),
            "baselines": [run.as_dict() for run in self.baselines],
            "best_baseline": dict(self.best),
            "model_minus_baseline": differences,
            "similarity_against_popularity": None if self.similarity is None else self.similarity.as_dict(),
            "baselines_left_out": dict(self.left_out),
        }


def vector_scorer(dataset: Dataset, model: VectorModel, counts: Knowledge, cut: int, probe: Probe | None = None) -> Scorer:
    """Returns a scorer of query blocks. Item vectors are asked for once per day while the queries come in day order."""
    kept: dict[int, Floats] = {}

    def items_as_of(moment: int) -> Floats:
        if moment not in kept:
            kept.clear()
            kept[moment] = _checked(model.item_vectors(moment), len(dataset.items), model.name)
        return kept[moment]

    def score(queries: Queries) -> Floats:
        views = member_views(dataset, queries, newest=records.NEWEST)
        members = _checked(model.member_vectors(views), len(queries), model.name)
        scores = np.empty((len(queries), len(dataset.items)), np.float32)
        moments = queries.day * DAY if counts == "live" else np.full(len(queries), cut)
        for moment in np.unique(moments).tolist():
            rows = np.flatnonzero(moments == moment)
            scores[rows] = members[rows] @ items_as_of(moment).T
            if probe is not None:
                probe.see(queries.take(rows), members[rows], items_as_of(moment), moment)
        return scores

    return score


def _checked(vectors: Floats, expected: int, name: str) -> Floats:
    if vectors.ndim != 2 or len(vectors) != expected or not np.isfinite(vectors).all():
        raise EvidenceError(f"{name} returned vectors {vectors.shape}, expected {expected} rows of finite numbers.")
    return vectors


def rank_with_vectors(
    dataset: Dataset,
    queries: Queries,
    model: VectorModel,
    counts: Knowledge,
    depth: int = DEPTH,
    progress: Progress | None = None,
    probe: Probe | None = None,
) -> Ranked:
    """Returns the model's lists in query order; the work is done in day order, so each night's vectors are built once.

    `probe` looks at the vectors on the way.
    """
    order = np.argsort(queries.timestamp, kind="stable")
    scorer = vector_scorer(dataset, model, counts, queries.cut, probe)
    ranked = rank_queries(queries.take(order), scorer, len(dataset.items), depth, progress)
    back = np.argsort(order)
    return Ranked(ranked.rows[back], ranked.scores[back])


def run_baselines(
    dataset: Dataset, queries: Queries, baselines: Sequence[Baseline], progress: Progress | None = None
) -> list[Run]:
    """Returns the result of each baseline, fitted on everything before the window's cut."""
    past = Past(dataset, queries.window)
    runs = []
    total = len(baselines) * len(queries)
    for done, baseline in enumerate(baselines):
        tell = _part_of(progress, done * len(queries), total)
        ranked = rank_queries(queries, baseline.fit(past), len(dataset.items), progress=tell)
        quality = judge(ranked, queries, len(dataset.items))
        runs.append(Run(baseline.name, baseline.knowledge, baseline.setting, quality))
    return runs


def _part_of(progress: Progress | None, begin: int, total: int) -> Progress | None:
    """Progress of one stretch of queries within all lists to make."""
    return None if progress is None else lambda done, _total: progress(begin + done, total)


def evaluate_retrieval(
    dataset: Dataset,
    model: VectorModel | None,
    counts: Knowledge,
    baselines: Sequence[Baseline],
    truth: Truth | None = None,
    window: Window = "test",
    progress: Progress | None = None,
    left_out: Mapping[str, str] | None = None,
) -> RetrievalReport:
    """Returns the model (if any) beside the baselines and, where the truth is known, the oracle.

    `baselines` are ready settings (`choice.choose_baselines`), `left_out` (of the same choice) is only told.
    Raises EvidenceError if the window asks nothing or there is nothing to judge.
    """
    queries = last_after_cut(dataset, window)
    asked = [*baselines, *([] if truth is None else [Oracle(truth)])]
    if model is None and not asked:
        raise EvidenceError("There is nothing to judge: no model, and every baseline is left out. Add one with --with NAME.")
    total = (len(asked) + (model is not None)) * len(queries)
    runs = run_baselines(dataset, queries, asked, _part_of(progress, 0, total))
    ours = ranked = None
    probe = Probe(len(queries), len(dataset.items))
    if model is not None:
        tell = _part_of(progress, len(asked) * len(queries), total)
        ranked = rank_with_vectors(dataset, queries, model, counts, progress=tell, probe=probe)
        ours = Run(model.name, counts, f"{counts} counts", judge(ranked, queries, len(dataset.items)))
    return RetrievalReport(
        dataset=dataset.meta.name,
        queries=queries,
        facts=window_facts(queries, len(dataset.items)),
        counts=counts,
        model=ours,
        baselines=runs,
        best=best_baselines(runs, counts),
        differences={} if ours is None else {run.name: differences(ours, run) for run in runs},
        ranked=ranked,
        similarity=None if ours is None else probe.found(),
        left_out=left_out or {},
    )


def window_facts(queries: Queries, items: int) -> dict[str, object]:
    """Returns the size of the question: who is asked, who is left out, what is cold."""
    cold = cold_items(queries, items)
    return {
        "window": queries.window,
        "cut": queries.cut,
        "members": len(queries),
        "members_left_out_without_history": queries.left_out,
        "targets": len(queries.targets.values),
        "cold_target_share": float(cold[queries.targets.values].mean()),
        "candidates": items,
        "items_with_events_before_cut": int((~cold).sum()),
    }


def best_baselines(runs: Sequence[Run], counts: Knowledge) -> dict[str, str]:
    """Returns metric -> name of the best simple baseline that knows no more than `counts` allows (no chance, no oracle)."""
    fair = [run for run in runs if run.name not in (Random.name, Oracle.name)]
    fair = [run for run in fair if counts == "live" or run.knowledge == "frozen"]
    if not fair:
        return {}
    metrics = fair[0].quality.metrics
    return {metric: max(fair, key=lambda run: run.quality.metrics[metric].value).name for metric in metrics}


def differences(ours: Run, theirs: Run) -> dict[str, Estimate]:
    """Returns metric -> our mean minus theirs with its paired interval over members."""
    return paired_differences(ours.quality.per_query, theirs.quality.per_query)
