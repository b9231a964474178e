"""The line taken apart: what each kind of replica runs, and a stack whose models and shards are asked from afar. No Ray here.

A far part answers through an `Ask`, whatever carries the question; the parts that are asked are the classes of the single server
(`Encoder`, `Searcher` or `Certified`, `Ranker`), and so is what asks them (`Stack`, `Recommender`, `Shards`). So are the answers.
Whoever searches a shard opens that shard's files of the snapshot and no others; whoever asks opens all but the shards'.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from index.certified import Certified
from index.filters import Allow, RowSet
from index.hits import Hits, Rows, Vectors
from index.kinds import as_recipe
from index.serving import Serving
from index.shards import ShardError, Shards
from index.snapshot import Shard, Snapshot
from ranking.fusion import Head
from ranking.pipeline import Recommender
from ranking.serving.stack import Origin, Stack, load_encoder, load_ranker, open_members, require_pair
from ranking.serving.swap_look import Source, look
from ranking.serving.today import Today
from ranking.tasks import Task, task_named
from retrieval.catalog import Catalog
from retrieval.data.schema import Item, MemberView
from retrieval.members import MemberStore
from retrieval.retrieve import Retriever

if TYPE_CHECKING:
    from ranking.fusion_features import Asked
    from ranking.pipeline import Floats
    from ranking.ranker import Ranker
    from retrieval.encoder import Encoder

Ask = Callable[..., Any]
"""Asks one replica of a kind: the name of a method, then its arguments. Returns what that returns, raises what it raises."""
AT_ONCE = 8
"""Requests of one ingress whose shards are asked at the same time."""


@dataclass(frozen=True)
class EncoderAbout:
    """What an encoder's replicas are."""

    fingerprint: str
    dims: int
    actions: tuple[str, ...]


@dataclass(frozen=True)
class RankerAbout:
    """What a ranker's replicas are: of `RankerFacts` what the line reads, without that class's module, which loads torch. The
    tasks come by name, the main one first; `fused` names those whose words numbers join, by the `head`."""

    fingerprint: str
    encoder: str | None
    tasks: Mapping[str, Task]
    fused: frozenset[str]
    head: Head | None


class EncoderReplica:
    """One encoder, with vectors of the snapshot's length. For one request at a time."""

    def __init__(self, folder: str, dims: int) -> None:
        whole = load_encoder(Path(folder))
        self._encoder = whole.truncated(dims) if dims < whole.dims else whole

    def about(self) -> EncoderAbout:
        """What it is."""
        return EncoderAbout(self._encoder.fingerprint, self._encoder.dims, tuple(self._encoder.writer.actions))

    def members(self, views: Sequence[MemberView]) -> Vectors:
        """See `Encoder.members`."""
        return self._encoder.members(views)

    def items(self, items: Sequence[Item], numbers: Mapping[str, np.ndarray]) -> Vectors:
        """See `Encoder.items`."""
        return self._encoder.items(items, numbers)

    def item_digests(self, items: Sequence[Item], numbers: Mapping[str, np.ndarray]) -> list[str]:
        """See `Encoder.item_digests`."""
        return self._encoder.item_digests(items, numbers)


class ShardReplica:
    """One shard of a snapshot, searched as it was built, or exactly. A snapshot that is not divided has one, 0."""

    def __init__(self, folder: str, place: int, exact: bool) -> None:
        self._shard = Shard.open(Path(folder), place)
        self._search = Certified(self._shard.vectors) if exact else as_recipe(self._shard)

    def name(self) -> str:
        """The snapshot's name, which is made of its content, and which shard of it this is."""
        return self._shard.name

    def search(self, queries: Vectors, k: int, exclude: Sequence[Rows] | None, allow: Allow) -> Hits:
        """See `Searcher.search`; rows are the shard's own."""
        return self._search.search(queries, k, exclude, allow=allow)


class RankerReplica:
    """One ranker with its own cache of prefixes. For one request at a time."""

    def __init__(self, folder: str) -> None:
        self._ranker = load_ranker(Path(folder))

    def about(self) -> RankerAbout:
        """What it is."""
        ranker = self._ranker
        fused = frozenset(name for name in ranker.tasks if ranker.fuses(name))
        return RankerAbout(ranker.fingerprint, ranker.facts.encoder, ranker.tasks, fused, ranker.head)

    def score(
        self, view: MemberView, tokens: list[list[int]], task: str, relations: list[str] | None, numbers: Asked | None
    ) -> Floats:
        """See `Ranker.score`."""
        return self._ranker.score(view, tokens, task, relations, numbers)

    def item_tokens(self, items: Sequence[Item], numbers: Mapping[str, np.ndarray]) -> list[list[int]]:
        """See `Ranker.item_tokens`."""
        return self._ranker.item_tokens(items, numbers)


