"""`brewline bench serve`: a real server under load that does not wait for it, through swaps, at and beyond its capacity."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ranking.cli.bench_report import check_drawing
from ranking.cli.connection import Ca, Cert, Key, credentials
from ranking.cli.member_store import MEMBERS_VARIABLE
from ranking.cli.output import console_err, emit, plain
from ranking.cli.train_report import facts_table, stages

if TYPE_CHECKING:
    from rich.console import Group

    from ranking.serving.load_bench import BenchResult, BenchWish
    from ranking.serving.load_nights import Models
    from ranking.serving.load_server import ServerWish

TERMINATED = 143
"""Exit status of a process that SIGTERM ended, as shells say it."""


class AskedMethod(StrEnum):
    """What is asked; "retrieve-cold" describes the member in the request, so that the encoder works for each."""

    recommend = "recommend"
    retrieve = "retrieve"
    cold = "retrieve-cold"


class Arrivals(StrEnum):
    """When requests come: as of independent callers, or evenly."""

    poisson = "poisson"
    even = "even"


Store = Annotated[Path, typer.Option(help="The snapshot store to serve; its members are the ones that ask.", metavar="DIR")]
EncoderFolder = Annotated[Path | None, typer.Option(help="The encoder of the snapshot.", metavar="DIR")]
RankerFolder = Annotated[Path | None, typer.Option(help="The ranker; Retrieve does without.", metavar="DIR")]
Members = Annotated[
    str | None, typer.Option(help="The member store, as `brewline serve` takes it.", metavar="URL", envvar=MEMBERS_VARIABLE)
]
Address = Annotated[
    str | None,
    typer.Option(help="Measure a running server of this store; a token is read from BREWLINE_TOKEN_FILE.", metavar="HOST:PORT"),
]
ServeOptions = Annotated[str, typer.Option(help="More options for `brewline serve`, as one text.", metavar='"--NAME VALUE ..."')]
Rate = Annotated[float, typer.Option(help="Requests per second; 0: 30 % of capacity, which is found first.", min=0)]
SwapEvery = Annotated[float, typer.Option(help="Seconds between swaps of two snapshots; 0: none.", min=0)]
OtherEncoder = Annotated[
    Path | None, typer.Option(help="With --swap-every: the encoder of the other snapshot, exchanged with it.", metavar="DIR")
]
OtherRanker = Annotated[Path | None, typer.Option(help="The same of the ranker.", metavar="DIR")]
FindCapacity = Annotated[bool, typer.Option("--capacity", help="Find the capacity, and end unless --overload is given.")]
SearchSeconds = Annotated[float, typer.Option(help="What the search for the capacity takes at most.", min=20)]
ProbeSeconds = Annotated[float, typer.Option(help="Least length of a trial of the search; that of one of --batching.", min=0.5)]
Batching = Annotated[bool, typer.Option("--batching", help="Only compare many callers at once with one by one.")]
Out = Annotated[Path | None, typer.Option(help="Folder for serve.json and serve.png (extra `evaluate`).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


def bench_serve(
    store: Store,
    encoder: EncoderFolder = None,
    ranker: RankerFolder = None,
    members: Members = None,
    address: Address = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    serve_options: ServeOptions = "",
    method: Annotated[AskedMethod, typer.Option(help="What is asked.")] = AskedMethod.recommend,
    k: Annotated[int, typer.Option("--k", "-k", help="Items of an answer.", min=1)] = 10,
    fanout: Annotated[int, typer.Option(help="Candidates to rank; 0: the server's default.", min=0)] = 0,
    filtered: Annotated[bool, typer.Option("--filter", help="Half of the categories, and not all creators.")] = False,
    distinct: Annotated[int, typer.Option(help="Members that ask, in turn.", min=1)] = 1_000,
    deadline_ms: Annotated[float, typer.Option(help="Deadline of each request.", min=1)] = 2_000.0,
    rate: Rate = 0.0,
    seconds: Annotated[float, typer.Option(help="How long requests are sent.", min=1)] = 30.0,
    arriving: Annotated[Arrivals, typer.Option("--arrivals", help="When requests come.")] = Arrivals.poisson,
    swap_every: SwapEvery = 0.0,
    other_encoder: OtherEncoder = None,
    other_ranker: OtherRanker = None,
    capacity: FindCapacity = False,
    search_seconds: SearchSeconds = 300.0,
    probe_seconds: ProbeSeconds = 5.0,
    overload: Annotated[float, typer.Option(help="Instead of --rate: so many times the capacity.", min=0)] = 0.0,
    batching: Batching = False,
    budget_ms: Annotated[float, typer.Option(help="What p99 may be in --batching.", min=1)] = 100.0,
    seed: Annotated[int, typer.Option(help="Decides arrivals, members and filters.")] = 0,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Load a real server from another process, in open loop: requests go out on schedule and wait for nobody.

    Latency counts from the scheduled moment. `failed` is everything but an answer, `goodput` the answers in time per second,
    `generator_cpu` the share of a core that sending took. --swap-every moves the store's pointer to and fro between two
    snapshots, and the models with it if there are others; `p99_ms_during_swap` is within a second of a swap. Capacity is the
    highest rate at which p99 stays within twice that of one caller after another. docs/serving-bench.md says more.

    A server with TLS or tokens is shown what `brewline ask` shows: --ca, --cert, --key, or BREWLINE_CA, _CERT, _KEY; a token
    comes from BREWLINE_TOKEN_FILE or BREWLINE_TOKEN and from nowhere else.

        brewline bench serve --store store/ --encoder encoder/ --ranker ranker/ --rate 20 --seconds 60 --swap-every 6 --json
        BREWLINE_TOKEN_FILE=token brewline bench serve --store store/ --address HOST:50051 --ca ca.pem --rate 20
    """
    from ranking.serving.load_bench import BenchWish
    from ranking.serving.load_requests import RequestWish
    from ranking.serving.load_server import ServerWish

    if (encoder is None) == (address is None):
        raise typer.BadParameter("give --encoder, to start a server, or --address of one that runs")
    if batching and (method is AskedMethod.recommend or capacity or overload or swap_every):
        raise typer.BadParameter("--batching goes with --method retrieve or retrieve-cold and neither a search nor swaps")
    credentials(ca, cert, key)
    server = ServerWish(store, encoder or Path(), ranker, members, shlex.split(serve_options))
    other = _other(server, other_encoder, other_ranker, exchanged=swap_every > 0 and address is None)
    asked = RequestWish(method.value, k, fanout, filtered, distinct, seed)
    load = (rate, seconds, deadline_ms / 1e3, arriving is Arrivals.even, swap_every, other)
    search = (capacity, probe_seconds, search_seconds, overload, budget_ms if batching else 0.0)
    _measure(BenchWish(server, asked, address, *load, *search), out, as_json)


