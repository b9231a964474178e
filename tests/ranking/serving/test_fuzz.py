"""Bytes that nobody meant: each ends in a status that says whose fault it is, and the server is as right afterwards as before."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ranking.serving import recommender_pb2 as pb
from ranking.serving.client import Client
from ranking.serving.stack import open_stack

Start = Callable[..., tuple[int, Callable[[], None]]]
Case = tuple[str, bytes]

SERVICE = pb.DESCRIPTOR.services_by_name["Recommender"]
CHECK = "/grpc.health.v1.Health/Check"
CLASSES = {f"/{SERVICE.full_name}/{one.name}": GetMessageClass(one.input_type) for one in SERVICE.methods} | {
    CHECK: health_pb2.HealthCheckRequest
}
FINE = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED"}
IN_FLIGHT = 16

HOSTILE = (
    *("", "\0", "\n\r\t", "a" * 600, "x" * 17_000, "\u202e\ufeff", "日本", "🌹" * 40, "e\u0301" * 90, "﷽" * 500),
    *("<|title|>", "<|member|><|item|>", "'; DROP TABLE items; --", "%s%n", "../../etc/passwd"),
)
WHOLE = (0, 0, 1, 2, 5, 10, 50, 255, 2_000, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, -1, -(2**63), 1_705_795_200)
REAL = (0.0, -0.0, 1.0, -1.0, 0.5, 5e-324, 1e308, -1e308, float("inf"), -float("inf"), float("nan"))
WILD_ONLY = {"packed", "ends", "languages", "regions", "weights", "fanout"}
"""Fields that a well made message does without: two forms at once, columns that the catalogue does not have, sizes that do not
go together."""
LIMITS = {
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
}


class Fuzzer:
    """Messages of every method, the same for the same seed: well made ones, hostile values in them, broken bytes, noise."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._before: dict[str, bytes] = dict.fromkeys(CLASSES, b"")

    def cases(self) -> Iterator[Case]:
        """Method and bytes, without end."""
        while True:
            path = self._rng.choice(list(CLASSES))
            yield path, self._bytes(path)

    def _bytes(self, path: str) -> bytes:
        way = self._rng.random()
        if way < 0.1:
            return self._rng.randbytes(self._rng.choice((0, 1, 2, 7, 60, 400)))
        message = CLASSES[path]()
        self._fill(message, path.rpartition("/")[2], wild=0.0 if way < 0.45 else 0.2)
        whole = message.SerializeToString()
        if way < 0.75:
            self._before[path] = whole
            return whole
        return self._broken(bytearray(whole or b"\n\0"), self._before[self._rng.choice(list(CLASSES))])

    def _broken(self, content: bytearray, other: bytes) -> bytes:
        """The message with a few bytes changed, cut, doubled, or taken from another message."""
        for _ in range(self._rng.randint(1, 4)):
            at = self._rng.randrange(len(content) + 1)
            cut = self._rng.randint(0, 12)
            way = self._rng.randrange(5)
            if way == 0 and at < len(content):
                content[at] ^= 1 << self._rng.randrange(8)
            elif way == 1:
                del content[at : at + cut]
            elif way == 2:
                content[at:at] = content[at : at + cut] * self._rng.randint(1, 4)
            elif way == 3:
                content[at:at] = self._rng.randbytes(cut)
            else:
                content[at:] = other[self._rng.randrange(len(other) + 1) :]
        return bytes(content)

    def _fill(self, message: Message, method: str, wild: float) -> None:
        """Each field is left out, fitting, or (with the chance `wild`) hostile."""
        chosen = {group.name: self._rng.choice(group.fields).name for group in message.DESCRIPTOR.oneofs}
        for field in message.DESCRIPTOR.fields:
            group = field.containing_oneof
            left_out = self._rng.random() < 0.4 if wild else field.name in WILD_ONLY or self._rng.random() < 0.07
            if left_out or (group is not None and chosen[group.name] != field.name):
                continue
            count = self._rng.choice((0, 1, 1, 2, 4)) if self._rng.random() >= wild / 20 else 2_500
            if field.type == FieldDescriptor.TYPE_MESSAGE:
                inner = getattr(message, field.name)
                for one in [inner.add() for _ in range(min(count, 300))] if field.is_repeated else [inner]:
                    one.SetInParent()
                    self._fill(one, method, wild)
            elif field.is_repeated:
                getattr(message, field.name).extend(self._value(field, method, wild) for _ in range(count))
            else:
                setattr(message, field.name, self._value(field, method, wild))

    def _value(self, field: FieldDescriptor, method: str, wild: float) -> object:
        hostile = self._rng.random() < wild
        if field.type == FieldDescriptor.TYPE_STRING:
            return self._rng.choice(HOSTILE) if hostile else self._word(field.name, method)
        if field.type == FieldDescriptor.TYPE_BYTES:
            return self._rng.randbytes(self._rng.choice((0, 3, 4, 8, 64))) if hostile else b""
        if field.type == FieldDescriptor.TYPE_BOOL:
            return self._rng.random() < 0.5
        if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
            return self._rng.choice(REAL) if hostile else self._rng.random()
        least, most = LIMITS.get(field.type, (0, 2**31 - 1))
        return min(max(self._rng.choice(WHOLE), least), most) if hostile else self._rng.choice((0, 1, 5, 30))

    def _word(self, name: str, method: str) -> str:
        """A text that fits. What is put in and taken away are items of the fuzzer's own, so that the night's stay."""
        if name in ("item_id", "plain"):
            own = method in ("UpsertItems", "WithdrawItems")
            return f"{'own' if own else 'i'}{self._rng.randrange(60)}"
        if name in ("id", "member_id"):
            return f"m{self._rng.randrange(40)}"
        if name == "event_id":
            return f"e{self._rng.randrange(10**9)}"
        fitting = {
            "action": ("", "like"),
            "task": ("",),
            "service": ("", SERVICE.full_name),
            "categories": ("gardens", "chess"),
            "name": ("price",) if method == "UpsertItems" else (f"field {self._rng.randrange(10**6)}",),
        }
        return self._rng.choice(fitting.get(name, ("roses and a hedge", "espresso", "author 2", "gardens")))


