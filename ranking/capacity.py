"""How many machines a load needs: measured costs of one unit of work each, a line before every worker, and prices that are asked.

A request goes through three stages. `front`: the member's record, the message, and for some members the encoder. `search`: one
replica of every shard, as late as the slowest. `rank`: all candidates in one prefill. A line is one process with one core and its
own bounded queue, as `brewline serve` is; replicas are chosen at random, which is the worst that a balancer does. Costs grow with
a shard's rows and with candidates in proportion, as no others were measured. `ranking.capacity_simulation` checks the formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from ranking.capacity_queues import Batches, CapacityError, Times, batched, let_in, lognormal, mixed, waits
from ranking.capacity_units import ENCODED_TOKENS, GPU_SEARCH_ITEMS, GPU_SEARCH_RATE, PUBLISHED, RANKED, SEARCH_DIMS, SEARCH_ROWS
from ranking.capacity_units import UNITS as U

GRID = 50
"""Cells of one service: the finest difference that a distribution shows."""
MOST_WAIT_S, MOST_TOGETHER = 0.5, 32
"""Of a line, as `ranking.serving.load_shed` and `ranking.serving.worker` have them (a test holds them together)."""

SearchKind = Literal["exact", "approximate"]


@dataclass(frozen=True)
class Load:
    """What is asked: items of the catalogue, Recommends per second, candidates of each, share of members encoded anew."""

    items: float = 500e6
    rate: float = 10_000
    candidates: int = 500
    cold: float = 0.1
    dims: int = SEARCH_DIMS

    def __post_init__(self) -> None:
        if min(self.items, self.rate, self.candidates, self.dims) <= 0 or not 0 <= self.cold <= 1:
            raise CapacityError(f"{self}: expected positive numbers, and a share of cold members between 0 and 1")


@dataclass(frozen=True)
class Layout:
    """How it is built: rows of a shard, the search, and how full lines are planned.

    `busy` is the share of time of a worker that takes one request at a time, `fill` the share of the most that a batching one
    bears. `variation` is the standard deviation of a service over its mean: an assumption, for the measurements are medians.
    """

    shard_items: float = 1e6
    search: SearchKind = "exact"
    busy: float = 0.4
    fill: float = 0.7
    variation: float = 0.2

    def __post_init__(self) -> None:
        if self.shard_items < 1 or not (0 < self.busy < 1 and 0 < self.fill < 1) or self.variation < 0:
            raise CapacityError(f"{self}: expected rows, shares of time between 0 and 1, and a variation of 0 or more")


@dataclass(frozen=True)
class Prices:
    """Assumptions about what can be rented, not facts: put in your own. Dollars an hour; GB are 10^9 bytes.

    `memory_gb_s` is what all cores of a machine together read from memory, `item_bytes` what the catalogue holds of an item.
    """

    cores: int = 64
    memory_gb: float = 256
    memory_gb_s: float = 200
    machine_hour: float = 2.5
    gpus: int = 8
    gpu_machine_hour: float = 20.0
    item_bytes: float = 500

    def __post_init__(self) -> None:
        if min(self.cores, self.memory_gb, self.memory_gb_s, self.gpus) <= 0:
            raise CapacityError(f"{self}: expected machines with cores, memory and GPUs")


@dataclass(frozen=True, eq=False)
class Stage:
    """One stage under its load: its lines, and what a request meets there. `gb` and `gb_s` are memory and reading of one line."""

    name: str
    work: Batches | Times = field(repr=False)
    shards: int
    replicas: int
    times: Times = field(repr=False)
    busy: float
    refused: float
    gb: float
    gb_s: float

    @property
    def lines(self) -> int:
        """Processes of one core each."""
        return self.shards * self.replicas

    def machines(self, prices: Prices) -> int:
        """By whichever runs out first: cores, memory, or what memory gives in a second. Raises CapacityError."""
        fit = min(prices.cores, prices.memory_gb / max(self.gb, 1e-9), prices.memory_gb_s / max(self.gb_s, 1e-9))
        if fit < 1:
            raise CapacityError(
                f"a line of {self.name} takes {self.gb:.1f} GB and reads {self.gb_s:.1f} a second: too much for one"
            )
        return math.ceil(self.lines / int(fit))


@dataclass(frozen=True, eq=False)
class Plan:
    """The stages of a load on CPUs, and the time of a whole answer."""

    load: Load
    layout: Layout
    stages: tuple[Stage, ...]

    @property
    def times(self) -> Times:
        """Seconds of an answer, the stages taken to be independent."""
        found = self.stages[0].times
        for stage in self.stages[1:]:
            found = found.then(stage.times)
        return found

    @property
    def refused(self) -> float:
        """Share of requests that some line refuses."""
        return 1 - math.prod(1 - stage.refused for stage in self.stages)

    def machines(self, prices: Prices) -> int:
        """Of all stages; a machine serves one."""
        return sum(stage.machines(prices) for stage in self.stages)

    def sliced(self, shards: int, replicas: int) -> Plan:
        """So much of it that it can be simulated: the same lines, each as full, fewer of them; itself if that is not less."""
        if shards >= self.stages[1].shards and replicas >= self.stages[1].replicas:
            return self
        rate = self.load.rate * min(1.0, replicas / self.stages[1].replicas)
        made = []
        for one in self.stages:
            kept = max(1, round(one.replicas * rate / self.load.rate))
            made.append(_stage(one.name, one.work, rate, kept, min(one.shards, shards), one.gb, 0.0))
        return Plan(replace(self.load, rate=rate), self.layout, tuple(made))


def plan(load: Load, layout: Layout) -> Plan:
    """The fewest lines that keep each stage no fuller than the layout says. Raises CapacityError."""
    return Plan(load, layout, (_front(load, layout), _search(load, layout), _rank(load, layout)))


def dollars(machines: float, hour: float, rate: float) -> float:
    """The price of a million requests where so many machines bear this rate, busy or not."""
    return machines * hour / (rate * 3600) * 1e6


def published_gpus(load: Load) -> dict[str, float]:
    """GPUs for search and ranking by what others published, in proportion; nothing of it was measured here."""
    share = load.items * load.rate / (GPU_SEARCH_ITEMS * GPU_SEARCH_RATE)
    return {"search": PUBLISHED["gpu_search"].value * share, "rank": load.rate * load.candidates / PUBLISHED["gpu_rank"].value}


def search_work(load: Load, layout: Layout) -> Batches | Times:
    """What one shard costs one core: a batch's fixed part and each query's, or an approximate query's seconds."""
    size = min(layout.shard_items, load.items) * load.dims / (SEARCH_ROWS * SEARCH_DIMS)
    if layout.search == "approximate":
        return _service(U["approximate_one"].value * size, layout)
    each = (64 * U["exact_64"].value - U["exact_one"].value) / 63
    return Batches((U["exact_one"].value - each) * size, each * size, MOST_TOGETHER)


