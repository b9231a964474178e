"""On a CUDA device: the kernels give the reference's answers without waiting for the host, and the engine scores through them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ranking.prefill.attend import BACKENDS, choose, merge, probe, reference
from ranking.prefill.engine import Engine
from ranking.prefill.float8 import CAPABILITY, Float8, scaled
from ranking.prefill.kernels import cuda_varlen_placed
from ranking.prefill.load import ready
from ranking.prefill.plan import Request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: the CUDA kernels were not tested in this run"),
    pytest.mark.filterwarnings("default::UserWarning"),  # torch.compile advises about precision and fusion
]
ALLOWED = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Scores are summed in float32; probabilities and answers are rounded to the inputs' precision."""
VARLEN = [(name, dtype) for name in ("cuda_varlen", "cuda_varlen_steady") for dtype in BACKENDS[name].dtypes]
CASES = [*VARLEN, ("flex", torch.bfloat16)]


def rows(count: int, heads: int, dims: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(count, heads, dims, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def bounds(*lengths: int) -> np.ndarray:
    return np.cumsum([0, *lengths], dtype=np.int32)


def working(name: str, dtype: torch.dtype) -> None:
    if name == "cuda_varlen_steady" and "no num_splits" in (reason := probe(name, "cuda", dtype)):
        pytest.skip(reason)
    assert probe(name, "cuda", dtype) == ""


def test_varlen_is_the_default_in_bfloat16_and_the_reference_in_float32() -> None:
    assert choose(None, "cuda", torch.bfloat16).name == "cuda_varlen"
    assert choose(None, "cuda", torch.float32).name == "reference"


@pytest.mark.parametrize(("name", "dtype"), VARLEN)
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (6, 1)])
@pytest.mark.parametrize("dims", [64, 128])
@pytest.mark.parametrize("lengths", [(8,), (1000, 7, 7, 33), (32,) * 50, (1,) * 8])
@pytest.mark.parametrize("causal", [True, False])
def test_varlen_agrees_with_the_reference(
    name: str, dtype: torch.dtype, heads: tuple[int, int], dims: int, lengths: tuple[int, ...], causal: bool
) -> None:
    working(name, dtype)
    agrees(name, dtype, heads, dims, lengths, causal)


@pytest.mark.parametrize(("dtype", "dims", "causal"), [(torch.bfloat16, 64, True), (torch.bfloat16, 128, False)])
def test_flex_agrees_with_the_reference(dtype: torch.dtype, dims: int, causal: bool) -> None:
    """Fewer cases: each form is compiled for itself."""
    for lengths in ((1000, 7, 7, 33), (32,) * 50):
        agrees("flex", dtype, (8, 2), dims, lengths, causal)


