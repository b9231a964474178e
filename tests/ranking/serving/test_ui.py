"""The page's HTTP side: what it serves, that it asks with the caller's rights and leaves no trace, and who is turned away."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from index.errors import BrewlineError
from ranking.cli.main import app
from ranking.pace import Pace
from ranking.served_evidence import night_catalog
from ranking.serving.client import Client
from ranking.serving.security_tls import TlsFiles
from ranking.serving.server import CannotListen, ServeSettings, check_address
from ranking.serving.stack import Stack, open_stack
from ranking.serving.tokens import make_token
from ranking.serving.ui import CALLS, MOST_MS, page_bytes, policy_of
from ranking.serving.ui_look import _night
from ranking.serving.web import MOST_BODY, Web
from retrieval.counts import Counts
from retrieval.data.schema import DAY, Dataset, Item, MemberView

Start = Callable[..., tuple[int, Callable[[], None]]]
ROOT = Path(__file__).parents[3]
JSON = {"Content-Type": "application/json"}


def asked(web: Web, path: str, body: object = None, method: str = "POST", **headers: str) -> tuple[int, Any]:
    """Status and body of an answer: of JSON what it holds, else its text. Bytes are posted as they are."""
    connection = http.client.HTTPConnection(web.host, web.port, timeout=20)
    sent = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
    try:
        connection.request(method, path, sent if method == "POST" else None, {**JSON, **headers})
        reply = connection.getresponse()
        text = reply.read().decode()
        return reply.status, json.loads(text) if reply.headers["Content-Type"] == "application/json" else text
    finally:
        connection.close()


@pytest.fixture
def site(stack: Stack, start: Start) -> tuple[Web, int]:
    """The page of a server over the night, and the server's port."""
    web = Web("127.0.0.1", 0)
    port, _ = start(stack, page=web)
    return web, port


def test_the_page_is_small_whole_and_reaches_for_nothing(site: tuple[Web, int]) -> None:
    connection = http.client.HTTPConnection(site[0].host, site[0].port, timeout=20)
    connection.request("GET", "/")
    reply = connection.getresponse()
    page = reply.read()
    connection.close()
    assert page == page_bytes() and len(page) < 60_000
    policy = reply.headers["Content-Security-Policy"]
    assert policy == policy_of(page) and "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    for kind in ("script", "style"):
        inside = page.partition(f"<{kind}>".encode())[2].partition(f"</{kind}>".encode())[0]
        assert base64.b64encode(hashlib.sha256(inside).digest()).decode() in policy
    assert reply.headers["X-Frame-Options"] == "DENY" and "Set-Cookie" not in reply.headers
    text = page.decode()
    assert re.findall(r"https?://[^\s\"']+", text) == ["http://www.w3.org/2000/svg"], "a name, which nobody fetches"
    dangerous = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser|srcdoc|cookie|localStorage"
    )
    assert not re.search(dangerous, text) and not re.search(r"<(img|link|iframe|object|embed|base)\b", text)
    assert not re.search(r"\s(on\w+|style|src)=\"", text), "the policy would block it"


