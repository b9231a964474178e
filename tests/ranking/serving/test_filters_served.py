"""A filtered question is answered with what a plain loop over all items lets through, or not at all; withdrawn items never."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from ranking.serving import recommender_pb2 as pb
from ranking.serving import recommender_pb2_grpc
from ranking.serving.client import Client, ServiceError
from ranking.serving.messages import BadRequest
from ranking.serving.stack import Stack, open_stack
from retrieval.attributes import Wanted
from retrieval.data.schema import Connection, Dataset, Engagement, Item, Member, MemberView
from retrieval.encoder import Encoder
from retrieval.hybrid import HybridSettings
from retrieval.moments import end_of
from retrieval.refresh import SnapshotForm, nightly

Start = Callable[..., tuple[int, Callable[[], None]]]
NEW = Item("new", "roses and compost", "a short piece about pruning", "gardens|chess", "author 9", 1_705_000_000, {"price": 4.0})
FILTERS = {
    "a category": Wanted(categories=frozenset({"chess"})),
    "one of two categories": Wanted(categories=frozenset({"chess", "trains"})),
    "a category nobody has": Wanted(categories=frozenset({"opera"})),
    "a creator": Wanted(creators=frozenset({"author 2"})),
    "a creator and another's category": Wanted(creators=frozenset({"author 2"}), categories=frozenset({"chess"})),
    "not these creators": Wanted(blocked_creators=frozenset({"author 0", "author 9"})),
    "of connections": Wanted(by_connections=True),
    "of connections, blocked": Wanted(by_connections=True, blocked_creators=frozenset({"author 1"})),
}


@pytest.fixture(scope="module")
def mixed(night: Path, tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Dataset) -> Iterator[dict[str, Stack]]:
    """Both first stages over one store with live items, one of them withdrawn, one that replaces an item of the night."""
    store, encoder = tmp_path_factory.mktemp("mixed"), Encoder.load(night / "encoder1")
    nightly(tiny_dataset, encoder, None, store, end_of(tiny_dataset), form=SnapshotForm(hybrid=HybridSettings()))
    made = {kind: open_stack(store, night / "encoder1", None, None, hybrid=kind == "hybrid") for kind in ("dense", "hybrid")}
    live = [NEW, replace(NEW, item_id="gone"), replace(NEW, item_id="i2", category="", creator="")]
    made["dense"].today.upsert(live, 5)
    made["dense"].today.withdraw(["gone", "i4", "i0"])
    time.sleep(0.3)
    yield made
    for stack in made.values():
        stack.today.close()


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
def test_filters_let_through_what_a_plain_loop_lets_through(
    mixed: dict[str, Stack], start: Start, kind: str, tiny_dataset: Dataset
) -> None:
    port, _ = start(mixed[kind])
    liked = (Engagement(tiny_dataset.items[6], 5, "like", 1),)
    items = {
        item.item_id: item for item in (tiny_dataset.items[row] for row in range(60)) if item.item_id not in ("i4", "i0", "i6")
    }
    items |= {"new": NEW, "i2": replace(NEW, item_id="i2", category="", creator="")}
    view = MemberView(
        Member("", {"role": "fond of roses"}), liked, (Connection("author 1", "follows"), Connection("author 9", "is"))
    )
    with Client(f"127.0.0.1:{port}") as client:
        everything = client.retrieve(view, 100).ids
        assert sorted(everything) == sorted(items)
        for name, wanted in FILTERS.items():
            expected = {one for one, item in items.items() if fits(item, wanted, {"author 1", "author 9"})}
            found = client.retrieve(view, 100, wanted=wanted).ids
            assert set(found) == expected and len(found) == len(expected), name
            assert found == [one for one in everything if one in expected] or kind == "hybrid", name
            assert client.retrieve(view, 3, wanted=wanted).ids == found[:3], name
        lonely = replace(view, connections=())
        assert client.retrieve(lonely, 100, wanted=Wanted(by_connections=True)).ids == []


def fits(item: Item, wanted: Wanted, connected: set[str]) -> bool:
    return (
        (not wanted.categories or bool({item.category, *item.category.split("|")} & wanted.categories))
        and (not wanted.creators or item.creator in wanted.creators)
        and item.creator not in wanted.blocked_creators
        and (not wanted.by_connections or item.creator in connected)
    )


def test_a_filter_that_cannot_be_judged_gives_no_answer(mixed: dict[str, Stack], start: Start) -> None:
    port, _ = start(mixed["dense"])
    with Client(f"127.0.0.1:{port}") as client:
        for wanted in (Wanted(languages=frozenset({"no"})), Wanted(regions=frozenset({"north"}))):
            with pytest.raises(ServiceError, match=r"no column '(language|region)'") as caught:
                client.retrieve(MemberView(Member("")), 5, wanted=wanted)
            assert caught.value.code == "INVALID_ARGUMENT"
    newer = pb.Filter()
    newer.ParseFromString(b"\xba\x3e\x02no")  # field 999: a condition of a contract to come
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as refused:
        stub = recommender_pb2_grpc.RecommenderStub(channel)
        stub.Retrieve(pb.RetrieveRequest(member=pb.Member(description=pb.Description()), filter=newer))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "does not know" in refused.value.details()


def test_a_language_is_asked_for_over_the_wire(night: Path, tmp_path: Path, start: Start, tiny_dataset: Dataset) -> None:
    items = tiny_dataset.items
    codes = ["no" if row % 2 else "de" for row in range(60)]
    spoken = replace(tiny_dataset, items=replace(items, facets={"language": codes}))
    nightly(spoken, Encoder.load(night / "encoder1"), None, tmp_path, end_of(spoken))
    stack = open_stack(tmp_path, night / "encoder1", None, None)
    port, _ = start(stack)
    norwegian, view = Wanted(languages=frozenset({"no"})), MemberView(Member("", {"role": "fond of roses"}))
    with Client(f"127.0.0.1:{port}") as client:
        expected = set(items.item_id[1::2])
        assert set(client.retrieve(view, 100, wanted=norwegian).ids) == expected
        client.upsert([NEW, replace(NEW, item_id="i1")])
        time.sleep(0.3)
        assert {"new", "i1"} <= set(client.retrieve(view, 100).ids)
        assert set(client.retrieve(view, 100, wanted=norwegian).ids) == expected - {"i1"}, "nobody said what language they are in"
        with pytest.raises(BadRequest, match="'new' has language, which can only be given at night"):
            client.upsert([replace(NEW, facets={"language": "no"})])
    stack.today.close()


def test_connections_are_known_of_a_member_by_id(client: Client, tiny_dataset: Dataset) -> None:
    everything = client.retrieve("m6", 60).ids
    creator = dict(zip(tiny_dataset.items.item_id, tiny_dataset.items.creator))
    for ask in (client.retrieve, client.recommend):
        found = ask("m6", 60, wanted=Wanted(by_connections=True)).ids
        assert set(found) == {one for one in everything if creator[one] == "author 2"} and found
