"""Times the certified exact search on a GPU beside torch's matmul and topk, after checking its answers against numpy.

    PYTHONPATH=. python benchmarks/gpu_search.py --out results          # needs torch, triton, numpy and a CUDA device, not faiss
    PYTHONPATH=. python benchmarks/gpu_search.py --out results --launches   # also the scan alone in 24 cuts (minutes more)
    PYTHONPATH=. python benchmarks/gpu_search.py --out results --tiny   # toy sizes in Triton's interpreter on a CPU

Top 2,000 of 10,000,000 and 100,000,000 x 128 (the latter takes 64 GB of the device and 26 more for the contender in float16).
A time is the median of 20 calls of other queries each, from numpy to numpy. `share` is the time in which the codes could be read
once at the bandwidth of a copy, over the time. What fails is written down with its reason, the rest goes on, the exit code is 1.
`results/gpu_search.json` is written anew after every step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from index.bench_gpu import top_of_products_on_device
from index.filters import RowSet
from index.gpu_code import GpuAsked
from index.gpu_scan import GpuExact, Launch, ordered_dot
from index.gpu_steps import Group

WARM_UPS, REPEATS, CENTRES, NOISE, PIECE = 3, 20, 2_000, 0.7, 1 << 20
LAUNCHES = [
    Launch(tile, asked, warps, stages)
    for tile, asked, warps, stages in itertools.product((64, 128), (16, 64, 128), (4, 8), (2, 4))
]
Report = dict[str, object]


def made(count: int, dims: int, device: str, seed: int) -> torch.Tensor:
    """Vectors by the law of `brewline bench search`, drawn on the device: a random centre plus 0.7 times noise, normalised."""
    centres = torch.randn(CENTRES, dims, generator=torch.Generator().manual_seed(0)).to(device)
    source = torch.Generator(device).manual_seed(seed)
    vectors = torch.empty(count, dims, device=device)
    for start in range(0, count, PIECE):
        part = vectors[start : start + PIECE]
        part.normal_(generator=source).mul_(NOISE)
        part += centres[torch.randint(CENTRES, (len(part),), generator=source, device=device)]
        part /= part.norm(dim=1, keepdim=True)
    return vectors


def median_ms(calls: list[Callable[[], object]], device: str) -> float:
    """The median time of the calls after some to warm up."""
    taken = []
    for turn, call in enumerate([*itertools.islice(itertools.cycle(calls), WARM_UPS), *calls]):
        began = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        if turn >= WARM_UPS:
            taken.append(time.perf_counter() - began)
    return float(np.median(taken)) * 1e3


def tried(run: Callable[[], Report]) -> Report:
    """What a step found, or why it failed."""
    try:
        return run()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:400]}"}


def bandwidth(device: str, size: int) -> float:
    """Bytes per second that a copy reads and writes."""
    source, target = (torch.zeros(size, dtype=torch.int8, device=device) for _ in range(2))
    return 2 * size / median_ms([lambda: target.copy_(source)] * REPEATS, device) * 1e3


def drawn(rng: np.random.Generator, kind: str, count: int, dims: int) -> np.ndarray:
    vectors = rng.standard_normal((count, dims))
    if kind == "spread":
        vectors *= 10.0 ** rng.uniform(-5, 5, (count, 1))
    if kind == "duplicates":
        vectors = vectors[rng.integers(0, 500, count)]
    if kind == "whole numbers":
        vectors = rng.integers(-2, 3, (count, dims))
    return vectors.astype(np.float32)


def checked(device: str, count: int, kind: str, codes: str, dims: int, launch: Launch) -> Report:
    """Answers of every kind of question are the sorted lists of numpy, bit for bit, or AssertionError."""
    rng = np.random.default_rng(len(kind))
    vectors, queries = drawn(rng, kind, count, dims), drawn(rng, "normal", 9, dims)
    queries[-1] = 0
    some = RowSet.where(rng.random(count) < 0.4)
    sets = [None, some, some, RowSet.where(rng.random(count) < 0.02), None, some, None, RowSet.of(np.arange(5), count), None]
    exclude = [rng.permutation(count)[: 100 * (query % 3)] for query in range(9)]
    k = min(2_000, count // 20)
    hits, proof = GpuExact(vectors, device=device, codes=codes, launch=launch).prove(queries, k, exclude, allow=sets)
    for query, (one, left_out) in enumerate(zip(sets, exclude)):
        permitted = np.ones(count, bool) if one is None else one.has(np.arange(count))
        permitted[left_out] = False
        rows = np.flatnonzero(permitted)
        scores = ordered_dot(vectors[rows], queries[query])
        order = np.lexsort((rows, -scores))[:k]
        found = int(hits.counts[query])
        assert hits.rows[query, :found].tolist() == rows[order].tolist(), f"rows of query {query} differ"
        assert (hits.scores[query, :found] == scores[order]).all(), f"scores of query {query} differ"
    return {"rounds": proof.rounds.tolist(), "scored": int(proof.scored.mean())}


def scan_alone(search: GpuExact, queries: np.ndarray, k: int, device: str, launch: Launch | None = None) -> float:
    """Milliseconds of the scan of one batch with the bars that its own answers are: the least that has to be found."""
    bars = torch.tensor(search.search(queries, k).scores[:, -1], dtype=torch.float64, device=device)
    group = Group.of(GpuAsked.of(queries, search.device, search.kind), [], np.zeros(0, np.int64), {})
    places = torch.arange(len(queries), device=device)
    steps = replace(search.steps, launch=launch or search.steps.launch)
    return median_ms([lambda: steps.survivors(group, places, bars, 8 * k)] * REPEATS, device)


def ours(search: GpuExact, batches: list[np.ndarray], k: int, device: str, rate: float) -> Report:
    """Latency, throughput, and what it was made of."""
    size = len(batches[0])
    spent = median_ms([partial(search.search, batch, k) for batch in batches], device)
    _, proof = search.prove(batches[0], k)
    least, scan = search.steps.coded.codes.nbytes / rate * 1e3, scan_alone(search, batches[0], k, device)
    made_of = {"share": least / spent, "scan_ms": scan, "scan_share": least / scan}
    return {"p50_ms": spent, "qps": size / spent * 1e3, **made_of, "scored": float(proof.scored.mean())}


def theirs(vectors: torch.Tensor, batches: list[np.ndarray], k: int, device: str) -> Report:
    """torch's matmul and topk over vectors that are there in this dtype."""

    def call(batch: np.ndarray) -> np.ndarray:
        return top_of_products_on_device(torch.tensor(batch, device=device).to(vectors.dtype), vectors, k).cpu().numpy()

    spent = median_ms([partial(call, batch) for batch in batches], device)
    return {"p50_ms": spent, "qps": len(batches[0]) / spent * 1e3}