def test_answers_are_those_of_the_contract(site: tuple[Web, int], views: list[MemberView]) -> None:
    web, port = site
    with Client(f"127.0.0.1:{port}") as client:
        question = {
            "member": {"id": "m5"},
            "k": 20,
            "fanout": 30,
            "instruction": "roses",
            "weights": [{"task": "like", "weight": 2}],
        }
        status, told = asked(web, "/api/recommend", question)
        same = client.recommend("m5", 20, fanout=30, instruction="roses", weights={"like": 2.0})
        assert status == 200 and [row["item_id"] for row in told["results"]["items"]] == same.ids
        rows = told["results"]["items"]
        assert same.probabilities is not None and [row["probability"] for row in rows] == pytest.approx(
            same.probabilities.tolist()
        )
        assert [row.get("place", 0) for row in rows] == same.places.tolist() and "ids" not in told["results"]
        assert told["provenance"]["snapshot"] == same.snapshot and int(told["times"]["total_us"]) > 0
        (column,) = told["results"]["tasks"]
        assert column["task"] == "like" and len(base64.b64decode(column["probabilities"])) == 80
        seen = views[5].history[0].item.item_id
        why = asked(web, "/api/explain", {"question": {"member": {"id": "m5"}}, "item_id": seen})[1]
        assert (why["outcome"], why["detail"]) == ("SEEN", client.explain("m5", seen).detail)
        status, first = asked(web, "/api/retrieve", {"member": {"id": "m5"}, "k": 7})
        assert [row["item_id"] for row in first["results"]["items"]] == client.retrieve("m5", 7).ids
        assert asked(web, "/api/info")[1]["provenance"]["ranker"] == client.info().ranker


def test_members_and_items_are_found_in_bounds(night: Path, copied: Path, start: Start, views: list[MemberView]) -> None:
    web = Web("127.0.0.1", 0)
    port, _ = start(open_stack(copied, night / "encoder1", night / "ranker1", None), page=web)
    found = asked(web, "/api/members", {"part": "M3"})[1]
    assert sorted(found["ids"]) == sorted({"m3", *(f"m3{n}" for n in range(10))}) and found["all"]
    many = asked(web, "/api/members", {"part": ""})[1]
    assert len(many["ids"]) == 20 and not many["all"]
    card = asked(web, "/api/member", {"id": "m5"})[1]
    assert [done["item_id"] for done in card["history"]] == [done.item.item_id for done in views[5].history]
    assert card["history"][0]["title"] == views[5].history[0].item.title and card["hidden"] == []
    assert card["profile"] == dict(views[5].member.profile) and card["connections"][0]["kind"] == "follows"
    gone = views[5].history[0].item
    with Client(f"127.0.0.1:{port}") as client:
        client.upsert([Item("new", "A Rose no 1000", category="gardens"), Item("i2", "now a hedge")])
        client.withdraw([gone.item_id])
        client.recommend("m1", 5)
    found = asked(web, "/api/items", {"words": "ROSE no 1000"})[1]
    assert [one["item_id"] for one in found["items"]] == ["new"] and found["all"]
    assert [one["item_id"] for one in asked(web, "/api/items", {"words": "i2"})[1]["items"]] == ["i2"]
    assert [one["title"] for one in asked(web, "/api/items", {"words": "hedge now"})[1]["items"]] == ["now a hedge"]
    assert gone.item_id not in [one["item_id"] for one in asked(web, "/api/items", {"words": gone.title})[1]["items"]]
    many = asked(web, "/api/items", {"words": "no"})[1]
    assert len(many["items"]) == 20 and not many["all"] and "i2" not in [one["item_id"] for one in many["items"][1:]]
    card = asked(web, "/api/member", {"id": "m5"})[1]
    assert gone.item_id in card["hidden"] and gone.item_id not in [done["item_id"] for done in card["history"]]
    assert asked(web, "/api/member", {"id": "nobody"})[1]["code"] == "NOT_FOUND"


def test_titles_of_the_night_are_found_however_they_are_written(tiny_dataset: Dataset) -> None:
    titles = ["Straße 5", "STRASSE 6", "\ufb01lter", "ÉCLAIR", "\u212aelvin and ΣΟΦΟΣ", "Sofa"]
    items = replace(tiny_dataset.items, title=[*titles, *tiny_dataset.items.title[len(titles) :]])
    catalog = night_catalog(replace(tiny_dataset, items=items), Counts.from_dataset(tiny_dataset).as_of(DAY), DAY)
    wanted = {"STRASSE": [0, 1], "straße 5": [0], "Filter": [2], "éclair": [3], "kelvin σοφος": [4], "sof": [5]}
    for words, rows in wanted.items():
        found = [row for row in _night(catalog, words.casefold().split()) if row is not None]
        assert [row for row in found if row < len(titles)] == rows, words


