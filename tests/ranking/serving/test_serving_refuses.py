"""What the service refuses, and with which status: each thing that does not fit has one, and one clear line."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from index.manifest import SnapshotMismatch
from ranking.ranker import Ranker
from ranking.serving import recommender_pb2 as pb
from ranking.serving import recommender_pb2_grpc
from ranking.serving.client import Client, ServiceError
from ranking.serving.server import CannotListen, ServeSettings, check_address
from ranking.serving.stack import NotServable, open_stack
from ranking.serving.status import TABLE, message_of, status_of
from retrieval.encoder import Encoder
from retrieval.fingerprint import FingerprintMismatch

Start = Callable[..., tuple[int, Callable[[], None]]]
SERVICE = "brewline.v1.Recommender"


def status(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """The status and the words of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


@pytest.mark.parametrize(
    ("method", "request_", "code", "words"),
    [
        ("Recommend", pb.RecommendRequest(member=pb.Member(id="nobody")), "NOT_FOUND", "nobody"),
        ("Retrieve", pb.RetrieveRequest(member=pb.Member(id="nobody")), "NOT_FOUND", "nobody"),
        ("Recommend", pb.RecommendRequest(), "INVALID_ARGUMENT", "member: neither"),
        ("Recommend", pb.RecommendRequest(member=pb.Member(id="x" * 600)), "INVALID_ARGUMENT", "member.id"),
        ("Recommend", pb.RecommendRequest(member=pb.Member(id="m1"), k=10_001), "INVALID_ARGUMENT", "k: 10,001"),
        ("Recommend", pb.RecommendRequest(member=pb.Member(id="m1"), k=9, fanout=8), "INVALID_ARGUMENT", "fanout: 8"),
        ("Recommend", pb.RecommendRequest(member=pb.Member(id="m1"), task="dance"), "INVALID_ARGUMENT", "dance"),
        ("Retrieve", pb.RetrieveRequest(member=pb.Member(id="m1"), k=20_001), "INVALID_ARGUMENT", "k: 20,001"),
        (
            "Recommend",
            pb.RecommendRequest(member=pb.Member(id="m1"), instruction="é" * 1_025),
            "INVALID_ARGUMENT",
            "instruction: 2,050 bytes",
        ),
        ("Rank", pb.RankRequest(member=pb.Member(id="m1")), "INVALID_ARGUMENT", "items: none"),
        (
            "Rank",
            pb.RankRequest(member=pb.Member(id="m1"), items=pb.Ids(plain=["i1", "i99"])),
            "NOT_FOUND",
            "items[1]: 'i99'",
        ),
        (
            "Rank",
            pb.RankRequest(member=pb.Member(id="m1"), items=pb.Ids(plain=["i1"], packed=b"i2")),
            "INVALID_ARGUMENT",
            "items: plain and packed",
        ),
        (
            "Recommend",
            pb.RecommendRequest(member=pb.Member(id="m1"), exclude=pb.Ids(packed=b"i2", ends=b"\1")),
            "INVALID_ARGUMENT",
            "exclude.ends",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_a_typed_status(
    stub: recommender_pb2_grpc.RecommenderStub, method: str, request_: object, code: str, words: str
) -> None:
    calls = {"Recommend": stub.Recommend, "Retrieve": stub.Retrieve, "Rank": stub.Rank}
    seen, details = status(lambda: calls[method](request_, timeout=10))
    assert seen.name == code
    assert words in details and "Traceback" not in details


@pytest.mark.parametrize(
    ("described", "code", "words"),
    [
        (pb.Description(history=[pb.Engagement(item_id="i999")]), "NOT_FOUND", "history[0]"),
        (pb.Description(history=[pb.Engagement()]), "INVALID_ARGUMENT", "history[0].item_id"),
        (pb.Description(history=[pb.Engagement(item_id="i1")] * 2_049), "INVALID_ARGUMENT", "2,049 entries"),
        (pb.Description(profile=[pb.ProfileField(words="x")]), "INVALID_ARGUMENT", "profile[0].name"),
        (pb.Description(profile=[pb.ProfileField(name="a", words="x")] * 2), "INVALID_ARGUMENT", "profile[1].name"),
        (pb.Description(profile=[pb.ProfileField(name="a", number=math.nan)]), "INVALID_ARGUMENT", "not finite"),
        (pb.Description(profile=[pb.ProfileField(name="a", words="x" * 16_385)]), "INVALID_ARGUMENT", "16,385 bytes"),
        (pb.Description(connections=[pb.Connection(kind="follows")]), "INVALID_ARGUMENT", "connections[0].other_id"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(
    stub: recommender_pb2_grpc.RecommenderStub, described: pb.Description, code: str, words: str
) -> None:
    seen, details = status(lambda: stub.Retrieve(pb.RetrieveRequest(member=pb.Member(description=described)), timeout=10))
    assert (seen.name, words in details) == (code, True), details


def test_bytes_that_are_no_message_are_an_invalid_argument(port: int) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        raw = channel.unary_unary(f"/{SERVICE}/Recommend")
        assert status(lambda: raw(b"\xff\xff\xff\xff", timeout=10))[0] is grpc.StatusCode.INVALID_ARGUMENT
        huge = b"\x2a" + b"\xff" * (5 << 20)
        assert status(lambda: raw(huge, timeout=10))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    with Client(f"127.0.0.1:{port}") as client:
        assert len(client.recommend("m1", 3)) == 3


def test_models_of_another_night_are_refused_with_both_values(night: Path) -> None:
    first, second = (Encoder.load(night / f"encoder{seed}").fingerprint for seed in (1, 2))
    with pytest.raises(SnapshotMismatch) as wrong_encoder:
        open_stack(night / "store", night / "encoder2", None, None)
    assert first in str(wrong_encoder.value) and second in str(wrong_encoder.value)
    with pytest.raises(FingerprintMismatch) as wrong_pair:
        open_stack(night / "store", night / "encoder1", night / "ranker2", None)
    assert first in str(wrong_pair.value) and second in str(wrong_pair.value)
    with pytest.raises(FingerprintMismatch) as wrong_ranker:
        open_stack(night / "store", night / "encoder1", night / "ranker3", None)
    for seed in (1, 3):
        assert Ranker.load(night / f"ranker{seed}").fingerprint in str(wrong_ranker.value)


def test_missing_folders_are_one_clear_line(night: Path, tmp_path: Path) -> None:
    for store, encoder, ranker, words in (
        (tmp_path / "no", night / "encoder1", None, "--store"),
        (tmp_path, night / "encoder1", None, "nothing was published"),
        (night / "store", tmp_path / "no", None, "--encoder"),
        (night / "store", night / "encoder1", tmp_path / "no", "--ranker"),
    ):
        with pytest.raises(NotServable, match=words) as caught:
            open_stack(store, encoder, ranker, None)
        assert "\n" not in str(caught.value)


def test_retrieval_alone_can_be_served(night: Path, start: Start) -> None:
    port, _ = start(open_stack(night / "store", night / "encoder1", None, None))
    with Client(f"127.0.0.1:{port}") as client:
        assert len(client.retrieve("m1", 5)) == 5
        assert client.info().ranker == "" and client.info().tasks == []
        for call in (lambda: client.recommend("m1", 5), lambda: client.rank("m1", ["i1"])):
            with pytest.raises(ServiceError, match="--ranker") as caught:
                call()
            assert caught.value.code == "FAILED_PRECONDITION"


def test_a_taken_port_and_a_public_address_are_refused(port: int) -> None:
    with pytest.raises(CannotListen, match=rf"127\.0\.0\.1:{port} \(Address already in use\)"):
        check_address(ServeSettings(port=port))
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(CannotListen, match="--insecure-public"):
            check_address(ServeSettings(host=host, port=0))
    check_address(ServeSettings(host="localhost", port=0))
    check_address(ServeSettings(host="0.0.0.0", port=0, insecure_public=True))
    with pytest.raises(CannotListen, match="cannot listen"):
        check_address(ServeSettings(host="192.0.2.1", port=0, insecure_public=True))


def test_a_client_without_a_server_says_so() -> None:
    with (
        Client("127.0.0.1:1", deadline_ms=500) as client,
        pytest.raises(ServiceError, match=r"127\.0\.0\.1:1 says UNAVAILABLE") as caught,
    ):
        client.info()
    assert "\n" not in str(caught.value)


def test_each_of_our_errors_has_one_status() -> None:
    kinds = [kind for kind, _ in TABLE]
    assert len(set(kinds)) == len(kinds)
    for place, kind in enumerate(kinds):
        assert not any(issubclass(kind, before) for before in kinds[:place]), "a row that nothing can reach"
    assert status_of(ZeroDivisionError()) is grpc.StatusCode.INTERNAL
    assert "r1" in message_of(ZeroDivisionError("secret"), "r1") and "secret" not in message_of(ZeroDivisionError("secret"), "r1")
