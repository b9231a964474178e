"""Words before weights: a model from scratch starts with token vectors that already know which words go together.

Latent semantic analysis (Deerwester et al. 1990) of two kinds of documents, all from before the cut: each item's words, and each
member's words together with the words of what they engaged with. The second kind is what ties a profile's vocabulary
to the items'. It costs seconds; learning the same from contrastive batches costs most of a short training.
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


def start_from_words(model: PreTrainedModel, tokens: Tokens, dataset: Dataset, before: int, seed: int) -> int:
    """Sets the embedding rows of all words seen before a time; returns how many. Special tokens keep their rows."""
    documents = list(_documents(dataset, tokens, before, seed))
    weight = model.get_input_embeddings().weight
    if len(documents) < MIN_DOCUMENTS:
        return 0
    vectors = latent_vectors(documents, len(tokens), weight.shape[1], seed)
    seen = np.flatnonzero(np.abs(vectors).sum(1) > 0)
    scaled = vectors[seen] / np.sqrt(np.mean(vectors[seen] ** 2))
    with torch.no_grad():
        weight[torch.from_numpy(seen)] = torch.from_numpy(SCALE * scaled).to(weight.dtype)
    return len(seen)


def latent_vectors(documents: Sequence[Sequence[int]], vocabulary: int, dims: int, seed: int) -> npt.NDArray[np.float32]:
    """Token vectors float32 [V, dims] (zero for tokens never seen): right singular vectors of the TF-IDF matrix, times the
    square root of their singular values, each row brought to unit length."""
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
    vectors[:, :rank] = (right * np.sqrt(strength)[:, None]).T
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9) * (frequency > 0)[:, None]


def _documents(dataset: Dataset, tokens: Tokens, before: int, seed: int) -> Iterator[list[int]]:
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
