"""What one unit of work was measured to cost, and where that is written; and what others published, which is kept apart.

One core of the test machine (Intel Xeon, AVX-512, KVM), seconds; the page of each figure is beside it. Nothing here was measured
on a GPU of ours.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """A figure, of what, and where it stands."""

    value: float
    of: str
    where: str


SEARCH_ROWS, SEARCH_DIMS = 1_000_000, 128
"""What the searches below were measured on."""
ENCODED_TOKENS = 224
"""Tokens of a member's row: the budget (`history_tokens`)."""

UNITS = {
    "exact_one": Unit(0.0156, "s, certified search of 1,000,000 x 128, k = 2,000, one query", "docs/search.md, table"),
    "exact_64": Unit(0.00221, "s a query, the same in batches of 64", "docs/search.md, table"),
    "approximate_one": Unit(0.0022, "s, shortlist search of 1,000,000 x 128, recall .984, one query", "docs/log.md, Search"),
    "approximate_rows": Unit(100_000, "rows visited by an approximate search of 1,000,000, at most", "docs/log.md, Search"),
    "encode": Unit(1 / 48_500, "s a token, packed, width 128, 2 layers", "docs/scale.md, Embedding at scale"),
    "rank": Unit(0.155, "s, 500 candidates of the demo by text ranker and fused head", "docs/log.md, The demo again"),
    "member": Unit(0.0012, "s, a member's record read and written out", "docs/log.md, The demo on the synthetic world"),
    "rest": Unit(0.0017, "s of a request that is not member, search or ranking (123 - 1.2 - 1.1 - 119 ms)", "the same"),
}
RANKED = 500
"""Candidates of the measured ranking."""

PUBLISHED = {
    "gpu_rank": Unit(2_200, "items/s an H100, a text ranker in production, p99 454 ms", "LinkedIn and SGLang, blog of 2026"),
    "gpu_search": Unit(24, "GPUs for index and exact kNN, taken as 300e6 items at 3,000/s", "arXiv 2510.14223"),
}
"""Other people's models on other people's machines, and `gpu_search` is our reading of "hundreds of millions" and "several
thousand": an order of magnitude, no promise."""
GPU_SEARCH_ITEMS, GPU_SEARCH_RATE = 300e6, 3_000.0
