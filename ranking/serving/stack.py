"""Everything that answers one request, opened together and of one night: snapshot, catalogue, models, members."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from index.errors import BrewlineError
from index.publish import current
from index.shadow import Shadow
from index.snapshot import Snapshot, read_manifest
from index.steady_store import SteadyStore
from index.store import KeyValueStore, open_store
from ranking.pace import Pace
from ranking.pipeline import Recommender
from ranking.serving.swap_look import Seen, Source, changed, look
from ranking.serving.today import Today
from retrieval.catalog import Catalog
from retrieval.data.schema import Member, MemberView
from retrieval.fingerprint import FingerprintMismatch
from retrieval.hybrid import Hybrid
from retrieval.members import MemberStore
from retrieval.retrieve import Retriever

if TYPE_CHECKING:
    from ranking.prefill.load import Arithmetic
    from ranking.ranker import Ranker
    from retrieval.encoder import Encoder

MEMBERS_FILE = "members.sqlite"
PATIENCE_S = 0.5
"""For the member store. An answer from what was known before, and marked so, is better than a late one."""
PROBE = MemberView(Member("", {"headline": "a small question"}))
WARM_CANDIDATES = 256

log = logging.getLogger(__name__)


class NotServable(BrewlineError):
    """A folder given to the server is missing or holds nothing to serve."""


@dataclass(frozen=True)
class Origin:
    """Where a stack was opened, what a look showed before, and what the next one may use again: the encoder with all the dims
    that its folder has, the connection to the members, and what compares answers with the exact ones (None: nothing does)."""

    source: Source
    seen: Seen
    encoder: Encoder
    connection: KeyValueStore
    shadow: Shadow | None


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
    origin: Origin

    @property
    def engaged(self) -> str:
        """The action of an engagement whose action nobody named: the first that the encoder was trained on."""
        return next(iter(self.encoder.writer.actions), "")

    def now(self) -> Stack:
        """The stack of the present moment, for one request from beginning to end. Raises LogDamaged."""
        moment, catalog = self.today.now()
        if moment is self.recommender.retriever.moment:
            return self
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


def open_members(url: str) -> SteadyStore:
    """The member store as a server asks it: a request waits for it once and briefly, and what it said last is remembered."""
    return SteadyStore(open_store(url, patience_s=PATIENCE_S))


def open_stack(
    store: Path,
    encoder: Path,
    ranker: Path | None,
    members: str | None,
    *,
    hybrid: bool = False,
    shadow_share: float = 0.0,
    arithmetic: Arithmetic = "float32",
) -> Stack:
    """The current night of a store with the models that made it; the encoder's vectors are cut to the night's length.

    `members` is a store URL (None: the snapshot store's own). `hybrid`: candidates come from the hybrid first stage that the
    night wrote. `shadow_share` of the searches are compared with the exact one's answer. The ranker multiplies in `arithmetic`,
    and so does each that comes after it. Raises HybridError if the night wrote none, FingerprintMismatch or SnapshotMismatch with
    both values if the models are not the ones that the snapshot was made with, ShadowError, NotServable or the models' own errors
    if something is missing.
    """
    shadow = Shadow(shadow_share) if shadow_share else None
    source = Source(store, encoder, ranker, members or default_members(store), hybrid, arithmetic)
    return load_stack(source, shadow=shadow)


def load_stack(source: Source, before: Stack | None = None, shadow: Shadow | None = None) -> Stack:
    """The night that a source holds now; of `before` the models that are still there are shared, the connection, the shadow.

    Beside `before` it follows the day, until `Today.take_over`, and asks shared models nothing: another thread does. Raises as
    `open_stack` does, and NotServable if a model's files changed while they were read.
    """
    seen = look(source)
    _exists("--store", source.store)
    published = current(source.store)
    if published is None:
        raise NotServable(f"--store {source.store}: nothing was published; run `brewline nightly` first")
    whole, judge = _models(source, seen, before)
    if changed(replace(look(source), snapshot=seen.snapshot, files=seen.files), seen):
        raise NotServable("files of the models changed while they were read; put a finished folder in their place by a rename")
    dims = read_manifest(published).dims
    reader = whole.truncated(dims) if dims < whole.dims else whole
    snapshot = Snapshot.open(published, fingerprint=reader.fingerprint)
    if judge is not None:
        Catalog.open(snapshot).require_ranker(judge.fingerprint)
    shadow = shadow if before is None else before.origin.shadow
    today = Today(snapshot, source.store, reader, judge, shadow)
    if before is None:
        today.read_anew()
    connection = open_members(source.members) if before is None else before.origin.connection
    moment, catalog = today.now()
    retriever = Retriever(reader, moment, catalog, Hybrid.open(snapshot) if source.hybrid else None)
    pace = before.recommender.pace if before is not None and before.ranker is judge else Pace()
    members, origin = MemberStore(connection, reader.fingerprint), Origin(source, seen, whole, connection, shadow)
    return Stack(snapshot, catalog, reader, judge, members, Recommender(retriever, judge, pace), today, origin)


def _models(source: Source, seen: Seen, before: Stack | None) -> tuple[Encoder, Ranker | None]:
    """The models of a source; those of `before` as far as their fingerprints are the same. Raises as `load_models` does."""
    if before is None:
        return load_models(source.encoder, source.ranker, source.arithmetic)
    reader, judge = before.origin.encoder, before.ranker
    if seen.encoder != before.origin.seen.encoder and not _is(reader, source.encoder):
        reader = load_encoder(source.encoder)
    if source.ranker is not None and judge is not None and seen.ranker != before.origin.seen.ranker:
        other = load_ranker(source.ranker, source.arithmetic)
        judge = judge if other.fingerprint == judge.fingerprint else other
    if judge is not None:
        require_pair(judge, reader)
    return reader, judge


def _is(encoder: Encoder, folder: Path) -> bool:
    from retrieval.encoder import stored_fingerprint

    _exists("--encoder", folder)
    return stored_fingerprint(folder.resolve()) == encoder.fingerprint


def load_models(encoder: Path, ranker: Path | None, arithmetic: Arithmetic = "float32") -> tuple[Encoder, Ranker | None]:
    """The two models of one night. Raises FingerprintMismatch if they do not go together, NotServable, the models' own errors."""
    _exists("--ranker", ranker)
    reader = load_encoder(encoder)
    judge = None if ranker is None else load_ranker(ranker, arithmetic)
    if judge is not None:
        require_pair(judge, reader)
    return reader, judge


def load_encoder(folder: Path) -> Encoder:
    """The encoder of a folder, or of the one that a link leads to now. Raises NotServable and its own errors."""
    from retrieval.encoder import Encoder

    _exists("--encoder", folder)
    return Encoder.load(folder.resolve())


def load_ranker(folder: Path, arithmetic: Arithmetic = "float32") -> Ranker:
    """The ranker of a folder, or of the one that a link leads to now. Raises NotServable and its own errors."""
    from ranking.ranker import Ranker

    _exists("--ranker", folder)
    return Ranker.load(folder.resolve(), arithmetic=arithmetic)


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