class FarEncoder:
    """An encoder that runs elsewhere, as the line asks it."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        about: EncoderAbout = ask("about")
        self.fingerprint, self.dims, self.actions = about.fingerprint, about.dims, about.actions

    def members(self, views: Sequence[MemberView]) -> Vectors:
        """See `Encoder.members`."""
        return cast(Vectors, self._ask("members", views))

    def items(self, items: Sequence[Item], numbers: Mapping[str, np.ndarray]) -> Vectors:
        """See `Encoder.items`."""
        return cast(Vectors, self._ask("items", items, numbers))

    def item_digests(self, items: Sequence[Item], numbers: Mapping[str, np.ndarray]) -> list[str]:
        """See `Encoder.item_digests`."""
        return cast("list[str]", self._ask("item_digests", items, numbers))


class FarSearch:
    """A shard that is searched elsewhere: a `Search`."""

    def __init__(self, ask: Ask, shard: Shard) -> None:
        """`shard` is not opened. Raises ShardError if the replicas hold another one."""
        self._ask, self.count, self.dims = ask, shard.count, shard.manifest.dims
        if (name := ask("name")) != shard.name:
            raise ShardError(f"the replicas search shard {name}, the snapshot here has {shard.name}: deploy both of one night")

    def search(self, queries: Vectors, k: int, exclude: Sequence[Rows] | None = None, *, allow: Allow = None) -> Hits:
        """See `Searcher.search`."""
        return cast(Hits, self._ask("search", queries, k, exclude, allow))


class FarRanker:
    """A ranker that runs elsewhere, as the line asks it."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self.facts: RankerAbout = ask("about")
        self.fingerprint, self.head = self.facts.fingerprint, self.facts.head

    @property
    def tasks(self) -> Mapping[str, Task]:
        """The tasks by name, the main one first."""
        return self.facts.tasks

    def fuses(self, task: str = "") -> bool:
        """See `Ranker.fuses`."""
        return task_named(self.tasks, task).name in self.facts.fused

    def score(
        self,
        view: MemberView,
        item_tokens: list[list[int]],
        task: str = "",
        relations: list[str] | None = None,
        numbers: Asked | None = None,
    ) -> Floats:
        """See `Ranker.score`."""
        return cast("Floats", self._ask("score", view, item_tokens, task, relations, numbers))

    def item_tokens(self, items: Sequence[Item], numbers: Mapping[str, np.ndarray]) -> list[list[int]]:
        """See `Ranker.item_tokens`."""
        return cast("list[list[int]]", self._ask("item_tokens", items, numbers))


class FarRetriever(Retriever):
    """A retriever whose vectors are elsewhere."""

    def cosines(self, vector: Vectors, rows: Rows) -> np.ndarray:
        """See `Retriever.cosines`; of the night's rows the shards are asked, which score what is wanted and nothing else."""
        found, older = np.empty(len(rows), np.float64), rows < self.moment.first_live
        if older.any():
            wanted = np.unique(rows[older])
            allow = RowSet.of(wanted, self.moment.first_live)
            hits = self.moment.searcher.search(vector[None], len(wanted), allow=allow)
            order = np.argsort(hits.rows[0])
            found[older] = hits.scores[0, order][np.searchsorted(wanted, rows[older])]
        for place in np.flatnonzero(~older).tolist():
            found[place] = float(self.moment.vector(int(rows[place])) @ vector)
        return found


@dataclass(frozen=True)
class FarStack(Stack):
    """A night whose models and shards are elsewhere; catalogue, ids, members and today's changes are here."""

    actions: tuple[str, ...]
    looking: threading.Lock

    @property
    def engaged(self) -> str:
        """See Stack."""
        return next(iter(self.actions), "")

    def now(self) -> Stack:
        """The stack of the present moment. Any thread may ask. Raises LogDamaged."""
        with self.looking:
            return super().now()


def far_stack(source: Source, published: Path, encoder: Ask, searches: Sequence[Ask], ranker: Ask | None) -> FarStack:
    """The night in the folder `published`, its encoder, ranker and shards asked from afar; `searches` in the order of the shards.

    That folder was the store's current one when the replicas were deployed; the pointer may have moved since. Vectors and indexes
    are not opened and need not be here. Raises what `open_stack` raises where parts are of different nights, and ShardError.
    """
    seen, reader, judge = look(source), FarEncoder(encoder), None if ranker is None else FarRanker(ranker)
    snapshot = Snapshot.open(published, fingerprint=reader.fingerprint, searched_here=False)
    as_encoder, as_ranker = cast("Encoder", reader), cast("Ranker | None", judge)
    if as_ranker is not None:
        require_pair(as_ranker, as_encoder)
        Catalog.open(snapshot).require_ranker(as_ranker.fingerprint)
    Serving.lend(snapshot, _far_shards(snapshot, searches), f"{len(searches)} shards")
    today = Today(snapshot, source.store, as_encoder, as_ranker)
    today.read_anew()
    moment, catalog = today.now()
    connection = open_members(source.members)
    members, origin = MemberStore(connection, reader.fingerprint), Origin(source, seen, as_encoder, connection, None)
    line = Recommender(FarRetriever(as_encoder, moment, catalog), as_ranker)
    stack = (snapshot, catalog, as_encoder, as_ranker, members, line, today, origin)
    return FarStack(*stack, reader.actions, threading.Lock())


def _far_shards(snapshot: Snapshot, searches: Sequence[Ask]) -> Shards:
    """The shards of one night behind their replicas, all asked at the same time. Raises ShardError."""
    if len(snapshot.shards) != len(searches):
        raise ShardError(f"{len(searches)} shards are deployed, {snapshot.name} has {len(snapshot.shards)}: deploy again")
    threads = ThreadPoolExecutor(AT_ONCE * len(searches), "shard")
    far = [FarSearch(ask, shard) for ask, shard in zip(searches, snapshot.shards)]
    return Shards(far, [shard.rows for shard in snapshot.shards], threads.map)
