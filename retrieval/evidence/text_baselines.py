"""Baselines that match words: TF-IDF and BM25 of the item texts, with the history (and the profile) as the query."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from retrieval.data.schema import Members
from retrieval.evidence.baselines import Floats, Knowledge, Past, history_matrix
from retrieval.evidence.protocol import Queries
from retrieval.evidence.rank import Scorer
from retrieval.terms import Terms, read_fields, unit_rows

__all__ = ["Bm25", "Terms", "TfIdf", "profile_texts"]


@dataclass(frozen=True)
class TfIdf:
    """Cosine between an item's words and those of the history (newest count most), plus `profile` times the profile's."""

    decay: float = 0.9
    profile: float = 0.0
    knowledge: Knowledge = "frozen"

    @property
    def name(self) -> str:
        return "TF-IDF, profile" if self.profile else "TF-IDF"

    @property
    def setting(self) -> str:
        weight = f"profile weight={self.profile:g} " if self.profile else ""
        return f"{weight}decay={self.decay:g}"

    def fit(self, past: Past) -> Scorer:
        terms = past.terms
        vectors = terms.tfidf(terms.counts)
        profiles = terms.tfidf(terms.count(profile_texts(past.dataset.members))) if self.profile else None
        transposed = vectors.T.tocsr()

        def score(queries: Queries) -> Floats:
            query = unit_rows(history_matrix(queries, vectors.shape[0], self.decay) @ vectors)
            if profiles is not None:
                query = unit_rows(query + self.profile * profiles[queries.member])
            return np.asarray((query @ transposed).toarray(), np.float32)

        return score


def profile_texts(members: Members) -> list[str]:
    """Returns all profile fields of each member in one text."""
    columns = [members.profile[name] for name in members.profile]
    return [read_fields(column[row] for column in columns) for row in range(len(members))]


@dataclass(frozen=True)
class Bm25:
    """BM25 with the words of the newest `newest` history items as the query."""

    newest: int = 5
    name: str = "BM25"
    knowledge: Knowledge = "frozen"

    @property
    def setting(self) -> str:
        return f"last {self.newest} items"

    def fit(self, past: Past) -> Scorer:
        terms = past.terms
        weights = terms.bm25().T.tocsr()

        def score(queries: Queries) -> Floats:
            query = history_matrix(queries, terms.counts.shape[0], newest=self.newest) @ terms.counts
            return np.asarray((query @ weights).toarray(), np.float32)

        return score
