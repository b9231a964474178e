"""The commands around the service: a night, its snapshots, questions to a server, and a server that a signal ends gently."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from click.testing import Result
from typer import Typer
from typer.testing import CliRunner

from index.errors import BrewlineError
from ranking.cli import ask, index, nightly, serve
from ranking.serving.stack import open_stack
from retrieval.data.schema import MemberView

ROOT = Path(__file__).parents[3]
Start = Callable[..., tuple[int, Callable[[], None]]]


def run(*words: object) -> Result:
    """The command's result; an error that is not ours fails the test."""
    app = Typer()
    app.command()(nightly.nightly)
    app.command()(serve.serve)
    app.add_typer(ask.app, name="ask")
    app.add_typer(index.app, name="index")
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "150"})
    if result.exception is not None and not isinstance(result.exception, BrewlineError | SystemExit):
        raise result.exception
    return result


def refused(*words: object) -> str:
    """The one line of a command that must fail."""
    result = run(*words)
    assert isinstance(result.exception, BrewlineError), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


def answer(*words: object) -> dict:
    """The one JSON object of a command that must succeed."""
    result = run(*words, "--json")
    assert result.exit_code == 0, result.exception
    return json.loads(result.stdout)


def test_nights_can_be_listed_verified_and_taken_back(night: Path, tiny_folder: Path, tmp_path: Path) -> None:
    store, models = tmp_path / "store", ("--encoder", night / "encoder1", "--ranker", night / "ranker1")
    first = answer("nightly", tiny_folder, *models, "--store", store, "--as-of", "2024-01-20")
    second = answer("nightly", tiny_folder, *models, "--store", store, "--as-of", "end")
    assert first["snapshot"] != second["snapshot"] and first["as_of"] == 1_705_708_800
    assert (second["items"], second["members"]) == (60, 40) and 0 < second["embedded"] <= 60
    listed = answer("index", "list", "--store", store)["snapshots"]
    assert [(one["name"], one["current"]) for one in listed] == [(first["snapshot"], False), (second["snapshot"], True)]
    assert answer("index", "show", "--store", store)["as_of"] == second["as_of"]
    assert answer("index", "verify", "--store", store)["passed"] is True
    assert answer("index", "rollback", "--store", store)["served"] == first["snapshot"]
    assert answer("index", "gc", "--store", store, "--keep", "0")["removed"] == [second["snapshot"]]
    for words in (("list",), ("show",), ("verify",)):
        assert first["snapshot"] in run("index", *words, "--store", store).stdout


def test_a_changed_file_fails_the_verification(night: Path, tiny_folder: Path, tmp_path: Path) -> None:
    made = answer("nightly", tiny_folder, "--encoder", night / "encoder1", "--store", tmp_path, "--as-of", "end")
    part = tmp_path / "snapshots" / made["snapshot"] / "catalog.arrow"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    assert "checksums" in refused("index", "verify", "--store", tmp_path)


def test_a_night_on_what_is_missing_or_mismatched_is_one_line(night: Path, tiny_folder: Path, tmp_path: Path) -> None:
    models = ("--encoder", night / "encoder1", "--store", tmp_path / "store")
    assert "nowhere" in refused("nightly", tmp_path / "nowhere", *models)
    assert "--encoder" in refused("nightly", tiny_folder, "--encoder", tmp_path / "no", "--store", tmp_path / "store")
    assert "another encoder" in refused("nightly", tiny_folder, *models, "--ranker", night / "ranker2")
    assert "--as-of 'later'" in refused("nightly", tiny_folder, *models, "--as-of", "later")
    assert "expected sqlite:PATH" in refused("nightly", tiny_folder, *models, "--members", "postgres://x", "--as-of", "end")
    assert "nothing was published" in refused("index", "show", "--store", tmp_path)
    assert "no such folder" in refused("index", "list", "--store", tmp_path / "nowhere")


def test_questions_have_readable_answers(port: int, views: list[MemberView]) -> None:
    at = ("--address", f"127.0.0.1:{port}")
    told = answer("ask", "recommend", "--member", "m5", "-k", "4", *at)
    assert len(told["items"]) == len(told["ids"]) == 4 and told["degraded"] == "NONE"
    shown = run("ask", "recommend", "--member", "m5", "-k", "4", *at).stdout
    for row in told["items"]:
        assert row["item_id"] in shown and row["title"] in shown and f"{row['probability']:.4f}" in shown
    assert re.search(r"rank [\d.]+ ms", shown) and told["snapshot"] in shown
    seen = views[5].history[0].item.item_id
    assert seen not in answer("ask", "retrieve", "--member", "m5", "-k", "60", *at)["ids"]
    ranked = answer("ask", "rank", "--member", "m5", "i1", seen, *at)
    assert sorted(ranked["ids"]) == sorted(["i1", seen]) and ranked["scores"] is None
    assert answer("ask", "info", *at)["items"] == 60
    assert "attention" in run("ask", "info", *at).stdout
    assert "nothing is left" in run("ask", "retrieve", "--member", "m5", "--category", "nowhere", *at).stdout


