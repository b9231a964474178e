"""The exported engine's twin is the plain Hugging Face model, one item per pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers
from transformers import PreTrainedModel

from ranking.prefill.errors import EmptyItem, LabelError, PrefixTooLong, UnknownToken, UnknownVector
from ranking.prefill.onnx_engine import OnnxEngine, PrefixShelf, groups
from ranking.prefill.onnx_folder import GRAPHS
from ranking.prefill.onnx_graphs import export_engine
from ranking.prefill.request import Limits, Request
from ranking.prefill.weights import UnsupportedModel

ROOT = Path(__file__).parent.parent.parent
LABELS = (5, 9, 40)
SIZE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama3 untied": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}),
    "llama yarn, biases": ("Llama", {"rope_parameters": YARN, "attention_bias": True, "mlp_bias": True}),
    "llama, one layer, one key head": ("Llama", {"num_hidden_layers": 1, "num_key_value_heads": 1}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


def made(name: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model whose biases and norms are not the trivial ones of a fresh model."""
    torch.manual_seed(seed)
    kind, changes = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZE, **changes})
    model: PreTrainedModel = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for part, weight in model.named_parameters():
            if "norm" in part:
                weight.uniform_(0.5, 1.5)
            elif part.endswith("bias"):
                weight.normal_()
    return model


def alone(model: PreTrainedModel, request: Request) -> np.ndarray:
    """One plain forward per item: the meaning of a score."""
    with torch.inference_mode():
        rows = [model(torch.tensor([[*request.prefix, *item]])).logits[0, -1, list(LABELS)] for item in request.items]
    return torch.stack(rows).float().numpy()


