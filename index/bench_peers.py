"""The contenders of `index.bench`: ours, FAISS over a grid, torch, and other libraries where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from index.bench import Method, Missing, Ready, Setting
from index.bench_gpu import GPU_METHODS
from index.errors import BrewlineError
from index.gpu_code import gpu_reason
from index.hits import Rows, Vectors
from index.recipe import SHORT_ROWS, choose_short_lists

SHARES = (1 / 24, 1 / 20, 1 / 16, 1 / 12, 1 / 10, 1 / 8, 1 / 6, 1 / 4)
"""Of the short lists, visited."""
LISTS = (1024, 4096, 16384)
CODES = ("SQ8", "SQfp16", "PQ", "PQ fine", "PQ residual")
"""PQ: 4 bits for two numbers; fine: 4 bits for each; residual: for two of what is left beside the centre, as our short list."""
PROBED = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2)
REFINED = (1, 1.5, 2, 3)
WIDTHS = (2_000, 3_000, 4_000, 8_000)
"""ef of the graphs; those below k are left out."""
_TORCH_SCORES = 1 << 27


class MethodError(BrewlineError):
    """A method of the benchmark is unknown, or needs a GPU that is not there."""


def methods_named(names: list[str], lists: Sequence[int] = LISTS) -> list[Method]:
    """The methods are returned in the order of their names, FAISS's grid over these numbers of lists.

    Raises MethodError, which lists the methods that exist.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise MethodError(f"methods {', '.join(unknown) or '(none)'} are unknown: expected some of {', '.join(METHODS)}")
    asked = [name for name in names if name in GPU_METHODS]
    if asked and (reason := gpu_reason()):
        raise MethodError(f"{', '.join(asked)} cannot run here: {reason}; leave {'them' if asked[1:] else 'it'} out of --methods")
    return [partial(_faiss, grid=lists) if name == "faiss" else METHODS[name] for name in names]


def _ours(vectors: Vectors) -> Iterator[Ready]:
    from index.certified import Certified

    started = time.perf_counter()
    certified = Certified(vectors)
    exact = Setting("exact, certified", lambda q, k: certified.search(q, k).rows, certified.bytes + vectors.nbytes)
    yield Ready("ours", time.perf_counter() - started, [exact])
    if len(vectors) >= SHORT_ROWS:
        yield _short_lists(vectors)


def _short_lists(vectors: Vectors) -> Ready:
    from index.shortlist import ShortLists
    from index.shortlist_build import TRIED, filled, margins_of

    started = time.perf_counter()
    lists = choose_short_lists(len(vectors))
    built = filled(vectors, lists, 0)
    some = np.random.default_rng(0).choice(len(vectors), TRIED, replace=False)
    index = ShortLists(built, vectors, nprobe=1, margins=margins_of(built, vectors, vectors[some]))
    size = len(vectors) * (int(built.code_size) + 8) + lists * int(built.d) * 4 + vectors.nbytes

    def find(probes: int, queries: Vectors, k: int) -> Rows:
        return index.search(queries, k, nprobe=probes).rows

    probed = sorted({max(1, round(share * lists)) for share in SHARES})
    settings = [Setting(f"short list nprobe={p} of {lists}", partial(find, p), size) for p in probed]
    return Ready("ours", time.perf_counter() - started, settings)


def _flat(vectors: Vectors) -> Iterator[Ready]:
    import faiss

    started = time.perf_counter()
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    yield Ready("faiss", time.perf_counter() - started, [Setting("Flat", lambda q, k: index.search(q, k)[1], vectors.nbytes)])


def _faiss(vectors: Vectors, grid: Sequence[int] = LISTS) -> Iterator[Ready | Missing]:
    yield from _flat(vectors)
    for lists in grid:
        if 39 * lists > len(vectors):
            yield Missing("faiss", f"IVF{lists}: {len(vectors)} vectors are too few to train it")
            continue
        started = time.perf_counter()
        centres = _centres(vectors, lists)
        trained = time.perf_counter() - started
        for codes in CODES:
            yield _inverted(vectors, centres, codes, trained)


def _centres(vectors: Vectors, lists: int) -> Vectors:
    """The centres of FAISS's own k-means, which the indexes of all codes share."""
    import faiss

    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(vectors.shape[1]), vectors.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.max_points_per_centroid = 0, 64
    index.train(vectors)
    centres: Vectors = index.quantizer.reconstruct_n(0, lists)
    return centres