def test_a_server_is_told_what_changed(night: Path, copied: Path, start: Start, tmp_path: Path) -> None:
    port, _ = start(open_stack(copied, night / "encoder1", night / "ranker1", None))
    at = ("--address", f"127.0.0.1:{port}")
    put = ("ask", "upsert", "new", "--title", "roses", "--category", "gardens", "--creator", "author 9", "--number", "price=3")
    assert answer(*put, *at)["position"] == 1
    lines, mistyped = tmp_path / "items.jsonl", tmp_path / "mistyped.jsonl"
    mistyped.write_text('{"item_id": "a", "titel": "hedge"}\n')
    lines.write_text('{"item_id": "a", "title": "hedge", "numbers": {"price": 2}}\n\n{"item_id": "b", "text": "signal"}\n')
    assert "2 items are kept up to position 2" in run("ask", "upsert", "--from", lines, *at).stdout
    assert answer("ask", "withdraw", "b", "nobody", *at)["were_here"] == 1
    only = ("--category", "gardens", "--block-creator", "author 2", "-k", "60")
    assert answer("ask", "retrieve", "--member", "m2", *only, *at)["ids"] == ["new"]
    assert answer("ask", "recommend", "--member", "m2", "--creator", "author 9", *at)["ids"] == ["new"]
    once = ("ask", "record", "--member", "m2", "new", "--liked", "--event-id", "e1", *at)
    assert [answer(*once)["recorded"] for _ in range(2)] == [1, 0]
    assert answer("ask", "retrieve", "--member", "m2", *only, *at)["ids"] == []
    assert "2 of the items were put in" in run("ask", "info", *at).stdout
    for words, told in (
        (("upsert",), "give ITEM_ID"),
        (("upsert", "x", "--from", lines), "two things"),
        (("upsert", "x", "--number", "price"), "NAME=VALUE"),
        (("upsert", "--from", tmp_path), "cannot be read"),
        (("upsert", "--from", mistyped), "unknown titel"),
        (("upsert", "--from", tmp_path / "store" / "CURRENT"), "line 1: no item"),
        (("record", "--member", "m1", "i1", "i2", "--event-id", "e"), "one by one"),
        (("retrieve", "--member", "m2", "--region", "north"), "no column 'region'"),
    ):
        assert told in refused("ask", *words, *at)


def test_an_unknown_member_is_described_in_words(port: int) -> None:
    at = ("--address", f"127.0.0.1:{port}")
    told = answer("ask", "recommend", "--profile", "role=fond of roses", "--history", "i2", "--history", "i6", "-k", "60", *at)
    assert len(told["ids"]) == 58 and not {"i2", "i6"} & set(told["ids"])
    wish = answer("ask", "recommend", "--profile", "role=fond of roses", "--instruction", "chess", "-k", "60", *at)
    assert wish["ids"] != told["ids"]
    assert "NAME=WORDS" in refused("ask", "recommend", "--profile", "roses", *at)
    assert "nobody asks" in refused("ask", "retrieve", *at)
    assert "NOT_FOUND" in refused("ask", "recommend", "--member", "nobody", *at)
    assert "nobody answers" in refused("ask", "info", "--address", "127.0.0.1:1", "--deadline-ms", "2000")


def test_serve_says_when_it_is_ready_and_ends_gently(night: Path, port: int) -> None:
    script = "import sys, typer; from ranking.cli.serve import serve; typer.run(serve)"
    models = ["--store", night / "store", "--encoder", night / "encoder1", "--ranker", night / "ranker1"]
    command = [sys.executable, "-c", script, *map(str, models), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        try:
            assert server.stdout is not None and server.stderr is not None
            ready = json.loads(server.stdout.readline())
            assert ready["items"] == 60 and ready["port"] not in (0, port)
            told = answer("ask", "info", "--address", f"127.0.0.1:{ready['port']}")
            assert (told["snapshot"], told["ranker"]) == (ready["snapshot"], ready["ranker"])
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(15) == 0
        assert server.stdout.read() == ""
        assert f"ready: retrieval and ranking over 60 items of snapshot {ready['snapshot']}" in server.stderr.read()


def test_a_taken_port_is_said_before_anything_is_loaded(night: Path, port: int, tmp_path: Path) -> None:
    for more in ((), ("--workers", "2")):
        words = refused("serve", "--store", tmp_path / "no", "--encoder", night / "encoder1", "--port", port, *more)
        assert "Address already in use" in words
