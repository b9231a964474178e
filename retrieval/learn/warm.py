"""Words before weights: a model from scratch starts with token vectors that already know which words go together.

Latent semantic analysis (Deerwester et al. 1990) of two kinds of documents, all from before the cut: each item's words, and each
member's words together with the words of what they engaged with. The second kind is what ties a profile's vocabulary
to the items'. It costs seconds; learning the same from contrastive batches costs most of a short training.

An encoder starts further on where members meet what nobody met before (`start_as_words`): there no count can tell items
apart, words must, and its first vectors are those of latent semantic retrieval, each word as loud as it is rare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import svds
from transformers import PreTrainedModel

from retrieval.data.schema import Dataset, Engagement
from retrieval.learn.prepare import known_items
from retrieval.learn.timeline import Timeline
from retrieval.prompts import entry_prompt, item_prompt, member_prompt
from retrieval.tokens import Tokens

DOCUMENTS = 60_000
"""Documents of each kind, at most."""
SCALE = 0.5
"""Root mean square of a word's start. Far above the usual 0.02, so that at first the sum over words decides and not noise."""
MIN_DOCUMENTS = 50
MOSTLY_NEW = 0.5
"""Share of engagements with what nobody met before from which on words start as loud as they are rare. Measured at .83, where it
gains .11 at 10 (docs/evidence.md), and at .10, where it loses .01 at 100; not in between."""
LONGEST = 0.99
"""Quantile of the lengths of word vectors that is the longest length kept; the few above it are cut to that."""


def warm_start(model: PreTrainedModel, tokens: Tokens, dataset: Dataset, before: int, seed: int) -> int:
    """The trunk starts from the words known before a time, in the way that fits what members meet; returns how many."""
    newness = newness_of(dataset, before)
    if newness >= MOSTLY_NEW:
        return start_as_words(model, tokens, dataset, before, seed, newness)
    return start_from_words(model, tokens, dataset, before, seed)


def start_as_words(model: PreTrainedModel, tokens: Tokens, dataset: Dataset, before: int, seed: int, newness: float) -> int:
    """Word vectors are the trunk's start, each as long as its word is rare to the power of `newness`; returns how many words.

    The final norm would make all words equally loud. So the last coordinate of a word's row takes up what its length lacks to
    the common one, and the final norm starts with weight 0 there. Special tokens keep their rows. Nothing is done (0) where
    too few documents are known.
    """
    documents = list(documents_of(dataset, tokens, before, seed))
    if len(documents) < MIN_DOCUMENTS:
        return 0
    weight = model.get_input_embeddings().weight
    vectors, idf = word_vectors(documents, len(tokens), weight.shape[1] - 1, seed)
    seen = np.flatnonzero(np.abs(vectors).sum(1) > 0)
    words = np.pad(vectors[seen] * idf[seen, None] ** newness, ((0, 0), (0, 1)))
    lengths = np.linalg.norm(words, axis=1, keepdims=True)
    longest = float(np.quantile(lengths, LONGEST))
    words *= np.minimum(1.0, longest / lengths)
    words[:, -1] = np.sqrt(np.maximum(longest**2 - np.square(words).sum(1), 0.0))
    with torch.no_grad():
        weight[torch.from_numpy(seen)] = torch.from_numpy(words * (SCALE * weight.shape[1] ** 0.5 / longest)).to(weight.dtype)
        model.norm.weight[-1] = 0.0
    return len(seen)


def newness_of(dataset: Dataset, before: int) -> float:
    """The share of engagements before a time with an item that nobody had engaged with earlier, 0 to 1."""
    item = Timeline.of(dataset, before).item
    return len(np.unique(item)) / max(len(item), 1)


def start_from_words(model: PreTrainedModel, tokens: Tokens, dataset: Dataset, before: int, seed: int) -> int:
    """Sets the embedding rows of all words seen before a time; returns how many. Special tokens keep their rows."""
    documents = list(documents_of(dataset, tokens, before, seed))
    weight = model.get_input_embeddings().weight
    if len(documents) < MIN_DOCUMENTS:
        return 0
    vectors, _ = word_vectors(documents, len(tokens), weight.shape[1], seed)
    seen = np.flatnonzero(np.abs(vectors).sum(1) > 0)
    scaled = vectors[seen] / np.sqrt(np.mean(vectors[seen] ** 2))
    with torch.no_grad():
        weight[torch.from_numpy(seen)] = torch.from_numpy(SCALE * scaled).to(weight.dtype)
    return len(seen)


def word_vectors(
    documents: Sequence[Sequence[int]], vocabulary: int, dims: int, seed: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Token vectors float32 [V, dims] (zero for tokens never seen), and how rare each token is, float32 [V] (IDF).

    The vectors are the right singular vectors of the TF-IDF matrix, times the square root of their singular values, each row
    brought to unit length.
    """
    lengths = [len(document) for document in documents]
    rows = np.repeat(np.arange(len(documents)), lengths)
    columns = np.fromiter((token for document in documents for token in document), np.int64, sum(lengths))
    counts = sp.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), (len(documents), vocabulary))
    counts.sum_duplicates()
    frequency = np.bincount(counts.indices, minlength=vocabulary)
    idf = np.log((1 + len(documents)) / (1 + frequency)).astype(np.float32)
    counts.data = (1 + np.log(counts.data)) * idf[counts.indices]
    norms = np.sqrt(np.asarray(counts.multiply(counts).sum(1)).ravel())
    counts = sp.diags_array(1 / np.maximum(norms, 1e-9)) @ counts
    rank = min(dims, min(counts.shape) - 1)
    start = np.random.default_rng([seed, 3]).standard_normal(min(counts.shape)).astype(np.float32)
    _, strength, right = svds(counts.astype(np.float32), k=rank, v0=start)
    vectors = np.zeros((vocabulary, dims), np.float32)
    vectors[:, :rank] = (right * np.sqrt(strength)[:, None])[::-1].T  # the strongest first, where shorter vectors keep them
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9) * (frequency > 0)[:, None], idf


def documents_of(dataset: Dataset, tokens: Tokens, before: int, seed: int) -> Iterator[list[int]]:
    """The ids of the words of items and of members with what they engaged with, known before a time."""
    special = {tokens.id(token) for token in tokens.special}
    rng = np.random.default_rng([seed, 4])
    items = rng.permutation(known_items(dataset, before))[:DOCUMENTS]
    whole = tokens.many([item_prompt(dataset.items[row], []) for row in items.tolist()])
    yield from ([token for token in ids if token not in special] for ids in whole)
    timeline = Timeline.of(dataset, before)
    met = np.unique(timeline.item).tolist()
    prompts = [entry_prompt(Engagement(dataset.items[row], 0, ""), with_action=False) for row in met]
    entries = dict(zip(met, tokens.many(prompts)))
    members = rng.permutation(np.unique(timeline.member))[:DOCUMENTS]
    profiles = tokens.many([member_prompt(dataset.members[row], ()) for row in members.tolist()])
    for row, profile in zip(members.tolist(), profiles):
        engaged = timeline.item[timeline.start[row] : timeline.start[row + 1]]
        ids = [*profile, *(token for item in engaged.tolist() for token in entries[item])]
        yield [token for token in ids if token not in special]
