"""The load generator waits for nobody and hides nothing; the figures are those of its columns; the search finds what is known."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from index.errors import BrewlineError
from ranking.cli.main import app
from ranking.cli.member_store import MEMBERS_VARIABLE
from ranking.serving import recommender_pb2 as pb
from ranking.serving.client import ServiceError
from ranking.serving.load import Floats, LoadError, Measured, Target, arrivals, closed_load, figures, open_load, quantile
from ranking.serving.load_capacity import NoCapacity
from ranking.serving.load_requests import RequestWish, requests_of
from ranking.serving.load_server import ServerWish, served

Answering = Callable[[Callable[[], Awaitable[None]]], str]
REQUEST = pb.RetrieveRequest(k=1).SerializeToString()
PROMISED = {"sent", "failed", "degraded", "p50_ms", "p99_ms", "p99_ms_during_swap", "goodput", "generator_cpu"}


def measured(at: Floats, ms: Floats, **columns: object) -> Measured:
    """A run of ten seconds with these columns; what is not given is an answer in full."""
    none = np.zeros(at.size, np.int64)
    run = Measured(10.0, 10.0, 100.0, 0.1, 1.0, ["one"], ["e|r"], at, 0.0 * ms, ms, none, none, none, none, 0.0 * ms, ms)
    return replace(run, **columns)  # type: ignore[arg-type]


class Stalling:
    """Nobody waits, but for half a second after the tenth request, when the whole event loop does nothing."""

    def __init__(self) -> None:
        self.asked = 0
        self.stalled = (0.0, 0.0)

    async def __call__(self) -> None:
        self.asked += 1
        if self.asked == 10:
            begun = time.monotonic()
            time.sleep(0.5)
            self.stalled = (begun, time.monotonic())


@pytest.fixture
def stalling(answering: Answering) -> tuple[Stalling, str]:
    pause = Stalling()
    return pause, answering(pause)


def test_every_request_of_a_stall_is_charged_with_it(stalling: tuple[Stalling, str]) -> None:
    handler, address = stalling
    at = arrivals(100, 1.5, seed=3)
    found = open_load(Target(address, "Retrieve", [REQUEST], 20.0), at, 1.5)
    np.testing.assert_allclose(found.at, at, atol=1e-5, err_msg="all were sent, and for when they were scheduled")
    assert found.answered.all() and handler.asked == at.size and found.snapshots == ["one"]
    begun, ended = handler.stalled
    due = found.started + found.at
    inside = (due > begun + 0.01) & (due < ended)
    assert inside.sum() >= 20, "the generator went on sending while nobody answered"
    assert (found.ms[inside] / 1e3 >= ended - due[inside] - 1e-3).all()
    handler.asked = 0
    closed = closed_load(Target(address, "Retrieve", [REQUEST], 20.0), 2, 1.0)
    begun, ended = handler.stalled
    sent = closed.started + closed.at
    charged = (sent < ended) & (sent + closed.ms / 1e3 > ended)
    assert 1 <= charged.sum() <= 2, "callers who wait see the stall once each: that is what hides it"


def test_a_schedule_is_the_same_again_and_keeps_its_rate() -> None:
    one, two, other = arrivals(50, 200, 1), arrivals(50, 200, 1), arrivals(50, 200, 2)
    assert np.array_equal(one, two) and not np.array_equal(one[:10], other[:10])
    assert (np.diff(one) > 0).all() and one[0] > 0 and one[-1] < 200
    assert abs(one.size - 10_000) < 400 and np.diff(one).std() == pytest.approx(1 / 50, rel=0.1), "as of independent callers"
    np.testing.assert_allclose(arrivals(4, 2, 0, even=True), np.arange(8) / 4)


def test_figures_are_those_of_the_columns() -> None:
    ms = np.arange(1.0, 201.0)
    code, degraded = np.zeros(200, np.int64), np.zeros(200, np.int64)
    code[0], code[1], degraded[5] = 8, 4, 1
    run = measured(np.linspace(0, 9.9, 200), ms, code=code, degraded=degraded)
    found = figures(run)
    assert (found["sent"], found["answered"], found["failed"], found["degraded"]) == (200, 198, 2, 1)
    assert found["codes"] == {"DEADLINE_EXCEEDED": 1, "OK": 198, "RESOURCE_EXHAUSTED": 1}
    assert (found["p50_ms"], found["p99_ms"], found["max_ms"]) == (101, 199, 200)
    assert found["goodput"] == 19.8 and replace(run, deadline_s=0.1).goodput == 9.8
    assert quantile(np.zeros(0), 0.5) != quantile(np.zeros(0), 0.5)
    assert run.whole_p99 == np.inf and measured(run.at, ms).whole_p99 == 198, "an answer that never came is later than all"


def test_requests_are_of_the_members_and_the_same_again(night: Path) -> None:
    store = night / "store"
    known = [pb.RecommendRequest.FromString(raw) for raw in requests_of(store, None, RequestWish("recommend", 7, 50, True))]
    assert len({one.member.id for one in known}) == 40 and {(one.k, one.fanout) for one in known} == {(7, 50)}
    assert {len(one.filter.categories) for one in known} == {2} and len({tuple(one.filter.categories) for one in known}) > 1
    cold = requests_of(store, None, RequestWish("retrieve-cold", distinct=9))
    assert cold == requests_of(store, None, RequestWish("retrieve-cold", distinct=9)) and len(cold) == 9
    assert all(pb.RetrieveRequest.FromString(raw).member.description.history for raw in cold)
    with pytest.raises(LoadError, match="holds no members"):
        requests_of(store, "sqlite::memory:", RequestWish("retrieve"))


def test_a_server_is_told_its_member_store_where_ps_does_not_look(night: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "redis://default:secret@127.0.0.1:1/0"
    wish = ServerWish(night / "store", night / "encoder1", members=url)
    assert "secret" not in " ".join(wish.command()) and wish.environment()[MEMBERS_VARIABLE] == url
    monkeypatch.setenv(MEMBERS_VARIABLE, url)
    assert MEMBERS_VARIABLE not in replace(wish, members=None).environment(), "the store's own members answer then"
    monkeypatch.setenv("BREWLINE_TOKEN", "secret")
    monkeypatch.setenv("BREWLINE_TOKEN_FILE", "token")
    assert not {"BREWLINE_TOKEN", "BREWLINE_TOKEN_FILE"} & set(wish.environment()), "a server knows hashes"
    there = replace(wish, members=f"sqlite:{night}/nowhere/members")
    with pytest.raises(LoadError, match=r"did not start.*nowhere/members cannot be opened"), served(there):
        pass


def bench(*words: object) -> Result:
    result = CliRunner().invoke(app, ["bench", "serve", *map(str, words)], env={"COLUMNS": "150"})
    if result.exception is not None and not isinstance(result.exception, BrewlineError | SystemExit):
        raise result.exception
    return result


def test_a_running_server_is_measured(night: Path, port: int, tmp_path: Path) -> None:
    at = ("--store", night / "store", "--address", f"127.0.0.1:{port}", "--deadline-ms", 20_000)
    done = bench(*at, "--method", "retrieve", "--rate", 30, "--seconds", 1, "--filter", "--json", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert set(found) >= PROMISED and found["p99_ms_during_swap"] is None
    assert found["sent"] == found["answered"] > 10 and found["failed"] == 0 and 0 < found["generator_cpu"] < 2
    assert 0 < found["inside_p50_ms"] <= found["server_p50_ms"] <= found["p50_ms"] <= found["p99_ms"] <= found["max_ms"]
    assert json.loads((tmp_path / "out" / "serve.json").read_text()) == found
    assert (tmp_path / "out" / "serve.png").read_bytes().startswith(b"\x89PNG")


def test_batches_are_compared_with_one_by_one(night: Path, port: int) -> None:
    at = ("--store", night / "store", "--address", f"127.0.0.1:{port}", "--deadline-ms", 20_000)
    done = bench(*at, "--method", "retrieve-cold", "--batching", "--probe-seconds", 0.5, "--budget-ms", 20_000)
    assert done.exit_code == 0 and "one by one per second" in done.stdout and "callers" in done.stdout, done.output


def test_what_cannot_be_measured_is_one_line(night: Path, port: int) -> None:
    at = ("--store", night / "store", "--address")
    assert "give --encoder" in bench("--store", night / "store").output
    assert "--batching goes with" in bench(*at, f"127.0.0.1:{port}", "--batching").output
    nobody = bench(*at, "127.0.0.1:1", "--rate", 5, "--seconds", 1).exception
    assert isinstance(nobody, ServiceError) and "127.0.0.1:1 says UNAVAILABLE: nobody answers" in str(nobody)


def test_a_server_that_does_not_start_says_why(night: Path, port: int) -> None:
    wish = ServerWish(night / "store", night / "encoder1", options=["--port", str(port)])
    with pytest.raises(LoadError, match=r"did not start.*Address already in use"), served(wish):
        pass


def test_the_generator_loads_no_model() -> None:
    heavy = (
        "import sys, ranking.serving.load_run; sys.exit(any(m in sys.modules for m in ('torch', 'faiss', 'numpy', 'pyarrow')))"
    )
    assert subprocess.run([sys.executable, "-c", heavy], check=False).returncode == 0


@pytest.mark.soak
def test_a_real_server_far_beyond_its_capacity(night: Path) -> None:
    models = ("--encoder", night / "encoder1", "--ranker", night / "ranker1")
    times = ("--probe-seconds", 2, "--search-seconds", 150, "--seconds", 10)
    done = bench("--store", night / "store", *models, "--overload", 5, *times, "--fanout", 50, "--json")
    if isinstance(done.exception, NoCapacity):
        pytest.skip(f"other processes keep this machine too busy for answers of few milliseconds: {done.exception}")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["capacity"] > 0 and found["overload"]["times_capacity"] == pytest.approx(5, rel=0.2)
    assert set(found["codes"]) <= {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"} and found["goodput"] > 0
