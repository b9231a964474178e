"""Several real processes at one port: what one is told all know, what one loses the others have, and they end together."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from index.publish import current
from ranking.ranker import Ranker
from ranking.serving import recommender_pb2 as pb
from ranking.serving import recommender_pb2_grpc
from retrieval.data.exported_journal import JOURNAL_DIR
from retrieval.data.schema import Dataset
from retrieval.encoder import Encoder
from retrieval.moments import end_of
from retrieval.refresh import nightly

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="--workers needs Linux")
CONNECTIONS = 12
"""The kernel shares connections out by their ports: of so many, all reach one of two workers once in two thousand times, and then
they are made anew."""
WAIT_S = 120.0
OWN = [("grpc.use_local_subchannel_pool", 1)]


@dataclass
class Server:
    """The parent of two workers, and connections to them."""

    process: subprocess.Popen[str]
    ready: dict
    channels: list[grpc.Channel] = field(default_factory=list)
    stubs: list[recommender_pb2_grpc.RecommenderStub] = field(default_factory=list)

    @property
    def children(self) -> list[int]:
        return [int(one) for one in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]

    def page(self, path: str) -> str:
        try:
            with urllib.request.urlopen(f"{self.ready['metrics']}{path}", timeout=WAIT_S) as reply:
                return reply.read().decode()
        except urllib.error.HTTPError as refused:
            return refused.read().decode()

    def meter(self, name: str, *methods: str) -> dict[str, float]:
        """The samples of a meter, of these methods if any are named, summed by worker."""
        found: Counter[str] = Counter()
        for family in text_string_to_metric_families(self.page("/metrics")):
            for sample in family.samples:
                if sample.name == name and (not methods or sample.labels["method"] in methods):
                    found[sample.labels["worker"]] += sample.value
        return dict(found)

    def everywhere(self) -> list[set[str]]:
        """The ids that each connection is answered."""
        request = pb.RetrieveRequest(member=pb.Member(id="m1"), k=400, readable=True)
        answers = [stub.Retrieve(request, timeout=WAIT_S) for stub in self.stubs]
        return [{item.item_id for item in answer.results.items} for answer in answers]

    def connect(self, workers: int = 2) -> None:
        """All connections are new, and so many workers have one at least."""
        before = self.meter("brewline_requests_total", "Info")
        deadline = time.monotonic() + WAIT_S
        while True:
            self._open()
            for stub in self.stubs:
                stub.Info(pb.InfoRequest(), timeout=WAIT_S)
            if workers < 2:
                return
            after = self.meter("brewline_requests_total", "Info")
            if sum(count > before.get(worker, 0) for worker, count in after.items()) >= workers:
                return
            assert time.monotonic() < deadline

    def _open(self) -> None:
        self.close()
        address = f"127.0.0.1:{self.ready['port']}"
        self.channels = [grpc.insecure_channel(address, options=OWN) for _ in range(CONNECTIONS)]
        for channel in self.channels:
            grpc.channel_ready_future(channel).result(WAIT_S)
        self.stubs = [recommender_pb2_grpc.RecommenderStub(channel) for channel in self.channels]

    def close(self) -> None:
        for channel in self.channels:
            channel.close()


@contextmanager
def started(store: Path, night: Path, *more: str) -> Iterator[Server]:
    words = ["--store", store, "--encoder", night / "encoder1", "--ranker", night / "ranker1", "--workers", "2", "--port", "0"]
    command = [sys.executable, "-m", "ranking.cli.main", "serve", *map(str, words), "--json", "--metrics-port", "0", *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        server = Server(process, {})
        try:
            server.ready |= json.loads(process.stdout.readline())
            server.connect()
            yield server
        finally:
            server.close()
            process.terminate()
            try:
                process.wait(WAIT_S)
            finally:
                process.kill()  # nothing to one that has ended


def until(holds: Callable[[], bool], seconds: float = 300.0) -> None:
    """Waits until something holds. Fails if it does not in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def put(name: str) -> pb.UpsertItemsRequest:
    return pb.UpsertItemsRequest(items=[pb.ItemRecord(item_id=name, words=pb.ItemWords(title=f"roses no {name}"))])


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int) -> None:
    until(lambda: not alive(pid))


def test_two_workers_are_one_server(night: Path, copied: Path, tiny_dataset: Dataset) -> None:
    with started(copied, night, "--ui", "--ui-port", "0") as server:
        assert server.ready["workers"] == 2 and len(server.children) == 2
        changes_are_seen_everywhere(server)
        engagements_are_seen_everywhere(server, copied)
        with urllib.request.urlopen(server.ready["page"], timeout=WAIT_S) as reply:
            assert reply.status == 200
        a_killed_worker_loses_nothing(server)
        a_new_night_reaches_all(server, night, copied, tiny_dataset)
        children = server.children
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(WAIT_S) == 0 and not any(map(alive, children))


