"""A real server, its meters, and those who read them: `brewline top`, the dashboard, the alerts."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import grpc
import pytest
import yaml
from click.testing import Result
from prometheus_client.parser import text_string_to_metric_families
from typer import Typer
from typer.testing import CliRunner

from index.errors import BrewlineError
from ranking.cli import top
from ranking.cli.top_look import Look, compared, look, quantile
from ranking.serving import recommender_pb2 as pb
from ranking.serving import recommender_pb2_grpc
from ranking.serving.stack import Stack
from ranking.serving.web import Web

Start = Callable[..., tuple[int, Callable[[], None]]]
EXAMPLES = Path(__file__).parents[3] / "examples"
BEYOND = re.compile(r"process_|python_")
"""Meters that the whole world names so."""


@dataclass(frozen=True)
class Watched:
    """A server that tells its meters."""

    stub: recommender_pb2_grpc.RecommenderStub
    port: int
    web: Web

    def read(self, path: str = "/metrics") -> str:
        with build_opener(ProxyHandler({})).open(self.web.address + path, timeout=20) as reply:
            return str(reply.read().decode())


@pytest.fixture
def watched(stack: Stack, start: Start) -> Iterator[Watched]:
    web = Web("127.0.0.1", 0)
    port, _ = start(stack, web=web)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Watched(recommender_pb2_grpc.RecommenderStub(channel), port, web)


def ask(watched: Watched) -> None:
    """Three calls that are answered and one that is refused."""
    watched.stub.Recommend(pb.RecommendRequest(member=pb.Member(id="m5"), k=4))
    watched.stub.Recommend(pb.RecommendRequest(member=pb.Member(id="m5"), k=4))
    watched.stub.Retrieve(pb.RetrieveRequest(member=pb.Member(id="m2"), k=9))
    with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
        watched.stub.Retrieve(pb.RetrieveRequest(member=pb.Member(id="nobody")))
    settle(watched, "NOT_FOUND", "Retrieve")


def settle(watched: Watched, *labels: str) -> None:
    """A refusal reaches its caller a moment before it is counted; returns when it is."""
    until = time.monotonic() + 10
    while labels not in values(watched.read(), "brewline_requests_total"):
        assert time.monotonic() < until


def values(text: str, name: str) -> dict[tuple[str, ...], float]:
    """The samples of a name by the values of their labels, which stand in the order of their names."""
    families = text_string_to_metric_families(text)
    return {tuple(one.labels.values()): one.value for family in families for one in family.samples if one.name == name}


def test_what_was_asked_is_what_is_told(watched: Watched, stack: Stack) -> None:
    before = watched.read()
    ask(watched)
    text = watched.read()
    began = values(before, "brewline_requests_total")
    grown = {key: count - began.get(key, 0) for key, count in values(text, "brewline_requests_total").items()}
    assert grown == {("OK", "Recommend"): 2, ("OK", "Retrieve"): 1, ("NOT_FOUND", "Retrieve"): 1}
    counts = values(text, "brewline_stage_seconds_count")
    for stage in ("queue", "member", "search", "rank", "order"):
        assert counts["Recommend", stage] == 2
    assert ("Retrieve", "rank") not in counts
    sums, whole = values(text, "brewline_stage_seconds_sum"), values(text, "brewline_request_seconds_sum")
    of_stages = sum(value for (method, _), value in sums.items() if method == "Recommend")
    assert 0 < of_stages <= whole["Recommend", "answered"] * 1.01
    assert values(text, "brewline_items") == {("all",): 60, ("live",): 0}
    (info,) = values(text, "brewline_serving_info")
    assert stack.ranker is not None
    assert {stack.snapshot.name, stack.encoder.fingerprint, stack.ranker.fingerprint} <= set(info)
    assert values(text, "brewline_prefix_cache_tokens_total")[("cache",)] > 0
    assert values(text, "brewline_queue_length") == {(): 0} and values(text, "brewline_in_flight") == {(): 0}
    age = values(text, "brewline_snapshot_age_seconds")
    assert 0 < age[("built",)] < 86_400 < age[("as_of",)]
    assert values(text, "brewline_unread_total") == {(): 0} and values(text, "process_resident_memory_bytes")[()] > 1e7
    assert "_created" not in text, "the library tells when it made each series, and nobody asks"
    assert watched.read("/healthz") == "ok\n"


def test_strangers_make_no_series(watched: Watched) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{watched.port}") as channel, pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
        channel.unary_unary("/brewline.v1.Recommender/Stranger")(b"")
    settle(watched, "UNIMPLEMENTED", "other")
    text = watched.read()
    assert values(text, "brewline_requests_total") == {("UNIMPLEMENTED", "other"): 1} and "Stranger" not in text


def run(*words: str) -> Result:
    app = Typer()
    app.command()(top.top)
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "150"})


def test_top_shows_what_happened_between_two_looks(watched: Watched) -> None:
    before = look(watched.web.address)
    ask(watched)
    now = look(watched.web.address)
    told = compared(Look(10.0, before.told), Look(12.0, now.told))
    assert told["qps"] == 2.0 and told["codes"] == {"OK": 1.5, "NOT_FOUND": 0.5}
    methods, stages = told["methods"], told["stages"]
    assert isinstance(methods, dict) and isinstance(stages, dict)
    assert methods["Recommend"]["qps"] == 1.0 and 0 < methods["Recommend"]["p50_ms"] <= methods["Recommend"]["p99_ms"]
    assert next(iter(stages)) == "queue" and stages["rank"]["p99_ms"] > 0
    done = run("--address", watched.web.address, "--once", "--json", "--every", "0.1")
    assert done.exit_code == 0, done.exception
    again = json.loads(done.stdout)
    assert again["qps"] == 0 and again["methods"]["Recommend"]["p50_ms"] is None and again["items"]["all"] == 60
    shown = run("--address", watched.web.address, "--once", "--every", "0.1").stdout
    for word in ("Recommend", "rank", "requests/s", "snapshot", again["snapshot"]["snapshot"], "swaps", "prefix cache"):
        assert word in shown


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--address", "127.0.0.1:1"), "expected http://"),
        (("--address", "http://127.0.0.1:1"), "--metrics-port"),
        (("--json",), "--once"),
    ],
)
def test_top_says_in_one_line_what_is_wrong(words: tuple[str, ...], told: str) -> None:
    error = run(*words).exception
    assert isinstance(error, BrewlineError) and told in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("text", ["<html>\x1b[2J</html>\n", "up 1\n", "brewline_serving_info{} 1", '# HELP ""\n', "\xff{"])
def test_top_refuses_what_is_no_scrape(text: str) -> None:
    from ranking.serving.web import Reply

    served = Web("127.0.0.1", 0)
    served.start({"/metrics": lambda _: Reply(text.encode("latin-1"))})
    try:
        with pytest.raises(BrewlineError, match="--metrics-port") as refused:
            look(served.address)
    finally:
        served.close()
    assert "\x1b" not in str(refused.value)


def test_quantiles_are_those_of_the_buckets() -> None:
    bounds = [(0.1, 50.0), (0.2, 90.0), (1.0, 100.0), (float("inf"), 100.0)]
    assert [quantile(bounds, share) for share in (0.25, 0.5, 0.7, 0.95)] == pytest.approx([0.05, 0.1, 0.15, 0.6])
    assert quantile([(0.1, 0.0), (float("inf"), 4.0)], 0.5) == 0.1 and quantile([(0.1, 0.0), (float("inf"), 0.0)], 0.5) is None


def expressions() -> dict[str, str]:
    """Every expression of the dashboard and of the alerts, by where it stands."""
    dashboard = json.loads((EXAMPLES / "grafana.json").read_text(encoding="utf-8"))
    found = {
        f"{panel['title']} {target['refId']}": target["expr"] for panel in dashboard["panels"] for target in panel["targets"]
    }
    alerts = yaml.safe_load((EXAMPLES / "alerts.yml").read_text(encoding="utf-8"))
    return found | {rule["alert"]: rule["expr"] for group in alerts["groups"] for rule in group["rules"]}


def test_dashboard_and_alerts_ask_for_what_the_server_tells(watched: Watched) -> None:
    families = dict(re.findall(r"# TYPE (\w+) (\w+)", watched.read()))
    spread = [name for name, kind in families.items() if kind == "histogram"]
    parts = {f"{name}_{part}" for name in spread for part in ("bucket", "sum", "count")}
    of_the_parent = {"brewline_worker_up", "brewline_worker_restarts_total"}  # test_workers_pages looks at these
    there = {*families, *parts, *of_the_parent}
    asked = {name for expr in expressions().values() for name in re.findall(r"\b(?:brewline|process|python)_\w+", expr)}
    assert asked <= there, asked - there
    ours = {name for name in families if not BEYOND.match(name)}
    shown = {name.removesuffix("_bucket") for name in asked}
    assert ours - shown <= {"brewline_prefix_cache_lookups_total"}, "a meter that nobody looks at"


def test_the_examples_are_whole() -> None:
    dashboard = json.loads((EXAMPLES / "grafana.json").read_text(encoding="utf-8"))
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in dashboard["panels"]})
    for where, expr in expressions().items():
        assert expr.count("(") == expr.count(")") and expr.count("{") == expr.count("}"), where
    scrape = yaml.safe_load((EXAMPLES / "prometheus.yml").read_text(encoding="utf-8"))
    assert scrape["rule_files"] == ["alerts.yml"] and scrape["scrape_configs"][0]["job_name"] == "brewline"
    assert scrape["scrape_configs"][0]["static_configs"][0]["targets"] == [top.ADDRESS.removeprefix("http://")]
    alerts = yaml.safe_load((EXAMPLES / "alerts.yml").read_text(encoding="utf-8"))
    rules = [rule for group in alerts["groups"] for rule in group["rules"]]
    told = (EXAMPLES.parent / "docs" / "observability.md").read_text(encoding="utf-8")
    for rule in rules:
        assert rule["labels"]["severity"] in ("page", "ticket") and rule["annotations"]["summary"]
        assert f"`{rule['alert']}`" in told, "an alert that nobody is told what to do about"