def agrees(name: str, dtype: torch.dtype, heads: tuple[int, int], dims: int, lengths: tuple[int, ...], causal: bool) -> None:
    q = rows(sum(lengths), heads[0], dims, dtype)
    k, v = (rows(sum(lengths), heads[1], dims, dtype, seed) for seed in (1, 2))
    cu = bounds(*lengths)
    want, want_lse = reference(q.float(), k.float(), v.float(), cu, cu, causal)
    out, lse = BACKENDS[name].attend(q, k, v, cu, cu, causal)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.float(), want, atol=ALLOWED[dtype], rtol=ALLOWED[dtype])
    torch.testing.assert_close(lse, want_lse, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize(("lengths", "prefix"), [([5, 32, 32, 1, 17, 17, 9, 9], 600), ([3000], 4000)])
def test_one_query_per_item_and_its_prefix_merge_into_the_whole(
    name: str, dtype: torch.dtype, lengths: list[int], prefix: int
) -> None:
    """What the last layer asks: a query for each item over a shared prefix and over the item's own keys.

    The kernel regroups heads where each segment has one query, and splits many keys of few queries.
    """
    working(name, dtype)
    q = rows(len(lengths), 8, 64, dtype)
    k, v = (rows(prefix + sum(lengths), 2, 64, dtype, seed) for seed in (1, 2))
    own = bounds(*lengths)
    run = BACKENDS[name].attend
    left = run(q, k[:prefix], v[:prefix], bounds(len(q)), bounds(prefix), False)
    right = run(q, k[prefix:], v[prefix:], np.arange(len(q) + 1, dtype=np.int32), own, False)
    out, _ = merge(*left, *right)
    for number, length in enumerate(lengths):
        start = prefix + int(own[number])
        seen = [torch.cat([x[:prefix], x[start : start + length]]).float() for x in (k, v)]
        want, _ = reference(q[number : number + 1].float(), *seen, bounds(1), bounds(prefix + length), False)
        torch.testing.assert_close(out[number : number + 1].float(), want, atol=ALLOWED[dtype], rtol=ALLOWED[dtype])


def test_varlen_waits_for_nothing_once_its_bounds_are_there() -> None:
    q, k = rows(64, 8, 64, torch.bfloat16), rows(64, 2, 64, torch.bfloat16)
    run, cu = BACKENDS["cuda_varlen"].attend, bounds(*(8,) * 8)
    run(q, k, k, cu, cu, True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            run(q, k, k, cu.copy(), cu.copy(), True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_steady_segment_keeps_its_bits_whatever_its_neighbours() -> None:
    working("cuda_varlen_steady", torch.bfloat16)
    run = BACKENDS["cuda_varlen_steady"].attend
    q, k = rows(8, 8, 64, torch.bfloat16), rows(4000, 2, 64, torch.bfloat16)
    alone = run(q, k[:2000], k[:2000], bounds(8), bounds(2000), False)
    both = run(torch.cat([q, q]), k, k, bounds(8, 8), bounds(2000, 2000), False)
    assert all(torch.equal(one, two[:8]) for one, two in zip(alone, both))


def llama(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.08,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().to("cuda")


@pytest.mark.parametrize("backend", ["cuda_varlen", "flex"])
def test_the_engine_scores_as_the_plain_model_does(backend: str) -> None:
    exact, rounded = llama(torch.float32), llama(torch.bfloat16)
    rounded.load_state_dict(exact.state_dict())
    rng = np.random.default_rng(0)
    asked = Request(rng.integers(0, 500, 200).tolist(), [rng.integers(0, 500, n).tolist() for n in (7, 32, 32, 1, 90)])
    labels = (5, 9, 40)

    def alone(model: LlamaForCausalLM) -> np.ndarray:
        with torch.inference_mode():
            passes = [model(torch.tensor([[*asked.prefix, *item]], device="cuda")).logits for item in asked.items]
        return np.array([found[0, -1, list(labels)].float().cpu().numpy() for found in passes])

    truth = alone(exact)
    np.testing.assert_allclose(Engine(exact, labels).score([asked])[0], truth, atol=1e-3)
    engine = Engine(rounded, labels, backend=backend)
    assert engine.backend == backend
    rounding = np.abs(alone(rounded) - truth).max()
    for _ in ("cold", "warm"):
        assert np.abs(engine.score([asked])[0] - truth).max() < 2 * rounding + 1e-2


def test_varlen_with_bounds_on_the_device_and_empty_places_agrees_with_the_reference() -> None:
    q, k = rows(64, 8, 64, torch.bfloat16), rows(64, 2, 64, torch.bfloat16)
    cu, on = bounds(5, 32, 1), torch.tensor([0, 5, 37, 38, 38, 38], dtype=torch.int32, device="cuda")
    for causal in (True, False):
        out, lse = cuda_varlen_placed(q, k, k, (on, 64), (on, 64), causal)
        want, want_lse = reference(q[:38].float(), k[:38].float(), k[:38].float(), cu, cu, causal)
        torch.testing.assert_close(out[:38].float(), want, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(lse[:38], want_lse, atol=2e-3, rtol=1e-3)


def small_request(seed: int) -> Request:
    rng = np.random.default_rng(seed)
    return Request(rng.integers(0, 500, 100 + seed).tolist(), [rng.integers(0, 500, n).tolist() for n in (7, 16, 16, 1)])


@pytest.mark.parametrize("float8", [False, True])
def test_cuda_graphs_score_as_the_plain_passes_do(float8: bool) -> None:
    if float8 and torch.cuda.get_device_capability() < CAPABILITY:
        pytest.skip("no FP8 products on this device")
    model = ready(llama(torch.bfloat16), float8=float8)
    plain, engine = Engine(model, (5, 9)), Engine(model, (5, 9), graph_bytes=1 << 30)
    for seed in (0, 1, 2, 0):
        want = plain.score([small_request(seed)])[0]
        assert np.abs(engine.score([small_request(seed)])[0] - want).max() < (0.1 if float8 else 0.05) * np.abs(want).max()
    assert engine.graphs is not None and engine.graphs.recorded == 2 and not engine.graphs.plain


def test_float8_layers_agree_with_the_cpu() -> None:
    if torch.cuda.get_device_capability() < CAPABILITY:
        pytest.skip("no FP8 products on this device")
    weight, x = scaled(torch.randn(96, 256)), torch.randn(33, 256, dtype=torch.bfloat16)
    small = scaled(x.cuda())
    assert torch.equal(small.values.cpu().float(), scaled(x).values.float())
    layer, out = (
        Float8(weight.values.cuda(), weight.scales.cuda(), None),
        torch.empty(33, 96, dtype=torch.bfloat16, device="cuda"),
    )
    layer.into(small, out)
    torch.testing.assert_close(out.cpu().float(), scaled(x).wide() @ weight.wide().T, atol=0.1, rtol=2**-6)
