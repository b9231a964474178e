"""Every attention backend gives the reference's answer, and two partial answers merge into the whole."""

from __future__ import annotations

import inspect
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from ranking.prefill import attend as attention
from ranking.prefill.attend import BACKENDS, Backend, BackendMissing, choose, equal_runs, merge, probe, reference
from ranking.prefill.kernels import TILE, ForwardOnly, cuda_varlen, segment_mask

WORKING = [name for name in BACKENDS if not probe(name, "cpu")]


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bounds(*lengths: int) -> np.ndarray:
    return np.cumsum([0, *lengths], dtype=np.int32)


def test_cpu_flash_works_on_the_torch_we_test_with() -> None:
    assert "cpu_flash" in WORKING, probe("cpu_flash", "cpu")
    assert choose(None, "cpu").name == "cpu_flash"
    assert probe("cpu_flash", "cpu", torch.bfloat16) == ""


def test_flex_checks_the_others_and_is_never_the_default() -> None:
    assert "flex" in WORKING, probe("flex", "cpu")
    assert list(BACKENDS).index("flex") > list(BACKENDS).index("reference")


@pytest.mark.parametrize("name", WORKING)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("lengths", [(1,), (3, 3, 3), (2, 2, 5, 1, 1), (33, 7)])
@pytest.mark.parametrize("causal", [True, False])
def test_backends_agree_with_torch(name: str, heads: tuple[int, int], lengths: tuple[int, ...], causal: bool) -> None:
    q, k, v = rows(sum(lengths), heads[0], 16), rows(sum(lengths), heads[1], 16, seed=1), rows(sum(lengths), heads[1], 16, seed=2)
    cu = bounds(*lengths)
    out, lse = BACKENDS[name].attend(q, k, v, cu, cu, causal)
    assert out.shape == q.shape and lse.shape == q.shape[:2] and lse.dtype == torch.float32
    for start, stop in itertools.pairwise(cu):
        part = [x[start:stop].transpose(0, 1)[None] for x in (q, k, v)]
        want = scaled_dot_product_attention(*part, is_causal=causal, enable_gqa=True)[0].transpose(0, 1)
        torch.testing.assert_close(out[start:stop], want, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse, reference(q, k, v, cu, cu, causal)[1], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", WORKING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_halves_of_the_keys_merge_into_the_whole(name: str, dtype: torch.dtype) -> None:
    q, k, v = (rows(n, h, 8, seed=n).to(dtype) for n, h in ((5, 4), (9, 2), (9, 2)))
    run = BACKENDS[name].attend
    left = run(q, k[:4], v[:4], bounds(5), bounds(4), False)
    right = run(q, k[4:], v[4:], bounds(5), bounds(5), False)
    whole, whole_lse = reference(q.float(), k.float(), v.float(), bounds(5), bounds(9), False)
    out, lse = merge(*left, *right)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.float(), whole, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, whole_lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", WORKING)
def test_a_merge_of_far_apart_sums_stays_finite(name: str) -> None:
    q = rows(2, 2, 8)
    run = BACKENDS[name].attend
    far = run(q, 100 * q, q, bounds(2), bounds(2), False)
    near = run(q, -100 * q, q, bounds(2), bounds(2), False)
    for pair in ((far, near), (near, far)):
        out, lse = merge(*pair[0], *pair[1])
        assert out.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize("name", WORKING)
def test_causal_attention_refuses_uneven_segments(name: str) -> None:
    q, k = rows(2, 2, 8), rows(3, 2, 8)
    with pytest.raises(ValueError, match="as many keys as queries"):
        BACKENDS[name].attend(q, k, k, bounds(2), bounds(3), True)


def test_runs_are_the_longest_of_equal_shape() -> None:
    found = [(run.segments, run.queries, run.keys) for run in equal_runs(bounds(1, 1, 1, 2), bounds(3, 3, 4, 4))]
    assert found == [(2, 1, 3), (1, 1, 4), (1, 2, 4)]
    assert list(equal_runs(bounds(), bounds())) == []


def test_a_missing_required_backend_is_an_error_with_its_reason() -> None:
    with pytest.raises(BackendMissing, match="unknown"):
        choose("warp", "cpu")
    with pytest.raises(BackendMissing, match="not for cuda"):
        choose("cpu_flash", "cuda")
    with pytest.raises(BackendMissing, match=r"takes torch\.bfloat16 and torch\.float16, not torch\.float32"):
        choose("cuda_varlen", "cuda")


@pytest.mark.parametrize("broken", ["raises", "wrong"])
def test_a_backend_that_fails_its_probe_is_not_chosen(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def run(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        if broken == "raises":
            raise RuntimeError("no such operator")
        return torch.zeros_like(q), torch.zeros(q.shape[:2])

    monkeypatch.setattr(
        attention, "BACKENDS", {"cpu_flash": Backend("cpu_flash", run, ("cpu",)), "reference": BACKENDS["reference"]}
    )
    probe.cache_clear()
    try:
        assert choose(None, "cpu").name == "reference"
        with pytest.raises(BackendMissing, match="no such operator" if broken == "raises" else "disagrees"):
            choose("cpu_flash", "cpu")
    finally:
        probe.cache_clear()


def test_the_kernels_of_torch_are_imported_on_first_use() -> None:
    code = "import sys, ranking.prefill.attend; sys.exit('torch.nn.attention.varlen' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("lengths", [(4,), (3, 2), (1, 1, 1), (1, 1, 1, 1)])
def test_varlen_is_called_as_this_torch_declares_it(heads: tuple[int, int], lengths: tuple[int, ...]) -> None:
    """On the device that computes shapes only: the kernel itself needs CUDA, but its declaration is the one CUDA gets."""
    q, k = (torch.empty(sum(lengths), some, 16, dtype=torch.bfloat16, device="meta") for some in heads)
    steady = ["cuda_varlen_steady"] if "num_splits" in inspect.signature(varlen_attn).parameters else []
    for name in ["cuda_varlen", *steady]:
        out, lse = BACKENDS[name].attend(q, k, k, bounds(*lengths), bounds(*lengths), True)
        assert out.shape == q.shape and lse.shape == q.shape[:2] and lse.dtype == torch.float32


def test_varlen_refuses_to_learn() -> None:
    q = rows(2, 2, 8).requires_grad_()
    with pytest.raises(ForwardOnly, match="no gradient"):
        cuda_varlen(q, q, q, bounds(2), bounds(2), False)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(1,), (TILE, TILE), (200, 1, 1, 300), (5,) * 60, (130, 120, 7)])
def test_the_mask_by_hand_lists_the_blocks_that_torch_finds(lengths: tuple[int, ...], causal: bool) -> None:
    made = segment_mask(bounds(*lengths), bounds(*lengths), causal, torch.device("cpu"))
    rows_, device = sum(lengths), "cpu"
    found = create_block_mask(made.mask_mod, None, None, rows_, rows_, device=device, BLOCK_SIZE=TILE)
    assert torch.equal(made.to_dense(), found.to_dense())


def test_the_mask_by_hand_of_few_queries_and_many_keys() -> None:
    made = segment_mask(bounds(1, 1, 130), bounds(300, 5, 200), False, torch.device("cpu"))
    found = create_block_mask(made.mask_mod, None, None, 132, 505, device="cpu", BLOCK_SIZE=TILE)
    assert torch.equal(made.to_dense(), found.to_dense())
