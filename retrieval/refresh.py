"""The night: items and the event log as of a time become a published snapshot, and members become records and vectors.

    items + counts as of now -> text -> changed only -> vectors -> index, catalogue, ranker tokens -> gates -> members -> pointer

No snapshot is visible before the pointer moves, and it moves last: a night that fails, or is killed, leaves yesterday's serving.
Members are visible at once, batch by batch, so that their vectors are there when the pointer moves. A record tells in ids what a
member did and belongs to no night: a server of any snapshot reads it through its own catalogue, leaves out every item of the
history that it holds, and has no words for one that it does not. A vector answers for its own encoder and record only; else the
server encodes the member. So when a night dies between members and pointer, yesterday's snapshot answers with what is known
today; running the night again completes it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from index.build import build
from index.check import require_gates, run_gates
from index.publish import publish
from index.snapshot import Snapshot
from index.writer import SnapshotWriter
from retrieval.catalog import CATALOG_PART, TOKENS_PART, write_catalog, write_tokens
from retrieval.data.schema import Dataset, Item
from retrieval.members import MemberStore
from retrieval.moments import NightError
from retrieval.records import ItemWords, MemberRecord, records_of, view_digest, view_of
from retrieval.tonight import Tonight
from retrieval.yesterday import Opened, Yesterday, alone, clear_pointers

if TYPE_CHECKING:
    from retrieval.encoder import Encoder

MEMBER_BATCH = 256
TOKEN_BATCH = 4_096
GATE_QUERIES = 128

Vectors = npt.NDArray[np.float32]
Progress = Callable[[str, int, int], None]
"""(what is being done, done so far, of how many)"""

log = logging.getLogger(__name__)


class ItemTokens(Protocol):
    """What the night needs of a ranker: the token ids of an item, and whose they are."""

    @property
    def fingerprint(self) -> str:
        """The ranker's fingerprint."""

    def item_tokens(self, items: Sequence[Item], numbers: Mapping[str, np.ndarray]) -> list[list[int]]:
        """The token ids of N items with as-of numbers name -> float [N]."""


@dataclass(frozen=True)
class NightReport:
    """What a night did. `embedded` items were encoded, the other `items` kept yesterday's vector; durations in seconds.

    `predecessor` is the snapshot published before, "" if there was none, or "unreadable: " and why; `items_before` is its count,
    which the count gate compared with, None where there was nothing to compare with.
    """

    snapshot: str
    published: bool
    predecessor: str
    items_before: int | None
    as_of: int
    items: int
    embedded: int
    members: int
    members_encoded: int
    encoder: str
    ranker: str
    index: str
    recall: float | None
    recall_k: int
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
) -> NightReport:
    """The items as of a time (seconds) are searchable and served, and the members' records and vectors are in the store.

    Only items whose prompt changed since the published snapshot of the same encoder are encoded; a damaged snapshot is replaced.
    Raises NightError, StoreBusy while another night works on the store, GateFailed (nothing is published then), and what the
    parts raise.
    """
    clock = _Clock()
    told = progress or _silent
    if members is not None and members.fingerprint != encoder.fingerprint:
        raise NightError(f"the member store is opened for encoder {members.fingerprint}, tonight's is {encoder.fingerprint}")
    tonight = Tonight.of(dataset, as_of)
    with alone(store_dir):
        yesterday = Yesterday.open(store_dir, as_of, encoder.fingerprint, encoder.dims)
        with clock("embed"):
            embedded = embed_changed(tonight, encoder, yesterday.opened, told)
        queries = _member_queries(dataset, encoder, as_of)
        with clock("index"):
            snapshot = _write(tonight, embedded, encoder, ranker, store_dir, yesterday.parent, queries, told)
            require_gates(run_gates(snapshot, yesterday.snapshot, queries=queries))
        loaded = (0, 0)
        if members is not None:
            with clock("members"):
                loaded = load_members(dataset, encoder, members, as_of, told)
        clear_pointers(store_dir)
        publish(store_dir, snapshot.name)
    return _report(snapshot, yesterday, embedded.count, loaded, "" if ranker is None else ranker.fingerprint, clock)


