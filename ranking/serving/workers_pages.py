"""One page of meters and one answer about health for all workers: each is asked, and its series bear its name."""

from __future__ import annotations

import logging
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from http import HTTPStatus

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from ranking.serving.web import Asked, Reply, Web, plain_reply
from ranking.serving.workers import One, Workers

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ANSWER_S = 6.0
"""A worker's own /healthz says no after five seconds."""
WORKER = "worker"

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
        pages = {one.name: _ask(one, "/metrics") for one in self._workers.all}
        return Reply(generate_latest(_Merged(pages, self._workers.all)), CONTENT_TYPE)

    def _healthz(self, asked: Asked) -> Reply:
        """Callers are sent to any worker that listens, so each of these must be well; one that is being started again takes
        none, and the others answer."""
        del asked
        listening = [one for one in self._workers.all if one.facts is not None]
        ill = next((one.name for one in listening if _ask(one, "/healthz") is None), None)
        if ill is not None:
            return plain_reply(HTTPStatus.SERVICE_UNAVAILABLE, f"worker {ill} is not serving")
        words = f"{len(listening)} of {len(self._workers.all)} workers serve"
        return plain_reply(HTTPStatus.OK, f"ok, {words}") if listening else plain_reply(HTTPStatus.SERVICE_UNAVAILABLE, words)


class _Merged(Collector):
    """The series of all pages, each with the name of its worker (None: it did not answer), and what the parent knows."""

    def __init__(self, pages: Mapping[str, str | None], workers: Iterable[One]) -> None:
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
            for family in text_string_to_metric_families(page or ""):
                whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                whole.samples += [sample._replace(labels={**sample.labels, WORKER: name}) for sample in family.samples]
        yield from families.values()


def _ask(one: One, path: str) -> str | None:
    """What a worker answers with 200; None for anything else."""
    facts = one.facts
    if facts is None:
        return None
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{facts['metrics']}{path}", timeout=ANSWER_S) as reply:
            return str(reply.read().decode())
    except (OSError, ValueError) as error:
        log.warning("worker %s does not answer %s: %s", one.name, path, error)
        return None
