"""What the server tells Prometheus: the format, the numbers, the port that tells them, and that no caller can hold or fill it."""

from __future__ import annotations

import http.client
import math
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ranking.serving import web
from ranking.serving.exposition import ExpositionError, parse, render
from ranking.serving.meters import MOST_SERIES, Counter, Family, Histogram, MeterError, Reading, Registry
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


def check(families: dict[str, Family]) -> None:
    """Every histogram counts upwards, ends with all, and has a sum that its buckets allow; every counter is 0 or more."""
    for family in families.values():
        if family.kind == "counter":
            assert all(sample.value >= 0 for sample in family.samples), family.name
        if family.kind != "histogram":
            continue
        series: dict[tuple[tuple[str, str], ...], list[tuple[float, float]]] = {}
        rest: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                *labels, (name, bound) = sample.labels
                assert name == "le"
                series.setdefault(tuple(labels), []).append((float(bound), sample.value))
            else:
                rest[sample.name, sample.labels] = sample.value
        for labels, buckets in series.items():
            bounds, counts = zip(*buckets)
            total, count = rest.pop((f"{family.name}_sum", labels)), rest.pop((f"{family.name}_count", labels))
            assert list(bounds) == sorted(set(bounds)) and bounds[-1] == math.inf and list(counts) == sorted(counts)
            each = [high - low for low, high in zip([0.0, *counts], counts)]
            least = sum(n * low for n, low in zip(each, [0.0, *bounds]))
            most = sum(n * high for n, high in zip(each, bounds) if n)
            assert counts[-1] == count and least <= total + 1e-9 and total <= most + 1e-9
        assert not rest, family.name


def test_a_text_says_what_the_meters_hold() -> None:
    registry = Registry()
    counted = registry.add(Counter("brewline_a_total", "One\\two\nthree.", ("who", "what")))
    spread = registry.add(Histogram("brewline_b_seconds", "Some.", ("who",), (0.1, 1.0)))
    numbers = {("x",): math.inf, ("y",): -math.inf, ("z",): 0.1 + 0.2}
    registry.add(Reading("brewline_c", "Elsewhere.", lambda: numbers, ("of",)))
    for who in (AWKWARD, "plain"):
        counted.add(who, "é", by=2)
        for value in (0.05, 0.1, 0.5, 7.0):
            spread.observe(value, who)
    text = render(registry.collect())
    families = parse(text)
    check(families)
    assert {sample.labels[0][1] for sample in families["brewline_a_total"].samples} == {AWKWARD, "plain"}
    assert families["brewline_a_total"].told == "One\\two\nthree."
    assert [sample.value for sample in families["brewline_c"].samples] == list(numbers.values())
    plain = [sample for sample in families["brewline_b_seconds"].samples if sample.labels[0] == ("who", "plain")]
    assert [(dict(one.labels).get("le"), one.value) for one in plain[:3]] == [("0.1", 2), ("1", 3), ("+Inf", 4)]
    assert plain[3].value == pytest.approx(7.65) and plain[4].value == 4
    judged = {(one.name, tuple(one.labels.items())): one.value for f in text_string_to_metric_families(text) for one in f.samples}
    assert judged == {(one.name, one.labels): one.value for family in families.values() for one in family.samples}


@pytest.mark.parametrize(
    "text",
    [
        "a 1\n",
        "# TYPE a counter\na 1\n",
        "# HELP a x\n# TYPE a counter\na 1",
        "# HELP a x\n# TYPE a counter\na 1\na 1\n",
        "# HELP a x\n# TYPE a counter\n# HELP b x\n# TYPE b counter\na 1\n",
        "# HELP a x\n# TYPE a counter\n# HELP a x\n# TYPE a counter\n",
        "# HELP a x\n# TYPE a sum\n",
        '# HELP a x\n# TYPE a gauge\na{b="c\\d"} 1\n',
        '# HELP a x\n# TYPE a gauge\na{b="c" 1\n',
        '# HELP a x\n# TYPE a gauge\na{b="c",b="d"} 1\n',
        "# HELP a x\n# TYPE a gauge\na one\n",
        "# HELP a x\n# TYPE a histogram\na 1\n",
        "<html>\n",
    ],
)
def test_a_text_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ExpositionError, match=r"line|cut short"):
        parse(text)


def test_meters_count_right_from_many_threads_and_do_not_grow_without_end() -> None:
    counted, spread = Counter("a_total", "A.", ("n",)), Histogram("b", "B.", ("n",), (1.0,))

    def touch(number: int) -> None:
        for _ in range(2_000):
            counted.add(str(number % 2))
            spread.observe(number, str(number % 2))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(touch, range(4)))
    assert [sample.value for sample in counted.family().samples] == [4_000, 4_000]
    values = {(sample.name, *sample.labels): sample.value for sample in spread.family().samples}
    assert [values["b_sum", ("n", one)] for one in "01"] == [4_000, 8_000]
    assert [values["b_count", ("n", one)] for one in "01"] == [4_000, 4_000]
    assert [values["b_bucket", ("n", one), ("le", "1")] for one in "01"] == [2_000, 2_000]
    for number in range(2 * MOST_SERIES):
        counted.add(f"stranger {number}")
        spread.observe(1, f"stranger {number}")
    sums = {sample.labels[0][1]: sample.value for sample in counted.family().samples}
    assert len(sums) == MOST_SERIES + 1 and sums["other"] == MOST_SERIES + 2
    assert len(spread.family().samples) == 4 * (MOST_SERIES + 1)


def test_a_wrong_meter_is_refused_and_a_broken_one_hides_no_other() -> None:
    with pytest.raises(MeterError, match="labels"):
        Counter("a_total", "A.", ("le",))
    with pytest.raises(MeterError, match="names"):
        Counter("A-total", "A.")
    with pytest.raises(MeterError, match="was given 2"):
        Counter("a_total", "A.", ("b",)).add("x", "y")
    with pytest.raises(MeterError, match="grows"):
        Counter("a_total", "A.").add(by=-1)
    with pytest.raises(MeterError, match="rise"):
        Histogram("a", "A.", bounds=(2.0, 1.0))
    registry = Registry()
    registry.add(Reading("a", "A.", lambda: {(): 1 / 0}))
    registry.add(Counter("b_total", "B."))
    with pytest.raises(MeterError, match="already"):
        registry.add(Counter("b_total", "B."))
    assert "a" not in parse(render(registry.collect()))
    again = parse(render(registry.collect()))
    assert again["brewline_unread_total"].samples[0].value == 1 and "b_total" in again


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
