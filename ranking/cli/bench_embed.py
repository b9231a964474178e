"""`brewline bench embed`: items become vectors, ours against sentence-transformers' own `encode` on the same folder."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ranking.cli.output import emit, progress_bar

if TYPE_CHECKING:
    from rich.table import Table

    from retrieval.data.schema import Dataset
    from retrieval.packed_bench import Wishes


class EmbedPrecision(StrEnum):
    """Of weights and arithmetic, of both."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class PoolingChoice(StrEnum):
    """What of the last hidden states becomes the vector."""

    mean = "mean"
    last = "last"
    both = "mean+last"


def embed(
    encoder: Annotated[
        Path | None, typer.Option(help="An encoder's folder instead of random weights.", exists=True, file_okay=False)
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A data folder whose items are read instead of an invented world's.", exists=True)
    ] = None,
    texts: Annotated[int, typer.Option(help="How many items are read.", min=2)] = 2_000,
    hidden: Annotated[int, typer.Option(help="Random weights: width.", min=16)] = 128,
    layers: Annotated[int, typer.Option(help="Random weights: depth.", min=1)] = 2,
    mlp: Annotated[int, typer.Option(help="Random weights: width of the MLP.", min=8)] = 384,
    heads: Annotated[int, typer.Option(help="Random weights: query heads.", min=1)] = 4,
    kv_heads: Annotated[int, typer.Option(help="Random weights: key and value heads.", min=1)] = 2,
    pooling: Annotated[PoolingChoice, typer.Option(help="Random weights: pooling.")] = PoolingChoice.both,
    precision: Annotated[EmbedPrecision, typer.Option(help="Of weights and arithmetic.")] = EmbedPrecision.float32,
    device: Annotated[str, typer.Option(help="cpu, cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(help="Each runs ours, and the peer at every batch size.", min=1)] = 3,
    seed: Annotated[int, typer.Option(help="Decides random weights and which items.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")] = False,
) -> None:
    """Texts per second, ours and sentence-transformers' own `encode`, in the same dtype and in turns.

    `ratio` divides the peer's seconds at its best batch size of 16 to 256 by ours (medians over rounds), `ratio_lowest` is that
    of the worst round, `ratio_processor` one of processor seconds. `cosine_min` compares each text's two vectors, `top10_same`
    is the share of queries (texts left out of the rest) whose ten nearest are the same. Ours writes the prompts in its time; the
    peer is handed the text.

        brewline bench embed --texts 2000 --json
        brewline bench embed --encoder models/encoder --data data/shop
    """
    from retrieval.llama import Size
    from retrieval.packed_bench import Wishes, made_encoder

    wishes = Wishes(texts=texts, rounds=rounds, precision=precision.value, device=device, seed=seed)
    dataset = _dataset(data)
    if encoder is not None:
        found = _measured(encoder, dataset, wishes)
    else:
        size = Size(hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, mlp=mlp)
        with tempfile.TemporaryDirectory() as folder:
            made_encoder(dataset, size, pooling.value, seed, Path(folder))
            found = {**asdict(size), **_measured(Path(folder), dataset, wishes)}
    emit({"encoder": encoder, "data": data, **found}, as_json=as_json, table=lambda: embed_table(found))


def _measured(folder: Path, dataset: Dataset, wishes: Wishes) -> dict[str, object]:
    import torch

    from ranking.prefill.machine import allocator
    from retrieval.encoder import read_facts
    from retrieval.packed_bench import bench_embed

    with progress_bar("rounds") as report:
        found = bench_embed(folder, dataset, wishes, report)
    machine = {"threads": torch.get_num_threads(), "allocator": allocator(), "torch": torch.__version__}
    return {**asdict(wishes), "pooling": read_facts(folder)["pooling"], **found, **machine}


def _dataset(folder: Path | None) -> Dataset:
    if folder is not None:
        from retrieval.data.read import read_dataset

        return read_dataset(folder)
    from retrieval.data.world import make_world
    from retrieval.data.world_people import WorldSettings

    with progress_bar("days of the world") as report:
        return make_world(WorldSettings(), report).dataset


def embed_table(found: dict[str, object]) -> Table:
    """One line per figure of the comparison."""
    from rich.table import Table

    table = Table("", "ours", "sentence-transformers")
    for name in ("seconds", "texts_per_s", "tokens_per_s"):
        table.add_row(name, f"{found[name]:,.2f}", f"{found[f'peer_{name}']:,.2f}")
    table.add_row("batch size", "by tokens", str(found["peer_best_batch"]))
    for name in ("ratio", "ratio_lowest", "ratio_processor", "cosine_min", "top10_same"):
        table.add_row(name, "-" if found[name] is None else f"{found[name]:.6f}", "")
    return table
