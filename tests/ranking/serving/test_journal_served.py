"""What a server notes of what it served: what was handed over, in its order, ids only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ranking.pipeline import Degraded
from ranking.serving.client import Client, ServiceError
from ranking.serving.stack import Stack, open_stack
from retrieval.data.exported_journal import Done, Record, Shown, read_journal
from retrieval.data.refusals import Refusals
from retrieval.data.schema import MemberView
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
        client.recommend(views[3], 4)  # described, and named
        client.recommend(MemberView(views[3].member.__class__("", {"role": "SECRET role"})), 4)
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
    assert [(one.member, one.surface, len(one.items)) for one in shown] == [("m1", "feed", 5), ("m2", "mail", 3), ("m3", "", 4)]
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
    port, _ = start(opened, journal=tmp_path / "file")
    with Client(f"127.0.0.1:{port}") as client:
        assert client.recommend("m1", 5).degraded is Degraded.NONE
        assert client.record("m1", [Told("e1", Entry("i1", 5, "like"))]).recorded == 1