def statuses(channel: grpc.Channel, cases: Iterator[Case]) -> Counter[tuple[str, str]]:
    """How often each method answered with each status; one that is not fine ends it, with the bytes that did it."""
    calls = {path: channel.unary_unary(path) for path in CLASSES}
    seen: Counter[tuple[str, str]] = Counter()
    while batch := list(islice(cases, IN_FLIGHT)):
        futures = [(path, raw, calls[path].future(raw, timeout=60)) for path, raw in batch]
        for path, raw, future in futures:
            code = future.code().name
            assert code in FINE, f"{path} ends in {code} ({future.details()}) for {len(raw)} bytes {raw[:2_000].hex()}"
            assert "Traceback" not in (future.details() or "")
            seen[path.rpartition("/")[2], code] += 1
    return seen


@pytest.mark.parametrize("count", [2_000, pytest.param(100_000, marks=pytest.mark.soak)])
def test_no_message_hurts_the_server(night: Path, copied: Path, start: Start, count: int) -> None:
    models = (night / "encoder1", night / "ranker1", None)
    port, stop = start(open_stack(copied, *models), most_wait_s=30.0)  # refused for overload, a message would not be read
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, Client(f"127.0.0.1:{port}") as client:
        items = [f"i{number}" for number in range(40)]
        seen = statuses(channel, islice(Fuzzer(count).cases(), count))
        print(sorted(seen.items()))  # noqa: T201
        for path in CLASSES:
            method = path.rpartition("/")[2]
            assert seen[method, "OK"] > 0, f"the fuzzer never gets through to {method}: {sorted(seen.items())}"
            assert seen[method, "INVALID_ARGUMENT"] > 0, method
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        members = [f"m{number}" for number in range(0, 40, 5)]
        lasting = [(client.retrieve(one, 200), client.recommend(one, 20), client.rank(one, items)) for one in members]
    stop()
    port, _ = start(open_stack(copied, *models))
    with Client(f"127.0.0.1:{port}") as client:
        for one, (retrieved, recommended, ranked) in zip(members, lasting):
            for was, fresh in (
                (retrieved, client.retrieve(one, 200)),
                (recommended, client.recommend(one, 20)),
                (ranked, client.rank(one, items)),
            ):
                assert was.ids == fresh.ids, "a server that nobody attacked answers otherwise"
                for column, other in ((was.scores, fresh.scores), (was.probabilities, fresh.probabilities)):
                    assert (column is None) == (other is None)
                    assert column is None or np.allclose(column, other, atol=1e-5)


def test_the_fuzzer_says_the_same_again() -> None:
    one, two, other = (list(islice(Fuzzer(seed).cases(), 300)) for seed in (1, 1, 2))
    assert one == two != other
    kinds = Counter(path for path, _ in one)
    assert set(kinds) == set(CLASSES)
