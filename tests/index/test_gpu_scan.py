"""The GPU search without a GPU: in Triton's interpreter, compiled for two processors, and refused with a reason.

What only a GPU can tell (that it computes what the interpreter does, and how fast) `benchmarks/gpu_search.py` finds out.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from index.bench_peers import MethodError, methods_named
from index.filters import RowSet
from index.gpu_code import code_width, gpu_reason, on_device, stays
from index.gpu_scan import GpuExact, ordered_dot, predicted
from index.gpu_steps import KnownSets, Launch
from index.hits import SearchError
from index.serving import DEVICE_VARIABLE, Serving, faiss_reason, search_device

ROOT = Path(__file__).parents[2]
NEEDS_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="TRITON IS NOT INSTALLED: NO GPU KERNEL WAS TESTED (pip install triton==3.7.1, which works without a GPU)",
)
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing is refused")
COMPILED = """
import itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from index.gpu_kernels import scan, score
from index.gpu_steps import Launch

def compiled(kernel, types, constants, processor, **options):
    signature = types | dict.fromkeys(constants, "constexpr")
    aligned = {(place,): [["tt.divisibility", 16]] for place, kind in enumerate(types.values()) if kind.startswith("*")}
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", processor, 32), options=options)

whole = dict.fromkeys(("rows", "which", "found", "counts"), "*i32") | {"wishes": "*fp64", "facts": "*fp64", "bits": "*u8"}
sizes = dict.fromkeys(("count", "blocks", "groups", "capacity", "set_bytes"), "i32")
for kind, width, queries, processor, ones in (
    ("int8", 128, 1, 90, ("groups",)), ("int8", 96, 200, 80, ()), ("float16", 128, 16, 90, ("groups", "blocks"))
):
    cut = Launch().of(queries, width, 1 if kind == "int8" else 2)
    code = "*i8" if kind == "int8" else "*fp16"
    numbers = dict(DIMS=width, CHUNK=min(128, width & -width), BLOCK=2048, TILE=cut.tile, ASKED=cut.asked)
    constants = numbers | dict(WHOLE=kind == "int8", FILTERED=True) | dict.fromkeys(ones, 1)  # Triton makes 1 a constant
    types = {"codes": code, "queries": code} | whole | {name: kind for name, kind in sizes.items() if name not in ones}
    made = compiled(scan, types, constants, processor, num_warps=cut.warps, num_stages=cut.stages)
    product = "wgmma.mma_async" if processor == 90 else "mma.sync"
    assert product in made.asm["ptx"] and made.asm["cubin"], "products are made by tensor cores"
    assert "cp.async" in made.asm["ptx"], "the next codes are fetched meanwhile"
    assert made.metadata.shared <= 160 * 1024, made.metadata.shared
types = {"vectors": "*fp32", "places": "*i32", "rows": "*i32", "queries": "*fp32", "keys": "*i64", "width": "i32"}
for ones in ({}, {"groups": 1}):
    made = compiled(score, types | ({} if ones else {"groups": "i32"}), {"DIMS": 100, "ROWS": 128} | ones, 90)
    assert ".f64" in made.asm["ptx"], "sums are in float64"
"""
WITHOUT_FAISS = """
import sys
sys.modules["faiss"] = None
import numpy as np
import index.bench_gpu
from index.gpu_scan import GpuExact, predicted
assert predicted(1_000, 8).total > 0
if {interpreted}:
    vectors = np.random.default_rng(0).integers(-3, 4, (20_000, 8)).astype(np.float32)
    hits = GpuExact(vectors, device="cpu").search(vectors[:1], 5)
    assert hits.scores[0, 0] == (vectors @ vectors[0]).max()
