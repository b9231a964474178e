"""`brewline top`: what a running server does, in a terminal, from its meters alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ranking.cli.output import emit, words

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ranking.cli.top_look import Look

ADDRESS = "http://127.0.0.1:9464"


def top(
    address: Annotated[str, typer.Option(help="Where `brewline serve --metrics-port` answers.", metavar="URL")] = ADDRESS,
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.05, max=3600)] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look twice, show what happened between, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout; needs --once.")] = False,
) -> None:
    """Watch a server: requests a second, latencies by method and stage, queue, cache, snapshot, swaps. Ctrl-C ends it.

    brewline top --address http://127.0.0.1:9464
    brewline top --once --json
    """
    from ranking.cli.top_look import TopError, compared, look

    if as_json and not once:
        raise TopError("--json shows one moment; say --once too")
    before = look(address)
    if once:
        time.sleep(every)
        told = compared(before, look(address))
        emit(told, as_json=as_json, table=lambda: shown(told))
        return
    _watch(address, every, before)


def _watch(address: str, every: float, before: Look) -> None:
    from rich.console import Console
    from rich.live import Live

    from ranking.cli.top_look import compared, look

    with Live(shown(compared(before, before)), console=Console(highlight=False), screen=True, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(every)
                now = look(address)
                live.update(shown(compared(before, now)), refresh=True)
                before = now
        except KeyboardInterrupt:
            return


def shown(told: Mapping[str, Any]) -> RenderableType:
    """One screen of it. Every word comes from the server, and none is believed to be fit for a terminal."""
    from rich.console import Group

    tables = [_latencies("Method", told["methods"]), _latencies("Stage", told["stages"])]
    return Group(words(_headline(told), style="bold"), *(table for table in tables if table.row_count), _state(told))


def _headline(told: Mapping[str, Any]) -> str:
    cpu = "" if told["cpu"] is None else f"   {told['cpu']:.2f} cores"
    memory = "" if told["memory_bytes"] is None else f"   {told['memory_bytes'] / 2**20:,.0f} MiB"
    return f"{told['qps']:,.1f} requests/s over {told['seconds']:.1f} s{cpu}{memory}"


def _latencies(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column(title)
    for name in ("requests/s", "p50 ms", "p99 ms"):
        table.add_column(name, justify="right")
    for name, row in rows.items():
        table.add_row(words(name, 30), _number(row.get("qps")), _number(row["p50_ms"]), _number(row["p99_ms"]))
    return table


def _state(told: Mapping[str, Any]) -> Table:
    from rich.table import Table

    queue, cache, snapshot = told["queue"], told["cache"], told["snapshot"]
    ages = "   ".join(f"{age / 3600:,.1f} h since {since}" for since, age in snapshot["age_seconds"].items())
    lines = {
        "codes/s": _pairs(told["codes"]),
        "rejected/s": _pairs(told["rejected"]),
        "degraded/s": _pairs(told["degraded"]),
        "queue": f"{_number(queue['length'])} waiting, the oldest {_number(queue['oldest_seconds'])} s",
        "prefix cache": f"{_share(cache['reused'])} of tokens reused, {(cache['bytes'] or 0) / 2**20:,.0f} MiB",
        "snapshot": f"{snapshot.get('snapshot', '-')}   {ages}",
        "models": f"encoder {snapshot.get('encoder', '-')}   ranker {snapshot.get('ranker', '') or '-'}",
        "items": _pairs(told["items"]),
        "swaps": _pairs(told["swaps"]),
        "recall": _number(told["recall"]),
        "score drift": _pairs(told["drift"]),
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, line in lines.items():
        table.add_row(name, words(line, 120))
    return table


def _pairs(values: Mapping[str, float]) -> str:
    return "   ".join(f"{name} {_number(value)}" for name, value in values.items()) or "-"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value % 1 == 0 else f"{value:,.2f}"