def _inverted(vectors: Vectors, centres: Vectors, codes: str, trained: float) -> Ready:
    import faiss as typed

    faiss: Any = typed
    (count, dims), lists = vectors.shape, len(centres)
    started = time.perf_counter()
    quantizer = faiss.IndexFlatIP(dims)
    quantizer.add(centres)
    metric, kinds = faiss.METRIC_INNER_PRODUCT, faiss.ScalarQuantizer
    parts = {"PQ": dims // 2, "PQ fine": dims, "PQ residual": dims // 2}.get(codes)
    if parts:
        inner: Any = faiss.IndexIVFPQFastScan(quantizer, dims, lists, parts, 4, metric)
        inner.by_residual = codes == "PQ residual"
    else:
        inner = faiss.IndexIVFScalarQuantizer(quantizer, dims, lists, kinds.QT_8bit if codes == "SQ8" else kinds.QT_fp16, metric)
    index: Any = faiss.IndexRefineFlat(inner) if parts else inner
    index.train(vectors)
    index.add(vectors)
    size = count * (inner.code_size + 8) + lists * dims * 4 + (vectors.nbytes if parts else 0)
    built = trained + time.perf_counter() - started

    def find(probed: int, factor: float, queries: Vectors, k: int) -> Rows:
        inner.parallel_mode = 1 if len(queries) == 1 else 0  # a lone query's lists over FAISS's threads, else the queries
        chosen: Any = faiss.SearchParametersIVF(nprobe=probed)
        if parts:
            chosen = faiss.IndexRefineSearchParameters(k_factor=factor, base_index_params=chosen)
        rows: Rows = index.search(queries, k, params=chosen)[1]
        return rows

    probes = sorted({max(1, round(share * lists)) for share in PROBED})
    name = f"IVF{lists}," + (f"PQ{parts}x4fs{'r' * inner.by_residual}" if parts else codes)
    if not parts:
        return Ready("faiss", built, [Setting(f"{name} nprobe={p}", partial(find, p, 1), size) for p in probes])
    pairs = [(probed, factor) for probed in probes for factor in REFINED]
    return Ready("faiss", built, [Setting(f"{name},RFlat x{f} nprobe={p}", partial(find, p, f), size) for p, f in pairs])


def _graph(vectors: Vectors) -> Iterator[Ready]:
    import faiss as typed

    faiss: Any = typed
    started = time.perf_counter()
    index = faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.add(vectors)
    size = vectors.nbytes + index.hnsw.neighbors.size() * 4

    def find(width: int, queries: Vectors, k: int) -> Rows:
        rows: Rows = index.search(queries, k, params=faiss.SearchParametersHNSW(efSearch=max(width, k)))[1]
        return rows

    settings = [Setting(f"HNSW32 efSearch={width}", partial(find, width), size) for width in WIDTHS]
    yield Ready("faiss-hnsw", time.perf_counter() - started, settings)


def _torch(vectors: Vectors) -> Iterator[Ready]:
    from index.int8 import top_of_products

    def find(queries: Vectors, k: int) -> Rows:
        step = max(1, _TORCH_SCORES // len(vectors))
        return np.concatenate([top_of_products(queries[at : at + step], vectors, k) for at in range(0, len(queries), step)])

    yield Ready("torch", 0.0, [Setting("matmul, topk", find, vectors.nbytes)])


def _hnswlib(vectors: Vectors) -> Iterator[Ready | Missing]:
    if (missing := _absent("hnswlib", "hnswlib")) is not None:
        yield missing
        return
    index: Any = importlib.import_module("hnswlib").Index(space="ip", dim=vectors.shape[1])
    started = time.perf_counter()
    index.init_index(max_elements=len(vectors), ef_construction=200, M=16, random_seed=0)
    index.add_items(vectors)

    def find(width: int, queries: Vectors, k: int) -> Rows:
        index.set_ef(max(width, k))
        return np.asarray(index.knn_query(queries, k=k)[0]).astype(np.int64)

    settings = [Setting(f"M16 ef={width}", partial(find, width), vectors.nbytes + len(vectors) * 140) for width in WIDTHS]
    yield Ready("hnswlib", time.perf_counter() - started, settings)


def _usearch(vectors: Vectors) -> Iterator[Ready | Missing]:
    if (missing := _absent("usearch", "usearch")) is not None:
        yield missing
        return
    started = time.perf_counter()
    index: Any = importlib.import_module("usearch.index").Index(ndim=vectors.shape[1], metric="ip", dtype="f16")
    index.add(np.arange(len(vectors)), vectors)

    def find(width: int, queries: Vectors, k: int) -> Rows:
        index.expansion_search = max(width, k)
        return np.asarray(index.search(queries, k).keys).astype(np.int64).reshape(len(queries), k)

    settings = [Setting(f"f16 expansion={width}", partial(find, width), int(index.memory_usage)) for width in WIDTHS]
    yield Ready("usearch", time.perf_counter() - started, settings)


def _scann(vectors: Vectors) -> Iterator[Ready | Missing]:
    if (missing := _absent("scann", "scann")) is not None:
        yield missing
        return
    scann: Any = importlib.import_module("scann")
    started = time.perf_counter()
    leaves = max(1, int(2 * len(vectors) ** 0.5))
    tree = scann.scann_ops_pybind.builder(vectors, 2_000, "dot_product").tree(leaves, leaves // 10, min(250_000, len(vectors)))
    index: Any = tree.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(6_000).build()

    def find(leaf: int, queries: Vectors, k: int) -> Rows:
        rows = index.search_batched(queries, final_num_neighbors=k, pre_reorder_num_neighbors=3 * k, leaves_to_search=leaf)[0]
        return np.asarray(rows).astype(np.int64)

    probes = sorted({max(1, round(share * leaves)) for share in PROBED})
    size = vectors.nbytes + len(vectors) * vectors.shape[1] // 4
    yield Ready(
        "scann", time.perf_counter() - started, [Setting(f"leaves={p} of {leaves}", partial(find, p), size) for p in probes]
    )


def _absent(method: str, module: str) -> Missing | None:
    return None if importlib.util.find_spec(module) else Missing(method, f"{module} is not installed")


METHODS: dict[str, Callable[[Vectors], Iterator[Ready | Missing]]] = {
    "ours": _ours,
    "faiss": _faiss,
    "faiss-flat": _flat,
    "faiss-hnsw": _graph,
    "torch": _torch,
    "hnswlib": _hnswlib,
    "usearch": _usearch,
    "scann": _scann,
    **GPU_METHODS,
}