def _other(server: ServerWish, encoder: Path | None, ranker: Path | None, *, exchanged: bool) -> Models | None:
    from ranking.serving.load_nights import Models

    if encoder is None and ranker is None:
        return None
    if not exchanged:
        raise typer.BadParameter("--other-encoder and --other-ranker go with --swap-every and --encoder, not with --address")
    return Models(encoder or server.encoder, ranker or server.ranker)


def _measure(wish: BenchWish, out: Path | None, as_json: bool) -> None:
    """The figures are on stdout, and in a folder with a picture if there is one."""
    from ranking.serving.load_bench import bench_serve as measure

    if out is not None:
        check_drawing()
    parts = wish.foretold()
    said = ", ".join(f"{name} {seconds:.0f}" for name, seconds in parts.items())
    console_err().print(f"once the server answers: at most {sum(parts.values()):.0f} s ({said})")
    with _ending_gently(), stages() as told:
        found = measure(wish, told)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "serve.json").write_text(json.dumps(plain(found.figures), indent=1) + "\n", encoding="utf-8")
        draw(found, out / "serve.png")
    emit(found.figures, as_json=as_json, table=lambda: serve_table(found.figures))


@contextmanager
def _ending_gently() -> Iterator[None]:
    """SIGTERM unwinds what is inside the block, so that the pointer goes back and the server ends."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def serve_table(figures: Mapping[str, Any]) -> Group:
    """The run, then the rates that were tried, the overload and the batches, where there were such."""
    from rich.console import Group

    tables: list[Any] = [facts_table({name: _short(value) for name, value in figures.items() if name not in NESTED})]
    for name in NESTED:
        found = figures.get(name)
        if isinstance(found, Mapping):
            tables += ["", name, facts_table({key: _short(value) for key, value in found.items() if key != "rows"})]
            found = found.get("rows")
        if found:
            tables += ["", _rows(found)]
    return Group(*tables)


NESTED = ("tried", "overload", "batching")


def _rows(rows: list[Mapping[str, object]]) -> Any:
    from rich.table import Table

    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(str(_short(value)) for value in row.values()))
    return table


def _short(value: object) -> object:
    return f"{value:,.4g}" if isinstance(value, float) else value


def draw(found: BenchResult, path: Path) -> None:
    """A picture of each answer's latency over the time of the run, swaps shaded, what failed at the top. Raises PictureError."""
    check_drawing()
    from matplotlib.figure import Figure

    run = found.run
    figure = Figure(figsize=(10, 5), layout="constrained")
    field = figure.subplots()
    whole = run.answered & (run.degraded == 0)
    for name, rows, color in (
        ("answers", whole, "C0"),
        ("degraded", run.answered & ~whole, "C1"),
        ("failed", ~run.answered, "C3"),
    ):
        if rows.any():
            field.plot(run.at[rows], run.ms[rows], ".", markersize=2, color=color, label=name)
    for number, swap in enumerate(found.swaps):
        field.axvspan(swap.moved, swap.seen, color="0.85", label=None if number else "pointer moved, until the first new answer")
    field.set(xlabel="seconds from the start, scheduled", ylabel="ms from the scheduled moment", yscale="log")
    figure.legend(fontsize="small", markerscale=4, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)
