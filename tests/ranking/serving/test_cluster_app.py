"""The line taken apart gives the answers of the single server: in one process, and on a local Ray where there is one."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format

from index.publish import current
from index.shards import ShardError
from index.snapshot import Shard, Snapshot
from index.store import open_store
from ranking.ranker import Ranker
from ranking.serving import answers
from ranking.serving import recommender_pb2 as pb
from ranking.serving.answers import Call
from ranking.serving.batch import retrieve_batch
from ranking.serving.cluster_app_parts import Ask, EncoderReplica, FarStack, RankerReplica, ShardReplica, far_stack
from ranking.serving.stack import PROBE, Stack, default_members, open_stack
from ranking.serving.swap_look import Source
from retrieval.data.schema import Dataset
from retrieval.encoder import Encoder
from retrieval.fingerprint import FingerprintMismatch
from retrieval.members import MemberStore, UnknownMember
from retrieval.moments import end_of
from retrieval.refresh import SnapshotForm, nightly

RAY = importlib.util.find_spec("ray") is not None
SHARDS = 3
DIMS = 32
"""Of the night's encoder."""
ON_RAY = """
import json, re, sys
from pathlib import Path
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
opened = {}  # kind of replica -> files of the snapshot, and of torch, that it has mapped
for process in Path("/proc").glob("[0-9]*"):
    try:
        title, maps = ((process / name).read_text(errors="replace") for name in ("cmdline", "maps"))
    except OSError:
        continue
    if kind := re.search(r"ServeReplica:brewline:([a-z0-9-]+)", title):
        opened.setdefault(kind[1], []).extend(re.findall(r"/(?:snapshots/[^/]+|torch/lib)/(\\S+)", maps))
serve.shutdown()
ray.shutdown()
print("told:" + json.dumps([*told, opened]))
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
def divided(night: Path, tiny_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the same night, in three shards. Shared: do not write into it."""
    store = tmp_path_factory.mktemp("divided")
    reader, judge = Encoder.load(night / "encoder1"), Ranker.load(night / "ranker1")
    members = MemberStore(open_store(default_members(store)), reader.fingerprint)
    nightly(tiny_dataset, reader, judge, store, end_of(tiny_dataset), members, form=SnapshotForm(shards=SHARDS))
    return store


@pytest.fixture(scope="module")
def whole(night: Path, divided: Path) -> Stack:
    """The divided night behind the single server."""
    return open_stack(divided, night / "encoder1", night / "ranker1", None)


def served(store: Path) -> Snapshot:
    path = current(store)
    assert path is not None
    return Snapshot.open(path)


def searches_of(store: Path) -> list[Ask]:
    snapshot = served(store)
    return [here(ShardReplica(str(snapshot.path), place, True)) for place in range(len(snapshot.shards))]


def apart(
    night: Path, store: Path, ranker: str = "ranker1", encoder: str = "encoder1", searches: list[Ask] | None = None
) -> FarStack:
    source, published = Source(store, night / encoder, night / ranker, default_members(store)), current(store)
    assert published is not None
    reader, judge = here(EncoderReplica(str(night / encoder), DIMS)), here(RankerReplica(str(night / ranker)))
    return far_stack(source, published, reader, searches_of(store) if searches is None else searches, judge)


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


def unnamed(answers: list[Any]) -> str:
    """Answers as text, without the name of the snapshot."""
    return re.sub(r"\d{8}-[0-9a-f]{12}", "SNAPSHOT", json.dumps(answers, sort_keys=True))


def single(stack: Stack, asked: Sequence[tuple[str, str, dict[str, Any]]]) -> list[Any]:
    found: list[Any] = []
    for method, kind, fields in asked:
        try:
            answer = WORKS[method](stack.now(), message(kind, fields), Call("r", 0.0))
            found.append(comparable(json_format.MessageToDict(answer)))
        except UnknownMember as error:
            found.append(["NOT_FOUND", str(error)])
    return found


def test_one_server_answers_from_shards_as_from_the_undivided_night(stack: Stack, whole: Stack) -> None:
    asked = requests(stack)
    undivided, answers = single(stack, asked), single(whole, asked)
    assert unnamed(answers) == unnamed(undivided) and len(whole.snapshot.shards) == SHARDS
    assert [len(one.get("results", {}).get("items", [])) for one in answers[:3]] == [10, 5, 9]
    assert whole.now().recommender.retriever.moment.serving.why.startswith("3 shards, each by FAISS Flat: ")


