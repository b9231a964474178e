"""The words of a night's items as a searchable part of its snapshot: BM25, one posting list per word, mapped.

  `lexical.arrow`  word (rising), rows (of the snapshot, rising), weights (of the word in each of them: Robertson and Zaragoza
                   2009)

A query is a bag of words; an item's score is the sum of its weights of those words, each as often as the query holds it. Scoring
walks the lists of the query's words only; one number per item of the snapshot is held while it does. No torch here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from index.snapshot import Snapshot
from retrieval.data.schema import Items
from retrieval.parts import CatalogError, map_part, part_bytes, part_facts
from retrieval.terms import Terms

LEXICAL_PART = "lexical.arrow"
COLUMNS = {"word": pa.large_string(), "rows": pa.large_list(pa.int32()), "weights": pa.large_list(pa.float32())}

Rows = npt.NDArray[np.int64]


class Lexical:
    """The posting lists of `count` items. Holds no state between searches."""

    def __init__(self, postings: pa.RecordBatch, count: int) -> None:
        self.count = count
        # The words' own bytes, mapped: looking one up through Arrow's objects takes ten times as long.
        _, bounds, text = postings.column("word").buffers()
        self._bounds, self._text = memoryview(bounds or b"").cast("q"), memoryview(text or b"")
        self._size = postings.num_rows
        self._starts = postings.column("rows").offsets.to_numpy()
        self._rows, self._weights = (postings.column(name).values.to_numpy() for name in ("rows", "weights"))

    @classmethod
    def of_items(cls, items: Items) -> Lexical:
        """The posting lists of these items, in memory."""
        return cls(_postings(items), len(items))

    @classmethod
    def open(cls, snapshot: Snapshot) -> Lexical:
        """The part of a snapshot, mapped. Raises SnapshotNotFound without one, CatalogError if it does not fit the vectors."""
        postings = map_part(snapshot.part(LEXICAL_PART))
        items = part_facts(postings, LEXICAL_PART, COLUMNS)["items"]
        if items != snapshot.manifest.count:
            raise CatalogError(
                f"snapshot {snapshot.name} holds {snapshot.manifest.count:,} vectors but {LEXICAL_PART} is of {items} items; "
                "publish a new night or roll back"
            )
        return cls(postings, snapshot.manifest.count)

    def find(self, query: Mapping[str, int], k: int, excluded: Rows) -> Rows:
        """At most `k` rows that hold a word of the query (word -> how often), best first, equal ones by row; none excluded."""
        lists = [(place, times) for word, times in sorted(query.items()) if (place := self._place(word)) >= 0]
        if not lists:
            return np.zeros(0, np.int64)
        spans = [slice(self._starts[place], self._starts[place + 1]) for place, _ in lists]
        rows = np.concatenate([self._rows[span] for span in spans])
        weights = np.concatenate([times * self._weights[span] for span, (_, times) in zip(spans, lists)])
        scores = np.bincount(rows, weights, self.count)
        found = np.setdiff1d(np.flatnonzero(scores > 0), excluded, assume_unique=True)
        if len(found) > k:
            bar = np.partition(scores[found], len(found) - k)[len(found) - k]
            found = found[scores[found] >= bar]
        best: Rows = found[np.lexsort((found, -scores[found]))][:k]
        return best

    def _place(self, word: str) -> int:
        """The word's posting list, -1 if no item holds the word."""
        wanted = word.encode()  # UTF-8 sorts as its characters do
        place = bisect_left(range(self._size), wanted, key=self._word)
        return place if place < self._size and self._word(place) == wanted else -1

    def _word(self, place: int) -> bytes:
        return bytes(self._text[self._bounds[place] : self._bounds[place + 1]])


def write_lexical(items: Items) -> bytes:
    """The bytes of `lexical.arrow` for items in the rows' order; the same items give the same bytes."""
    return part_bytes(_postings(items), LEXICAL_PART, {"items": len(items)})


def _postings(items: Items) -> pa.RecordBatch:
    terms = Terms.of_items(items)
    words = sorted(terms.column_of)
    weights = terms.bm25().tocsc()[:, [terms.column_of[word] for word in words]]
    weights.sort_indices()
    starts = pa.array(weights.indptr, pa.int64())
    columns = {"rows": (weights.indices, pa.int32()), "weights": (weights.data, pa.float32())}
    lists = {name: pa.LargeListArray.from_arrays(starts, pa.array(part, kind)) for name, (part, kind) in columns.items()}
    return pa.record_batch({"word": pa.array(words, pa.large_string()), **lists})
