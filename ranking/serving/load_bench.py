"""One measurement of the service from beginning to end: server, requests, warming, the load, and the figures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from ranking.serving.client import Client
from ranking.serving.load import LoadError, Measured, Progress, Target, arrivals, closed_load, figures, open_load
from ranking.serving.load_batching import CALLERS, batching
from ranking.serving.load_capacity import Search, capacity_of, overload_figures
from ranking.serving.load_nights import PARTS, Models, linked, pair_of
from ranking.serving.load_requests import METHODS, RequestWish, requests_of
from ranking.serving.load_server import ServerWish, served
from ranking.serving.load_swap import Move, Mover, Swap, seen_swaps, swap_figures, swapping
from ranking.serving.security_client import Credentials, tls_of

USUAL_SHARE = 0.3
"""Of capacity: what a service is run at that has room for a machine that fails."""
WARM_S, WARM_CALLERS = 2.0, 4
ENTRY_MS = 10_000
OWN = "localhost:0"
"""Where a server of our own will be; the port is not known yet."""
NO_SWAPS = {"pointer_moves": 0, "swaps": 0, "swaps_by_kind": dict.fromkeys(PARTS, 0), "p99_ms_during_swap": None}

StageProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BenchWish:
    """What to measure. `address` names a running server of the same store, else `server` is started. What is shown to either is
    what the environment names (`Credentials.from_environment`).

    `rate` 0 is `USUAL_SHARE` of capacity. `overload`: so many times capacity instead. `capacity_only`: nothing after the search.
    `batching_budget_ms`: only the comparison of batches within this percentile. `swap_every` 0 leaves the pointer alone; with
    `other`, the models are exchanged with the snapshot.
    """

    server: ServerWish
    requests: RequestWish
    address: str | None = None
    rate: float = 0.0
    seconds: float = 30.0
    deadline_s: float = 2.0
    even: bool = False
    swap_every: float = 0.0
    other: Models | None = None
    capacity_only: bool = False
    probe_seconds: float = 5.0
    search_seconds: float = 300.0
    overload: float = 0.0
    batching_budget_ms: float = 0.0

    @property
    def searches(self) -> bool:
        """Whether the capacity must be known."""
        return not self.batching_budget_ms and (self.capacity_only or self.overload > 0 or self.rate == 0)

    def foretold(self) -> dict[str, float]:
        """Seconds that each part takes at most once the server answers."""
        parts = {"warming": WARM_S}
        if self.batching_budget_ms:
            return {**parts, "callers": (1 + len(CALLERS)) * self.probe_seconds}
        if self.searches:
            parts["search"] = self.search_seconds
        return parts if self.capacity_only and not self.overload else {**parts, "load": self.seconds}


@dataclass(frozen=True)
class BenchResult:
    """The figures of `brewline bench serve`, the run that they are of, and its swaps."""

    figures: dict[str, Any]
    run: Measured
    swaps: list[Swap]


def bench_serve(wish: BenchWish, told: StageProgress) -> BenchResult:
    """A server was measured, and the store is as it was.

    Raises LoadError, NoSecondSnapshot, PointerMoved; CertificateError or TokenError for what cannot be shown to a server, and
    ServiceError if it lets nobody in who shows that.
    """
    shown = Credentials.from_environment()
    tls_of(wish.address or OWN, shown)  # a file that cannot be used is said at once, not after the models are loaded
    if shown.ca is not None and not wish.address and not any(word.startswith("--tls-cert") for word in wish.server.options):
        raise LoadError(
            f"BREWLINE_CA or --ca ({shown.ca}) asks for TLS, and the server that is started here speaks plain text: unset it, or "
            'give the server its side by --serve-options "--tls-cert FILE --tls-key FILE"'
        )
    # Said at once, not after the search for the capacity.
    nights = pair_of(wish.server, wish.other, running=wish.address is not None) if wish.swap_every else None
    requests = requests_of(wish.server.store, wish.server.members, wish.requests)
    with linked(wish.server, wish.other) as (server, point), _address(wish.address, server) as address:
        mover = None if nights is None else Mover(server.store, *nights, point)
        _enter(address)
        target = Target(address, METHODS[wish.requests.method], requests, wish.deadline_s)
        _warm(target, partial(told, "warm"))
        facts, run, moves = _measure(target, wish, told, mover)
    swaps = NO_SWAPS if nights is None else swap_figures(run, moves, nights)
    about = {
        "method": wish.requests.method,
        "k": wish.requests.k,
        "fanout": wish.requests.fanout,
        "filtered": wish.requests.filtered,
        "deadline_ms": wish.deadline_s * 1e3,
        "arrivals": "even" if wish.even else "poisson",
        "distinct_requests": len(requests),
        "cores": len(os.sched_getaffinity(0)),
        "server_options": list(wish.server.options),
        "tls": shown.ca is not None,
        "token": bool(shown.token),
    }
    return BenchResult({**figures(run), **swaps, **about, **facts}, run, seen_swaps(run, moves))


@contextmanager
def _address(address: str | None, wish: ServerWish) -> Iterator[str]:
    if address is not None:
        yield address
        return
    with served(wish) as server:
        yield server.address
        server.check()


def _enter(address: str) -> None:
    """The server lets us in: a load that is turned away would only fill its audit log. Raises ServiceError."""
    with Client(address, ENTRY_MS, attempts=1) as client:
        client.info()


def _warm(target: Target, progress: Progress) -> None:
    """Caches are filled and first-use work is done. Raises LoadError if nothing is answered."""
    found = closed_load(target, WARM_CALLERS, WARM_S, progress)
    if not found.answered.any():
        raise LoadError(
            f"{target.address} answers nothing to {target.method}: {figures(found)['codes']}; try it with `brewline ask`"
        )


def _measure(
    target: Target, wish: BenchWish, told: StageProgress, mover: Mover | None
) -> tuple[dict[str, Any], Measured, list[Move]]:
    if wish.batching_budget_ms:
        compared, run = batching(target, wish.probe_seconds, wish.batching_budget_ms, partial(told, "callers"))
        return {"batching": compared}, run, []
    search = Search(wish.search_seconds, wish.probe_seconds, wish.requests.seed, wish.even)
    capacity = capacity_of(target, search, told) if wish.searches else None
    facts = {} if capacity is None else capacity.figures()
    if capacity is not None and wish.capacity_only and not wish.overload:
        return facts, capacity.best, []
    rate = wish.rate
    if capacity is not None and (wish.overload or not rate):
        rate = capacity.rate * (wish.overload or USUAL_SHARE)
    at = arrivals(rate, wish.seconds, wish.requests.seed, even=wish.even)
    with swapping(mover, wish.swap_every) as moves:
        run = open_load(target, at, wish.seconds, partial(told, "load"))
    if capacity is not None and wish.overload:
        facts["overload"] = overload_figures(run, capacity)
    return facts, run, moves