def request(prefix: int, lengths: list[int], seed: int = 0) -> Request:
    rng = np.random.default_rng(seed)
    return Request(rng.integers(0, 50, prefix).tolist(), [rng.integers(0, 50, n).tolist() for n in lengths])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_engine(made("llama tied"), LABELS, tmp_path_factory.mktemp("float"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> OnnxEngine:
    return OnnxEngine(folder, threads=1)


@pytest.mark.parametrize("name", list(MODELS))
def test_each_family_scores_as_one_item_per_pass(name: str, tmp_path: Path) -> None:
    model = made(name)
    engine = OnnxEngine(export_engine(model, LABELS, tmp_path), threads=1)
    assert engine.backend == "onnx"
    for graph in GRAPHS:
        onnx.checker.check_model(str(tmp_path / graph), full_check=True)
    shapes = [(13, [3, 7, 1, 7, 4, 3, 12]), (1, [1]), (1, [1, 1, 2]), (9, [1]), (1, [6]), (50, [5, 70])]
    asked = [request(*shape, seed) for seed, shape in enumerate(shapes)]
    for got, one in zip(engine.score(asked), asked):
        assert got.dtype == np.float32 and got.shape == (len(one.items), 3)
        np.testing.assert_allclose(got, alone(model, one), atol=1e-5)


def test_bfloat16_weights_are_computed_in_float32(tmp_path: Path) -> None:
    rounded = made("qwen3").to(torch.bfloat16)
    engine = OnnxEngine(export_engine(rounded, LABELS, tmp_path), threads=1)
    asked = request(9, [4, 6])
    np.testing.assert_allclose(engine.score([asked])[0], alone(rounded.float(), asked), atol=1e-5)


@pytest.mark.parametrize("rows", [1, 7, 25])
def test_chunked_equals_whole(folder: Path, engine: OnnxEngine, rows: int) -> None:
    asked = [request(9, [3, 5, 2, 5, 3, 3, 8], 1), request(4, [], 2), request(60, [2, 2, 30], 3), request(11, [4], 4)]
    whole, chunked = engine.score(asked), OnnxEngine(folder, limits=Limits(max_tokens=rows), threads=1).score(asked)
    assert [len(part) for part in chunked] == [7, 0, 3, 1]
    for left, right in zip(whole, chunked):
        np.testing.assert_allclose(left, right, atol=1e-5)


def test_a_kept_prefix_changes_nothing_bitwise(folder: Path) -> None:
    engine, asked = OnnxEngine(folder, threads=1), [request(20, [3, 4], 1), request(30, [5, 2], 2)]
    miss = engine.score(asked)
    hit = engine.score(asked)
    assert (engine.prefixes.hits, engine.prefixes.misses) == (2, 2)
    none = OnnxEngine(folder, cache_bytes=0, threads=1)
    for left, right, other in zip(miss, hit, none.score(asked)):
        np.testing.assert_array_equal(left, right)
        np.testing.assert_array_equal(left, other)
    assert (none.prefixes.hits, none.prefixes.bytes) == (0, 0)


def test_the_shelf_drops_the_prefix_that_was_longest_unused() -> None:
    first, second, third = (np.array([n]) for n in range(3))
    shelf, keys = PrefixShelf(budget=800), np.zeros(100, np.float32)
    shelf.keep(first, keys)
    shelf.keep(second, keys)
    assert shelf.find(first) is keys
    shelf.keep(third, keys)
    assert shelf.find(second) is None and shelf.find(first) is keys and shelf.find(third) is keys
    shelf.keep(second, np.zeros(201, np.float32))
    assert shelf.bytes == 800 and shelf.find(second) is None


def test_order_duplicates_and_company_do_not_matter(engine: OnnxEngine) -> None:
    asked = request(8, [4, 2, 5, 4, 9])
    base = engine.score([asked])[0]
    order = [3, 0, 4, 2, 1]
    shuffled = engine.score([Request(asked.prefix, [asked.items[n] for n in order])])[0]
    np.testing.assert_allclose(shuffled, base[order], atol=1e-5)
    doubled = engine.score([Request(asked.prefix, [*asked.items, *asked.items])])[0]
    np.testing.assert_array_equal(doubled, np.concatenate([base, base]))
    beside = engine.score([request(30, [3, 3], 9), asked])[1]
    np.testing.assert_array_equal(beside, base)
    changed = engine.score([Request(asked.prefix, [[7, 7, 1, 3], *asked.items[1:]])])[0]
    assert not np.allclose(changed[0], base[0], atol=1e-3)
    np.testing.assert_array_equal(changed[1:], base[1:])


def test_no_torch_is_loaded(folder: Path, engine: OnnxEngine, tmp_path: Path) -> None:
    asked = request(13, [3, 7, 1])
    script = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from ranking.prefill.onnx_engine import OnnxEngine
from ranking.prefill.request import Request
found = OnnxEngine(Path({str(folder)!r}), threads=1).score([Request({asked.prefix}, {asked.items})])[0]
assert not {{"torch", "transformers", "onnx"}} & set(sys.modules), sorted(sys.modules)
print(json.dumps(found.tolist()))
"""
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.array(json.loads(done.stdout), np.float32), engine.score([asked])[0])
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_scored_is_refused_by_type(engine: OnnxEngine, tmp_path: Path) -> None:
    for wrong, expected in (
        (Request([1], [[50]]), UnknownToken),
        (Request([77], [[1]]), UnknownToken),
        (Request([1], [[-1]]), UnknownVector),
        (Request([1], [[-1]], np.zeros((1, 32), np.float32)), UnknownVector),
        (Request([1], [[]]), EmptyItem),
        (Request([1] * 127, [[1, 2]]), PrefixTooLong),
    ):
        with pytest.raises(expected):
            engine.score([wrong])
    model = made("llama tied")
    for labels in ((), (3, 3), (50,), (-1,)):
        with pytest.raises(LabelError):
            export_engine(model, labels, tmp_path / "labels")

    class Wrapped(torch.nn.Linear):
        pass

    model.model.layers[0].self_attn.q_proj = Wrapped(32, 32)
    with pytest.raises(UnsupportedModel, match="wrapped"):
        export_engine(model, LABELS, tmp_path / "wrapped")


def test_only_the_body_is_int8(tmp_path: Path) -> None:
    export_engine(made("qwen3"), LABELS, tmp_path, quantize=True)
    graph = onnx.load(tmp_path / "items.onnx", load_external_data=False).graph
    weights = {tensor.name: tensor.data_type for tensor in graph.initializer}
    products = [(node.op_type, node.input[1]) for node in graph.node if node.op_type in ("MatMul", "MatMulInteger")]
    named = [f"{layer}.{part}" for layer in range(2) for part in ("q", "kv", "o", "gate_up", "down")]
    assert sorted(name for op, name in products if op == "MatMulInteger") == sorted(named)
    assert all(weights[name] == onnx.TensorProto.INT8 for name in named)
    assert products[-1] == ("MatMul", "head")
    assert all(weights[name] == onnx.TensorProto.FLOAT for name in ("head", "norm", "embedding", "0.before", "0.q_gain"))


def test_no_pass_holds_more_rows_than_the_budget() -> None:
    """The mask of a pass is T x (P + T), so T is what bounds it; an item that is longer goes alone."""
    bounds = np.cumsum([0, 2, 2, 3, 4, 9, 1]).astype(np.int32)
    assert list(groups(bounds, 0, 6, 7)) == [(0, 3), (3, 4), (4, 5), (5, 6)]
    assert list(groups(bounds, 1, 4, 5)) == [(1, 3), (3, 4)]
    assert list(groups(bounds, 0, 6, 1000)) == [(0, 6)]