def test_looking_leaves_nothing_in_the_journal(stack: Stack, start: Start, tmp_path: Path) -> None:
    web = Web("127.0.0.1", 0)
    port, stop = start(stack, page=web, journal=tmp_path / "journal")
    assert asked(web, "/api/recommend", {"member": {"id": "m11"}, "surface": "feed"})[0] == 200
    with Client(f"127.0.0.1:{port}") as client:
        client.recommend("m22", 5, surface="feed")
    stop()
    kept = b"".join(path.read_bytes() for path in (tmp_path / "journal").rglob("*") if path.is_file())
    assert b"m22" in kept and b"m11" not in kept
    with pytest.raises(ConnectionError):
        asked(web, "/api/info")


def test_strange_pages_and_strange_bodies_are_refused(site: tuple[Web, int]) -> None:
    web = site[0]
    assert asked(web, "/api/info", Origin=web.address, **{"Sec-Fetch-Site": "same-origin"})[0] == 200
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": f"http://127.0.0.1:{web.port + 1}"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        assert asked(web, "/api/info", **headers)[0] == 403, headers
    assert asked(web, "/api/info", **{"Content-Type": "text/plain"})[0] == 400, "what a strange page may send without asking"
    assert asked(web, "/api/info", Host="evil.example")[0] == 421
    assert asked(web, "/api/info", method="GET")[0] == asked(web, "/api/info", method="OPTIONS")[0] == 405
    assert asked(web, "/")[0] == 405 and asked(web, "/api/withdraw")[0] == 404
    member = {"id": "m5"}
    for path, body, words in (
        ("/api/recommend", b"{", "no JSON"),
        ("/api/recommend", b"[" * 100_000, "no JSON"),
        ("/api/recommend", b'{"k": ' + b"9" * 9_000 + b"}", "no JSON"),
        ("/api/recommend", b"[1]", "a JSON object"),
        ("/api/recommend", {"member": member, "surprise": 1}, "surprise"),
        ("/api/recommend", {"member": member, "k": "many"}, "k"),
        ("/api/recommend", {"member": member, "k": 10**6}, "at most 10,000"),
        ("/api/recommend", {"member": {"id": "\ud800"}}, ""),
        ("/api/recommend?deadline_ms=0", {"member": member}, "deadline_ms"),
        (f"/api/recommend?deadline_ms={MOST_MS + 1}", {"member": member}, "deadline_ms"),
        ("/api/recommend", {"member": member, "filter": {"regions": ["north"]}}, "no column 'region'"),
        ("/api/member", {"id": "\ud800"}, ""),
        ("/api/member", {"id": "m" * 513}, "at most 512"),
        ("/api/member", {"id": 5}, "a text"),
        ("/api/items", {"words": "x", "more": 1}, "nothing else"),
    ):
        status, told = asked(web, path, body)
        assert (status, told["code"]) == (400, "INVALID_ARGUMENT") and words in told["message"], (path, told)
    assert asked(web, "/api/info", **{"Content-Length": str(MOST_BODY + 1)})[0] == 413
    assert asked(web, "/api/info", **{"Transfer-Encoding": "chunked"})[0] == 411
    assert asked(web, "/api/recommend", {"member": {"id": "nobody"}})[0] == 404
    assert asked(web, "/api/info")[0] == 200, "and nobody was hurt"