def _report(
    snapshot: Snapshot, yesterday: Yesterday, embedded: int, loaded: tuple[int, int], ranker: str, clock: _Clock
) -> NightReport:
    facts = snapshot.manifest
    return NightReport(
        snapshot=snapshot.name,
        published=yesterday.snapshot is None or yesterday.name != snapshot.name,
        predecessor=yesterday.told,
        items_before=None if yesterday.snapshot is None else yesterday.snapshot.manifest.count,
        as_of=facts.as_of,
        items=facts.count,
        embedded=embedded,
        members=loaded[0],
        members_encoded=loaded[1],
        encoder=facts.fingerprint,
        ranker=ranker,
        index=facts.recipe,
        recall=None if facts.recall is None else facts.recall.mean,
        recall_k=0 if facts.recall is None else facts.recall.k,
        seconds=round(clock.total(), 3),
        seconds_embed=round(clock.spent["embed"], 3),
        seconds_index=round(clock.spent["index"], 3),
        seconds_members=round(clock.spent["members"], 3),
    )


@dataclass(frozen=True)
class Embedded:
    """Vectors float32 [N,D] and prompt digests [N] of a night's items; `count` of them were encoded anew."""

    vectors: Vectors
    digests: Sequence[str]
    count: int


def embed_changed(tonight: Tonight, encoder: Encoder, previous: Opened | None, told: Progress) -> Embedded:
    """Tonight's items as vectors: yesterday's where the same encoder read the same prompt, else encoded now."""
    records = tonight.records()
    digests = encoder.item_digests(records, tonight.numbers)
    vectors = np.zeros((len(records), encoder.dims), np.float32)
    changed = np.ones(len(records), bool)
    if previous is not None and previous.snapshot.manifest.fingerprint == encoder.fingerprint:
        rows = previous.catalog.rows(tonight.items.item_id)
        same = [row >= 0 and previous.catalog.digest(row) == digest for row, digest in zip(rows.tolist(), digests)]
        changed = ~np.array(same, bool)
        vectors[~changed] = previous.snapshot.vectors[rows[~changed]]
    new = np.flatnonzero(changed)
    if len(new):
        numbers = {name: column[new] for name, column in tonight.numbers.items()}
        vectors[new] = encoder.items([records[row] for row in new], numbers, lambda done, of: told("items", done, of))
    return Embedded(vectors, digests, len(new))


def _write(
    tonight: Tonight,
    embedded: Embedded,
    encoder: Encoder,
    ranker: ItemTokens | None,
    store_dir: Path,
    parent: str,
    queries: Vectors | None,
    told: Progress,
) -> Snapshot:
    built = build(embedded.vectors, queries=queries, progress=lambda done, of: told("index", done, of))
    with SnapshotWriter(store_dir, fingerprint=encoder.fingerprint, as_of=tonight.as_of, parent=parent) as writer:
        writer.vectors(embedded.vectors)
        writer.ids(tonight.items.item_id)
        writer.index(built.index, recipe=str(built.recipe), facts=built.facts, recall=built.recall)
        writer.part(CATALOG_PART, write_catalog(tonight.items, tonight.numbers, embedded.digests, tonight.as_of))
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


def load_members(dataset: Dataset, encoder: Encoder, members: MemberStore, as_of: int, told: Progress) -> tuple[int, int]:
    """Every member's record and vector are in the store; returns how many there are and how many were encoded.

    Between a batch's records and its vectors a server finds no vector for a changed record, and encodes the member itself.
    """
    words = ItemWords(dataset.items)
    done = encoded = 0
    for batch in _batches(records_of(dataset, as_of), MEMBER_BATCH):
        views = [view_of(record, words) for record in batch]
        digests = [view_digest(view) for view in views]
        vectors = members.vectors(batch, digests)
        new = [place for place, vector in enumerate(vectors) if vector is None or len(vector) != encoder.dims]
        if new:
            for place, vector in zip(new, encoder.members([views[place] for place in new])):
                vectors[place] = vector
        members.put(batch)
        members.put_vectors(batch, digests, np.stack([vector for vector in vectors if vector is not None]))
        done, encoded = done + len(batch), encoded + len(new)
        told("members", done, len(dataset.members))
    return done, encoded


def _member_queries(dataset: Dataset, encoder: Encoder, as_of: int) -> Vectors | None:
    """Vectors of some members with a history, to measure the index with what it will be asked; None if there are none."""
    words = ItemWords(dataset.items)
    active = (record for record in records_of(dataset, as_of) if record.history)
    views = [view_of(record, words) for record in islice(active, GATE_QUERIES)]
    return encoder.members(views) if views else None


class _Clock:
    """Seconds by stage, and since it was made."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {"embed": 0.0, "index": 0.0, "members": 0.0}
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.spent[stage] += time.perf_counter() - start

    def total(self) -> float:
        return time.perf_counter() - self._start


def _batches(records: Iterable[MemberRecord], size: int) -> Iterator[list[MemberRecord]]:
    rest = iter(records)
    while batch := list(islice(rest, size)):
        yield batch


def _silent(stage: str, done: int, of: int) -> None:
    del stage, done, of
