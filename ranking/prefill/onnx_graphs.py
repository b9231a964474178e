"""The prefill engine written out for onnxruntime: one graph makes a prefix's keys and values, one reads items over them.

The nodes are laid down one by one instead of traced, so no size is fixed or assumed to be more than one: a prefix of one token,
one item of one token and an empty past are ordinary. Both graphs see a row's keys as past followed by rows of the same pass,
with one softmax over both; what a row may not see among its own pass is the only mask, [T, past + T] for a pass of T rows. The
last layer computes keys and values for all rows and everything else only where a score is read.

    prefix.onnx   ids, positions [t], past [h, layers, 2, G, D]                          -> made [t, layers, 2, G, D]
    items.onnx    ids, positions, items [T], past [P, layers, 2, G, D], last [n]         -> logits [n, labels]
    weights.bin   every weight once, float32 (int8 and a scale for each output), read by both graphs
    engine.json   `ranking.prefill.onnx_folder.EngineFacts`, which both graphs repeat in their metadata

Ids, positions, the item that a row belongs to (any numbers, equal within an item) and last rows are int64, the rest float32.

Legend: T rows of a pass, P prefix tokens, n items, H query heads, G key heads, R = H / G, D dims of a head.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from index.durable import sha256_of
from ranking.prefill.onnx_folder import DESCRIBED, FACTS, FORMAT, GRAPHS, ITEMS, PREFIX, WEIGHTS, Dimensions, EngineFacts
from ranking.prefill.onnx_nodes import Graph, Store, save
from ranking.prefill.request import check_labels
from ranking.prefill.weights import Block, UnsupportedModel, Weights, longest_text


def export_engine(model: PreTrainedModel, label_ids: Sequence[int], folder: Path, *, quantize: bool = False) -> Path:
    """The folder holds an engine that `OnnxEngine` opens, with the logits of `label_ids` in that order; returns it.

    With `quantize` the products of the projections and the MLP are int8 (one scale for each output of a weight, one for all rows
    of a pass), and the folder is refused until `quality_gate` has admitted it. Embeddings, norms, attention and the label head
    stay float32. Raises UnsupportedModel, LabelError, and ExportError if the package onnx (extra `dev`) is missing.
    """
    weights = Weights.of(model)
    if weights is None:
        raise UnsupportedModel("the projections are wrapped (LoRA); merge them into the weights before the export")
    labels = check_labels(label_ids, len(weights.embedding))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FACTS).unlink(missing_ok=True)  # never the facts of an earlier export beside these files
    with (folder / WEIGHTS).open("wb") as file:
        store = Store(file, quantize)
        _store(store, weights, model.get_output_embeddings().weight[list(labels)])
    rope = model.model.rotary_emb
    shape = _Shape(weights, rope.original_inv_freq.float().cpu().numpy(), float(rope.attention_scaling))
    facts = _facts(model, weights, labels, quantize)
    for name, draw in ((PREFIX, _prefix_graph), (ITEMS, _items_graph)):
        save(draw(store, shape, facts.signature(name)), folder / name, {DESCRIBED: facts.described()})
    facts = replace(facts, files={name: sha256_of(folder / name) for name in (*GRAPHS, WEIGHTS)})
    (folder / FACTS).write_text(json.dumps(asdict(facts), indent=1) + "\n")
    return folder


def _facts(model: PreTrainedModel, weights: Weights, labels: tuple[int, ...], quantize: bool) -> EngineFacts:
    return EngineFacts(
        format=FORMAT,
        labels=labels,
        layers=len(weights.blocks),
        heads=weights.heads,
        kv_heads=weights.kv_heads,
        dims=weights.dims,
        hidden=weights.hidden,
        vocabulary=len(weights.embedding),
        max_positions=longest_text(model),
        revision=weights_revision(model),
        quantized=quantize,
        files={},
        gate=None,
    )


def weights_revision(model: PreTrainedModel) -> str:
    """A sha256 over the names, types, shapes and bytes of the weights; a tied weight counts once."""
    whole = hashlib.sha256()
    for name, weight in model.named_parameters():
        whole.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        whole.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return whole.hexdigest()


def _store(store: Store, weights: Weights, head: Tensor) -> None:
    store.put("embedding", _numpy(weights.embedding))
    for number, block in enumerate(weights.blocks):
        _store_block(store, f"{number}.", block)
    store.put("norm", _numpy(weights.norm))
    store.put("head", _numpy(head).T)


def _store_block(store: Store, at: str, block: Block) -> None:
    products = {"q": (block.q,), "kv": (block.k, block.v), "o": (block.o,), "gate_up": block.gate_up, "down": (block.down,)}
    for name, parts in products.items():
        store.linear(at + name, _numpy(torch.cat([part.weight for part in parts])).T)
        biases = [part.bias for part in parts if part.bias is not None]
        if biases:
            store.put(f"{at}{name}.bias", _numpy(torch.cat(biases)))
    gains = {"before": block.before, "after": block.after, "q_gain": block.q_gain, "k_gain": block.k_gain}
    for name, gain in gains.items():
        if gain is not None:
            store.put(at + name, _numpy(gain))


def _numpy(weight: Tensor) -> np.ndarray:
    return weight.detach().float().cpu().numpy()


@dataclass(frozen=True)
class _Shape:
    """What the graphs need besides the weights: sizes, and the rotation's frequencies [D / 2] with the factor of cos and sin."""

    weights: Weights
    frequencies: np.ndarray
    scaling: float


