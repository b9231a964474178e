"""Both stages end to end: what the first one finds for a member of the test window, and what the ranker makes of its order.

Every query of the retrieval evaluation ("last after the cut", the whole catalogue minus the history) is answered as a service of
that night would answer `Recommend`: 2,000 candidates by the night's item vectors, scored with the night's item numbers, put in
order by the pipeline's own function. Both orders hold the same candidates, so every difference between them is the ranker's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from index.ids import Ids
from ranking.fusion_features import asked_of
from ranking.pipeline import FANOUT, order
from ranking.prompts import relations_of
from ranking.ranker import Ranker
from ranking.tasks import task_named
from ranking.wishes import Final
from retrieval.catalog import Catalog, Columns, write_catalog
from retrieval.counts import Counts
from retrieval.data.schema import Dataset
from retrieval.encoder import Encoder
from retrieval.evidence.baselines import Knowledge
from retrieval.evidence.encoded import EncoderModel
from retrieval.evidence.evaluate import RetrievalReport, Run, differences, window_facts
from retrieval.evidence.forms import Form, HybridForm, Sight, form_folder, rank_forms
from retrieval.evidence.intervals import Estimate, Values, paired_differences
from retrieval.evidence.metrics import judge, slice_masks
from retrieval.evidence.protocol import Queries, cold_members, last_after_cut
from retrieval.evidence.rank import Progress, Ranked, write_ranked
from retrieval.evidence.saved import RANKED_FILE, write_report
from retrieval.hybrid import HybridSettings
from retrieval.pooled_rate import POOLED, PooledRates
from retrieval.retrieve import Candidates

FOUND, RANKED = "Retrieval order", "Ranked"
HYBRID_FOUND, HYBRID_RANKED = "Hybrid, retrieval order", "Hybrid, ranked"
COLD_SLICE = "cold targets"
QUESTION = "both stages end to end: the same candidates as they were found, and as the ranker orders them"


@dataclass(frozen=True)
class ServedReport(RetrievalReport):
    """The ranker's order as the model beside the order in which its candidates were found, the first of the baselines.

    `retrieved` are those lists; `leads_by_slice` slice -> metric -> ranked minus retrieved, paired over the slice's members.
    """

    retrieved: Ranked | None = None
    leads_by_slice: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """The report ready for JSON: everything but the lists."""
        leads = {name: {metric: lead.as_dict() for metric, lead in found.items()} for name, found in self.leads_by_slice.items()}
        return {**super().as_dict(), "ranked_minus_retrieval_by_slice": leads}


class RankedForm:
    """The lists of a first stage (the model's own, or another form's) in the order of a ranker, as they are served.

    `frozen`: item numbers know nothing at or after the test cut. Raises TaskError for a task that the ranker does not know.
    """

    def __init__(
        self,
        dataset: Dataset,
        ranker: Ranker,
        counts: Knowledge,
        task: str = "",
        first: Form | None = None,
        answered: Callable[[], None] = lambda: None,
    ) -> None:
        """`first` makes the lists (None: the model's own are ordered), `answered` is called after each member."""
        self.name = RANKED if first is None else HYBRID_RANKED
        self._dataset, self._ranker, self._first, self._answered = dataset, ranker, first, answered
        self._task = task_named(ranker.tasks, task).name
        before = dataset.meta.cut_test if counts == "frozen" else None
        self._counts, self._pooled = Counts.from_dataset(dataset, before), PooledRates.from_dataset(dataset, before)
        self._bodies = ranker.prompts.bodies([dataset.items[row] for row in range(len(dataset.items))])

    @property
    def setting(self) -> str:
        head = "with its head" if self._ranker.fuses(self._task) else "words alone"
        return f"task {self._task}, {head}, up to {FANOUT:,} candidates"

    def lists(self, sight: Sight) -> Ranked:
        """The first stage's lists by falling probability, which stands in `scores`."""
        plain = sight.plain if self._first is None else self._first.lists(sight)
        numbers = {**self._counts.as_of(sight.moment), POOLED: self._pooled.as_of(sight.moment)}
        night = night_catalog(self._dataset, numbers, sight.moment) if self._ranker.fuses(self._task) else None
        found = Ranked(np.full_like(plain.rows, -1), np.full_like(plain.scores, -np.inf))
        for at in range(len(sight.views)):
            rows = plain.rows[at][plain.rows[at] >= 0].astype(np.int64)[:FANOUT]
            said = self._probabilities(sight, at, rows, numbers, night)
            ids = [self._dataset.items.item_id[row] for row in rows.tolist()]
            best = order(Candidates(ids, rows, plain.scores[at][: len(rows)]), {self._task: said}, Final(said, said), len(rows))
            found.rows[at, : len(rows)], found.scores[at, : len(rows)] = best.rows, best.probabilities
            self._answered()
        return found

    def _probabilities(
        self, sight: Sight, at: int, rows: npt.NDArray[np.int64], numbers: Mapping[str, Values], night: Catalog | None
    ) -> npt.NDArray[np.float32]:
        """The probabilities float32 [C] of the items at `rows` before one member, as `Recommender.score` gives them."""
        if not len(rows):
            return np.zeros(0, np.float32)
        ranker, view, items = self._ranker, sight.views[at], self._dataset.items
        known = {name: column[rows] for name, column in {**items.numbers, **numbers}.items()}
        tokens = ranker.prompts.with_numbers([self._bodies[row] for row in rows.tolist()], known)
        creators = [items.creator[row] for row in rows.tolist()]
        relations = relations_of(view.connections, creators) if view.connections else None
        asked = None
        if night is not None and ranker.head is not None:
            cosine = np.asarray(sight.items[rows] @ sight.members[at], np.float64) if ranker.head.reads_cosine else None
            asked = asked_of(view, night, rows, ranker.head.static, cosine)
        return ranker.score(view, tokens, self._task, relations, asked)


def night_catalog(dataset: Dataset, numbers: Mapping[str, Values], as_of: int) -> Catalog:
    """The catalogue that a night of that moment would have written over all items of a folder, kept in memory, without tokens."""
    ids = dataset.items.item_id
    written = write_catalog(dataset.items, numbers, [""] * len(ids), as_of)
    return Catalog(Columns(Ids.of(ids), pa.ipc.open_file(pa.BufferReader(written)).get_batch(0), None))


def evaluate_served(
    dataset: Dataset,
    encoder: Encoder,
    ranker: Ranker,
    counts: Knowledge,
    task: str = "",
    hybrid: HybridSettings | None = None,
    sample: int | None = None,
    progress: Progress | None = None,
) -> ServedReport:
    """Returns the ranker's order beside the order of retrieval over the test queries; with `hybrid` the same about the hybrid
    first stage, under `apart`.

    `sample` asks only so many members, evenly spaced in time; the facts say so. Raises EvidenceError if the window asks nothing,
    TaskError for an unknown task, HybridError.
    """
    every, cut, items = last_after_cut(dataset), dataset.meta.cut_test, len(dataset.items)
    queries = every if sample is None else every.sample(sample)
    tell = _counted(progress, len(queries) * (1 if hybrid is None else 2))
    forms: list[Form] = [RankedForm(dataset, ranker, counts, task, None, tell)]
    if hybrid is not None:
        found = HybridForm(dataset, counts, cut, hybrid)
        forms += [found, RankedForm(dataset, ranker, counts, task, found, tell)]
    lists = rank_forms(dataset, queries, EncoderModel(encoder, dataset, counts, cut), counts, forms)
    names = [FOUND, RANKED, HYBRID_FOUND, HYBRID_RANKED]
    settings = ["the encoder's cosine", *(form.setting for form in forms)]
    runs = [Run(name, counts, told, judge(one, queries, items)) for name, told, one in zip(names, settings, lists)]
    facts = {"question": QUESTION, **window_facts(queries, items)}
    facts |= {"members_in_window": len(every), "sampled": len(queries) < len(every)}
    nothing = ServedReport(dataset.meta.name, queries, facts, counts, None, (), {}, {}, None)
    report = _beside(nothing, runs[1], runs[:1], lists[1], lists[0])
    if hybrid is None:
        return report
    return replace(report, apart=[_beside(nothing, runs[3], [runs[2], runs[1]], lists[3], lists[2])])


def _counted(progress: Progress | None, total: int) -> Callable[[], None]:
    """What several forms call after each list that they made, as one progress."""
    done = count(1)

    def tell() -> None:
        if progress is not None:
            progress(next(done), total)

    return tell


def _beside(nothing: ServedReport, ours: Run, others: Sequence[Run], ranked: Ranked, retrieved: Ranked) -> ServedReport:
    """The report about a ranker's lists; the first of the others are the lists that it was given."""
    return replace(
        nothing,
        model=ours,
        baselines=others,
        best=dict.fromkeys(ours.quality.metrics, others[0].name),
        differences={one.name: differences(ours, one) for one in others},
        ranked=ranked,
        retrieved=retrieved,
        leads_by_slice=slice_leads(ours, others[0], nothing.queries),
    )


def slice_leads(ours: Run, theirs: Run, queries: Queries) -> dict[str, dict[str, Estimate]]:
    """Returns slice -> metric -> our mean minus theirs, paired over the slice's members; empty slices are left out.

    "cold targets" counts the members who have one, once each.
    """
    masks = {name: mask for name, mask in slice_masks(queries.excluded.lengths, cold_members(queries)).items() if mask.any()}
    one, other = ours.quality, theirs.quality
    found = {name: paired_differences(_of(one.per_query, mask), _of(other.per_query, mask)) for name, mask in masks.items()}
    asked = ~np.isnan(next(iter(one.cold.values()), np.full(len(queries), np.nan)))
    if asked.any():
        found[COLD_SLICE] = paired_differences(_of(one.cold, asked), _of(other.cold, asked))
    return found


def _of(columns: Mapping[str, Values], mask: npt.NDArray[np.bool_]) -> dict[str, Values]:
    return {name: values[mask] for name, values in columns.items()}


def write_served(report: ServedReport, dataset: Dataset, folder: Path, command: str = "") -> None:
    """Writes what `retrieval.evidence.saved.write_report` writes, and into ranked.parquet both orders.

    `item_ids`, `scores` (probabilities) are the ranker's, `retrieved_ids`, `retrieved_scores` the first stage's. The hybrid's
    files stand in a folder of their own. Whenever it is killed, `item_ids` are the ranker's or not there.
    """
    write_report(report, dataset, folder, command)
    if report.retrieved is not None:
        path = folder / RANKED_FILE
        beside = path.with_suffix(".tmp")
        ours = pq.read_table(path)
        write_ranked(beside, report.retrieved, report.queries, dataset.members, dataset.items)
        theirs = pq.read_table(beside)
        for name in ("item_ids", "scores"):
            ours = ours.append_column(f"retrieved_{name.removeprefix('item_')}", theirs[name])
        pq.write_table(ours, beside)
        beside.replace(path)
    for form in report.apart:
        if isinstance(form, ServedReport):
            write_served(form, dataset, folder / form_folder(form.own.name), command)
