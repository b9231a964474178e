"""The words of texts, and those of a catalogue as sparse matrices: counts, TF-IDF and BM25 weights. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from retrieval.data.schema import Items

Floats = npt.NDArray[np.float32]
_WORD = re.compile(r"\w\w+")
FIELD_CHARACTERS = 4000
"""How much of one field is read: one hostile field must not cost minutes."""


def words_of(text: str) -> list[str]:
    """The words of a text in small letters, in order: runs of two or more letters, digits and underscores."""
    return _WORD.findall(text.lower())


def read_fields(fields: Iterable[str]) -> str:
    """Several fields as one text; of each no more than `FIELD_CHARACTERS` are read."""
    return " ".join(field[:FIELD_CHARACTERS] for field in fields)


@dataclass(frozen=True)
class Terms:
    """Word counts of a catalogue: float32 [N, V] and the column of each word."""

    counts: sp.csr_matrix
    column_of: dict[str, int]

    @classmethod
    def of_items(cls, items: Items) -> Terms:
        """Counts the words of title, text, category and creator of every item."""
        column_of: dict[str, int] = {}
        fields = zip(items.title, items.text, items.category, items.creator, strict=True)
        counts = _count((read_fields(parts) for parts in fields), column_of, grow=True)
        return cls(counts, column_of)

    def count(self, texts: Iterable[str]) -> sp.csr_matrix:
        """Returns float32 [n, V]: counts of the catalogue's words in other texts."""
        return _count(texts, self.column_of, grow=False)

    @property
    def inverse_frequency(self) -> Floats:
        """Float32 [V]: log((1 + N) / (1 + df)) + 1."""
        frequency = np.bincount(self.counts.indices, minlength=self.counts.shape[1])
        return (np.log((1 + self.counts.shape[0]) / (1 + frequency)) + 1).astype(np.float32)

    def tfidf(self, counts: sp.csr_matrix) -> sp.csr_matrix:
        """Returns rows of unit length: (1 + log tf) * idf."""
        weights = counts.copy()
        weights.data = (1 + np.log(weights.data)) * self.inverse_frequency[weights.indices]
        return unit_rows(weights)

    def bm25(self, k1: float = 1.2, b: float = 0.75) -> sp.csr_matrix:
        """Returns float32 [N, V]: the weight of each word in each item (Robertson and Zaragoza 2009)."""
        weights = self.counts.copy()
        length = np.asarray(weights.sum(axis=1)).ravel()
        row = np.repeat(np.arange(weights.shape[0]), np.diff(weights.indptr))
        frequency = np.bincount(weights.indices, minlength=weights.shape[1])
        idf = np.log1p((weights.shape[0] - frequency + 0.5) / (frequency + 0.5))
        norm = k1 * (1 - b + b * length / max(float(length.mean()), 1.0))
        weights.data = (idf[weights.indices] * weights.data * (k1 + 1) / (weights.data + norm[row])).astype(np.float32)
        return weights


def _count(texts: Iterable[str], column_of: dict[str, int], grow: bool) -> sp.csr_matrix:
    indices: list[int] = []
    indptr = [0]
    for text in texts:
        words = words_of(text)
        if grow:
            for word in words:
                column_of.setdefault(word, len(column_of))
        indices.extend(column_of[word] for word in words if word in column_of)
        indptr.append(len(indices))
    shape = (len(indptr) - 1, max(len(column_of), 1))
    matrix = sp.csr_matrix((np.ones(len(indices), np.float32), np.array(indices, np.int64), np.array(indptr)), shape)
    matrix.sum_duplicates()
    return matrix


def unit_rows(matrix: sp.csr_matrix) -> sp.csr_matrix:
    """Returns the rows scaled to length 1; an empty row stays empty."""
    norm = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
    scaled: sp.csr_matrix = (sp.diags(1 / np.where(norm > 0, norm, 1)) @ matrix).tocsr().astype(np.float32)
    return scaled
