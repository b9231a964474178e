"""The requests of a load: real members of the store, by id or described in full, with filters that let some items through."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path

import numpy as np

from index.publish import current
from index.snapshot import Snapshot
from index.store import open_store, shown_address
from ranking.serving import recommender_pb2 as pb
from ranking.serving.load import LoadError
from ranking.serving.messages import member_message
from ranking.serving.stack import default_members
from retrieval.catalog import Catalog
from retrieval.members import RECORD, MemberStore
from retrieval.records import view_of

METHODS = {"recommend": "Recommend", "retrieve": "Retrieve", "retrieve-cold": "Retrieve"}
"""What is asked, and the call that answers it; `retrieve-cold` describes the member, so that the encoder works each time."""
MOST_IDS = 100_000
"""Members of a large store that are looked at."""
SAMPLED_ITEMS = 2_000
BLOCKED = 3


@dataclass(frozen=True)
class RequestWish:
    """What is asked. `distinct`: so many members at most, each with one request. `filtered`: half of the categories, and not all
    creators."""

    method: str
    k: int = 10
    fanout: int = 0
    filtered: bool = False
    distinct: int = 1_000
    seed: int = 0


def requests_of(store: Path, members: str | None, wish: RequestWish) -> list[bytes]:
    """Serialised requests, the same for the same store and seed. Raises LoadError if the store has no members or no night."""
    folder = current(store)
    if folder is None:
        raise LoadError(f"--store {store}: nothing was published; run `brewline nightly` first")
    snapshot = Snapshot.open(folder, verify=False)
    address = members or default_members(store)
    catalog, kept = Catalog.open(snapshot), open_store(address)
    try:
        ids = sorted(islice(kept.ids(RECORD), MOST_IDS))
        if not ids:
            raise LoadError(
                f"the member store {shown_address(address)} holds no members to ask for; "
                "run `brewline nightly` with this --members"
            )
        rng = np.random.default_rng(wish.seed)
        chosen = [ids[place] for place in rng.permutation(len(ids))[: wish.distinct]]
        filters: Iterator[pb.Filter | None] = _filters(catalog, rng) if wish.filtered else repeat(None)
        book = MemberStore(kept, snapshot.manifest.fingerprint)
        return [_request(wish, _member(wish, one, book, catalog), next(filters)).SerializeToString() for one in chosen]
    finally:
        kept.close()


def _member(wish: RequestWish, member_id: str, book: MemberStore, catalog: Catalog) -> pb.Member:
    if wish.method != "retrieve-cold":
        return pb.Member(id=member_id)
    return member_message(view_of(book.get(member_id).record, catalog))


def _request(wish: RequestWish, member: pb.Member, only: pb.Filter | None) -> pb.RecommendRequest | pb.RetrieveRequest:
    if METHODS[wish.method] == "Recommend":
        return pb.RecommendRequest(member=member, k=wish.k, fanout=wish.fanout, filter=only)
    return pb.RetrieveRequest(member=member, k=wish.k, filter=only)


def _filters(catalog: Catalog, rng: np.random.Generator) -> Iterator[pb.Filter]:
    """Filters without end, each a half of the categories and a few creators not."""
    rows = rng.permutation(len(catalog))[:SAMPLED_ITEMS]
    items = [catalog.item(int(row)) for row in rows]
    categories = sorted({item.category for item in items if item.category})
    creators = sorted({item.creator for item in items if item.creator})
    while True:
        half = rng.permutation(len(categories))[: max(1, len(categories) // 2)]
        few = rng.permutation(len(creators))[:BLOCKED]
        yield pb.Filter(categories=[categories[place] for place in half], blocked_creators=[creators[place] for place in few])