def test_the_page_has_the_rights_of_its_token(
    stack: Stack, start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    file, web = tmp_path / "tokens.txt", Web("127.0.0.1", 0)
    reader, admin = make_token(file, "shop", "read"), make_token(file, "boss", "admin")
    start(stack, page=web, tokens=file)
    explain = {"question": {"member": {"id": "m5"}}, "item_id": "i1"}
    bodies = {"/api/info": {}, "/api/items": {"words": "no"}, "/api/recommend": {"member": {"id": "m5"}}}
    closed = {"/api/members": {"part": ""}, "/api/member": {"id": "m5"}, "/api/explain": explain}
    assert {*bodies, *closed, "/api/retrieve"} == {*CALLS, "/api/items", "/api/members", "/api/member"}
    for path, body in {**bodies, **closed}.items():
        for wrong in (
            {},
            {"Authorization": "Bearer shop.x"},
            {"Authorization": f"Basic {admin}"},
            {"Authorization": "Bearer \xff"},
        ):
            status, told = asked(web, path, body, **wrong)
            assert (status, told["code"]) == (401, "UNAUTHENTICATED"), (path, wrong)
        assert asked(web, path, body, Authorization=f"Bearer {admin}")[0] == 200, path
        status, told = asked(web, path, body, Authorization=f"Bearer {reader}")
        assert status == (403 if path in closed else 200) and (status == 200 or "has the role read" in told["message"])
    assert asked(web, "/", method="GET")[0] == 200, "the page itself says nothing about anybody"
    lines = [one.__dict__ for one in caplog.records if one.name == "brewline.audit"]
    told = {(one["msg"], one["method"], one["caller"], one["code"]) for one in lines}
    assert {("looked", "/api/member", "boss", "OK"), ("turned away", "/api/member", "shop", "PERMISSION_DENIED")} <= told
    assert ("turned away", "/brewline.v1.Recommender/Explain", "shop", "PERMISSION_DENIED") in told
    everything = " ".join(str(record.__dict__) for record in caplog.records)
    assert not any(token.partition(".")[2] in everything for token in (reader, admin))
    file.unlink()
    assert asked(web, "/api/items", {"words": "no"}, Authorization=f"Bearer {reader}")[0] == 503


def test_what_an_answer_lacks_is_told(stack: Stack, start: Start) -> None:
    slow, web = Pace(), Web("127.0.0.1", 0)
    slow.record(2_000, 50.0, time.monotonic())
    slowed = replace(stack, recommender=replace(stack.recommender, pace=slow))
    start(slowed, page=web)
    told = asked(web, "/api/recommend?deadline_ms=2000", {"member": {"id": "m5"}})[1]
    assert told["degraded"] == "RETRIEVAL_ORDER" and told["degraded_detail"]
    assert all("probability" not in row for row in told["results"]["items"])


def test_a_page_cannot_stand_in_for_a_certificate(tmp_path: Path) -> None:
    web = Web("127.0.0.1", 0)
    settings = ServeSettings(port=0, page=web, tls=TlsFiles(tmp_path / "cert", tmp_path / "key", tmp_path / "ca"))
    with pytest.raises(CannotListen, match="give --tokens"):
        check_address(settings)
    command = ["serve", "--store", str(tmp_path), "--encoder", str(tmp_path), "--port", "0", "--ui", "--ui-port", str(web.port)]
    assert isinstance(failed := CliRunner().invoke(app, command).exception, BrewlineError) and str(web.port) in str(failed)
    web.close()


def test_serve_says_where_the_page_is(night: Path, copied: Path) -> None:
    words = ["serve", "--store", copied, "--encoder", night / "encoder1", "--port", "0", "--json", "--ui", "--ui-port", "0"]
    command = [sys.executable, "-c", "from ranking.cli.main import main; main()", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None and server.stderr is not None
            page = json.loads(server.stdout.readline())["page"]
            web = Web("127.0.0.1", 0)
            web.port, own = int(page.rpartition(":")[2]), web.close
            assert asked(web, "/", method="GET")[1] == page_bytes().decode()
            status, told = asked(web, "/api/recommend", {"member": {"id": "m5"}})
            assert (status, told["code"]) == (409, "FAILED_PRECONDITION"), "without a ranker"
            assert asked(web, "/api/retrieve", {"member": {"id": "m5"}})[0] == 200
            own()
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(15) == 0 and f"page: {page}/" in server.stderr.read()
