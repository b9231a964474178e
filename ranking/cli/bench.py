"""`brewline bench`: ratios against a peer in the same run, because the seconds of one machine say little about another."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Measure: every figure is a ratio against a peer in the same run.",
)


@app.callback()
def _group() -> None:
    """Keeps `prefill` a subcommand while it is the only one."""


@app.command()
def prefill(
    prefix: Annotated[int, typer.Option(help="Tokens of the shared prefix.", min=1)] = 512,
    items: Annotated[int, typer.Option(help="Items in one request.", min=1)] = 500,
    length: Annotated[int, typer.Option(help="Tokens of each item.", min=1)] = 24,
    layers: Annotated[int, typer.Option(help="Depth of the model.", min=1)] = 6,
    hidden: Annotated[int, typer.Option(help="Width of the model.", min=8)] = 256,
    mlp: Annotated[int, typer.Option(help="Width of its MLP.", min=8)] = 768,
    heads: Annotated[int, typer.Option(help="Query heads.", min=1)] = 4,
    kv_heads: Annotated[int, typer.Option(help="Key and value heads.", min=1)] = 2,
    vocab: Annotated[int, typer.Option(help="Vocabulary.", min=8)] = 8192,
    seed: Annotated[int, typer.Option(help="Decides weights and tokens.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")] = False,
) -> None:
    """Score N items after one prefix in one prefill, and one item per pass with the plain model, in turn.

    Example: `brewline bench prefill --prefix 1024 --items 500 --length 32 --json`
    """
    from ranking.cli.output import emit
    from ranking.cli.train_report import facts_table
    from ranking.prefill.bench import PrefillShape, bench_prefill
    from retrieval.llama import Size

    size = Size(hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, mlp=mlp, vocabulary=vocab)
    shape = PrefillShape(prefix, items, length)
    facts = {**vars(shape), **vars(size), "dtype": "float32", **bench_prefill(size, shape, seed)}
    emit(facts, as_json=as_json, table=lambda: facts_table(facts))
