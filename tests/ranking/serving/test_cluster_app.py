"""The line taken apart gives the answers of the single server: in one process, and on a local Ray where there is one."""

from __future__ import annotations

import base64
import importlib.util
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from google.protobuf import json_format

from index.publish import current
from index.shards import ShardError, by_hash, by_range, write_shards
from index.snapshot import Snapshot
from ranking.serving import answers
from ranking.serving import recommender_pb2 as pb
from ranking.serving.answers import Call
from ranking.serving.batch import retrieve_batch
from ranking.serving.cluster_app import SERVICER, ClusterAppError, ClusterSettings, application
from ranking.serving.cluster_app_parts import (
    Ask,
    EncoderReplica,
    FarStack,
    RankerReplica,
    ShardReplica,
    far_stack,
    shard_folders,
)
from ranking.serving.stack import Stack, default_members, open_stack
from ranking.serving.swap_look import Source
from retrieval.fingerprint import FingerprintMismatch
from retrieval.members import UnknownMember

ROOT = Path(__file__).parents[3]
RAY = importlib.util.find_spec("ray") is not None
SHARDS = 3
DIMS = 32
"""Of the night's encoder."""
ON_RAY = """
import json, sys
import grpc
import ray
from google.protobuf import json_format
from ray import serve
from ranking.serving import recommender_pb2 as pb, recommender_pb2_grpc
from ranking.serving.cluster_app import SERVICER, application

settings, asked, port = json.loads(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)  # as many as there are replicas, whatever the machine has
http = {"host": "127.0.0.1", "port": int(sys.argv[4])}
serve.start(proxy_location="HeadOnly", http_options=http, grpc_options={"port": port, "grpc_servicer_functions": [SERVICER]})
serve.run(application(settings), name="brewline")
told = []
with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
    stub = recommender_pb2_grpc.RecommenderStub(channel)
    for method, kind, fields in asked:
        try:
            found = getattr(stub, method)(json_format.ParseDict(fields, getattr(pb, kind)()), timeout=60)
            told.append(json_format.MessageToDict(found))
        except grpc.RpcError as error:
            told.append([error.code().name, error.details()])
serve.shutdown()
ray.shutdown()
print("told:" + json.dumps(told))
"""
WORKS: dict[str, Callable[[Stack, Any, Call], Any]] = {
    "Recommend": answers.recommend,
    "Retrieve": answers.retrieve,
    "RetrieveBatch": retrieve_batch,
    "Rank": answers.rank,
}


def here(replica: object) -> Ask:
    """Asks a replica in this process."""
    return lambda method, *given: getattr(replica, method)(*given)


