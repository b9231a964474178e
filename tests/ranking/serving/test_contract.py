"""The contract keeps what it promised, and is enough: the documented calls work for a client that knows only the reflection.

`proto/recommender.bin` is the descriptor of the last release. After a release that added to the contract, write it again from
`recommender_pb2.DESCRIPTOR.serialized_pb`; whatever this test finds missing is a promise broken, not a reason to write it again.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, Parse
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from ranking.serving import recommender_pb2
from ranking.serving.stack import Stack, open_stack

ROOT = Path(__file__).parents[3]
OURS = {"m42": "m1", "p17": "i1", "p99": "i2", "p500": "new one"}
"""The ids of the page -> those of the tiny shop."""
Start = Callable[..., tuple[int, Callable[[], None]]]


def broken(before: FileDescriptorProto, after: FileDescriptorProto) -> list[str]:
    """What a client of `before` would miss in `after`, one sentence each."""
    messages = {one.name: one for one in after.message_type}
    enums = {one.name: one for one in after.enum_type}
    found = [] if before.package == after.package else [f"package {before.package} is {after.package}"]
    for message in before.message_type:
        found += _fields(message, messages.get(message.name, DescriptorProto()))
    for enum in before.enum_type:
        found += _values(enum, enums.get(enum.name, EnumDescriptorProto()))
    methods = {f"{service.name}.{one.name}": one for service in after.service for one in service.method}
    for service in before.service:
        for method in service.method:
            if methods.get(f"{service.name}.{method.name}") != method:
                found.append(f"call {method.name} is gone or takes or gives something else")
    return found


def _fields(before: DescriptorProto, after: DescriptorProto) -> list[str]:
    def facts(message: DescriptorProto, field: FieldDescriptorProto) -> tuple[object, ...]:
        group = message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else ""
        return field.name, field.type, field.label, field.type_name, field.proto3_optional, group

    there = {field.number: facts(after, field) for field in after.field}
    return [
        f"{before.name}.{field.name} = {field.number} is gone or another"
        for field in before.field
        if there.get(field.number) != facts(before, field)
    ]


def _values(before: EnumDescriptorProto, after: EnumDescriptorProto) -> list[str]:
    there = {value.number: value.name for value in after.value}
    return [f"{before.name}.{value.name} is gone or another" for value in before.value if there.get(value.number) != value.name]


def released() -> FileDescriptorProto:
    return FileDescriptorProto.FromString((ROOT / "proto" / "recommender.bin").read_bytes())


def test_nothing_that_was_released_is_gone() -> None:
    now = FileDescriptorProto.FromString(recommender_pb2.DESCRIPTOR.serialized_pb)
    assert broken(released(), now) == []


def message(file: FileDescriptorProto, name: str) -> DescriptorProto:
    return next(one for one in file.message_type if one.name == name)


CHANGES: dict[str, Callable[[FileDescriptorProto], object]] = {
    "a field removed": lambda file: message(file, "Member").field.pop(),
    "a field renumbered": lambda file: setattr(message(file, "Member").field[0], "number", 77),
    "a field renamed": lambda file: setattr(message(file, "Member").field[0], "name", "name"),
    "a field retyped": lambda file: setattr(message(file, "Member").field[0], "type", FieldDescriptorProto.TYPE_BYTES),
    "a field repeated": lambda file: setattr(message(file, "Member").field[0], "label", FieldDescriptorProto.LABEL_REPEATED),
    "a message of another kind": lambda file: setattr(message(file, "Member").field[1], "type_name", ".brewline.v1.Ids"),
    "presence lost": lambda file: setattr(message(file, "ResultItem").field[4], "proto3_optional", False),
    "a message removed": lambda file: file.message_type.remove(message(file, "Weight")),
    "a value renumbered": lambda file: setattr(file.enum_type[0].value[1], "number", 9),
    "a call removed": lambda file: file.service[0].method.pop(),
    "a call retyped": lambda file: setattr(file.service[0].method[0], "input_type", ".brewline.v1.RankRequest"),
    "a stream instead": lambda file: setattr(file.service[0].method[0], "server_streaming", True),
    "another package": lambda file: setattr(file, "package", "brewline.v2"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_each_way_of_breaking_it_is_seen(change: Callable[[FileDescriptorProto], object]) -> None:
    after = released()
    change(after)
    assert len(broken(released(), after)) >= 1


def test_additions_break_nothing() -> None:
    after = released()
    message(after, "Member").field.add(name="later", number=99, type=FieldDescriptorProto.TYPE_STRING)
    after.message_type.add(name="Later")
    after.enum_type[0].value.add(name="LATER", number=99)
    assert broken(released(), after) == []


def documented() -> list[list[str]]:
    """The words of every grpcurl command of the README, the manual and the contract's own comments."""
    pages = [ROOT / "README.md", ROOT / "proto" / "recommender.proto", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    return [shlex.split(line) for line in re.findall(r"^(?:\s|//|[$>])*(grpcurl .*)$", text, re.M)]


def grpcurl(words: list[str], port: int) -> dict:
    """What the command prints, by reflection alone, as grpcurl works: no generated class takes part."""
    _, plain, *options, address, method = words
    assert plain == "-plaintext" and address == "127.0.0.1:50051"
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        if method == "list":
            return {"services": list(database.get_services())}
        flag, data = options
        assert flag == "-d"
        for theirs, ours in OURS.items():
            data = data.replace(f'"{theirs}"', f'"{ours}"')
        service, _, name = method.partition("/")
        call = DescriptorPool(database).FindServiceByName(service).FindMethodByName(name)
        request = Parse(data, GetMessageClass(call.input_type)())
        ask = channel.unary_unary(
            f"/{method}",
            request_serializer=lambda one: one.SerializeToString(),
            response_deserializer=GetMessageClass(call.output_type).FromString,
        )
        return MessageToDict(ask(request, timeout=60), preserving_proto_field_name=True)


def test_the_documented_calls_work(night: Path, copied: Path, start: Start) -> None:
    stack: Stack = open_stack(copied, night / "encoder1", night / "ranker1", None)
    port, _ = start(stack)
    commands = documented()
    told = {words[-1].rpartition("/")[2]: grpcurl(words, port) for words in commands}
    methods = {method.name for method in recommender_pb2.DESCRIPTOR.services_by_name["Recommender"].methods}
    assert set(told) == methods | {"list", "Check"}, "every call is documented"
    assert "brewline.v1.Recommender" in told["list"]["services"] and told["Check"] == {"status": "SERVING"}
    assert {row["item_id"] for row in told["Rank"]["results"]["items"]} == {"i1", "i2"}
    assert len(told["Recommend"]["results"]["items"]) == 5 and told["Retrieve"]["results"]["count"] == 5
    assert [row.get("status", 0) for row in told["RetrieveBatch"]["rows"]] == [0, 5]
    assert told["WithdrawItems"]["were_here"] == 1 and told["RecordEngagements"]["recorded"] == 1
    assert told["Info"]["items"] == "60" and told["Explain"]["detail"] and json.dumps(told)
