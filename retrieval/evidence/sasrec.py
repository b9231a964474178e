"""SASRec (Kang and McAuley 2018): a small causal transformer over item ids, trained on events before the cut only.

Trained with the full softmax over its items, which later work found stronger than the original's one negative per positive.
The settings are fixed, not tuned, and the work is bounded by a count of operations, not by a clock: the same data gives the same
model however busy the machine is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from retrieval.data.schema import Events
from retrieval.evidence.baselines import Floats, Knowledge, Past
from retrieval.evidence.protocol import Queries
from retrieval.evidence.ragged import Ragged
from retrieval.evidence.rank import Scorer

TARGETS_PER_STEP = 1024
OPERATIONS = 1e13
"""Floating-point operations of the softmax in one training: at most a quarter of an hour of one CPU core (0.35 s a step)."""
UNKNOWN = np.float32(-1e9)
Ids = npt.NDArray[np.int64]


class Network(nn.Module):
    """Tokens int64 [B, T] (0 = padding on the right, 1 = start, then items) to hidden states [B, T, D]."""

    def __init__(self, tokens: int, dims: int, blocks: int, length: int, dropout: float) -> None:
        super().__init__()
        self.items = nn.Embedding(tokens, dims)
        self.places = nn.Embedding(length, dims)
        nn.init.normal_(self.items.weight, std=dims**-0.5)
        nn.init.normal_(self.places.weight, std=dims**-0.5)
        layer = nn.TransformerEncoderLayer(dims, 1, 4 * dims, dropout, "gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, blocks, nn.LayerNorm(dims), enable_nested_tensor=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        states: torch.Tensor = self.body(self.dropout(self.items(tokens) + self.places.weight[:length]), mask=later)
        return states


@dataclass(frozen=True)
class Sasrec:
    """Next-item prediction over the `vocabulary` most engaged items; all others come last, in order of popularity."""

    dims: int = 64
    blocks: int = 2
    length: int = 50
    epochs: int = 20
    dropout: float = 0.2
    rate: float = 1e-3
    vocabulary: int = 20_000
    seed: int = 0
    name: str = "SASRec"
    knowledge: Knowledge = "frozen"

    @property
    def setting(self) -> str:
        shape = f"{self.blocks} blocks of {self.dims}, last {self.length} items, dropout {self.dropout:g}"
        return f"{shape}, full softmax, {self.epochs} epochs or {OPERATIONS:g} operations, seed {self.seed}"

    def fit(self, past: Past) -> Scorer:
        known = np.sort(np.argsort(-past.counts, kind="stable")[: min(self.vocabulary, int((past.counts > 0).sum()))])
        token_of = np.zeros(len(past.dataset.items), np.int64)
        token_of[known] = np.arange(len(known)) + 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = Network(len(known) + 2, self.dims, self.blocks, self.length, self.dropout)
            _train(network, training_rows(past.events, token_of, self.length), self)

        def score(queries: Queries) -> Floats:
            scores = np.full((len(queries), len(token_of)), UNKNOWN, np.float32)
            tokens, ends = _query_tokens(queries, token_of, self.length)
            with torch.inference_mode():
                states = [network(part)[torch.arange(len(part)), end] for part, end in zip(tokens.split(256), ends.split(256))]
                scores[:, known] = (torch.cat(states) @ network.items.weight[2:].T).numpy()
            return scores

        return score


def training_rows(log: Events, token_of: Ids, length: int) -> Ids:
    """Returns int64 [S, length + 1]: the start token, then up to `length` tokens of one member in time order, then zeros.

    A longer history becomes several rows, so that each event is a target exactly once.
    """
    tokens = token_of[log.item]
    known = tokens > 0
    lists = Ragged.from_pairs(log.member[known], tokens[known], int(log.member.max(initial=-1)) + 1)
    place = np.arange(len(lists.values)) - lists.start[:-1][lists.rows]
    first = place % length == 0
    rows = np.zeros((int(first.sum()), length + 1), np.int64)
    rows[:, 0] = 1
    rows[np.cumsum(first) - 1, place % length + 1] = lists.values
    return rows


def _query_tokens(queries: Queries, token_of: Ids, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The start token and the newest known tokens of each history [B, length], and the place of the last one [B]."""
    tokens = token_of[queries.events.item[queries.history.values]]
    history = Ragged.from_pairs(queries.history.rows[tokens > 0], tokens[tokens > 0], len(queries))
    kept = history.from_end < length - 1
    ends = np.minimum(history.lengths, length - 1)
    rows = np.zeros((len(queries), length), np.int64)
    rows[:, 0] = 1
    rows[history.rows[kept], (ends[history.rows] - history.from_end)[kept]] = history.values[kept]
    return torch.from_numpy(rows), torch.from_numpy(ends)


def _train(network: Network, rows: Ids, settings: Sasrec) -> None:
    """Leaves the network trained and in inference mode; a log without events leaves it as it began."""
    targets = int((rows[:, 1:] > 0).sum())
    if targets:
        per_step = max(1, TARGETS_PER_STEP * len(rows) // targets)
        softmax = 6 * min(targets, TARGETS_PER_STEP) * len(network.items.weight) * settings.dims
        steps = min(settings.epochs * -(-len(rows) // per_step), max(1, int(OPERATIONS // softmax)))
        optimizer = torch.optim.AdamW(network.parameters(), settings.rate, weight_decay=0.01)
        shuffle = torch.Generator().manual_seed(settings.seed)
        waiting: list[torch.Tensor] = []
        for _ in range(steps):
            waiting = waiting or list(torch.randperm(len(rows), generator=shuffle).split(per_step))
            loss = _loss(network, torch.from_numpy(rows)[waiting.pop()])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()


def _loss(network: Network, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each next token over all items, in nats."""
    longest = int((rows > 0).sum(1).max())
    states, following = network(rows[:, : longest - 1]), rows[:, 1:longest]
    logits = states[following > 0] @ network.items.weight[2:].T
    return functional.cross_entropy(logits, following[following > 0] - 2)
