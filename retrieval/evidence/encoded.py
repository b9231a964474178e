"""An encoder folder as a vector model: its nightly rebuild, replayed for each day of the evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retrieval.counts import Counts
from retrieval.data.schema import Dataset, MemberView
from retrieval.encoder import Encoder, row_digest
from retrieval.evidence.baselines import Knowledge
from retrieval.evidence.rank import Floats, Progress


class EncoderModel:
    """Item vectors as of a moment, members as of their query. Of each night only items whose prompt changed are encoded.

    `frozen`: the counts know nothing at or after the test cut, whatever moment is asked for.
    """

    name = "Dual encoder"

    def __init__(self, encoder: Encoder, dataset: Dataset, counts: Knowledge, cut: int, progress: Progress | None = None) -> None:
        self.encoder = encoder
        self.counts = Counts.from_dataset(dataset, before=cut if counts == "frozen" else None)
        self.records = [dataset.items[row] for row in range(len(dataset.items))]
        self.progress = progress
        self.encoded = 0
        self._known: dict[str, np.ndarray] = {}

    def item_vectors(self, day_start: int) -> Floats:
        """Float32 [N, D]; also counts in `encoded` how many prompts had to be read."""
        rows = self.encoder.writer.items(self.records, self.counts.as_of(day_start))
        digests = [row_digest(row) for row in rows]
        first = {digest: number for number, digest in enumerate(digests) if digest not in self._known}
        if first:
            fresh = self.encoder.embed([rows[number] for number in first.values()], self.progress)
            self._known.update(zip(first, fresh))
            self.encoded += len(first)
        self._known = {digest: self._known[digest] for digest in digests}
        return np.stack([self._known[digest] for digest in digests])

    def member_vectors(self, views: Sequence[MemberView]) -> Floats:
        """Float32 [B, D]."""
        return self.encoder.members(views)
