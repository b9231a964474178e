"""An off-the-shelf sentence-transformers model of the user's as a baseline: the text of items and of the newest history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.data.schema import Items
from retrieval.evidence.baselines import Floats, Knowledge, Past
from retrieval.evidence.protocol import EvidenceError, Queries
from retrieval.evidence.rank import Scorer
from retrieval.terms import FIELD_CHARACTERS


@dataclass(frozen=True)
class SentenceModel:
    """Cosine of an item's text with the texts of the `newest` history items, newest first; no training of any kind."""

    model: Any = field(repr=False, compare=False)
    folder: str
    newest: int = 5
    name: str = "Sentence model"
    knowledge: Knowledge = "frozen"

    @property
    def setting(self) -> str:
        return f"{self.folder}, last {self.newest} items"

    def fit(self, past: Past) -> Scorer:
        texts = item_texts(past.dataset.items)
        vectors = past.kept(("sentence", self.folder), lambda: self._embed(texts))

        def score(queries: Queries) -> Floats:
            return self._embed([self._query(texts, queries, row) for row in range(len(queries))]) @ vectors.T

        return score

    def _query(self, texts: Sequence[str], queries: Queries, row: int) -> str:
        newest = queries.events.item[queries.history[row][::-1][: self.newest]]
        return ". ".join(texts[item] for item in newest.tolist())

    def _embed(self, texts: Sequence[str]) -> Floats:
        found = self.model.encode(list(texts), batch_size=64, normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(found, np.float32)


def item_texts(items: Items) -> list[str]:
    """Returns title, text, category and creator of each item in one text; the model cuts it where its window ends."""
    fields = zip(items.title, items.text, items.category, items.creator, strict=True)
    return [". ".join(part[:FIELD_CHARACTERS] for part in parts if part) for parts in fields]


def load_sentence_model(folder: Path) -> Any:
    """The model of a local folder, on the CPU. Raises EvidenceError if it is not one; nothing is downloaded, no code of the
    folder is run, and weights must be safetensors."""
    from sentence_transformers import SentenceTransformer

    if not (folder / "modules.json").is_file():
        raise EvidenceError(
            f"{folder}: no modules.json; expected a local sentence-transformers folder. Names of models on a hub are not looked "
            "up: download the model first and give its folder."
        )
    options = {"local_files_only": True, "trust_remote_code": False, "model_kwargs": {"use_safetensors": True}}
    try:
        return SentenceTransformer(str(folder.resolve()), device="cpu", **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise EvidenceError(f"{folder}: sentence-transformers cannot read this folder ({error}).") from error
