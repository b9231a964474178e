"""`brewline encoder`: train the dual encoder, look at one, export its query side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

if TYPE_CHECKING:
    from retrieval.features import Kind

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="The dual encoder that reads members and items into one vector space.",
    epilog="Then: `brewline ranker train`, `brewline nightly`, `brewline serve`.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


@app.command()
def train(
    data: Annotated[Path, typer.Argument(help="The data folder.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="The encoder folder to make.", show_default=False)],
    base: Annotated[
        str | None, typer.Option(help="A LLaMA checkpoint to start from: a local folder (or hub name). Without it: from scratch.")
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="With --base: train LoRA of this rank instead of all weights.", min=1)
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Time for everything: rate, length and refit.", min=0)] = None,
    steps: Annotated[int | None, typer.Option(help="Exactly this many refit steps; same seed, same weights.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Fixed, instead of chosen from three.", min=1e-9)] = None,
    seed: Annotated[int, typer.Option(help="Decides first weights, batches and negatives.")] = 0,
    hidden: Annotated[int, typer.Option(help="From scratch: width.", min=16)] = 128,
    layers: Annotated[int, typer.Option(help="From scratch: depth.", min=1)] = 2,
    numbers: Annotated[
        str, typer.Option(help="How numbers become words: percentile, log, percentile_text or raw.")
    ] = "percentile",
    as_json: AsJson = False,
) -> None:
    """Train an encoder on a data folder: InfoNCE over day batches, counts as of each batch's day.

    A run on what came before the validation window chooses there: the learning rate, by short trials of half, one and two times
    the default (not with --learning-rate, --base or few steps), then, with --minutes (default 5), the length. It stays in
    OUT/validation. The refit takes every event before the test cut.

    --steps and --learning-rate as reported, with the same seed, reproduce the weights. A killed run goes on when the same command
    is given on the same data. A folder without interactions trains on its text alone.

    Example: `brewline encoder train WORLD --out models/encoder --minutes 3 --seed 1`
    """
    from ranking.cli.memory import keep_freed_memory
    from ranking.cli.output import emit
    from ranking.cli.train_report import how_long, stages, training_table
    from retrieval.data.read import read_dataset
    from retrieval.learn.fit import train_encoder
    from retrieval.learn.start import EncoderPlan
    from retrieval.llama import Size

    keep_freed_memory()
    wanted = how_long(steps, minutes)
    size = Size(hidden=hidden, layers=layers, heads=max(2, hidden // 32), kv_heads=max(1, hidden // 64), mlp=3 * hidden)
    kind = quantizer_kind(numbers)
    plan = EncoderPlan(steps, wanted, seed, base, lora_rank, learning_rate, quantizer=kind, size=size)
    dataset = read_dataset(data)
    with stages() as stage:
        report = train_encoder(dataset, out, plan, stage)
    emit(vars(report), as_json=as_json, table=lambda: training_table("encoder", vars(report)))


@app.command()
def show(
    encoder: Annotated[Path, typer.Argument(help="The encoder folder.", show_default=False)], as_json: AsJson = False
) -> None:
    """Print an encoder's facts: fingerprint, dimensions, template, budgets, number fields, how it was trained.

    Example: `brewline encoder show models/encoder`
    """
    from ranking.cli.output import emit
    from ranking.cli.train_report import facts_table
    from retrieval.encoder import QUANTIZER, read_facts, stored_fingerprint
    from retrieval.features import Quantizer

    facts = read_facts(encoder)
    quantizer = Quantizer.load(encoder / QUANTIZER)
    shown = {"fingerprint": stored_fingerprint(encoder), "numbers": quantizer.kind, "fields": list(quantizer.names), **facts}
    emit(shown, as_json=as_json, table=lambda: facts_table(shown))


@app.command()
def export(
    encoder: Annotated[Path, typer.Argument(help="The encoder folder.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="The .onnx file to write.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Export the query side for onnxruntime and measure how far its vectors are from the encoder's.

    Example: `brewline encoder export models/encoder --out models/query.onnx`
    """
    from ranking.cli.output import emit
    from ranking.cli.train_report import facts_table
    from retrieval.encoder import Encoder
    from retrieval.export import export_query, parity

    found = Encoder.load(encoder)
    export_query(found, out)
    facts = {"file": str(out), "bytes": out.stat().st_size, "fingerprint": found.fingerprint, "max_abs_diff": parity(found, out)}
    emit(facts, as_json=as_json, table=lambda: facts_table(facts))


def quantizer_kind(name: str) -> Kind:
    """The quantizer kind of a flag. Raises typer.BadParameter."""
    from retrieval.features import Kind

    if name not in get_args(Kind):
        raise typer.BadParameter(f"{name!r}; expected one of {', '.join(get_args(Kind))}", param_hint="--numbers")
    return cast("Kind", name)
