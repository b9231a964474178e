"""`brewline bench night`: what nights over changes cost and lose, replayed over a data folder or an invented catalogue."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ranking.cli.nightly import stage_bars
from ranking.cli.output import emit, progress_bar

if TYPE_CHECKING:
    from rich.table import Table

POLICIES = "0,1,2,4,8,100"


def night(
    data: Annotated[
        Path | None, typer.Argument(help="A data folder, to replay nights of its test window.", metavar="[DATA]")
    ] = None,
    encoder: Annotated[Path | None, typer.Option(help="The encoder's folder, for a replay.", metavar="DIR")] = None,
    nights: Annotated[int, typer.Option(help="Nights to replay, from the test cut on.", min=1)] = 14,
    hysteresis: Annotated[
        str, typer.Option(help="Policies to replay: buckets that a number may stray. 0 is always among them.", metavar="N,N,...")
    ] = POLICIES,
    items: Annotated[
        int | None, typer.Option(help="Instead: invent so many items, and run two nights.", min=100, show_default=False)
    ] = None,
    changed: Annotated[
        float, typer.Option(help="With --items: share of them with another title at the second.", min=0, max=1)
    ] = 0.02,
    hidden: Annotated[int, typer.Option(help="With --items, random weights: width.", min=16)] = 64,
    layers: Annotated[int, typer.Option(help="With --items, random weights: depth.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="With --items: decides items, changes and weights.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")] = False,
) -> None:
    """Replay a fortnight of nights under several policies, or time a night over few changes against a full one.

    Over a data folder: for each policy the share of existing items that a night encodes, its seconds, and Recall@10/100/2000 of
    the members who come back in these days, each with that night's vectors; `minus_exact` is the paired difference to the
    policy 0, with its 95 % interval. `largest_difference` is that of policy 0's last night to an encoding of everything.

    With --items: `ratio` divides the second night's seconds in the embed stage by the first one's; `largest_difference` is that
    of its vectors to a rebuild of everything.

        brewline bench night shop/ --encoder models/encoder --nights 14 --json
        brewline bench night --items 100000 --changed 0.02 --json
    """
    if (data is None) != (encoder is None) or (data is None) == (items is None):
        raise typer.BadParameter("give a data folder and --encoder, or --items")
    if data is not None and encoder is not None:
        found = _fortnight(data, encoder, nights, _policies(hysteresis))
    else:
        found = _changes(items or 0, changed, hidden, layers, seed)
    emit(found, as_json=as_json, table=lambda: night_table(found))


def _policies(text: str) -> list[int]:
    try:
        found = sorted({int(one) for one in text.split(",")})
    except ValueError:
        found = [-1]
    if found[0] < 0:
        raise typer.BadParameter(f"{text!r} are no numbers of buckets; write for instance {POLICIES}", param_hint="--hysteresis")
    return found


def _fortnight(data: Path, folder: Path, nights: int, policies: list[int]) -> dict[str, Any]:
    from retrieval.data.read import read_dataset
    from retrieval.encoder import Encoder
    from retrieval.hysteresis import Hysteresis
    from retrieval.night_bench import bench_fortnight
    from retrieval.provenance import check_provenance

    dataset, model = read_dataset(data), Encoder.load(folder)
    check_provenance(folder, model.facts["training"], dataset)
    with progress_bar("nights") as report:
        found = bench_fortnight(dataset, model, [Hysteresis(one) for one in policies], nights, report)
    return {"encoder": model.fingerprint, **found}


def _changes(items: int, changed: float, hidden: int, layers: int, seed: int) -> dict[str, Any]:
    from retrieval.llama import Size
    from retrieval.night_bench import NightWishes, bench_changes

    size = Size(hidden=hidden, layers=layers, heads=2, kv_heads=1, mlp=2 * hidden, vocabulary=8_192)
    with tempfile.TemporaryDirectory() as folder, stage_bars() as told:
        return bench_changes(NightWishes(items, changed, size, seed), Path(folder), told)


def night_table(found: dict[str, Any]) -> Table:
    """One line per policy of a replay, or per figure of two nights."""
    from rich.table import Table

    if "policies" not in found:
        table = Table("figure", "")
        for name, value in found.items():
            table.add_row(name, f"{value:,.6g}" if isinstance(value, float) else str(value))
        return table
    names = ("recall@10", "recall@100", "recall@2000")
    table = Table(
        "buckets", "encoded a night", "seconds a night", *names, title=f"{found['nights']} nights, {found['queries']:,} queries"
    )
    for row in found["policies"]:
        cells = [f"{row[name]:.4f} ({row['minus_exact'][name]['value']:+.4f})" for name in names]
        table.add_row(str(row["hysteresis"]), f"{row['share_embedded']:.1%}", f"{row['seconds_embed']:.2f}", *cells)
    return table