def test_the_parts_answer_as_the_whole_and_who_asks_them_needs_no_vectors(
    night: Path, divided: Path, whole: Stack, tmp_path: Path
) -> None:
    rest = tmp_path / "rest"
    shutil.copytree(divided, rest, ignore=shutil.ignore_patterns("*.vectors.npy", "*.faiss"))
    asked = requests(whole)
    far = apart(night, rest, searches=searches_of(divided))
    assert single(far, asked) == single(whole, asked)
    here, there = whole.now().recommender.retriever, far.now().recommender.retriever
    vector, rows = here.encoder.members([PROBE])[0], np.random.default_rng(0).permutation(60)[:20]
    np.testing.assert_allclose(there.cosines(vector, rows), here.cosines(vector, rows), atol=1e-6)
    assert there.cosines(vector, rows[:0]).shape == (0,)


def test_a_replica_opens_its_own_shard_only(divided: Path, tmp_path: Path) -> None:
    snapshot = served(divided)
    copy = tmp_path / snapshot.name
    shutil.copytree(snapshot.path, copy, ignore=shutil.ignore_patterns("shard-0.*", "shard-2.*", "ids.*", "catalog*"))
    replica = ShardReplica(str(copy), 1, exact=False)
    assert replica.name() == f"{snapshot.name}/1"
    found = replica.search(Shard.open(copy, 1).vectors[:2].copy(), 3, None, None)
    assert found.rows[:, 0].tolist() == [0, 1]


def test_a_night_that_is_not_divided_is_one_shard(night: Path, stack: Stack) -> None:
    asked = requests(stack)[3:4]
    assert single(apart(night, night / "store"), asked) == single(stack, asked)


def test_many_threads_may_ask_at_once(night: Path, divided: Path, whole: Stack) -> None:
    far, asked = apart(night, divided), requests(whole)[3:4]
    expected, seen = single(whole, asked), []
    threads = [threading.Thread(target=lambda: seen.append(single(far, asked))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [expected] * 8


def test_what_is_withdrawn_by_day_is_in_no_answer(night: Path, divided: Path, tmp_path: Path) -> None:
    copied = tmp_path / "store"
    shutil.copytree(divided, copied)
    writer = open_stack(copied, night / "encoder1", night / "ranker1", None)
    far = apart(night, copied)
    first = far.now().recommender.retriever
    best = first.retrieve(first.encoder.members([answers.asker_of(far, pb.Member(id="m3"), "").view])[0], 5).ids
    writer.today.withdraw(best[:2])
    writer.today.close()
    for second in (apart(night, copied), open_stack(copied, night / "encoder1", night / "ranker1", None)):
        now = second.now().recommender.retriever
        found = now.retrieve(now.encoder.members([answers.asker_of(far, pb.Member(id="m3"), "").view])[0], 60).ids
        assert not set(found) & set(best[:2]) and set(best[2:]) <= set(found)
        second.today.close()
    far.today.close()


def test_parts_of_different_nights_are_refused(night: Path, divided: Path) -> None:
    with pytest.raises(FingerprintMismatch):
        apart(night, divided, ranker="ranker2")
    searches = searches_of(divided)
    with pytest.raises(ShardError, match="the replicas search shard"):
        apart(night, divided, searches=searches[::-1])
    with pytest.raises(ShardError, match="2 shards are deployed"):
        apart(night, divided, searches=searches[:2])
    with pytest.raises(ShardError, match="3 shards are deployed"):
        apart(night, night / "store", searches=searches)


def test_who_imports_the_application_loads_no_torch() -> None:
    program = "import sys, ranking.serving.cluster_app; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


@pytest.mark.skipif(not RAY, reason="needs Ray Serve (extra cluster)")
def test_a_local_ray_answers_as_one_process(night: Path, divided: Path, whole: Stack) -> None:
    """In a process of its own: Ray asks the machine for its address, which the guard of these tests forbids."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = [str(found.getsockname()[1]) for found in (one, other)]
    settings = {"store": str(divided), "encoder": str(night / "encoder1"), "timeout_s": 60}
    asked = requests(whole)
    words = [
        json.dumps({**settings, "ranker": str(night / "ranker1")}),
        json.dumps([*asked, ("Info", "InfoRequest", {})]),
        *ports,
    ]
    quiet = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", ON_RAY, *words], capture_output=True, text=True, timeout=400, check=False, env=quiet
    )
    assert done.returncode == 0, done.stderr[-4_000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("told:")]
    *told, about, opened = json.loads(line.removeprefix("told:"))
    assert comparable(told) == single(whole, asked)
    assert (int(about["items"]), about["index"], about["requests"]) == (
        len(whole.catalog),
        f"{SHARDS} shards",
        str(len(asked) + 1),
    )
    files = {kind: {name for name in names if name.endswith((".vectors.npy", ".faiss"))} for kind, names in opened.items()}
    shards = {f"shard-{place}": {f"shard-{place}.vectors.npy"} for place in range(SHARDS)}
    assert files == {"encoder": set(), "ranker": set(), "ingress": set(), **shards} and "catalog.arrow" in opened["ingress"]
    torch = "libtorch_cpu.so"
    assert torch in opened["encoder"] and torch not in opened["ingress"], "an ingress is small, and up before the models are"
