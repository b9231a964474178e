"""A running server is told what changed: it is on the disk before the answer, and in every answer after it."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from index.live import LIVE_DIR
from index.wal import segments
from ranking.serving import recommender_pb2 as pb
from ranking.serving import recommender_pb2_grpc
from ranking.serving.client import Client, ServiceError
from ranking.serving.stack import Stack, open_stack
from retrieval.data.schema import Dataset, Item, Member, MemberView
from retrieval.encoder import Encoder
from retrieval.moments import end_of
from retrieval.refresh import nightly

Start = Callable[..., tuple[int, Callable[[], None]]]
NEW = Item("new", "roses and compost", "a short piece about pruning", "gardens|chess", "author 9", 1_705_000_000, {"price": 4.0})


@pytest.fixture
def store(copied: Path) -> Path:
    return copied


@pytest.fixture
def opened(night: Path, store: Path) -> Iterator[Callable[[], Stack]]:
    stacks: list[Stack] = []

    def one() -> Stack:
        stacks.append(open_stack(store, night / "encoder1", night / "ranker1", None))
        return stacks[-1]

    yield one
    for stack in stacks:
        stack.today.close()


def test_an_item_put_in_is_answered_ranked_and_shown_at_once(opened: Callable[[], Stack], start: Start) -> None:
    port, stop = start(opened())
    with Client(f"127.0.0.1:{port}") as client:
        assert client.info().items == 60
        assert client.upsert([NEW]).position == 1
        assert client.upsert([NEW, replace(NEW, item_id="i3", title="signal and viaduct")]).position == 2
        told = client.info()
        assert (told.items, told.live_items, told.live_position) == (61, 2, 2)
        answer = client.recommend("m6", 61, readable=True)
        shown = {row.item_id: row for row in answer.rows}
        assert shown["new"].title == NEW.title and shown["i3"].title == "signal and viaduct"
        again = client.rank("m6", ["new", "i3", "i4"])
        served = dict(zip(answer.ids, answer.probabilities))
        np.testing.assert_allclose(again.probabilities, [served[one] for one in again.ids], atol=1e-6)
        assert client.withdraw(["new", "i4", "nobody"]).were_here == 2
        assert not {"new", "i4"} & set(client.recommend("m6", 61).ids)
        with pytest.raises(ServiceError, match=r"items\[0\]: 'new'") as caught:
            client.rank("m6", ["new"])
        assert caught.value.code == "NOT_FOUND"
    stop()
    port, _ = start(opened())
    with Client(f"127.0.0.1:{port}") as client:
        assert client.info().items == 59, "a server that starts reads what was kept"
        assert not {"new", "i4"} & set(client.retrieve("m6", 61).ids)


def test_a_live_item_is_found_and_scored_as_the_next_night_finds_and_scores_it(
    opened: Callable[[], Stack], store: Path, tiny_dataset: Dataset, start: Start
) -> None:
    stack = opened()
    port, stop = start(stack)
    view = MemberView(Member("", {"role": "fond of roses"}))
    with Client(f"127.0.0.1:{port}") as client:
        client.upsert([NEW])
        client.withdraw(["i5"])
        before = client.recommend(view, 60)
    stop()
    nightly(tiny_dataset, stack.encoder, stack.ranker, store, end_of(tiny_dataset))
    port, _ = start(opened())
    with Client(f"127.0.0.1:{port}") as client:
        after = client.recommend(view, 60)
        assert client.info().live_items == 0
    assert after.snapshot != before.snapshot and sorted(after.ids) == sorted(before.ids)
    scores = dict(zip(before.ids, zip(before.scores, before.probabilities)))
    np.testing.assert_allclose(
        [scores[one] for one in after.ids], np.column_stack([after.scores, after.probabilities]), atol=1e-5
    )


def test_one_server_writes_and_the_others_follow_within_a_second(opened: Callable[[], Stack], start: Start) -> None:
    first, stop = start(opened())
    second, _ = start(opened())
    with Client(f"127.0.0.1:{first}") as writer, Client(f"127.0.0.1:{second}") as follower:
        writer.upsert([NEW])
        with pytest.raises(ServiceError, match="one server takes changes") as caught:
            follower.withdraw(["i1"])
        assert caught.value.code == "UNAVAILABLE"
        time.sleep(0.3)
        assert "new" in follower.retrieve("m6", 61).ids
        writer.withdraw(["new"])
        time.sleep(0.3)
        assert "new" not in follower.retrieve("m6", 61).ids
        stop()
        assert follower.withdraw(["i1"]).position == 3, "who is left takes over"
        assert "i1" not in follower.retrieve("m6", 61).ids


def test_many_writers_at_once_all_get_what_they_were_promised(opened: Callable[[], Stack], start: Start) -> None:
    port, _ = start(opened(), most_waiting=200)
    positions: list[int] = []

    def put(who: int) -> None:
        with Client(f"127.0.0.1:{port}") as client:
            for turn in range(5):
                positions.append(client.upsert([replace(NEW, item_id=f"w{who}-{turn}")]).position)

    threads = [threading.Thread(target=put, args=(who,)) for who in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(positions) == list(range(1, 31))
    with Client(f"127.0.0.1:{port}") as client:
        assert client.info().items == 90
        assert len([one for one in client.retrieve("m6", 100).ids if one.startswith("w")]) == 30


def test_items_that_another_encoders_server_took_are_read_anew(
    opened: Callable[[], Stack], store: Path, night: Path, tiny_dataset: Dataset
) -> None:
    before, other = opened(), Encoder.load(night / "encoder2")
    nightly(tiny_dataset, other, None, store, end_of(tiny_dataset) + 3_600)
    before.today.upsert([NEW], 5)
    before.today.close()
    stack = open_stack(store, night / "encoder2", None, None)
    moment, catalog = stack.today.now()
    (row,) = moment.rows(["new"]).tolist()
    assert catalog.item(row) == NEW and not moment.stale and moment.items == 61
    numbers = {name: np.array([value]) for name, value in catalog.numbers(row).items()}
    np.testing.assert_allclose(moment.vector(row), other.items([NEW], numbers)[0], atol=1e-6)
    stack.today.close()


def test_a_full_disk_refuses_and_the_server_goes_on_when_there_is_room(
    opened: Callable[[], Stack], store: Path, start: Start
) -> None:
    port, _ = start(opened())
    with Client(f"127.0.0.1:{port}") as client:
        client.upsert([NEW])
        (_, path) = segments(store / LIVE_DIR)[-1]
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 40, before[1]))
        try:
            with pytest.raises(ServiceError, match="not taken") as caught:
                client.upsert([replace(NEW, item_id="newer")])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert caught.value.code == "UNAVAILABLE"
        found = client.retrieve("m6", 100).ids
        assert "new" in found and "newer" not in found
        assert client.upsert([replace(NEW, item_id="newer")]).position == 2
        assert {"new", "newer"} <= set(client.retrieve("m6", 100).ids)


def test_a_damaged_log_is_an_error_and_never_an_answer_without_its_withdrawals(
    opened: Callable[[], Stack], store: Path, start: Start
) -> None:
    port, _ = start(opened())
    follower, _ = start(opened())
    with Client(f"127.0.0.1:{port}") as client, Client(f"127.0.0.1:{follower}") as late:
        client.withdraw(["i1"])
        (_, path) = segments(store / LIVE_DIR)[-1]
        content = bytearray(path.read_bytes())
        content[-20] ^= 0xFF
        path.write_bytes(content)
        time.sleep(0.3)
        with pytest.raises(ServiceError) as caught:
            late.retrieve("m6", 60)
        assert caught.value.code == "DATA_LOSS"
        assert "i1" not in client.retrieve("m6", 60).ids


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda stub: stub.UpsertItems(pb.UpsertItemsRequest()), "items: none are given"),
        (lambda stub: stub.UpsertItems(pb.UpsertItemsRequest(items=[record(item_id="")])), "items[0].item_id: is empty"),
        (lambda stub: stub.UpsertItems(pb.UpsertItemsRequest(items=[record(), record()])), "items: 'x' is given twice"),
        (lambda stub: stub.UpsertItems(pb.UpsertItemsRequest(items=[record()] * 257)), "items: 257 entries"),
        (
            lambda stub: stub.UpsertItems(pb.UpsertItemsRequest(items=[pb.ItemRecord(item_id="x")])),
            "items[0].words: are all empty",
        ),
        (lambda stub: stub.UpsertItems(pb.UpsertItemsRequest(items=[record(number("size", 1))])), "they have price"),
        (lambda stub: stub.UpsertItems(pb.UpsertItemsRequest(items=[record(number("price", np.inf))])), "price is inf"),
        (lambda stub: stub.WithdrawItems(pb.WithdrawItemsRequest()), "items: none are given"),
        (lambda stub: stub.WithdrawItems(pb.WithdrawItemsRequest(items=pb.Ids(plain=["a", "a"]))), "'a' is given twice"),
        (lambda stub: stub.WithdrawItems(pb.WithdrawItemsRequest(items=pb.Ids(plain=["a" * 600]))), "items[0]: 600 bytes"),
    ],
)
def test_changes_that_do_not_fit_are_refused_whole(
    opened: Callable[[], Stack], start: Start, call: Callable[[recommender_pb2_grpc.RecommenderStub], object], words: str
) -> None:
    port, _ = start(opened())
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, Client(f"127.0.0.1:{port}") as client:
        with pytest.raises(grpc.RpcError) as caught:
            call(recommender_pb2_grpc.RecommenderStub(channel))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and words in caught.value.details()
        assert (client.info().live_position, client.info().items) == (0, 60)


def record(*numbers: pb.ItemNumber, item_id: str = "x") -> pb.ItemRecord:
    return pb.ItemRecord(item_id=item_id, words=pb.ItemWords(title="roses"), numbers=numbers)


def number(name: str, value: float) -> pb.ItemNumber:
    return pb.ItemNumber(name=name, value=value)
