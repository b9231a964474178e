"""The recall of what is served, seen by a scrape: of an exact index, and of a poor one that a night put in its place."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from index.build import Plan
from index.recipe import Recipe
from index.search import Searcher
from ranking.cli.top_look import Look, look
from ranking.ranker import Ranker
from ranking.serving import recommender_pb2 as pb
from ranking.serving import recommender_pb2_grpc
from ranking.serving.current import Current
from ranking.serving.stack import Stack, open_stack
from ranking.serving.web import Web
from retrieval.data.schema import Dataset
from retrieval.encoder import Encoder
from retrieval.moments import end_of
from retrieval.refresh import SnapshotForm, nightly

Start = Callable[..., tuple[int, Callable[[], None]]]
ASKED = 8


def asked(port: int, web: Web) -> Look:
    """What a scrape tells when members have asked and all comparisons are done."""
    before = look(web.address).sums("brewline_recall_answers_total", "result")
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = recommender_pb2_grpc.RecommenderStub(channel)
        for number in range(ASKED):
            stub.Retrieve(pb.RetrieveRequest(member=pb.Member(id=f"m{number}"), k=20))
    return until(web, lambda now: now.sums("brewline_recall_answers_total", "result")["compared"] >= before["compared"] + ASKED)


def until(web: Web, holds: Callable[[Look], bool]) -> Look:
    """The first scrape for which something holds."""
    end = time.monotonic() + 20
    while not holds(now := look(web.address)):
        assert time.monotonic() < end
        time.sleep(0.02)
    return now


def test_a_poor_index_is_seen_and_the_comparing_outlives_a_swap(
    night: Path, copied: Path, tiny_dataset: Dataset, start: Start
) -> None:
    web, reader, judge = Web("127.0.0.1", 0), Encoder.load(night / "encoder1"), Ranker.load(night / "ranker1")
    others = set(threading.enumerate())
    current = Current(open_stack(copied, night / "encoder1", night / "ranker1", None, shadow_share=1.0))
    port, stop = start(current, web=web, swap_poll_s=0.05)
    exact = asked(port, web)
    assert exact.one("brewline_recall") == 1.0
    plan = Plan(Recipe(8), items=60, dims=reader.dims)
    nightly(tiny_dataset, reader, judge, copied, end_of(tiny_dataset), form=SnapshotForm(plan=plan))
    until(web, lambda now: now.sums("brewline_swaps_total", "result")["ok"] == 1)
    searcher = current.stack.today.shown[0].searcher
    assert isinstance(searcher, Searcher)
    searcher.nprobe = 1
    poor = asked(port, web)
    recall = poor.one("brewline_recall")
    assert recall is not None and 0 < recall < 0.95
    told = poor.sums("brewline_recall_answers_total", "result")
    assert told["compared"] >= 2 * ASKED and told["dropped"] == told["failed"] == 0
    stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "shadow" and thread not in others]


def test_a_server_that_compares_nothing_tells_no_recall(stack: Stack, start: Start) -> None:
    web = Web("127.0.0.1", 0)
    start(stack, web=web)
    now = look(web.address)
    assert now.one("brewline_recall") is None and not now.sums("brewline_recall_answers_total", "result")
    assert not now.sums("brewline_searches_total", "look"), "FAISS searches so few items, and looks once"


def test_a_scrape_tells_by_which_look_searches_were_answered(
    night: Path, copied: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.serving.LEAST_ROWS", 0)
    monkeypatch.setattr("index.serving.fastest_way", lambda _: "int8")
    web = Web("127.0.0.1", 0)
    port, _ = start(open_stack(copied, night / "encoder1", night / "ranker1", None, shadow_share=1.0), web=web)
    before = look(web.address).sums("brewline_searches_total", "look")
    after = asked(port, web).sums("brewline_searches_total", "look")
    assert after == {**before, "everything": before["everything"] + ASKED}, "so few items are all scored"
