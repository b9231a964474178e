"""The loop closes: serve, ask, record, kill, export, train, night, serve, ask. Nothing acknowledged is lost on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from ranking.cli.main import app
from ranking.serving.client import Answer, Client, ServiceError
from retrieval.data.exported_journal import JOURNAL_DIR, read_journal
from retrieval.data.read import read_dataset
from retrieval.data.refusals import Refusals
from retrieval.data.schema import IMPRESSION, Dataset, Item
from retrieval.learn.batches import BatchSettings
from retrieval.learn.fit import train_encoder
from retrieval.learn.start import EncoderPlan
from retrieval.learn.train import LoopSettings
from retrieval.llama import Size
from retrieval.recent import Told
from retrieval.records import Entry

ROOT = Path(__file__).parents[3]
SERVE = "import sys, typer; from ranking.cli.serve import serve; typer.run(serve)"
PLAN = EncoderPlan(
    steps=6,
    minutes=None,
    size=Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=48, vocabulary=400),
    batch=BatchSettings(targets=24, random_items=16),
    loop=LoopSettings(learning_rate=5e-3),
)


@contextmanager
def serving(*words: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-c", SERVE, *map(str, words), "--port", "0", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        try:
            yield server, f"127.0.0.1:{json.loads(server.stdout.readline())['port']}"
        finally:
            server.kill()


def brewline(*words: object) -> dict:
    done = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    return json.loads(done.stdout)


def tell(address: str, who: str, acknowledged: set[tuple[str, str]]) -> None:
    """Records engagements one after another until nobody answers; what was acknowledged goes into the set."""
    with Client(address, deadline_ms=5_000, attempts=1) as client, suppress(ServiceError):
        for count in range(10_000):
            event, item = f"{who} {count}", f"i{count % 60}"
            client.record(who, [Told(event, Entry(item, 1_750_000_000 + count, "like"))])
            acknowledged.add((who, event))


def ask_and_like(client: Client, members: list[str]) -> dict[str, Answer]:
    """Each member is shown five items and likes the second of them."""
    answers = {}
    for who in members:
        answers[who] = client.recommend(who, 5, surface="feed")
        seen = answers[who]
        assert client.record(who, [Told(f"like of {who}", Entry(seen.ids[1], 0, ""), seen.request_id, "feed")]).recorded == 1
    return answers


def kill_in_the_middle(server: subprocess.Popen[str], address: str) -> set[tuple[str, str]]:
    acknowledged: set[tuple[str, str]] = set()
    tellers = [threading.Thread(target=tell, args=(address, f"late {n}", acknowledged)) for n in range(3)]
    for teller in tellers:
        teller.start()
    deadline = time.monotonic() + 30
    while len(acknowledged) < 20 and time.monotonic() < deadline:
        time.sleep(0.005)
    server.send_signal(signal.SIGKILL)
    for teller in tellers:
        teller.join(30)
    assert len(acknowledged) >= 20
    return acknowledged


def shown_in(dataset: Dataset) -> dict[tuple[str, str, str], tuple[int, int]]:
    """(request, member, item) -> (position, label) of the impressions that servers noted."""
    log = dataset.events
    rows = np.flatnonzero((log.action == log.actions.index(IMPRESSION)) & (log.event_id >= 1 << 62)).tolist()
    members, items = dataset.members.member_id, dataset.items.item_id
    return {
        (log.requests[log.request[row]], members[log.member[row]], items[log.item[row]]): (
            int(log.position[row]),
            int(log.label[row]),
        )
        for row in rows
    }


def test_the_loop_closes(night: Path, copied: Path, tiny_folder: Path, tmp_path: Path) -> None:
    store, members = copied, [f"m{n}" for n in range(0, 40, 4)]
    models = ("--store", store, "--encoder", night / "encoder1", "--ranker", night / "ranker1")
    with serving(*models) as (server, address), Client(address) as client:
        answers = ask_and_like(client, members)
        client.upsert([Item("new one", "espresso and crema", "a short piece about beans", "coffee", "author 0")])
        client.withdraw(["i59"])
        client.record("m0", [Told("of the new one", Entry("new one", 0, ""))])
        deadline = time.monotonic() + 20
        while len(list(read_journal(store / JOURNAL_DIR, Refusals()))) < 2 * len(members) + 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        acknowledged = kill_in_the_middle(server, address)
    time.sleep(1.1)  # the log's grain: what is of the very second of the export waits for the next
    told = brewline("data", "export-log", store, tmp_path / "data", "--data", tiny_folder, "--settle-minutes", "0")
    assert all("unfinished" in one or "in neither the folder" in one for one in told["source_rows_refused"])

    dataset, check = read_dataset(tmp_path / "data"), brewline("data", "check", tmp_path / "data")
    assert check["refused"] == {} and "new one" in dataset.items.item_id and "i59" not in dataset.items.item_id
    shown = shown_in(dataset)
    for who, answer in answers.items():
        kept = [(place, item) for place, item in enumerate(answer.ids) if item != "i59"]
        assert {item: shown[answer.request_id, who, item] for _, item in kept} == {
            item: (place, int(place == 1)) for place, item in kept
        }
    log = dataset.events.take(dataset.is_engagement)
    liked = list(zip((dataset.members.member_id[row] for row in log.member), log.timestamp.tolist()))
    expected = {(who, 1_750_000_000 + int(event.split()[-1])) for who, event in acknowledged}
    gone = {one for one in expected if (one[1] - 1_750_000_000) % 60 == 59}  # of the withdrawn item
    assert expected - gone <= set(liked), "every acknowledged engagement is in tomorrow's folder"
    assert len(liked) == len(set(zip(liked, log.item.tolist()))), "and none is there twice"

    train_encoder(dataset, tmp_path / "encoder", PLAN)
    night_report = brewline("nightly", tmp_path / "data", "--encoder", tmp_path / "encoder", "--store", store)
    assert night_report["published"] and night_report["items"] == 60
    with serving("--store", store, "--encoder", tmp_path / "encoder") as (_, address), Client(address) as client:
        for who, answer in answers.items():
            found = client.retrieve(who, 60).ids
            assert answer.ids[1] not in found and "i59" not in found
        assert "new one" in client.retrieve("m4", 60).ids and "new one" not in client.retrieve("m0", 60).ids
    again = brewline("data", "export-log", store, tmp_path / "again", "--data", tmp_path / "data", "--settle-minutes", "0")
    assert again["check"]["sizes"]["events"] == check["sizes"]["events"], "what was exported is not exported twice"