class _Loop:
    """The layers as nodes, over the inputs ids, positions and past."""

    def __init__(self, graph: Graph, shape: _Shape, visible: str) -> None:
        """`visible` bool [T, T] names what a row sees among the rows of its pass; it always sees all of the past."""
        self.g, self.shape, self.w = graph, shape, shape.weights
        g = graph
        self.x = g.rows("embedding", "ids")
        positions = g.one("Cast", g.one("Unsqueeze", "positions", g.ints(1, 2)), attributes={"to": 1})
        half = g.one("Mul", positions, g.constant(shape.frequencies))
        angle = g.stack(half, half, axis=-1)
        scaling = g.number(shape.scaling)
        self.cos = g.one("Mul", g.one("Cos", angle), scaling)
        self.sin = g.one("Mul", g.one("Sin", angle), scaling)
        own = g.one("Where", visible, g.number(0), g.number(-np.inf))
        before = g.one("Shape", "past", attributes={"start": 0, "end": 1})
        self.mask = g.one("Pad", own, g.stack(g.ints(0), before, g.ints(0, 0)), g.number(0))

    def keys(self, layer: int) -> tuple[str, str, str]:
        """The normed rows, and their keys (rotated) and values [T, G, D]."""
        h = self.g.norm(self.x, f"{layer}.before", self.w.epsilon)
        width = self.w.kv_heads * self.w.dims
        k, v = self.g.split(self.g.linear(h, f"{layer}.kv"), width, width)
        return h, self._heads(k, f"{layer}.k_gain"), self.g.one("Reshape", v, self.g.ints(-1, self.w.kv_heads, self.w.dims))

    def mix(self, layer: int, h: str, k: str, v: str) -> None:
        """Attention over the past and the pass, output projection and MLP are added to the rows."""
        g, groups, dims = self.g, self.w.kv_heads, self.w.dims
        q = self._heads(g.linear(h, f"{layer}.q"), f"{layer}.q_gain")
        q = g.one("Reshape", g.one("Mul", q, g.number(dims**-0.5)), g.ints(-1, groups, self.w.heads // groups, dims))
        past = g.rows("past", g.constant(np.int64(layer)), axis=1)
        keys = g.turned(g.stack(g.rows(past, g.constant(np.int64(0)), axis=1), k), 1, 2, 0)
        values = g.turned(g.stack(g.rows(past, g.constant(np.int64(1)), axis=1), v), 1, 0, 2)
        scores = g.one("MatMul", g.turned(q, 1, 2, 0, 3), g.one("Unsqueeze", keys, g.ints(1)))
        shares = g.one("Softmax", g.one("Add", scores, self.mask), attributes={"axis": -1})
        mixed = g.turned(g.one("MatMul", shares, g.one("Unsqueeze", values, g.ints(1))), 2, 0, 1, 3)
        mixed = g.one("Reshape", mixed, g.ints(-1, self.w.heads * dims))
        self.x = g.one("Add", self.x, g.linear(mixed, f"{layer}.o"))
        h = g.norm(self.x, f"{layer}.after", self.w.epsilon)
        gate, up = g.split(g.linear(h, f"{layer}.gate_up"), self.w.mlp, self.w.mlp)
        gate = g.one("Mul", gate, g.one("Sigmoid", gate))
        self.x = g.one("Add", self.x, g.linear(g.one("Mul", gate, up), f"{layer}.down"))

    def only(self, rows: str) -> None:
        """The other rows are needed no more."""
        self.x, self.cos, self.sin, self.mask = (self.g.rows(one, rows) for one in (self.x, self.cos, self.sin, self.mask))

    def _heads(self, flat: str, gain: str) -> str:
        """Heads [T, heads, D], normed where the model does that, turned by their positions, halves paired as in LLaMA."""
        g, half = self.g, self.w.dims // 2
        heads = g.one("Reshape", flat, g.constant(np.array([0, -1, self.w.dims], np.int64)))
        if gain in g.store.places:
            heads = g.norm(heads, gain, self.w.epsilon)
        first, second = g.split(heads, half, half)
        crossed = g.stack(g.one("Neg", second), first, axis=-1)
        return g.one("Add", g.one("Mul", heads, self.cos), g.one("Mul", crossed, self.sin))


def _prefix_graph(store: Store, shape: _Shape, ports: Mapping[str, Dimensions]) -> Graph:
    """Keys and values of the rows of one prefix that follow those in `past`."""
    w = shape.weights
    g = Graph(store, "prefix", ports)
    loop = _Loop(g, shape, _up_to(g))
    made = []
    for layer in range(len(w.blocks)):
        h, k, v = loop.keys(layer)
        made += [g.one("Unsqueeze", one, g.ints(1)) for one in (k, v)]
        if layer < len(w.blocks) - 1:
            loop.mix(layer, h, k, v)
    g.end("Reshape", g.stack(*made, axis=1), g.ints(-1, len(w.blocks), 2, w.kv_heads, w.dims))
    return g


def _items_graph(store: Store, shape: _Shape, ports: Mapping[str, Dimensions]) -> Graph:
    """Label logits of items that each continue the prefix in `past`."""
    w = shape.weights
    g = Graph(store, "items", ports)
    same = g.one("Equal", g.one("Unsqueeze", "items", g.ints(1)), g.one("Unsqueeze", "items", g.ints(0)))
    loop = _Loop(g, shape, g.one("And", same, _up_to(g)))
    for layer in range(len(w.blocks)):
        h, k, v = loop.keys(layer)
        if layer == len(w.blocks) - 1:
            h = g.rows(h, "last")
            loop.only("last")
        loop.mix(layer, h, k, v)
    g.end("MatMul", g.norm(loop.x, "norm", w.epsilon), "head")
    return g


def _up_to(g: Graph) -> str:
    """Bool [T, T]: a column's position is not after the row's."""
    return g.one("GreaterOrEqual", g.one("Unsqueeze", "positions", g.ints(1)), g.one("Unsqueeze", "positions", g.ints(0)))