@pytest.fixture(scope="module")
def shards(night: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    published = current(night / "store")
    assert published is not None
    snapshot = Snapshot.open(published)
    write_shards(snapshot, by_hash(list(snapshot.ids), SHARDS), folder)
    return folder


def apart(night: Path, shards: Path, store: Path | None = None, ranker: str = "ranker1", encoder: str = "encoder1") -> FarStack:
    store = store or night / "store"
    source = Source(store, night / encoder, night / ranker, default_members(store))
    published = current(store)
    assert published is not None
    searches = [here(ShardReplica(str(folder), True)) for folder in shard_folders(shards, published.name)]
    reader = EncoderReplica(str(night / encoder), DIMS)
    return far_stack(source, shards, here(reader), searches, here(RankerReplica(str(night / ranker))))


def requests(stack: Stack) -> list[tuple[str, str, dict[str, Any]]]:
    """Calls of every kind, and some that must fail."""
    some = [item.item_id for item in (stack.catalog.item(row) for row in range(5))]
    member = {"id": "m3"}
    described = {"description": {"history": [{"itemId": some[0], "action": "like"}]}}
    found = [
        ("Recommend", {"member": member, "k": 10, "fanout": 30, "readable": True}),
        ("Recommend", {"member": described, "k": 5, "fanout": 60, "readable": True}),
        ("Recommend", {"member": member, "k": 9, "readable": True, "filter": {"categories": ["coffee"]}}),
        ("Retrieve", {"member": member, "k": 25, "exclude": {"plain": some[:3]}, "readable": True}),
        ("Rank", {"member": member, "items": {"plain": some}, "readable": True}),
        ("RetrieveBatch", {"requests": [{"member": member, "k": 4}, {"member": {"id": "m5"}, "k": 7}]}),
        ("Retrieve", {"member": {"id": "nobody"}, "k": 3}),
    ]
    return [(method, f"{method}Request", fields) for method, fields in found]


def message(kind: str, fields: dict[str, Any]) -> Any:
    return json_format.ParseDict(fields, getattr(pb, kind)())


def comparable(told: Any) -> Any:
    """What a caller sees, without what is of one call alone; floats to six digits."""
    if isinstance(told, dict):
        return {name: _plain(name, value) for name, value in told.items() if name not in ("times", "requestId")}
    if isinstance(told, list):
        return [comparable(value) for value in told]
    return round(told, 6) if isinstance(told, float) else told


def _plain(name: str, value: Any) -> Any:
    if name in ("scores", "probabilities"):
        return [round(one, 5) for one in np.frombuffer(base64.b64decode(value), "<f4").tolist()]
    return comparable(value)


def single(stack: Stack, asked: Sequence[tuple[str, str, dict[str, Any]]]) -> list[Any]:
    found: list[Any] = []
    for method, kind, fields in asked:
        try:
            answer = WORKS[method](stack.now(), message(kind, fields), Call("r", 0.0))
            found.append(comparable(json_format.MessageToDict(answer)))
        except UnknownMember as error:
            found.append(["NOT_FOUND", str(error)])
    return found


def test_the_parts_answer_as_the_whole(night: Path, shards: Path, stack: Stack) -> None:
    asked = requests(stack)
    whole, parts = single(stack, asked), single(apart(night, shards), asked)
    assert parts == whole
    assert [len(one.get("results", {}).get("items", [])) for one in whole[:3]] == [10, 5, 9]


def test_many_threads_may_ask_at_once(night: Path, shards: Path, stack: Stack) -> None:
    far, asked = apart(night, shards), requests(stack)[3:4]
    expected, seen = single(stack, asked), []
    threads = [threading.Thread(target=lambda: seen.append(single(far, asked))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [expected] * 8


def test_what_is_withdrawn_by_day_is_in_no_answer(night: Path, shards: Path, copied: Path) -> None:
    writer = open_stack(copied, night / "encoder1", night / "ranker1", None)
    far = apart(night, shards, copied)
    first = far.now().recommender.retriever
    best = first.retrieve(first.encoder.members([answers.asker_of(far, pb.Member(id="m3"), "").view])[0], 5).ids
    writer.today.withdraw(best[:2])
    writer.today.close()
    second = apart(night, shards, copied).now().recommender.retriever
    found = second.retrieve(second.encoder.members([answers.asker_of(far, pb.Member(id="m3"), "").view])[0], 60).ids
    assert not set(found) & set(best[:2]) and set(best[2:]) <= set(found)


def test_parts_of_different_nights_are_refused(night: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(FingerprintMismatch):
        apart(night, shards, ranker="ranker2")
    published = current(night / "store")
    assert published is not None
    snapshot = Snapshot.open(published)
    write_shards(snapshot, by_range(len(snapshot.ids), SHARDS), tmp_path)
    for folder in (tmp_path / "0", tmp_path / "nowhere"):
        with pytest.raises(ShardError, match="holds 0 parts"):
            shard_folders(folder, snapshot.name)
    with pytest.raises(ShardError, match="no part 0 of another"):
        shard_folders(tmp_path, "another")
    encoder, source = (
        EncoderReplica(str(night / "encoder1"), DIMS),
        Source(night / "store", night / "encoder1", None, default_members(night / "store")),
    )
    wrong = [here(ShardReplica(str(folder), True)) for folder in reversed(shard_folders(tmp_path, snapshot.name))]
    with pytest.raises(ShardError, match="the replicas search shard"):
        far_stack(source, tmp_path, here(encoder), wrong, None)
    with pytest.raises(ShardError, match="2 shards are deployed"):
        far_stack(source, tmp_path, here(encoder), wrong[:2], None)


def test_a_set_that_is_not_whole_is_refused(night: Path, shards: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", shards / "0", tmp_path / "0"], check=True)
    with pytest.raises(ShardError, match=f"holds 1 parts of .*, expected {SHARDS}"):
        apart(night, tmp_path)


def test_settings_are_read_or_refused() -> None:
    told = ClusterSettings.read(
        {"store": "s", "shards": "d", "encoder": "e", "exact": "false", "most_rankers": "3", "timeout_s": 1}
    )
    assert (told.exact, told.most_rankers, told.timeout_s, told.source.ranker) == (False, 3, 1.0, None)
    for wrong in (
        {"store": "s"},
        {**vars(told), "colour": "red"},
        {**vars(told), "most_rankers": "many"},
        {**vars(told), "exact": "so"},
    ):
        with pytest.raises(ClusterAppError):
            ClusterSettings.read(wrong)


def test_the_example_is_an_application() -> None:
    config = yaml.safe_load((ROOT / "examples/deploy/serve.yaml").read_text(encoding="utf-8"))
    (app,) = config["applications"]
    assert config["grpc_options"]["grpc_servicer_functions"] == [SERVICER]
    assert app["import_path"] == f"{application.__module__}:{application.__name__}"
    settings = ClusterSettings.read(app["args"])
    assert settings.ranker and config["grpc_options"]["request_timeout_s"] > settings.timeout_s, "our own word comes first"
    module, _, name = SERVICER.rpartition(".")
    assert callable(vars(importlib.import_module(module))[name])


@pytest.mark.skipif(RAY, reason="Ray is installed")
def test_without_ray_the_error_says_what_to_install() -> None:
    with pytest.raises(ClusterAppError, match=r"pip install 'brewline\[cluster\]'"):
        application({"store": "s", "shards": "d", "encoder": "e"})


@pytest.mark.skipif(not RAY, reason="needs Ray Serve (extra cluster)")
def test_a_local_ray_answers_as_one_process(night: Path, shards: Path, stack: Stack) -> None:
    """In a process of its own: Ray asks the machine for its address, which the guard of these tests forbids."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = [str(found.getsockname()[1]) for found in (one, other)]
    settings = {"store": str(night / "store"), "shards": str(shards), "encoder": str(night / "encoder1"), "timeout_s": 60}
    asked = requests(stack)
    words = [
        json.dumps({**settings, "ranker": str(night / "ranker1")}),
        json.dumps([*asked, ("Info", "InfoRequest", {})]),
        *ports,
    ]
    done = subprocess.run([sys.executable, "-c", ON_RAY, *words], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-4_000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("told:")]
    *told, about = json.loads(line.removeprefix("told:"))
    assert comparable(told) == single(stack, asked)
    assert (int(about["items"]), about["index"], about["requests"]) == (
        len(stack.catalog),
        f"{SHARDS} shards",
        str(len(asked) + 1),
    )
