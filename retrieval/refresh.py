"""The night: items and the event log as of a time become a published snapshot, and members become records and vectors.

    items + counts as of now -> text -> changed only -> vectors -> index, catalogue, ranker tokens -> gates -> members -> pointer

No snapshot is visible before the pointer moves, and it moves last: a night that fails, or is killed, leaves yesterday's serving.
Members are visible at once, batch by batch, so that their vectors are there when the pointer moves. A record tells in ids what a
member did and belongs to no night: a server of any snapshot reads it through its own catalogue, leaves out every item of the
history that it holds, and has no words for one that it does not. A vector answers for its own encoder and record only; else the
server encodes the member. So when a night dies between members and pointer, yesterday's snapshot answers with what is known
today; running the night again completes it.

What was put in or withdrawn by day goes into the snapshot (`retrieval.taken_over`): a change since the data folder's own cut, the
last event that it holds, wins over the folder; of an earlier one the folder has had the chance to know, and it wins. The log is
shortened after publishing only, to what every kept snapshot has, so whichever is served finds in the log what it lacks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from index.build import Plan, build
from index.check import require_gates, run_gates
from index.codes import Codes
from index.drift import Drift, drift, drift_gate
from index.live import trim_folded
from index.publish import collect_garbage, publish
from index.shards import by_hash
from index.snapshot import Snapshot
from index.writer import SnapshotWriter
from retrieval.catalog import CATALOG_PART, TOKENS_PART, write_catalog, write_tokens
from retrieval.data.schema import Dataset
from retrieval.embed import Embedded, Progress, embed_changed
from retrieval.hybrid import FACT, HybridSettings
from retrieval.hysteresis import EMBEDDED_PART, EXACT, Hysteresis, write_embedded
from retrieval.lexical import LEXICAL_PART, write_lexical
from retrieval.live_catalog import ItemTokens
from retrieval.load_members import load_members, member_queries
from retrieval.members import MemberStore
from retrieval.moments import NightError, checked_words
from retrieval.night_clock import NightClock
from retrieval.popular import POPULAR_PART, write_popular
from retrieval.records import ItemWords
from retrieval.taken_over import CHANGES_PART, TakenOver, cut_of, ended, facts_of, take_over
from retrieval.tonight import Rows, Tonight
from retrieval.units import UnitReader
from retrieval.yesterday import Yesterday, alone, clear_pointers

if TYPE_CHECKING:
    from retrieval.encoder import Encoder

TOKEN_BATCH = 4_096
BY_SIZE = Plan()
KEPT = 7
"""Snapshots that are kept, the newest; and always the served one and the one before."""

Vectors = npt.NDArray[np.float32]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SnapshotForm:
    """What a night's snapshot keeps the items' vectors in, which changed numbers are worth a new one and, if `hybrid` is given,
    that it also holds a lexical index and a popularity list, to be merged so. `plan` is what index is built, of each of so many
    `shards` that the items are divided into; with one nothing is."""

    codes: Codes = "float32"
    hybrid: HybridSettings | None = None
    hysteresis: Hysteresis = EXACT
    plan: Plan = BY_SIZE
    shards: int = 1

    def divided(self, ids: Sequence[str]) -> Sequence[Rows]:
        """The rows of each shard, by the hash of the id; none if the snapshot is not to be divided."""
        return by_hash(ids, self.shards) if self.shards > 1 else ()


PLAIN = SnapshotForm()


@dataclass(frozen=True)
class NightReport:
    """What a night did. `embedded` items were encoded, the other `items` kept yesterday's vector; durations in s.
    `embedded_by` is "ray" or "this process": who encodes what changed, if anything did.

    Up to `live_position` of the log, `put` items and `withdrawn` ids won over the folder; `removed` old snapshots are gone.

    `predecessor` is the snapshot published before, "" if there was none, or "unreadable: " and why; `items_before` is its count,
    which the count gate compared with, None where there was nothing to compare with, and `shards_before` what it was divided in
    (1: not; 0: there was nothing). `hysteresis` is in buckets. Of the predecessor's best `overlap_k` items the share `overlap` is
    among tonight's (mean over some members), None without comparison.
    """

    snapshot: str
    published: bool
    predecessor: str
    items_before: int | None
    as_of: int
    items: int
    embedded: int
    embedded_by: str
    put: int
    withdrawn: int
    live_position: int
    removed: int
    members: int
    members_encoded: int
    dims: int
    codes: str
    hybrid: bool
    hysteresis: int
    encoder: str
    ranker: str
    index: str
    shards: int
    shards_before: int
    recall: float | None
    recall_k: int
    overlap: float | None
    overlap_p5: float | None
    overlap_k: int
    seconds: float
    seconds_embed: float
    seconds_index: float
    seconds_members: float


def nightly(
    dataset: Dataset,
    encoder: Encoder,
    ranker: ItemTokens | None,
    store_dir: Path,
    as_of: int,
    members: MemberStore | None = None,
    progress: Progress | None = None,
    form: SnapshotForm = PLAIN,
    *,
    keep: int = KEPT,
    least_overlap: float = 0.0,
    reader: UnitReader | None = None,
    clock: Callable[[], float] = time.time,
) -> NightReport:
    """The items as of a time (seconds) are searchable and served, and the members' records and vectors are in the store.

    Only items whose prompt changed since the published snapshot of the same encoder are encoded, and of changed numbers only by
    those that `form.hysteresis` does not let pass; a damaged snapshot is replaced; the `keep` newest snapshots stay. `clock`
    tells when the changes of the log were taken over. An overlap with the predecessor below `least_overlap` is a failed gate.
    Changed items are read by `reader`, which holds this encoder too (None: in this process); members are always read here.
    Raises BuildError for a plan that does not fit, NightError, StoreBusy while another night works on the store, GateFailed
    (nothing is published then), LogDamaged, and what the parts raise.
    """
    spent = NightClock()
    told = progress or _silent
    if members is not None and members.fingerprint != encoder.fingerprint:
        raise NightError(f"the member store is opened for encoder {members.fingerprint}, tonight's is {encoder.fingerprint}")
    checked_words(as_of)
    with alone(store_dir):
        yesterday = Yesterday.open(store_dir, as_of, encoder.fingerprint, encoder.dims)
        taken = take_over(store_dir, yesterday, as_of, cut_of(dataset, as_of), clock)
        changed, put, gone = taken.over(dataset)
        tonight = Tonight.of(changed, as_of, put, gone)
        form.plan.require(len(tonight.items) // form.shards, encoder.dims)
        with spent("embed"):
            made = taken.made(encoder.fingerprint)
            embedded = embed_changed(tonight, encoder, yesterday.opened, told, form.codes, made, form.hysteresis, reader)
        words = ItemWords(tonight.items)
        queries = member_queries(dataset, words, encoder, as_of)
        with spent("index"):
            snapshot = _write(tonight, embedded, taken, encoder, ranker, store_dir, yesterday.parent, queries, told, form)
            gates = run_gates(snapshot, yesterday.snapshot, queries=queries)
            moved = drift(yesterday.snapshot, snapshot, queries) if all(gate.passed for gate in gates) else None
            require_gates([*gates, *drift_gate(moved, least_overlap)])
        loaded = (0, 0)
        if members is not None:
            with spent("members"):
                loaded = load_members(dataset, words, encoder, members, as_of, told)
        clear_pointers(store_dir)
        publish(store_dir, snapshot.name)
        removed = len(collect_garbage(store_dir, keep, own_night=True))
        trim_folded(store_dir)
        ended(store_dir)
    judge = "" if ranker is None else ranker.fingerprint
    return _report(snapshot, yesterday, embedded, taken, removed, loaded, judge, form.hysteresis, moved, spent)


def _report(
    snapshot: Snapshot,
    yesterday: Yesterday,
    embedded: Embedded,
    taken: TakenOver,
    removed: int,
    loaded: tuple[int, int],
    ranker: str,
    hysteresis: Hysteresis,
    moved: Drift | None,
    clock: NightClock,
) -> NightReport:
    facts = snapshot.manifest
    return NightReport(
        snapshot=snapshot.name,
        published=yesterday.snapshot is None or yesterday.name != snapshot.name,
        predecessor=yesterday.told,
        items_before=None if yesterday.snapshot is None else yesterday.snapshot.manifest.count,
        as_of=facts.as_of,
        items=facts.count,
        embedded=embedded.count,
        embedded_by=embedded.where,
        put=len(taken.folded.upserts),
        withdrawn=len(taken.folded.withdrawn),
        live_position=taken.folded.position,
        removed=removed,
        members=loaded[0],
        members_encoded=loaded[1],
        dims=facts.dims,
        codes=facts.dtype,
        hybrid=FACT in facts.extra,
        hysteresis=hysteresis.buckets,
        encoder=facts.fingerprint,
        ranker=ranker,
        index=facts.recipe,
        shards=len(snapshot.shards),
        shards_before=0 if yesterday.snapshot is None else len(yesterday.snapshot.shards),
        recall=None if facts.recall is None else facts.recall.mean,
        recall_k=0 if facts.recall is None else facts.recall.k,
        overlap=None if moved is None else moved.mean,
        overlap_p5=None if moved is None else moved.p5,
        overlap_k=0 if moved is None else moved.k,
        seconds=round(clock.total(), 3),
        seconds_embed=round(clock.spent["embed"], 3),
        seconds_index=round(clock.spent["index"], 3),
        seconds_members=round(clock.spent["members"], 3),
    )


def _write(
    tonight: Tonight,
    embedded: Embedded,
    taken: TakenOver,
    encoder: Encoder,
    ranker: ItemTokens | None,
    store_dir: Path,
    parent: str,
    queries: Vectors | None,
    told: Progress,
    form: SnapshotForm,
) -> Snapshot:
    plan, shards = form.plan, form.divided(tonight.items.item_id)
    built = build(
        embedded.vectors,
        recipe=plan.recipe,
        codes=form.codes,
        seed=plan.seed,
        k=plan.k,
        target=plan.target,
        queries=queries,
        shards=shards,
        progress=lambda done, of: told("index", done, of),
    )
    facts = facts_of(taken)
    told_of = facts | form.hysteresis.facts()
    with SnapshotWriter(store_dir, fingerprint=encoder.fingerprint, as_of=tonight.as_of, parent=parent, extra=told_of) as writer:
        writer.vectors(embedded.vectors, form.codes, shards)
        writer.ids(tonight.items.item_id)
        writer.indexes(built.indexes, recipe=str(built.recipe), facts=built.facts | plan.facts(), recall=built.recall)
        writer.part(CATALOG_PART, write_catalog(tonight.items, tonight.numbers, embedded.digests, tonight.as_of))
        if form.hysteresis != EXACT:
            writer.part(EMBEDDED_PART, write_embedded(embedded.numbers))
        if form.hybrid is not None:
            writer.extra[FACT] = form.hybrid.fact()
            writer.part(LEXICAL_PART, write_lexical(tonight.items))
            writer.part(POPULAR_PART, write_popular(tonight.numbers))
        if facts:
            writer.part(CHANGES_PART, taken.to_bytes())
        if ranker is not None:
            writer.part(TOKENS_PART, write_tokens(_tokens(tonight, ranker, told), ranker.fingerprint))
    return Snapshot.open(writer.path, verify=False)


def _tokens(tonight: Tonight, ranker: ItemTokens, told: Progress) -> list[list[int]]:
    records, found = tonight.records(), []
    for start in range(0, len(records), TOKEN_BATCH):
        some = slice(start, start + TOKEN_BATCH)
        found += ranker.item_tokens(records[some], {name: column[some] for name, column in tonight.numbers.items()})
        told("ranker tokens", len(found), len(records))
    return found


def _silent(stage: str, done: int, of: int) -> None:
    del stage, done, of