def _front(load: Load, layout: Layout) -> Stage:
    usual = U["member"].value + U["rest"].value
    encoded = usual + U["encode"].value * ENCODED_TOKENS
    step = usual / GRID
    parts = [lognormal(seconds, layout.variation, step) for seconds in (usual, encoded)]
    work = mixed(parts, [1 - load.cold, load.cold])
    return _planned("front", work, load, layout, 1, 0.0, 0.0)


def _search(load: Load, layout: Layout) -> Stage:
    rows, shards = min(layout.shard_items, load.items), math.ceil(load.items / layout.shard_items)
    work = search_work(load, layout)
    codes = rows * (load.dims + 8)
    read = codes if isinstance(work, Batches) else U["approximate_rows"].value / SEARCH_ROWS * codes
    return _planned("search", work, load, layout, shards, (codes + rows * load.dims * 4) / 1e9, read / 1e9)


def _rank(load: Load, layout: Layout) -> Stage:
    return _planned("rank", _service(U["rank"].value * load.candidates / RANKED, layout), load, layout, 1, 0.0, 0.0)


def _service(seconds: float, layout: Layout) -> Times:
    return lognormal(seconds, layout.variation, seconds / GRID)


def _planned(name: str, work: Batches | Times, load: Load, layout: Layout, shards: int, gb: float, read_gb: float) -> Stage:
    most = layout.fill * work.most_rate if isinstance(work, Batches) else layout.busy / work.mean
    return _stage(name, work, load.rate, math.ceil(load.rate / most), shards, gb, read_gb)


def _stage(name: str, work: Batches | Times, rate: float, replicas: int, shards: int, gb: float, read_gb: float) -> Stage:
    """`read_gb` are read for each batch, or each request where they are not taken together."""
    each = rate / replicas
    if isinstance(work, Batches):
        times, busy = batched(each, work, work.seconds(1) / GRID)
        begun = (busy - work.each * each) / work.fixed  # batches a second: their fixed parts fill the rest of the busy time
        return Stage(name, work, shards, replicas, times.slowest(shards), busy, 0.0, gb, read_gb * begun)
    busy = each * work.mean
    waited, refused = let_in(waits(each, work), busy, MOST_WAIT_S)
    everywhere = 1 - (1 - refused) ** shards
    return Stage(name, work, shards, replicas, waited.then(work).slowest(shards), busy, everywhere, gb, read_gb * each)
