"""One page of meters and one answer about health for all workers: each is asked, and its series bear its name."""

from __future__ import annotations

import logging
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.client import HTTPException
from typing import TypeVar

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from ranking.serving.web import Asked, Reply, Web, plain_reply
from ranking.serving.workers import One, Workers

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ANSWER_S = 6.0
"""A worker's own /healthz says no after five seconds, and this page's reader is cut off after ten."""
WORKER = "worker"

T = TypeVar("T")

log = logging.getLogger(__name__)


class Pages:
    """What HTTP tells of several workers; each must tell its own meters on a port of this machine."""

    def __init__(self, workers: Workers, web: Web) -> None:
        self._workers, self._web = workers, web

    def start(self) -> None:
        """/metrics and /healthz are answered."""
        self._web.start({"/metrics": self._metrics, "/healthz": self._healthz})

    def close(self) -> None:
        """The port is free."""
        self._web.close()

    def _metrics(self, asked: Asked) -> Reply:
        del asked
        pages = _ask_all(self._workers.all, "/metrics", _meters)
        return Reply(generate_latest(_Merged(pages, self._workers.all)), CONTENT_TYPE)

    def _healthz(self, asked: Asked) -> Reply:
        """Callers are sent to any worker that listens, so each of these must be well; one that is being started again takes
        none, and the others answer."""
        del asked
        listening = [one for one in self._workers.all if one.facts is not None]
        ill = [name for name, told in _ask_all(listening, "/healthz", str).items() if told is None]
        if ill:
            return plain_reply(HTTPStatus.SERVICE_UNAVAILABLE, f"worker {ill[0]} is not serving")
        words = f"{len(listening)} of {len(self._workers.all)} workers serve"
        return plain_reply(HTTPStatus.OK, f"ok, {words}") if listening else plain_reply(HTTPStatus.SERVICE_UNAVAILABLE, words)


class _Merged(Collector):
    """The series of all pages, each with the name of its worker (None: it did not answer), and what the parent knows."""

    def __init__(self, pages: Mapping[str, Sequence[Metric] | None], workers: Iterable[One]) -> None:
        self._pages, self._workers = pages, workers

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("brewline_worker_up", "1 while the worker answers, else 0.", labels=[WORKER])
        told = "Times that the worker was started again after it had ended."
        restarts = CounterMetricFamily("brewline_worker_restarts_total", told, labels=[WORKER])
        for one in self._workers:
            up.add_metric([one.name], float(self._pages.get(one.name) is not None))
            restarts.add_metric([one.name], one.restarts)
        yield from (up, restarts)
        families: dict[str, Metric] = {}
        for name, page in self._pages.items():
            for family in page or ():
                whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                whole.samples += [sample._replace(labels={**sample.labels, WORKER: name}) for sample in family.samples]
        yield from families.values()


def _ask_all(workers: Sequence[One], path: str, read: Callable[[str], T]) -> dict[str, T | None]:
    """What each worker answers, by its name; all are asked at once, and None stands for one that does not answer well."""
    if not workers:
        return {}
    with ThreadPoolExecutor(len(workers), "brewline-pages") as threads:
        return dict(zip((one.name for one in workers), threads.map(lambda one: _ask(one, path, read), workers)))


def _ask(one: One, path: str, read: Callable[[str], T]) -> T | None:
    """What is read in a worker's answer with 200; None for anything else, and for what was cut short or cannot be read."""
    facts = one.facts
    if facts is None:
        return None
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{facts['metrics']}{path}", timeout=ANSWER_S) as reply:
            return read(reply.read().decode())
    except (OSError, ValueError, IndexError, HTTPException) as error:  # an IndexError is the parser's
        log.warning("worker %s does not answer %s: %r", one.name, path, error)
        return None


def _meters(page: str) -> list[Metric]:
    """The families of a page of meters. Raises ValueError for one that was cut short, and what the parser raises."""
    if not page.endswith("\n"):
        raise ValueError("the page ends within a line")
    return list(text_string_to_metric_families(page))
