"""The pages of several workers are one page, whatever one of them does; and `brewline top` reads it right."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager

import pytest
from prometheus_client import generate_latest

from ranking.cli.top_look import Look, _samples, compared
from ranking.serving import workers_pages
from ranking.serving.web import Asked, Reply, Web
from ranking.serving.workers import Workers
from ranking.serving.workers_pages import Pages, _Merged, _meters

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="--workers needs Linux")
PAGE = (
    '# HELP calls_total Calls.\n# TYPE calls_total counter\ncalls_total{code="OK"} %d\n'
    '# TYPE brewline_serving_info gauge\nbrewline_serving_info{snapshot="s"} 1\n'
    '# TYPE brewline_items gauge\nbrewline_items{which="all"} 60\n# TYPE brewline_queue_length gauge\nbrewline_queue_length 2\n'
)


def test_pages_of_workers_are_one_page() -> None:
    workers = Workers([["x"]] * 3, {}, 0.0).all
    workers[1].restarts = 4
    text = generate_latest(_Merged({"0": _meters(PAGE % 3), "1": _meters(PAGE % 4), "2": None}, workers)).decode()
    told = _samples(text)
    assert {one.labels["worker"]: one.value for one in told["calls_total"]} == {"0": 3, "1": 4}
    assert text.count("# TYPE calls_total counter") == 1 and text.count("# HELP calls_total") == 1
    assert {one.labels["worker"]: one.value for one in told["brewline_worker_up"]} == {"0": 1, "1": 1, "2": 0}
    assert {one.labels["worker"]: one.value for one in told["brewline_worker_restarts_total"]} == {"0": 0, "1": 4, "2": 0}
    seen = compared(Look(0.0, told), Look(1.0, told))
    assert json.loads(json.dumps(seen["items"])) == {"all": 60}, "one store, whoever tells of it"
    assert seen["queue"] == {"length": 4, "oldest_seconds": None}


@contextmanager
def pages_of(*addresses: str) -> Iterator[Callable[[str], str]]:
    """Reads a page of the parent of workers that tell their meters there ("": it does not answer yet)."""
    workers, web = Workers([["x"]] * len(addresses), {}, 0.0), Web("127.0.0.1", 0)
    for one, address in zip(workers.all, addresses, strict=True):
        one.facts = {"metrics": address} if address else None
    pages = Pages(workers, web)
    asks: Mapping[str, Callable[[Asked], Reply]] = {"/metrics": pages._metrics, "/healthz": pages._healthz}
    with closing(web):
        yield lambda path: asks[path](Asked(path)).body.decode()


@contextmanager
def answering(reply: Callable[[], bytes]) -> Iterator[str]:
    """The address of a worker whose every page is this."""
    web = Web("127.0.0.1", 0)
    with closing(web):
        web.start({path: lambda _: Reply(reply()) for path in ("/metrics", "/healthz")})
        yield web.address


@contextmanager
def raw(reply: bytes) -> Iterator[str]:
    """The address of somebody who sends these bytes and hangs up."""
    loop = asyncio.new_event_loop()

    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        writer.close()

    server = loop.run_until_complete(asyncio.start_server(send, "127.0.0.1", 0))
    port = server.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        loop.close()


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n# TYPE calls_total counter\n",
        b"HTTP/1.1 200 OK\r\n\r\n" + (PAGE % 3).encode()[:-1],
        b"HTTP/1.1 200 OK\r\n\r\n<html>{\xff\n",
        b"HTTP/1.1 200 OK\r\n\r\n{{{\n",
        b"so what\r\n",
        b"",
    ],
)
def test_a_page_that_is_cut_short_or_none_is_one_workers_only(reply: bytes) -> None:
    with answering((PAGE % 3).encode) as well, raw(reply) as ill, pages_of(well, ill) as read:
        told = _samples(read("/metrics"))
    assert {one.labels["worker"]: one.value for one in told["calls_total"]} == {"0": 3}
    assert {one.labels["worker"]: one.value for one in told["brewline_worker_up"]} == {"0": 1, "1": 0}


def test_workers_are_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answers when both have been asked."""
    monkeypatch.setattr(workers_pages, "ANSWER_S", 60.0)
    both = threading.Barrier(2, timeout=30)

    def reply() -> bytes:
        both.wait()
        return (PAGE % 3).encode()

    with answering(reply) as one, answering(reply) as other, pages_of(one, other) as read:
        assert {one.value for one in _samples(read("/metrics"))["brewline_worker_up"]} == {1}
        assert read("/healthz") == "ok, 2 of 2 workers serve\n"


def test_health_is_that_of_those_who_listen() -> None:
    with answering(lambda: b"ok\n") as well, raw(b"HTTP/1.1 503 Ill\r\nContent-Length: 0\r\n\r\n") as ill:
        for addresses, words in (
            ((well, ""), "ok, 1 of 2 workers serve"),
            ((well, ill), "worker 1 is not serving"),
            (("", ""), "0 of 2 workers serve"),
        ):
            with pages_of(*addresses) as read:
                assert read("/healthz") == f"{words}\n"


def counted(at: float, counts: Mapping[str, int]) -> Look:
    """A look at workers that have answered so often, each request in less than .1 s."""
    lines = []
    for worker, count in counts.items():
        lines += [
            f'brewline_serving_info{{worker="{worker}"}} 1',
            f'brewline_requests_total{{code="OK",method="Retrieve",worker="{worker}"}} {count}',
            f'process_cpu_seconds_total{{worker="{worker}"}} {count}',
            f'process_resident_memory_bytes{{worker="{worker}"}} {count}',
        ]
        labels = f'method="Retrieve",outcome="answered",worker="{worker}"'
        lines += [f'brewline_request_seconds_bucket{{le="{le}",{labels}}} {count}' for le in ("0.1", "+Inf")]
    return Look(at, _samples("\n".join(lines) + "\n"))


@pytest.mark.parametrize(
    ("before", "now", "grown"),
    [
        ({"0": 1_000, "1": 500}, {"0": 1_010, "1": 520}, 30),
        ({"0": 1_000_000, "1": 500}, {"0": 1_000_010, "1": 20}, 30),  # 1 was started again
        ({"0": 1_000}, {"0": 1_010, "1": 500_000}, 10),  # the look before had nothing of 1
        ({"0": 1_000, "1": 500}, {"0": 1_010}, 10),
    ],
)
def test_rates_of_workers_are_those_of_each(before: dict[str, int], now: dict[str, int], grown: int) -> None:
    told = compared(counted(0.0, before), counted(2.0, now))
    assert told["qps"] == grown / 2 and told["codes"] == {"OK": grown / 2} and told["cpu"] == grown / 2
    assert told["methods"] == {"Retrieve": {"qps": grown / 2, "p50_ms": 50.0, "p99_ms": pytest.approx(99.0)}}
    assert told["memory_bytes"] == max(now.values())
