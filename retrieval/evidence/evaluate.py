"""A model given as vectors, judged beside the simple baselines on the same questions.

"live": the item vectors are rebuilt at the start of each query's day, as a nightly job does. "frozen": one set of item
vectors, as of the cut. The member is always read as of the query. Candidates are the whole catalogue minus the history,
searched exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from retrieval.data.schema import Dataset
from retrieval.evidence.baselines import Baseline, Knowledge, Oracle, Past, Random, Truth
from retrieval.evidence.forms import Form, VectorModel, rank_forms
from retrieval.evidence.intervals import Estimate, paired_differences
from retrieval.evidence.metrics import Quality, judge
from retrieval.evidence.protocol import EvidenceError, Queries, Window, cold_items, last_after_cut
from retrieval.evidence.rank import Progress, Ranked, rank_queries
from retrieval.evidence.similarity import Probe, Similarity


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
    baseline -> why it does not stand in the table though it does by default. `apart` are the same reports about the model's other
    forms (hybrid, shorter and coarser vectors), each with the model among its baselines; here they stand beside, never for it.
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
    apart: Sequence[RetrievalReport] = ()

    def about(self, name: str, setting: str, ranked: Ranked, items: int) -> RetrievalReport:
        """Returns the same report about a system that made these lists of `items` candidates."""
        run = Run(name, self.counts, setting, judge(ranked, self.queries, items))
        return replace(self, model=run, ranked=ranked, differences={one.name: differences(run, one) for one in self.baselines})

    def as_dict(self) -> dict[str, object]:
        """The report ready for JSON: everything but the lists."""
        return {
            "dataset": self.dataset,
            "counts": self.counts,
            **self.facts,
            "model": None if self.model is None else self.model.as_dict(),
            "baselines": [run.as_dict() for run in self.baselines],
            "best_baseline": dict(self.best),
            "model_minus_baseline": {name: self.minus(name) for name in self.differences},
            "similarity_against_popularity": None if self.similarity is None else self.similarity.as_dict(),
            "baselines_left_out": dict(self.left_out),
            "apart": [{**form.own.as_dict(), "minus_model": form.minus(self.own.name)} for form in self.apart],
        }

    @property
    def own(self) -> Run:
        """The model's run. Raises EvidenceError for a report about baselines only."""
        if self.model is None:
            raise EvidenceError("This report is about baselines only; it has no model.")
        return self.model

    def minus(self, other: str) -> dict[str, object]:
        """Returns the model minus another system of the report, ready for JSON."""
        return {metric: estimate.as_dict() for metric, estimate in self.differences[other].items()}


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
    forms: Sequence[Form] = (),
) -> RetrievalReport:
    """Returns the model (if any) beside the baselines and, where the truth is known, the oracle.

    `baselines` are ready settings (`choice.choose_baselines`), `left_out` (of the same choice) is only told, `forms` are judged
    apart.
    Raises EvidenceError if the window asks nothing or there is nothing to judge.
    """
    queries = last_after_cut(dataset, window)
    asked = [*baselines, *([] if truth is None else [Oracle(truth)])]
    if model is None and not asked:
        raise EvidenceError("There is nothing to judge: no model, and every baseline is left out. Add one with --with NAME.")
    total = (len(asked) + (model is not None) * (1 + len(forms))) * len(queries)
    runs = run_baselines(dataset, queries, asked, _part_of(progress, 0, total))
    plain = RetrievalReport(
        dataset=dataset.meta.name,
        queries=queries,
        facts=window_facts(queries, len(dataset.items)),
        counts=counts,
        model=None,
        baselines=runs,
        best=best_baselines(runs, counts),
        differences={},
        ranked=None,
        left_out=left_out or {},
    )
    if model is None:
        return plain
    tell = _part_of(progress, len(asked) * len(queries), total)
    probe = Probe(len(queries), len(dataset.items))
    ranked, *others = rank_forms(dataset, queries, model, counts, forms, progress=tell, probe=probe)
    items = len(dataset.items)
    ours = replace(plain.about(model.name, f"{counts} counts", ranked, items), similarity=probe.found())
    beside = replace(plain, baselines=[ours.own, *runs])
    told = zip(forms, others, strict=True)
    return replace(ours, apart=[beside.about(form.name, form.setting, lists, items) for form, lists in told])


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
