from __future__ import annotations

import json
import signal
import subprocess
import sys

from ranking.cli.bench_search import INTERRUPTED


def test_ctrl_c_keeps_what_was_measured() -> None:
    options = "--items 3000 --dims 16 --k 50 --judged 8 --seconds 2 --methods torch,ours --json"
    # A test that somebody started in the background is deaf to SIGINT, and its children with it.
    begin = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from ranking.cli.main import main; main()"
    command = [sys.executable, "-c", begin, "bench", "search", *options.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        finished = 0  # the truth, torch, our exact search; then eight settings of our lists
        while finished < 3:
            line = running.stderr.readline()
            assert line, "the bench ended before it could be interrupted"
            finished += line.startswith("search: 1/1")
        running.send_signal(signal.SIGINT)
        said, _ = running.communicate(timeout=120)
    found = json.loads(said)
    assert running.returncode == INTERRUPTED and not found["complete"]
    assert found["rows"][0]["method"] == "torch" and len(found["rows"]) <= 2
