"""What the server tells Prometheus: the numbers, the port that tells them, and that no caller can hold or fill it."""

from __future__ import annotations

import http.client
import math
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ranking.serving import web
from ranking.serving.readings import MOST_SERIES, Readings, Series
from ranking.serving.score_drift import ENOUGH, Drift
from ranking.serving.web import MOST_HEAD, Asked, Reply, Web, WebError

Start = Callable[..., tuple[int, Callable[[], None]]]
AWKWARD = 'a "quoted\\" \n line } 5'


@pytest.fixture
def site() -> Iterator[Web]:
    """An HTTP server with two paths, one of which fails."""
    served = Web("127.0.0.1", 0)
    served.start({"/words": lambda asked: Reply(asked.query.get("say", "nothing").encode()), "/broken": broken})
    yield served
    served.close()


def broken(asked: Asked) -> Reply:
    raise RuntimeError(f"{asked.path} is broken")


def fetch(address: Web, path: str, method: str = "GET", **headers: str) -> tuple[int, str, str]:
    """Status, kind and body of an answer."""
    connection = http.client.HTTPConnection(address.host, address.port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        reply = connection.getresponse()
        return reply.status, reply.headers["Content-Type"], reply.read().decode()
    finally:
        connection.close()


def said(address: Web, sent: bytes) -> bytes:
    """What comes back for bytes, until the server hangs up."""
    with socket.create_connection((address.host, address.port), timeout=10) as connection:
        connection.sendall(sent)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def numbers(text: bytes) -> dict[tuple[str, ...], float]:
    """The samples of a scrape by name and values of the labels."""
    families = text_string_to_metric_families(text.decode())
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


def test_a_scrape_says_what_is_held_elsewhere_and_a_broken_meter_hides_no_other() -> None:
    registry = CollectorRegistry()
    readings = Readings(registry)
    held = {("x",): math.inf, ("y",): -math.inf, (AWKWARD,): 0.1 + 0.2}
    readings.add("brewline_a", "Elsewhere.", lambda: held, ("of",))
    readings.add("brewline_b_total", "Only grows.", lambda: {(): 7}, counter=True)
    readings.add("brewline_c", "Broken.", lambda: {(): 1 / 0})
    with pytest.raises(ValueError, match="brewline_a"):
        readings.add("brewline_a", "Twice.", dict)
    told = numbers(generate_latest(registry))
    assert {key[1:]: value for key, value in told.items() if key[0] == "brewline_a"} == held
    assert told[("brewline_b_total",)] == 7 and ("brewline_c",) not in told
    assert numbers(generate_latest(registry))[("brewline_unread_total",)] == 1


def test_series_count_right_from_many_threads_and_do_not_grow_without_end() -> None:
    registry = CollectorRegistry()
    counted = Series(Counter("a_total", "A.", ("n",), registry=registry))
    spread = Series(Histogram("b", "B.", ("n",), registry=registry, buckets=(1.0,)))

    def touch(number: int) -> None:
        for _ in range(2_000):
            counted(str(number % 2)).inc()
            spread(str(number % 2)).observe(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(touch, range(4)))
    told = numbers(generate_latest(registry))
    assert [told["a_total", one] for one in "01"] == [4_000, 4_000]
    assert [told["b_sum", one] for one in "01"] == [4_000, 8_000]
    assert [told["b_bucket", "1.0", one] for one in "01"] == [2_000, 2_000]
    for number in range(2 * MOST_SERIES):
        counted(f"stranger {number}").inc()
    sums = {key[1]: value for key, value in numbers(generate_latest(registry)).items() if key[0] == "a_total"}
    assert len(sums) == MOST_SERIES + 1 and sums["other"] == MOST_SERIES + 2


def test_drift_is_seen_against_the_first_hour_of_the_same_models() -> None:
    drift = Drift()
    for number in range(ENOUGH):
        assert drift.shift() is None
        drift.add(0.5 + 0.1 * (-1) ** number, "one", now=float(number))
    assert drift.shift() == pytest.approx(0, abs=1e-9)
    for number in range(600):
        drift.add(0.7 + 0.1 * (-1) ** number, "one", now=4_000.0 + number)
    assert drift.shift() == pytest.approx(2, abs=0.01)
    assert drift.stats()["reference", "mean"] == pytest.approx(0.5) and drift.stats()["recent", "p10"] == pytest.approx(0.6)
    drift.add(0.9, "two", now=5_000.0)
    assert drift.shift() is None and drift.stats()["reference", "mean"] == 0.9


def test_http_answers_what_it_has_and_nothing_else(site: Web) -> None:
    assert fetch(site, "/words?say=hello+you&x")[::2] == (200, "hello you")
    assert fetch(site, "/words", "HEAD")[::2] == (200, "")
    status, _, body = fetch(site, "/passwd")
    assert status == 404 and "/words" in body
    assert fetch(site, "/words", "POST")[0] == 405
    status, _, body = fetch(site, "/broken")
    assert status == 500 and "is broken" not in body
    assert fetch(site, "/words", Host="localhost:99")[0] == 200
    assert fetch(site, "/words", Host="evil.example")[0] == 421, "a page whose name leads here may not read"
    for sent in (b"hello\r\n\r\n", b"GET  HTTP/1.1\r\n\r\n", b"GET /words HTTP/3\r\n\r\n", b"\xff\x00\r\n\r\n"):
        assert said(site, sent).startswith(b"HTTP/1.1 400 ")
    assert said(site, b"GET /words HTTP/1.1\r\nX: " + b"y" * MOST_HEAD).startswith(b"HTTP/1.1 431 ")
    with pytest.raises(WebError, match=str(site.port)):
        Web("127.0.0.1", site.port)


def test_slow_callers_are_hung_up_on_and_hold_nobody(site: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "CLIENT_S", 0.5)
    monkeypatch.setattr(web, "MOST_CLIENTS", 3)
    slow = [socket.create_connection((site.host, site.port), timeout=10) for _ in range(3)]
    for connection in slow:
        connection.sendall(b"GET /wor")
    with socket.create_connection((site.host, site.port), timeout=10) as one_more:
        assert one_more.recv(100) == b""
    for connection in slow:
        with connection:
            assert connection.recv(100) == b""
    assert fetch(site, "/words")[0] == 200


def test_the_port_is_free_again_and_no_thread_is_left() -> None:
    served = Web("127.0.0.1", 0)
    served.start({})
    held = socket.create_connection((served.host, served.port), timeout=10)
    served.close()
    served.close()
    held.close()
    Web("127.0.0.1", served.port).close()
    assert not [thread for thread in threading.enumerate() if thread.name == "brewline-web"]