def changes_are_seen_everywhere(server: Server) -> None:
    for place, stub in enumerate(server.stubs):
        assert stub.UpsertItems(put(f"new{place}"), timeout=WAIT_S).position == 2 * place + 1
        assert all(f"new{place}" in ids for ids in server.everywhere())
        gone = stub.WithdrawItems(pb.WithdrawItemsRequest(items=pb.Ids(plain=[f"new{place}"])), timeout=WAIT_S)
        assert gone.were_here == 1 and not any(f"new{place}" in ids for ids in server.everywhere())
    asked = server.meter("brewline_requests_total", "UpsertItems", "WithdrawItems")
    assert len(asked) == 2 and sum(asked.values()) == 2 * CONNECTIONS, "a change that is handed on counts once"
    wrong = pb.UpsertItemsRequest(items=[pb.ItemRecord(item_id="x" * 2_000)])
    for stub in server.stubs:
        with pytest.raises(grpc.RpcError) as caught:
            stub.UpsertItems(wrong, timeout=WAIT_S)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def engagements_are_seen_everywhere(server: Server, store: Path) -> None:
    (seen, *_), first = server.everywhere()[0], server.stubs[0]
    event = pb.MemberEvent(event_id="e1", item_id=seen)
    assert first.RecordEngagements(pb.RecordEngagementsRequest(member_id="m1", events=[event]), timeout=WAIT_S).recorded == 1
    assert not any(seen in ids for ids in server.everywhere())
    for place, stub in enumerate(server.stubs):
        stub.Recommend(pb.RecommendRequest(member=pb.Member(id=f"m{place}"), k=2, surface="feed"), timeout=WAIT_S)
    until(lambda: sum(page.read_text().count('"feed"') for page in (store / JOURNAL_DIR).glob("*.log")) == CONNECTIONS)
    pages = [page.name for page in (store / JOURNAL_DIR).glob("*.log")]
    days = {page[: len("2026-01-31")] for page in pages}
    assert 2 <= len(pages) <= 2 * len(days), "one of each worker, two across midnight"


def a_killed_worker_loses_nothing(server: Server) -> None:
    """Each in turn, so the one that writes the log is among them; whatever was acknowledged is everywhere at once."""
    for turn in range(2):
        for place, stub in enumerate(server.stubs):
            stub.UpsertItems(put(f"kept{turn}-{place}"), timeout=WAIT_S)
        victim = server.children[0]
        os.kill(victim, signal.SIGKILL)
        gone(victim)
        server.connect(workers=1)
        server.stubs[0].UpsertItems(put(f"after{turn}"), timeout=WAIT_S)
        kept = {f"kept{turn}-{place}" for place in range(CONNECTIONS)} | {f"after{turn}"}
        assert all(kept <= ids for ids in server.everywhere())
        until(lambda turn=turn: sum(server.meter("brewline_worker_restarts_total").values()) == turn + 1)
        until(lambda: server.page("/healthz") == "ok, 2 of 2 workers serve\n")
        until(lambda: set(server.meter("brewline_worker_up").values()) == {1.0})
        server.connect()
        assert all(kept <= ids for ids in server.everywhere())


def a_new_night_reaches_all(server: Server, night: Path, store: Path, dataset: Dataset) -> None:
    nightly(dataset, Encoder.load(night / "encoder1"), Ranker.load(night / "ranker1"), store, end_of(dataset) + 3_600)
    path = current(store)
    assert path is not None and path.name != server.ready["snapshot"]
    server.process.send_signal(signal.SIGHUP)
    until(lambda: {stub.Info(pb.InfoRequest(), timeout=WAIT_S).provenance.snapshot for stub in server.stubs} == {path.name})
    assert all("kept0-0" in ids for ids in server.everywhere())


def test_a_worker_ends_with_its_parent_however_that_ended(night: Path, tmp_path: Path) -> None:
    """The parent is a shell, killed before the worker's standard input ends; the worker takes the folder of sockets along."""
    folder = tmp_path / "sockets"
    folder.mkdir()
    words = ["--store", night / "store", "--encoder", night / "encoder1", "--worker", folder / "0", "--port", "0", "--json"]
    command = [sys.executable, "-m", "ranking.cli.main", "serve", *map(str, words), "--no-journal"]
    shell = ["sh", "-c", 'exec 3<&0; "$@" <&3 & echo $!; wait', "sh", *command]
    pipe, environment = subprocess.PIPE, {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(shell, stdin=pipe, stdout=pipe, text=True, env=environment) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        worker = int(parent.stdout.readline())
        try:
            assert json.loads(parent.stdout.readline())["ready"] and (folder / "0").is_socket()
            assert [parent.stdout.readline() for _ in range(2)] == ["\n", "\n"], "it says that it lives"
            parent.kill()
            parent.wait()
            assert alive(worker)
            parent.stdin.close()
            gone(worker)
            assert not folder.exists()
        finally:
            parent.kill()
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
