"""Embedding measured against sentence-transformers on the same folder, the same texts and the same dtype, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from index.exact import exact_search, overlap
from retrieval.data.schema import Dataset, Item
from retrieval.encoder import PRECISIONS, Encoder, Pooling, Precision, Vectors, save_encoder
from retrieval.learn.prepare import fit_quantizer, fit_tokens
from retrieval.llama import Size, new_llama, smooth_buckets
from retrieval.memory import freeze_loaded
from retrieval.moments import end_of
from retrieval.prompts import item_prompt, number_words, render
from retrieval.tonight import Numbers, Tonight
from retrieval.writer import Budgets, Writer

BATCHES = (16, 32, 64, 128, 256)
QUERIES = 500
"""At most so many of the texts, and at most a fourth of them, ask for their nearest among the others."""
TOP = 10
SAME = 1e-6
"""Items whose scores lie closer than this may stand for each other in a top ten."""


@dataclass(frozen=True)
class Wishes:
    """How many texts and rounds, which of the data's items, at which batch sizes of the peer, in which precision and where."""

    texts: int = 2_000
    rounds: int = 3
    batches: tuple[int, ...] = BATCHES
    precision: Precision = "float32"
    device: str = "cpu"
    seed: int = 0


class Seconds(NamedTuple):
    """What a piece of work took, by the clock and of all processors."""

    wall: float
    processor: float


def made_encoder(dataset: Dataset, size: Size, pooling: Pooling, seed: int, folder: Path) -> None:
    """The folder is an encoder of that shape with random weights, its tokenizer and quantizer fitted to the data."""
    torch.manual_seed(seed)
    quantizer = fit_quantizer(dataset, end_of(dataset), "percentile", seed)
    tokens = fit_tokens(dataset, end_of(dataset), quantizer, size.vocabulary)
    model = new_llama(size, len(tokens), causal_lm=False)
    smooth_buckets(model, tokens, quantizer)
    writer = Writer(tokens, quantizer, Budgets(), dataset.meta.retrieval_actions)
    save_encoder(folder, model, writer, {"random": True, "seed": seed}, pooling=pooling)


def bench_embed(
    folder: Path, dataset: Dataset, wishes: Wishes, progress: Callable[[int, int], None] | None = None
) -> dict[str, object]:
    """Texts and tokens per second of both, their ratio, and how far their vectors agree.

    Each round runs ours once and then the peer at every batch size; a seconds figure is the median over rounds, the peer's that
    of its best batch size. Processor seconds are told too: other work on the machine disturbs them less. Ours starts from
    records (prompts are written and tokenised in it), the peer from rendered texts.
    """
    encoder = Encoder.load(folder, wishes.device, precision=wishes.precision)
    items, numbers = _some_items(dataset, wishes)
    rows = encoder.writer.items(items, numbers)
    peer = _peer(folder, encoder, wishes)
    words = number_words(encoder.writer.quantizer, _all_numbers(encoder, items, numbers), len(items))
    texts = [render(item_prompt(item, row)) for item, row in zip(items, words)]
    encoder.items(items[:64], {name: column[:64] for name, column in numbers.items()})
    peer.encode(texts[:64])
    freeze_loaded()  # as a night does; else a collection hits now the one and now the other
    own: list[Seconds] = []
    theirs: dict[int, list[Seconds]] = {batch: [] for batch in wishes.batches}
    for done in range(wishes.rounds):
        seconds, vectors = _timed(lambda: encoder.items(items, numbers))
        own.append(seconds)
        for batch in wishes.batches:
            seconds, peers = _timed(lambda batch=batch: np.asarray(peer.encode(texts, batch_size=batch)))  # type: ignore[misc]
            theirs[batch].append(seconds)
        if progress is not None:
            progress(done + 1, wishes.rounds)
    return {**_rates(own, theirs, len(texts), sum(map(len, rows))), **_agreement(vectors, peers.astype(np.float32), wishes.seed)}


def _rates(own: list[Seconds], theirs: dict[int, list[Seconds]], texts: int, tokens: int) -> dict[str, object]:
    by_batch = {batch: median(one.wall for one in seconds) for batch, seconds in theirs.items()}
    best = min(by_batch, key=lambda batch: by_batch[batch])
    ratios = [min(theirs[batch][turn].wall for batch in theirs) / seconds.wall for turn, seconds in enumerate(own)]
    mine = median(one.wall for one in own)
    processor = min(median(one.processor for one in seconds) for seconds in theirs.values())
    return {
        "texts": texts,
        "tokens": tokens,
        "seconds": mine,
        "texts_per_s": texts / mine,
        "tokens_per_s": tokens / mine,
        "peer_best_batch": best,
        "peer_seconds": by_batch[best],
        "peer_texts_per_s": texts / by_batch[best],
        "peer_tokens_per_s": tokens / by_batch[best],
        "peer_seconds_by_batch": by_batch,
        "ratio": by_batch[best] / mine,
        "ratio_lowest": min(ratios),
        "ratio_processor": processor / median(one.processor for one in own),
    }


def _agreement(own: Vectors, theirs: Vectors, seed: int) -> dict[str, object]:
    """The lowest cosine of a text's two vectors, and for how many queries both find the same ten."""
    lengths = np.linalg.norm(own, axis=1) * np.linalg.norm(theirs, axis=1)
    order = np.random.default_rng(seed).permutation(len(own))
    asked, rest = np.split(order, [min(QUERIES, len(own) // 4)])
    if not asked.size:
        return {"cosine_min": float((own * theirs).sum(1).min()), "queries": 0, "top10_same": None}
    found, truth = (exact_search(vectors[rest], vectors[asked], TOP) for vectors in (own, theirs))
    same = overlap(theirs[rest], theirs[asked], found, truth, SAME) == 1
    return {
        "cosine_min": float(((own * theirs).sum(1) / lengths).min()),
        "largest_difference": float(np.abs(own - theirs).max()),
        "queries": len(asked),
        "top10_same": float(same.mean()),
    }


def _some_items(dataset: Dataset, wishes: Wishes) -> tuple[list[Item], Numbers]:
    tonight = Tonight.of(dataset, end_of(dataset))
    count = len(tonight.items)
    chosen = np.random.default_rng(wishes.seed).choice(count, min(wishes.texts, count), replace=False)
    return [tonight.items[row] for row in chosen.tolist()], {name: column[chosen] for name, column in tonight.numbers.items()}


def _all_numbers(encoder: Encoder, items: Sequence[Item], numbers: Numbers) -> Numbers:
    """As-of numbers and the items' own, as the writer puts them together."""
    own = [name for name in encoder.writer.quantizer.names if name not in numbers]
    return numbers | {name: np.array([item.numbers.get(name, np.nan) for item in items], np.float64) for name in own}


def _peer(folder: Path, encoder: Encoder, wishes: Wishes) -> Any:
    from sentence_transformers import SentenceTransformer

    options = {"dtype": PRECISIONS[wishes.precision]}
    peer = SentenceTransformer(str(folder.resolve()), device=wishes.device, local_files_only=True, model_kwargs=options)
    peer.max_seq_length = encoder.writer.budgets.item
    return peer


def _timed(work: Callable[[], Vectors]) -> tuple[Seconds, Vectors]:
    started, busy = time.perf_counter(), time.process_time()
    made = work()
    return Seconds(time.perf_counter() - started, time.process_time() - busy), made