"""


def run(arguments: list[str], **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@NEEDS_TRITON
def test_the_kernels_answer_in_the_interpreter() -> None:
    file = Path(__file__).parent / "gpu_scan_interpreted.py"
    run(["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)], TRITON_INTERPRET="1")


@NEEDS_TRITON
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    """The interpreter lets pass what the compiler refuses: names, types, sizes of products, shared memory."""
    file = tmp_path / "compiled.py"
    file.write_text(COMPILED, encoding="utf-8")
    run(["-W", "ignore", str(file)], TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path / "cache"))


def test_faiss_is_not_needed() -> None:
    interpreted = importlib.util.find_spec("triton") is not None
    run(["-c", WITHOUT_FAISS.format(interpreted=interpreted)], TRITON_INTERPRET="1")


@NO_GPU
def test_where_there_is_no_gpu_it_is_refused(make_snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.ones((4, 3), np.float32)
    with pytest.raises(SearchError, match="no search on cuda: "):
        GpuExact(vectors)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SearchError, match=r"TRITON_INTERPRET|not installed"):
        GpuExact(vectors, device="cpu")
    for names in (["gpu-exact"], ["ours", "gpu-torch"]):
        with pytest.raises(MethodError, match=f"{names[-1]} cannot run here"):
            methods_named(names)
    monkeypatch.setenv(DEVICE_VARIABLE, "cuda")
    with pytest.raises(SearchError, match="BREWLINE_SEARCH_DEVICE is cuda, but "):
        Serving.of(make_snapshot(40))


def test_the_device_is_an_option_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DEVICE_VARIABLE, raising=False)
    assert search_device() == "cpu", "also where there is a GPU"
    monkeypatch.setenv(DEVICE_VARIABLE, "tpu")
    with pytest.raises(SearchError, match="'tpu', expected cpu or cuda"):
        search_device()
    assert faiss_reason("Flat", "float32", 10, 128, "cuda") == ""
    assert "recipe" in faiss_reason("IVF64,Flat", "float32", 10, 128, "cuda")
    assert "1025 dims" in faiss_reason("Flat", "float32", 10, 1_025, "cuda")


def test_memory_is_predicted() -> None:
    small, large = predicted(10_000_000, 128), predicted(100_000_000, 128)
    assert large.vectors == 51_200_000_000 and 13.2e9 < large.codes < 13.3e9 and 70e9 > large.total > 64e9
    assert small.vectors + small.codes < 7e9
    assert predicted(100_000_000, 128, on_host=True).total < 20e9
    assert predicted(100_000_000, 128, codes="float16").codes - large.codes == pytest.approx(12.8e9, rel=1e-3)


def test_sets_are_kept_within_bytes_the_last_used_first_and_no_longer_than_they_live() -> None:
    first, second, third = (RowSet.of(np.array([row]), 80) for row in range(3))
    known = KnownSets(torch.device("cpu"), 20)
    bits = known.bits(first)
    assert bits.tolist() == first.bits.tolist() and known.bits(second) is known.bits(second) and known.bits(first) is bits
    known.bits(third)
    assert known.bytes == 20 and known.bits(first) is bits, "the second one left"
    del third
    assert known.bytes == 10
    assert KnownSets(torch.device("cpu"), 5).bits(first).tolist() == bits.tolist(), "one that is too large is read all the same"


def test_only_vectors_that_stay_where_they_are_need_no_memory() -> None:
    cpu, vectors = torch.device("cpu"), torch.ones(4, 6)
    assert stays(vectors, cpu) and on_device(vectors, cpu) is vectors
    for other in (vectors.half(), vectors.double(), vectors[:, ::2], vectors.T, vectors.to("meta"), vectors.numpy()):
        assert not stays(other, cpu)


def test_launches_fit_the_questions_and_the_memory() -> None:
    assert [Launch().of(queries, 128, 1).asked for queries in (1, 16, 17, 100, 1_000)] == [16, 16, 32, 64, 64]
    for width in range(32, 1_025, 32):
        for size in (1, 2):
            cut = Launch().of(1_000, width, size)
            assert cut.stages == 1 or cut.stages * width * size * (cut.tile + cut.asked) <= 128 << 10
    assert [code_width(dims) for dims in (1, 32, 33, 100, 128)] == [32, 32, 64, 128, 128]


def test_the_twin_sums_in_order_and_rounds_once() -> None:
    vectors = np.array([[1e8, 1.0, -1e8], [0.1, 0.2, 0.3], [-1.0, 0.0, 0.0]], np.float32)
    scores = ordered_dot(vectors, np.array([1.0, 1.0, 1.0], np.float32))
    exact = np.float32(float(vectors[1, 0]) + float(vectors[1, 1]) + float(vectors[1, 2]))
    assert (
        scores.tolist() == [1.0, float(exact), -1.0]
        and not np.signbit(ordered_dot(vectors[2:], -np.eye(3, dtype=np.float32)[2]))[0]
    )


@pytest.mark.gpu
@pytest.mark.skipif(bool(gpu_reason()), reason="needs a CUDA device and triton")
def test_a_gpu_answers_as_numpy_does() -> None:
    rng = np.random.default_rng(0)
    vectors, queries = rng.standard_normal((50_000, 100)).astype(np.float32), rng.standard_normal((20, 100)).astype(np.float32)
    for codes in ("int8", "float16"):
        hits, proof = GpuExact(vectors, codes=codes).prove(queries, 300)
        for query, row in enumerate(queries):
            scores = ordered_dot(vectors, row)
            order = np.lexsort((np.arange(50_000), -scores))[:300]
            assert np.array_equal(hits.rows[query], order) and np.array_equal(hits.scores[query], scores[order])
        assert (proof.rounds >= 1).all()
