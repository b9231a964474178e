"""The page as people have it: a real Chromium without a window, driven through its debugging pipe, looks at a real server."""

from __future__ import annotations

import base64
import http.client
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ranking.serving.client import Client
from ranking.serving.stack import open_stack
from ranking.serving.tokens import make_token
from ranking.serving.web import Web
from retrieval.data.schema import Item

Start = Callable[..., tuple[int, Callable[[], None]]]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="NO chromium HERE: THE PAGE WAS NOT OPENED")
PIPES = """
import os, sys
read, write = (os.dup(int(one)) for one in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""The browser reads commands from 3 and writes to 4."""
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>\u202etxt'


class Tab:
    """One tab of a browser of its own, whose network ends at this machine."""

    def __init__(self, profile: Path) -> None:
        theirs, self._down = os.pipe()
        self._up, ours = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe", "--no-proxy-server"]
        flags += ["--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}"]
        command = [sys.executable, "-c", PIPES, str(theirs), str(ours), str(CHROMIUM), *flags, "about:blank"]
        quiet = subprocess.DEVNULL
        self._browser = subprocess.Popen(command, pass_fds=(theirs, ours), stdout=quiet, stderr=quiet)
        for one in (theirs, ours):
            os.close(one)
        self._heard, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        page = next(one for one in self.ask("Target.getTargets")["targetInfos"] if one["type"] == "page")
        self._session = self.ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

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
            assert time.monotonic() < end, f"{script} never came true; the page says {self.run('document.body.innerText')[-1500:]}"
            time.sleep(0.05)
        return value

    def press(self, key: str, **more: object) -> None:
        """A key goes down and up."""
        code = {"Enter": 13, "ArrowDown": 40, "ArrowRight": 39, "Escape": 27}[key]
        text = {"text": "\r"} if key == "Enter" and not more else {}
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text, **more)

    def type(self, field: str, words: str) -> None:
        """Words are typed into a field, in the place of those it has."""
        self.run(f"document.getElementById({field!r}).focus(), document.getElementById({field!r}).select()")
        self.ask("Input.insertText", text=words)

    def errors(self) -> list[dict[str, Any]]:
        """What the page complained of: exceptions, what the policy blocked, requests that failed."""
        self.run("1")
        bad = ("Runtime.exceptionThrown", "Log.entryAdded")
        return [one["params"] for one in self.events if one.get("method") in bad]

    def close(self) -> None:
        """The browser has ended."""
        self._browser.kill()
        self._browser.wait(10)
        os.close(self._down)
        os.close(self._up)


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    """A tab that has nothing in it."""
    opened = Tab(tmp_path / "profile")
    yield opened
    opened.close()
