"""Everything that answers one request, opened together and of one night: snapshot, catalogue, models, members."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from index.errors import BrewlineError
from index.publish import current
from index.snapshot import Snapshot, read_manifest
from index.store import open_store
from ranking.pipeline import Recommender
from ranking.serving.today import Today
from retrieval.catalog import Catalog
from retrieval.data.schema import Member, MemberView
from retrieval.fingerprint import FingerprintMismatch
from retrieval.hybrid import Hybrid
from retrieval.members import MemberStore
from retrieval.retrieve import Retriever

if TYPE_CHECKING:
    from ranking.ranker import Ranker
    from retrieval.encoder import Encoder

MEMBERS_FILE = "members.sqlite"
PROBE = MemberView(Member("", {"headline": "a small question"}))
WARM_CANDIDATES = 256

log = logging.getLogger(__name__)


class NotServable(BrewlineError):
    """A folder given to the server is missing or holds nothing to serve."""


@dataclass(frozen=True)
class Stack:
    """One night, ready to answer, and what changed since. Nothing in it changes but `today`; a new night is a new stack."""

    snapshot: Snapshot
    catalog: Catalog
    encoder: Encoder
    ranker: Ranker | None
    members: MemberStore | None
    recommender: Recommender
    today: Today

    @property
    def engaged(self) -> str:
        """The action of an engagement whose action nobody named: the first that the encoder was trained on."""
        return next(iter(self.encoder.writer.actions), "")

    def now(self) -> Stack:
        """The stack of the present moment, for one request from beginning to end. Raises LogDamaged."""
        moment, catalog = self.today.now()
        retriever = replace(self.recommender.retriever, moment=moment, catalog=catalog)
        return replace(self, catalog=catalog, recommender=replace(self.recommender, retriever=retriever))

    def probe(self) -> None:
        """Encodes a tiny member and searches for one item: raises whatever would fail for a real request."""
        self.now().recommender.retrieve(PROBE, 1)

    def warm(self) -> None:
        """Runs both stages once, so that the first caller does not pay for first-use work and the pace is known."""
        recommender = self.now().recommender
        found = recommender.retrieve(PROBE, WARM_CANDIDATES)
        if self.ranker is not None:
            recommender.score(PROBE, found.rows)


def default_members(store: Path) -> str:
    """The member store that belongs to a snapshot store unless another one is named."""
    return f"sqlite:{store / MEMBERS_FILE}"


def open_stack(store: Path, encoder: Path, ranker: Path | None, members: str | None, *, hybrid: bool = False) -> Stack:
    """The current night of a store with the models that made it; the encoder's vectors are cut to the night's length.

    `members` is a store URL (None: the snapshot store's own). `hybrid`: candidates come from the hybrid first stage that the
    night wrote. Raises HybridError if it wrote none, FingerprintMismatch or SnapshotMismatch with both values if the models are
    not the ones that the snapshot was made with, NotServable or the models' own errors if something is missing.
    """
    _exists("--store", store)
    published = current(store)
    if published is None:
        raise NotServable(f"--store {store}: nothing was published; run `brewline nightly` first")
    reader, judge = load_models(encoder, ranker)
    dims = read_manifest(published).dims
    reader = reader.truncated(dims) if dims < reader.dims else reader
    snapshot = Snapshot.open(published, fingerprint=reader.fingerprint)
    if judge is not None:
        Catalog.open(snapshot).require_ranker(judge.fingerprint)
    today = Today(snapshot, store, reader, judge)
    kept = MemberStore(open_store(members or default_members(store)), reader.fingerprint)
    moment, catalog = today.now()
    retriever = Retriever(reader, moment, catalog, Hybrid.open(snapshot) if hybrid else None)
    return Stack(snapshot, catalog, reader, judge, kept, Recommender(retriever, judge), today)


def load_models(encoder: Path, ranker: Path | None) -> tuple[Encoder, Ranker | None]:
    """The two models of one night. Raises FingerprintMismatch if they do not go together, NotServable, the models' own errors."""
    from ranking.ranker import Ranker
    from retrieval.encoder import Encoder

    _exists("--encoder", encoder)
    _exists("--ranker", ranker)
    reader = Encoder.load(encoder)
    if ranker is None:
        return reader, None
    judge = Ranker.load(ranker)
    require_pair(judge, reader)
    return reader, judge


def _exists(what: str, folder: Path | None) -> None:
    if folder is not None and not folder.is_dir():
        raise NotServable(f"{what} {folder}: no such folder; expected one that brewline has written")


def require_pair(ranker: Ranker, encoder: Encoder) -> None:
    """Nothing happens if the ranker goes with any encoder or with this one. Raises FingerprintMismatch with both values."""
    if ranker.facts.encoder not in (None, encoder.fingerprint):
        raise FingerprintMismatch(
            "the ranker was trained to go with another encoder",
            encoder.fingerprint,
            str(ranker.facts.encoder),
            "use that encoder, or train the ranker again with --encoder of this one",
        )
