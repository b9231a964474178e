"""`brewline encoder`: train the dual encoder, look at one, export its query side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ranking.cli.out_folder import out_folder

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="The dual encoder that reads members and items into one vector space.",
    epilog="Then: `brewline ranker train`, `brewline nightly`, `brewline serve`.",
)

NO_SETTINGS = ("data", "out", "more", "as_json")
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Any other setting (docs/scale.md lists them); may be repeated.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


@app.command()
def train(
    data: Annotated[Path, typer.Argument(help="The data folder.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="The encoder folder to make.", show_default=False, callback=out_folder)],
    base: Annotated[
        str | None, typer.Option(help="A LLaMA checkpoint to start from: a local folder (or hub name). Without it: from scratch.")
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="With --base: train LoRA of this rank instead of all weights.", min=1)
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Time for everything: rate, length and refit.", min=0)] = None,
    steps: Annotated[int | None, typer.Option(help="Exactly this many refit steps; same seed, same weights.", min=1)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Fixed, instead of chosen from three.", min=1e-9)] = None,
    seed: Annotated[int, typer.Option(help="Decides first weights, batches and negatives.")] = 0,
    hidden: Annotated[int, typer.Option(help="From scratch: width.", min=16)] = 128,
    layers: Annotated[int, typer.Option(help="From scratch: depth.", min=1)] = 2,
    numbers: Annotated[
        str, typer.Option(help="How numbers become words: percentile, log, percentile_text, raw or none.")
    ] = "percentile",
    loss: Annotated[str, typer.Option(help="infonce, or bce to compare.")] = "infonce",
    pooling: Annotated[str, typer.Option(help="mean over all tokens, last, or mean+last: their sum.")] = "mean",
    matryoshka: Annotated[str | None, typer.Option(help="Shorter lengths to train too, as 32,64.", show_default=False)] = None,
    history: Annotated[str, typer.Option(help="positives, or full: other actions too (cannot be served).")] = "positives",
    hard: Annotated[int, typer.Option(help="Hard negatives per target.", min=0)] = 0,
    hard_from: Annotated[str, typer.Option(help="impressions passed over, or mined by the model.")] = "impressions",
    precision: Annotated[str, typer.Option(help="float32 or bf16 (autocast).")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda.")] = "cpu",
    cached: Annotated[bool, typer.Option("--cached", help="Large batches in the memory of one pass (GradCache).")] = False,
    shard: Annotated[bool, typer.Option("--shard", help="Under torchrun: spread weights and optimizer too (FSDP).")] = False,
    more: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Train an encoder on a data folder: InfoNCE over day batches, counts as of each batch's day.

    A run on what came before the validation window chooses there: the learning rate, by short trials of half, one and two times
    the default (not with --learning-rate, --base or few steps), then, with --minutes (default 5), the length. It stays in
    OUT/validation. The refit takes every event before the test cut.

    --steps and --learning-rate as reported, with the same seed, reproduce the weights. A killed run goes on when the same command
    is given on the same data. A folder without interactions trains on its text alone. Under torchrun all
    processes share each batch.

    Example: `brewline encoder train WORLD --out models/encoder --minutes 3 --seed 1`
    """
    flags = dict(locals())
    flags["matryoshka"] = matryoshka.split(",") if matryoshka else []
    _train(data, out, {**flags, **further(more or [])}, as_json)


def _train(data: Path, out: Path, flags: dict[str, Any], as_json: bool) -> None:
    """Trains with the flags that are settings; `--set` can name any, so what is no setting and no flag is refused there."""
    from ranking.cli.memory import keep_freed_memory
    from ranking.cli.output import emit
    from ranking.cli.train_report import how_long, stages, training_table
    from retrieval.data.read import read_dataset
    from retrieval.learn.fit import train_encoder
    from retrieval.learn.ranks import joined
    from retrieval.learn.settings import plan_of

    keep_freed_memory()
    settings = {name: value for name, value in flags.items() if name not in NO_SETTINGS}
    plan = plan_of({**settings, "minutes": how_long(flags["steps"], flags["minutes"])})
    dataset = read_dataset(data)
    with joined(plan.device) as ranks, stages() as stage:
        report = train_encoder(dataset, out, plan, stage if ranks.leads else None)
    if ranks.leads:
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


def further(pairs: list[str]) -> dict[str, object]:
    """Settings from NAME=VALUE, values read as YAML. Raises typer.BadParameter."""
    import yaml

    try:
        return {name: yaml.safe_load(value) for name, _, value in (pair.partition("=") for pair in pairs)}
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"{' '.join(str(error).split())}; expected NAME=VALUE", param_hint="--set") from error
