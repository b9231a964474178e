"""A catalogue without interactions still teaches: made-up sessions of look-alike items.

The listing site that has only a table gets an encoder that knows which of its texts belong together. Each made-up member
"engages" with an item and its nearest neighbours by TF-IDF; the encoder learns to bring them together from a part of the
words. No popularity exists, so none is learned. Every command that uses this says so.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import scipy.sparse as sp

from retrieval.data.schema import DAY, TEST, TRAIN, VALID, Dataset, Events, Members
from retrieval.terms import Terms

ACTION = "look-alike"
LENGTH = 6
"""Items of one made-up session: the seed and its nearest neighbours."""
SESSIONS = 20_000
NOTE = "no engagements in this folder: trained on made-up sessions of look-alike items (text alone, no popularity)"
MADE_UP = "made_up_sessions"
"""Key of `Meta.extra` that marks such a data set: its counts mean nothing and are not shown to a model."""
_BLOCK = 512


def with_sessions(dataset: Dataset, seed: int) -> tuple[Dataset, str]:
    """The dataset itself and "" if it has engagements, else one with made-up sessions in their place and a note that says so."""
    if len(dataset.engagements):
        return dataset, ""
    n_items = len(dataset.items)
    rng = np.random.default_rng([seed, 2])
    seeds = rng.permutation(np.resize(np.arange(n_items), min(SESSIONS, 4 * n_items)))
    chosen = _neighbours(dataset, seeds, rng)
    # Ten pseudo-days: eight to fit, one to validate, one after the cut, so that the same protocol runs.
    day = np.sort(rng.integers(0, 10, len(seeds)))
    return _dataset(dataset, chosen, day), NOTE


def _neighbours(dataset: Dataset, seeds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Item rows [S, LENGTH] (-1 where a seed has too few neighbours), in random order within a session."""
    terms = Terms.of_items(dataset.items)
    vectors: sp.csr_matrix = terms.tfidf(terms.counts)
    found = np.full((len(seeds), LENGTH), -1, np.int64)
    for first in range(0, len(seeds), _BLOCK):
        block = seeds[first : first + _BLOCK]
        scores = np.asarray((vectors[block] @ vectors.T).todense(), np.float32)
        scores[np.arange(len(block)), block] = np.inf
        count = min(LENGTH, scores.shape[1])
        near = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        near[np.take_along_axis(scores, near, 1) <= 0] = -1
        found[first : first + len(block), :count] = near
    return rng.permuted(found, axis=1)


def _dataset(dataset: Dataset, chosen: np.ndarray, day: np.ndarray) -> Dataset:
    session, place = np.nonzero(chosen >= 0)
    timestamp = (day[session] * DAY + session % 1_000 * 60 + place).astype(np.int64)
    order = np.argsort(timestamp, kind="stable")
    n = len(order)
    split = np.select([day[session] < 8, day[session] < 9], [TRAIN, VALID], TEST)
    events = Events(
        event_id=np.arange(n, dtype=np.int64),
        member=session[order].astype(np.int32),
        item=chosen[session, place][order].astype(np.int32),
        timestamp=timestamp[order],
        action=np.zeros(n, np.int16),
        label=np.full(n, -1, np.int8),
        value=np.full(n, np.nan, np.float32),
        split=split[order].astype(np.int8),
        request=np.full(n, -1, np.int32),
        position=np.full(n, -1, np.int16),
        surface=np.full(n, -1, np.int16),
        actions=(ACTION,),
    )
    extra = {**dataset.meta.extra, MADE_UP: True}
    meta = replace(dataset.meta, cut_valid=8 * DAY, cut_test=9 * DAY, retrieval_actions=(ACTION,), extra=extra)
    members = Members([f"session {number}" for number in range(len(chosen))])
    # Real times cannot be compared with pseudo-days: every item is there from the start.
    items = replace(dataset.items, created_at=np.zeros(len(dataset.items), np.int64))
    return replace(dataset, meta=meta, items=items, members=members, events=events, connections=None)