def cut_up(queries: np.ndarray, size: int) -> list[np.ndarray]:
    """A batch for each repeat, none like the one before."""
    return [np.take(queries, range(at * size, at * size + size), axis=0, mode="wrap") for at in range(REPEATS)]


def launches(search: GpuExact, queries: np.ndarray, k: int, device: str) -> Report:
    """Milliseconds of the scan alone, by how the kernel is cut."""
    cuts = [cut for cut in LAUNCHES if cut.asked <= max(16, len(queries))]
    return {str(cut): tried(partial(lambda cut: {"scan_ms": scan_alone(search, queries, k, device, cut)}, cut)) for cut in cuts}


def measured(
    asked: argparse.Namespace, count: int, device: str, rate: float, launch: Launch | None
) -> Iterator[tuple[str, Report]]:
    """The steps of one size."""
    vectors = made(count, asked.dims, device, 1)
    queries = made(2 * max(asked.batches), asked.dims, device, 2).cpu().numpy()
    began = time.perf_counter()
    search = GpuExact(vectors, device=device, launch=launch)
    yield "built", {"seconds": time.perf_counter() - began, "bytes": search.bytes}
    for n in asked.batches:
        yield f"certified, batch {n}", tried(partial(ours, search, cut_up(queries, n), asked.k, device, rate))
    for n in asked.batches if asked.launches else []:
        yield f"launches, batch {n}", tried(partial(launches, search, queries[:n], asked.k, device))
    del search
    for dtype, n in itertools.product((torch.float16, torch.float32), asked.batches):
        there = vectors.to(dtype)
        yield f"torch {dtype}, batch {n}", tried(partial(theirs, there, cut_up(queries, n), asked.k, device))
        del there


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_search.json")
    parser.add_argument("--tiny", action="store_true", help="toy sizes in Triton's interpreter on a CPU")
    parser.add_argument("--sizes", type=lambda text: [int(n) for n in text.split(",")], default=[10_000_000, 100_000_000])
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32, 256, 1024])
    parser.add_argument("--launches", action="store_true", help="time the scan alone in many cuts")
    parser.add_argument("--dims", type=int, default=128)
    parser.add_argument("--k", type=int, default=2_000)
    asked = parser.parse_args()
    if not asked.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device; --tiny runs on a CPU")
    device, where = ("cpu", "CPU, Triton's interpreter") if asked.tiny else ("cuda", torch.cuda.get_device_name())
    if asked.tiny:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which is when the first search is made
        asked.sizes, asked.batches, asked.dims, asked.k = [30_000], [1, 4], 24, 40
    asked.out.mkdir(parents=True, exist_ok=True)
    report: Report = {"torch": torch.__version__, "device": where}

    def note(name: str, found: Report) -> None:
        report[name] = found
        (asked.out / "gpu_search.json").write_text(json.dumps(report, indent=1))
        parts = (f"{key} {x:.4g}" if isinstance(x, float) else f"{key} {x}" for key, x in found.items())
        sys.stdout.write(f"{name:60} {'  '.join(parts)}\n")

    launch = Launch(tile=2048, scored=1024) if asked.tiny else None
    for kind, codes in itertools.product(("normal", "spread", "duplicates", "whole numbers"), ("int8", "float16")):
        count, dims = (20_000, 24) if asked.tiny else (300_000, 100)
        step = partial(checked, device, count, kind, codes, dims, launch or Launch())
        note(f"answers, {kind}, {codes}", tried(step))
    if '"failed"' in json.dumps(report):
        sys.stdout.write("answers are wrong: nothing is timed\n")
        return 1
    rate = bandwidth(device, 1 << 20 if asked.tiny else 4 << 30)
    note("copy", {"bytes per second": rate})
    for count in asked.sizes:
        for name, found in measured(asked, count, device, rate, launch):
            note(f"{count:,}: {name}", found)
    return int('"failed"' in json.dumps(report))


if __name__ == "__main__":
    sys.exit(main())
