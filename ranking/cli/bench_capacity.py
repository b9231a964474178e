"""`brewline bench capacity`: machines, memory and money for a load, by a model of measured costs that a simulation checks."""

from __future__ import annotations

import math
from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ranking.cli.output import emit

if TYPE_CHECKING:
    from rich.console import Group

    from ranking.capacity import Plan, Prices

REPLICAS = 3
"""Of each simulated shard."""


class SearchKind(StrEnum):
    """How shards are searched: exactly in batches, or approximately (recall .982) one query at a time."""

    exact = "exact"
    approximate = "approximate"


def capacity(
    items: Annotated[float, typer.Option(help="Items of the catalogue.", min=1)] = 500e6,
    rate: Annotated[float, typer.Option(help="Recommends per second.", min=0.001)] = 10_000,
    candidates: Annotated[int, typer.Option(help="Candidates that each of them ranks.", min=1)] = 500,
    cold: Annotated[float, typer.Option(help="Share of requests whose member is encoded anew.", min=0, max=1)] = 0.1,
    dims: Annotated[int, typer.Option(help="Numbers of a vector.", min=1)] = 128,
    search: Annotated[SearchKind, typer.Option(help="How a shard is searched.")] = SearchKind.exact,
    shard_items: Annotated[float, typer.Option(help="Items of a shard; one of 1,000,000 was measured.", min=1)] = 1e6,
    busy: Annotated[float, typer.Option(help="Share of time that a worker without batches works.")] = 0.4,
    fill: Annotated[float, typer.Option(help="Share of the most that a batching worker bears.")] = 0.7,
    variation: Annotated[float, typer.Option(help="Standard deviation of a service over its mean: assumed.", min=0)] = 0.2,
    cores: Annotated[int, typer.Option(help="Of a machine.", min=1)] = 64,
    memory_gb: Annotated[float, typer.Option(help="Of a machine.", min=0.1)] = 256,
    memory_gb_s: Annotated[float, typer.Option(help="What a machine reads from memory in a second.", min=0.1)] = 200,
    machine_hour: Annotated[float, typer.Option(help="Price of a machine's hour: assumed, put in yours.", min=0)] = 2.5,
    gpus: Annotated[int, typer.Option(help="Of a GPU machine.", min=1)] = 8,
    gpu_machine_hour: Annotated[float, typer.Option(help="Price of a GPU machine's hour: assumed.", min=0)] = 20.0,
    item_bytes: Annotated[float, typer.Option(help="Of an item in the catalogue: assumed.", min=0)] = 500,
    requests: Annotated[int, typer.Option(help="To simulate, as a check; 0: none.", min=0)] = 20_000,
    simulated_shards: Annotated[int, typer.Option(help="Of those, how many are simulated.", min=1)] = 32,
    seed: Annotated[int, typer.Option(help="Decides arrivals, replicas and services of the simulation.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")] = False,
) -> None:
    """Say how many machines a load needs, and what a million requests cost: from measured costs of one core, no GPU of ours.

    `stages` are processes of one core each; `cpu` is all of it on CPUs; `gpu_published` replaces search and ranking by figures
    that others published for their own models. `check` simulates a slice of the plan request by request: arrivals at random, the
    server's bounded queues, batches, the slowest shard; `agrees` if p99 lies within 10 % and busy time within 2 points. Nothing
    is measured by this command: `units` says where each figure stands, docs/scale.md what they leave out.

        brewline bench capacity --items 500e6 --rate 10000 --json
        brewline bench capacity --items 5e6 --rate 50 --search approximate --machine-hour 1.8
    """
    from ranking.capacity import Layout, Load, Prices, plan

    load = Load(items, rate, candidates, cold, dims)
    prices = Prices(cores, memory_gb, memory_gb_s, machine_hour, gpus, gpu_machine_hour, item_bytes)
    found = plan(load, Layout(shard_items, search.value, busy, fill, variation))
    facts = told(found, prices)
    if requests:
        from ranking.capacity_simulation import check

        facts["check"] = check(found, shards=simulated_shards, replicas=REPLICAS, requests=requests, seed=seed)
    emit(facts, as_json=as_json, table=lambda: capacity_table(facts))


def told(found: Plan, prices: Prices) -> dict[str, Any]:
    """The plan in plain values: what was asked, stages, machines, memory, money, and where the figures come from."""
    from ranking.capacity import dollars
    from ranking.capacity_units import PUBLISHED, UNITS

    machines, rate = found.machines(prices), found.load.rate
    return {
        "load": asdict(found.load),
        "layout": asdict(found.layout),
        "prices": asdict(prices),
        "stages": [
            {
                "name": one.name,
                "shards": one.shards,
                "replicas": one.replicas,
                "processes": one.lines,
                "machines": one.machines(prices),
                "memory_gb": one.lines * one.gb,
                "busy": one.busy,
                "refused": one.refused,
                "p50_ms": one.times.quantile(0.5) * 1e3,
                "p99_ms": one.times.quantile(0.99) * 1e3,
            }
            for one in found.stages
        ],
        "cpu": {
            "processes": sum(one.lines for one in found.stages),
            "machines": machines,
            "vectors_gb": sum(one.lines * one.gb for one in found.stages),
            "catalogue_gb": found.load.items * prices.item_bytes / 1e9,
            "p50_ms": found.times.quantile(0.5) * 1e3,
            "p99_ms": found.times.quantile(0.99) * 1e3,
            "refused": found.refused,
            "dollars_per_million": dollars(machines, prices.machine_hour, rate),
        },
        "gpu_published": _on_gpus(found, prices),
        "units": {name: asdict(unit) for name, unit in {**UNITS, **PUBLISHED}.items()},
    }


def _on_gpus(found: Plan, prices: Prices) -> dict[str, float]:
    """The front as measured, search and ranking as published."""
    from ranking.capacity import dollars, published_gpus

    wanted, front = published_gpus(found.load), found.stages[0].machines(prices)
    total = math.ceil(wanted["search"]) + math.ceil(wanted["rank"])
    machines = math.ceil(total / prices.gpus)
    rate = found.load.rate
    cost = dollars(machines, prices.gpu_machine_hour, rate) + dollars(front, prices.machine_hour, rate)
    told = {"search_gpus": math.ceil(wanted["search"]), "rank_gpus": math.ceil(wanted["rank"])}
    return {**told, "gpu_machines": machines, "cpu_machines": front, "dollars_per_million": cost}


def capacity_table(facts: dict[str, Any]) -> Group:
    """The stages, then the sums, then the check."""
    from rich.console import Group
    from rich.table import Table

    from ranking.cli.train_report import facts_table

    stages = Table("", *(str(stage["name"]) for stage in facts["stages"]))
    for name in list(facts["stages"][0])[1:]:
        stages.add_row(name.replace("_", " "), *(_short(stage[name]) for stage in facts["stages"]))
    parts: list[Any] = [stages]
    for name in ("cpu", "gpu_published", "check"):
        if name in facts:
            parts += ["", name.replace("_", " "), facts_table({key: _short(value) for key, value in facts[name].items()})]
    return Group(*parts)


def _short(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
