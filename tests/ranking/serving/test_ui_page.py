"""The page as people have it: a real Chromium without a window, driven through its debugging pipe, looks at a real server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from ranking.pace import Pace
from ranking.serving.client import Client
from ranking.serving.stack import Stack, open_stack
from ranking.serving.tokens import make_token
from ranking.serving.web import Web
from retrieval.data.schema import Item, MemberView
from retrieval.recent import Told
from retrieval.records import Entry

Start = Callable[..., tuple[int, Callable[[], None]]]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="NO chromium HERE: THE PAGE WAS NOT OPENED")
PIPES = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(one), fcntl.F_DUPFD, 10) for one in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""The browser reads commands from 3 and writes to 4."""
FLAGS = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-proxy-server --remote-debugging-pipe"
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>\u202etxt'


class Tab:
    """One tab of a browser of its own, whose network ends at this machine."""

    def __init__(self, profile: Path) -> None:
        theirs, self._down = os.pipe()
        self._up, ours = os.pipe()
        flags = [*FLAGS.split(), "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={profile}"]
        command = [sys.executable, "-c", PIPES, str(theirs), str(ours), str(CHROMIUM), *flags, "about:blank"]
        self._browser = subprocess.Popen(command, pass_fds=(theirs, ours), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs)
        os.close(ours)
        self._heard, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        page = next(one for one in self.ask("Target.getTargets")["targetInfos"] if one["type"] == "page")
        self._session = self.ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")
        self.ask("Emulation.setFocusEmulationEnabled", enabled=True)

    def ask(self, method: str, **params: object) -> dict[str, Any]:
        """The browser's answer to a command; what it says in between is kept in `events`."""
        self._number += 1
        told = {"id": self._number, "method": method, "params": params}
        os.write(self._down, json.dumps(told | ({"sessionId": self._session} if self._session else {})).encode() + b"\0")
        while True:
            one = self._next()
            if one.get("id") == self._number:
                assert "error" not in one, (method, one)
                return one["result"]
            self.events.append(one)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._heard:
            more = os.read(self._up, 1 << 16)
            assert more, "the browser went away"
            self._heard += more
        first, _, self._heard = self._heard.partition(b"\0")
        return json.loads(first)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        done = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, (script, done)
        return done["result"].get("value")

    def until(self, script: str) -> Any:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + 20
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"{script} never came true: {self.run('document.body.innerText')[-1500:]}"
            time.sleep(0.05)
        return value

    def open(self, web: Web) -> None:
        """The page is there and has asked for its facts."""
        self.events.clear()
        self.ask("Page.navigate", url=f"{web.address}/")
        self.until("document.querySelectorAll('#facts b').length || document.querySelector('#token[open]') ? 1 : 0")

    def press(self, key: str, modifiers: int = 0) -> None:
        """A key goes down and up; modifiers 2 is Ctrl, 8 is Shift."""
        code = {"Enter": 13, "ArrowDown": 40, "ArrowRight": 39, "Escape": 27, "Tab": 9}[key]
        text = {"text": "\r"} if key == "Enter" and not modifiers else {}
        for kind in ("keyDown", "keyUp"):
            told = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers, **text}
            self.ask("Input.dispatchKeyEvent", type=kind, **told)

    def type(self, field: str, words: str) -> None:
        """Words are typed into a field, in the place of those it has."""
        self.run(f"document.getElementById({field!r}).focus(), document.getElementById({field!r}).select()")
        self.ask("Input.insertText", text=words)

    def table(self) -> list[list[str]]:
        """The cells of the answer's table."""
        rows = "[...document.querySelectorAll('#view tbody tr')]"
        return self.until(f"{rows}.map(row => [...row.cells].map(cell => cell.innerText))")

    def complaints(self) -> list[object]:
        """Exceptions of the page, and what its policy or the network stopped."""
        self.run("1")
        return [one["params"] for one in self.events if one.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]

    def reached_for(self) -> set[str]:
        """The hosts that the page asked anything of."""
        sent = [one["params"]["request"]["url"] for one in self.events if one.get("method") == "Network.requestWillBeSent"]
        return {urlsplit(url).netloc for url in sent}

    def close(self) -> None:
        """The browser has ended."""
        self._browser.kill()
        self._browser.wait(10)
        os.close(self._down)
        os.close(self._up)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """A tab for the tests of this file, one after another."""
    opened = Tab(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def choose(tab: Tab, member: str) -> None:
    """The member is asked for by typing the id."""
    tab.type("member", member)
    tab.press("Enter")
    tab.until("document.getElementById('state').innerText.startsWith('as the store')")


def asks(tab: Tab) -> list[list[str]]:
    """Ctrl Enter, and the table of the new answer."""
    tab.run("document.getElementById('answer').replaceChildren()")
    tab.press("Enter", 2)
    return tab.table()


def test_an_answer_is_asked_for_and_explained_by_keys_alone(tab: Tab, stack: Stack, start: Start) -> None:
    port, _ = start(stack, page=(web := Web("127.0.0.1", 0)))
    tab.open(web)
    tab.type("member", "m1")
    tab.until("document.querySelectorAll('#member-list [role=option]').length === 11")
    tab.press("ArrowDown")
    tab.press("Enter")
    tab.until("document.querySelectorAll('#history li').length")
    chosen = tab.run("document.getElementById('member').value")
    tab.type("instruction", "roses")
    table = asks(tab)
    with Client(f"127.0.0.1:{port}") as client:
        same = client.recommend(chosen, 10, fanout=200, instruction="roses", readable=True)
        why = client.explain(chosen, same.ids[0], 10, fanout=200, instruction="roses")
    assert [row[0] for row in table] == [str(n + 1) for n in range(10)]
    for rank, (cells, row) in enumerate(zip(table, same.rows)):
        assert row.title in cells[2] and row.item_id in cells[2] and f"{row.probability:.4f}" in cells[3]
        assert cells[4].startswith(f"#{row.place + 1}\n")
        by = row.place - rank
        assert cells[1].startswith(f"▲ {by}" if by > 0 else f"▼ {-by}" if by < 0 else "=")
    shown = tab.run("document.getElementById('answer').innerText")
    assert same.snapshot in shown and same.ranker in shown and "rank" in shown and f"of {same.candidates} candidates" in shown
    tab.run("document.getElementById('tab-ranked').focus()")
    tab.press("ArrowRight")
    assert tab.run("document.querySelectorAll('#view path').length") == 10
    tab.press("ArrowRight")
    assert len(candidates := tab.table()) == min(50, same.candidates) and [row[0] for row in candidates[:3]] == ["1", "2", "3"]
    tab.press("ArrowRight")
    for _ in range(2):  # past the panel's table, if it can be scrolled, to the first button
        tab.press("Tab")
        if tab.run("document.activeElement.innerText") == "Why?":
            break
    tab.press("Enter")
    tab.until("document.querySelectorAll('#why tr').length > 5")
    assert why.detail in (words := tab.run("document.getElementById('why').innerText")) and why.outcome in words
    assert [one.text for one in why.prompts] == tab.run("[...document.querySelectorAll('#why pre')].map(pre => pre.textContent)")
    tab.press("Escape")
    assert tab.run("document.querySelector('dialog[open]') === null && document.activeElement.innerText") == "Why?"
    assert tab.complaints() == [] and tab.reached_for() == {f"{web.host}:{web.port}"}


def test_hostile_words_stay_words(tab: Tab, night: Path, copied: Path, start: Start) -> None:
    port, _ = start(open_stack(copied, night / "encoder1", night / "ranker1", None), page=(web := Web("127.0.0.1", 0)))
    with Client(f"127.0.0.1:{port}") as client:
        client.upsert([Item(f"bad{n}", HOSTILE, HOSTILE, HOSTILE, HOSTILE) for n in range(3)] + [Item(HOSTILE, HOSTILE)])
        client.record("m5", [Told("e1", Entry("bad0", 0, "like", 1))])
        client.record(HOSTILE, [Told("e2", Entry("bad0", 0, "like", 1))])
    tab.open(web)
    choose(tab, HOSTILE)
    assert HOSTILE in tab.run("document.getElementById('history').textContent")
    tab.type("instruction", HOSTILE)
    tab.type("k", "60")
    assert any(HOSTILE in row[2] for row in asks(tab))
    for view in ("changes", "candidates"):
        tab.run(f"document.getElementById('tab-{view}').click()")
    tab.type("other", HOSTILE)
    tab.until("document.querySelectorAll('#other-list [role=option]').length")
    tab.press("ArrowDown")
    tab.press("Enter")
    tab.until("document.querySelectorAll('#why tr').length > 5")
    assert tab.run("document.title") == "Brewline"
    assert tab.run("document.querySelectorAll('img, body script ~ script').length") == 0
    assert tab.complaints() == [] and tab.reached_for() == {f"{web.host}:{web.port}"}
    forced = "try { document.body.innerHTML = '<b>x</b>'; 0 } catch (error) { error.name === 'TypeError' ? 1 : 0 }"
    assert tab.run(forced) == 1, "the browser itself forbids what the page does not do"


def test_a_member_is_edited_and_a_cold_one_described(tab: Tab, stack: Stack, start: Start, views: list[MemberView]) -> None:
    port, _ = start(stack, page=(web := Web("127.0.0.1", 0)))
    tab.open(web)
    choose(tab, "m7")
    newest = views[7].history[-1].item
    assert newest.title in tab.run("document.querySelector('#history li').innerText")
    tab.type("k", "100")
    assert newest.item_id not in str(asks(tab))
    tab.run("document.querySelector('#history li button:last-child').click()")
    assert tab.run("document.getElementById('state').innerText") == "edited: in the request"
    described = asks(tab)
    with Client(f"127.0.0.1:{port}") as client:
        less = client.recommend(replace(views[7], history=views[7].history[:-1]), 100, fanout=200, readable=True)
    assert [row.title for row in less.rows] == [row[2].partition("\n")[0] for row in described] and newest.item_id in less.ids
    tab.run("document.getElementById('undo').click()")
    assert tab.run("document.getElementById('state').innerText") == "as the store knows them"
    tab.run("document.getElementById('cold').click()")
    tab.ask("Input.insertText", text="fond of roses")
    tab.type("add-item", newest.title)
    tab.until("document.querySelectorAll('#add-item-list [role=option]').length")
    tab.press("ArrowDown")
    tab.press("Enter")
    assert newest.title in tab.run("document.querySelector('#history li').innerText")
    tab.run("document.querySelector('[data-filter=categories]').value = 'gardens\\nchess'")
    cold = asks(tab)
    assert cold and all(" · gardens" in row[2] or " · chess" in row[2] for row in cold)
    tab.run("document.querySelector('[data-task=like]').value = -1")
    assert len(asks(tab)[0]) == len(cold[0]) + 2, "each task has a column"
    assert "1 × label + -1 × like" in tab.run("document.getElementById('answer').innerText")
    late = "const got = await asks(...sent); fetch = asks; return new Promise(go => late = () => go(got));"
    tab.run(f"asks = fetch; fetch = async (...sent) => {{ {late} }}; late = 0")
    tab.press("Enter", 2)
    tab.until("late && 1")
    tab.type("k", "3")
    assert len(asks(tab)) == 3 and tab.run("late(), new Promise(done => setTimeout(done, 300))") is None
    assert len(tab.table()) == 3, "the answer to the question before came last and is not shown"
    assert tab.complaints() == []


def test_lacks_and_refusals_are_shown(tab: Tab, stack: Stack, start: Start, tmp_path: Path) -> None:
    slow, web, file = Pace(), Web("127.0.0.1", 0), tmp_path / "tokens.txt"
    slow.record(2_000, 50.0, time.monotonic())
    reader = make_token(file, "shop", "read")
    start(replace(stack, recommender=replace(stack.recommender, pace=slow)), page=web, tokens=file)
    tab.open(web)
    tab.type("token-text", "shop.wrong")
    tab.press("Enter")
    tab.until("document.getElementById('token-why').innerText.includes('no token that this server knows')")
    tab.type("token-text", reader)
    tab.press("Enter")
    tab.until("document.querySelectorAll('#facts b').length")
    tab.type("member", "m5")
    tab.press("Enter")
    tab.until("document.getElementById('unshown').innerText.includes('may not read')")
    assert len(asks(tab)) == 10
    assert "Degraded: RETRIEVAL_ORDER" in tab.run("document.querySelector('#answer [role=alert]').innerText")
    tab.run("document.querySelector('#view button').click()")
    tab.until("document.getElementById('why').innerText.includes('PERMISSION_DENIED')")
    tab.press("Escape")
    tab.type("member", "nobody")
    tab.press("Enter")
    tab.press("Enter", 2)
    tab.until("document.getElementById('answer').innerText.includes('NOT_FOUND')")
    assert reader not in tab.run("document.documentElement.outerHTML + JSON.stringify({...localStorage, ...sessionStorage})")


def test_a_member_store_that_is_away_is_no_end(tab: Tab, night: Path, copied: Path, start: Start) -> None:
    away = open_stack(copied, night / "encoder1", night / "ranker1", f"unix://{copied}/nobody")
    start(away, page=(web := Web("127.0.0.1", 0)))
    tab.open(web)
    tab.type("member", "m5")
    assert len(asks(tab)) == 10
    assert "Degraded: STALE_MEMBER" in tab.run("document.querySelector('#answer [role=alert]').innerText")
    assert "does not answer" in tab.run("document.getElementById('unshown').innerText")
