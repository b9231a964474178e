"""What a server notes of what it served: what was handed over, in its order, ids only."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
import pytest
from typer.testing import CliRunner

from ranking.cli.ask import app
from ranking.cli.export_log import ExportError, exported
from ranking.pipeline import Degraded
from ranking.serving import recommender_pb2 as pb
from ranking.serving import recommender_pb2_grpc
from ranking.serving.client import Client, ServiceError
from ranking.serving.journal import Journal
from ranking.serving.journal_served import RECORD_BYTES, SERVICE, Served
from ranking.serving.load_requests import RequestWish, requests_of
from ranking.serving.messages import pack_ids
from ranking.serving.stack import MEMBERS_FILE, Stack, open_stack
from ranking.serving.web import Web
from retrieval.data.exported_journal import JOURNAL_DIR, Done, Record, Shown, read_journal
from retrieval.data.refusals import Refusals
from retrieval.data.schema import Dataset, MemberView
from retrieval.recent import RECENT, Told, decode_told
from retrieval.records import Entry

Start = Callable[..., tuple[int, Callable[[], None]]]


@pytest.fixture
def opened(night: Path, copied: Path) -> Stack:
    return open_stack(copied, night / "encoder1", night / "ranker1", None)


def noted(folder: Path) -> list[Record]:
    refusals = Refusals()
    found = list(read_journal(folder, refusals))
    assert not len(refusals)
    return found


def test_what_was_handed_over_is_noted(opened: Stack, start: Start, tmp_path: Path, views: list[MemberView]) -> None:
    folder = tmp_path / "journal"
    port, stop = start(opened, journal=folder)
    with Client(f"127.0.0.1:{port}") as client:
        first = client.recommend("m1", 5, surface="feed", instruction="SECRET wish", request_id="asked-1")
        second = client.retrieve("m2", 3, surface="mail")
        client.retrieve("m2", 3)
        client.recommend("m2", 3)  # nobody is shown it: a probe, a load, somebody who looks
        client.recommend(views[3], 4, surface="page")  # described, and named
        client.recommend(MemberView(views[3].member.__class__("", {"role": "SECRET role"})), 4, surface="page")
        client.retrieve_batch(["m1", "m2"], 2)
        client.rank("m1", first.ids)
        client.explain("m1", first.ids[0])
        with pytest.raises(ServiceError):
            client.recommend("nobody", 5)
        client.record("m1", [Told("e1", Entry(first.ids[1], 0, "", 1), first.request_id, "feed")])
        client.record("m1", [Told("e1", Entry(first.ids[1], 0, "", 1))])
        with pytest.raises(ServiceError):
            client.record("m1", [Told("", Entry("i1", 5, "like"))])
    stop()
    shown = [one for one in noted(folder) if isinstance(one, Shown)]
    done = [one for one in noted(folder) if isinstance(one, Done)]
    assert [(one.member, one.surface, len(one.items)) for one in shown] == [
        ("m1", "feed", 5),
        ("m2", "mail", 3),
        ("m3", "page", 4),
    ]
    assert shown[0].items == tuple(first.ids) and shown[1].items == tuple(second.ids)
    assert first.probabilities is not None
    assert shown[0].probabilities == pytest.approx(first.probabilities.tolist(), abs=1e-6) and not shown[1].probabilities
    assert (shown[0].request, shown[0].snapshot, shown[0].encoder, shown[0].ranker, shown[0].degraded) == (
        "asked-1", first.snapshot, first.encoder, first.ranker, "NONE",
    )  # fmt: skip
    assert shown[1].ranker == "" and shown[0].task == first.task
    assert [(one.member, one.event, one.item, one.label) for one in done] == [("m1", "e1", first.ids[1], 1)] * 2
    assert done[0].request == "asked-1" and done[0].timestamp == pytest.approx(shown[0].at, abs=60)
    written = b"".join(path.read_bytes() for path in folder.iterdir())
    assert b"SECRET" not in written and b"fond of" not in written and b"short piece" not in written


def test_loads_and_those_who_look_leave_no_impression(opened: Stack, start: Start, copied: Path, tmp_path: Path) -> None:
    port, stop = start(opened, journal=tmp_path / "journal")
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = recommender_pb2_grpc.RecommenderStub(channel)
        for one in requests_of(copied, None, RequestWish("recommend", distinct=3)):
            assert stub.Recommend(pb.RecommendRequest.FromString(one)).results.count
    looked = CliRunner().invoke(app, ["recommend", "--member", "m1", "--address", f"127.0.0.1:{port}"])
    assert looked.exit_code == 0, looked.output
    stop()
    assert not (tmp_path / "journal").exists()
    assert "no impression is written" in CliRunner().invoke(app, ["recommend", "--help"]).output


def test_the_member_store_keeps_what_the_journal_keeps(opened: Stack, start: Start, tmp_path: Path) -> None:
    port, stop = start(opened, journal=tmp_path / "journal")
    with Client(f"127.0.0.1:{port}") as client:
        client.record("m1", [Told("e1", Entry("i1", 0, "like"), "the-request", "feed"), Told("e2", Entry("i2", 7, "like"))])
        with pytest.raises(ServiceError, match=r"events\[0\]\.request_id"):
            client.record("m1", [Told("e3", Entry("i1", 5, "like"), "x" * 65)])
        with pytest.raises(ServiceError, match="surface"):
            client.recommend("m1", surface="x" * 129)
    stop()
    (stored,) = opened.origin.connection.get_many(RECENT, ["m1"])
    kept = {one.event_id: one for one in decode_told(stored, "m1")}
    (first, second) = (one for one in noted(tmp_path / "journal") if isinstance(one, Done))
    assert kept["e1"] == Told("e1", Entry("i1", first.timestamp, "like"), first.request, first.surface)
    assert kept["e2"] == Told("e2", Entry("i2", second.timestamp, "like")) and second.timestamp == 7


def test_a_journal_that_cannot_be_written_costs_no_answer(opened: Stack, start: Start, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    port, _ = start(opened, journal=tmp_path / "file", web=(web := Web("127.0.0.1", 0)))
    with Client(f"127.0.0.1:{port}") as client:
        assert client.recommend("m1", 5).degraded is Degraded.NONE
        assert client.record("m1", [Told("e1", Entry("i1", 5, "like"))]).recorded == 1
    deadline = time.monotonic() + 20
    while 'brewline_journal_records_total{result="lost"} 1.0' not in metrics(web):
        assert time.monotonic() < deadline, "what is lost is counted where somebody looks"
        time.sleep(0.02)


def metrics(web: Web) -> str:
    with urllib.request.urlopen(f"{web.address}/metrics", timeout=20) as page:
        text: str = page.read().decode()
    return text


def test_an_export_without_its_member_store_is_refused_and_makes_none(copied: Path, tiny_dataset: Dataset) -> None:
    (copied / JOURNAL_DIR).mkdir()
    members = copied / MEMBERS_FILE
    members.rename(copied / "elsewhere")
    with pytest.raises(ExportError, match=f"no member store at sqlite:{members}; give --members"):
        exported(copied, tiny_dataset, None, 1_705_795_200, 1_705_795_200, None)
    assert not members.exists()
    assert exported(copied, tiny_dataset, f"sqlite:{copied / 'elsewhere'}", 1_705_795_200, 1_705_795_200, None).dataset


class _Details(grpc.HandlerCallDetails):
    def __init__(self, method: str) -> None:
        self.method = method


def asked(served: Served, method: str, request: Any, response: Any) -> Any:
    """What a caller gets if the method answers so, behind the journal."""

    async def answer(request: Any, context: Any) -> Any:
        del request, context
        return response

    async def handler(details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        del details
        return grpc.unary_unary_rpc_method_handler(answer)

    async def call() -> Any:
        found = await served.intercept_service(handler, _Details(f"{SERVICE}{method}"))
        assert found is not None
        return await found.unary_unary(request, None)

    return asyncio.run(call())


def test_a_batch_of_the_largest_is_noted_whole(tmp_path: Path) -> None:
    """Each row is charged what it weighs itself, so that an idle disk loses nothing."""
    members, k = 64, 2_000
    rows = [[f"item-{row:02d}-{place:06d}" for place in range(k)] for row in range(members)]
    request = pb.RetrieveBatchRequest(
        requests=[pb.RetrieveRequest(member=pb.Member(id=f"m{row}"), surface="home") for row in range(members)]
    )
    chances = np.full(k, 0.25, "<f4").tobytes()
    found = [pb.BatchRow(results=pb.Results(ids=pack_ids(ids), probabilities=chances, count=k)) for ids in rows]
    response = pb.RetrieveBatchResponse(rows=found, request_id="r")
    journal = Journal(tmp_path, most_bytes=response.ByteSize() + members * RECORD_BYTES)
    assert asked(Served(journal), "RetrieveBatch", request, response) is response
    journal.close()
    assert (journal.written, journal.lost) == (members, 0)
    assert [list(one.items) for one in noted(tmp_path) if isinstance(one, Shown)] == rows
    assert all(isinstance(one, Shown) and one.probabilities == (0.25,) * k for one in noted(tmp_path))


def test_a_fault_of_the_journal_does_not_take_the_answer_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path)
    request = pb.RecommendRequest(member=pb.Member(id="m1"), surface="feed")
    response = pb.RecommendResponse(degraded=cast("pb.Degraded", 99))  # no name: the record cannot be made
    assert asked(Served(journal), "Recommend", request, response) is response
    journal.close()
    assert "is not noted in the journal" in caplog.text and not noted(tmp_path) and journal.lost == 1
