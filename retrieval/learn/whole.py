"""Members with every action: what an encoder of whole histories is judged by. The service keeps engagements only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from retrieval.data.schema import Dataset, Item, MemberView
from retrieval.encoder import Encoder
from retrieval.evidence.baselines import Knowledge
from retrieval.evidence.encoded import EncoderModel
from retrieval.evidence.protocol import Queries, engagements, last_after_cut, member_views
from retrieval.evidence.rank import Floats
from retrieval.learn.timeline import Timeline


def whole_views(dataset: Dataset, queries: Queries, timeline: Timeline | None = None) -> list[MemberView]:
    """The views of the queries, each history with the actions that are no engagement, as `Timeline.shown` lists them.

    `timeline`, if it was made before, must reach past the last query.
    """
    moments = queries.timestamp.tolist()
    timeline = timeline or Timeline.of(dataset, max(moments, default=0) + 1, whole=True)
    found: list[MemberView] = []
    records: dict[int, Item] = {}
    for view, member, moment in zip(member_views(dataset, queries, newest=0), queries.member.tolist(), moments):
        rows = timeline.log_event[timeline.shown(member, moment)]
        found.append(replace(view, history=tuple(engagements(dataset, dataset.events, rows, records))))
    return found


class WholeModel(EncoderModel):
    """An encoder of whole histories under evaluation: whatever view it is handed, it reads all that the member did."""

    def __init__(self, encoder: Encoder, dataset: Dataset, counts: Knowledge, cut: int) -> None:
        super().__init__(encoder, dataset, counts, cut)
        self.dataset, self.queries = dataset, last_after_cut(dataset, "test")
        self.timeline = Timeline.of(dataset, int(self.queries.timestamp.max()) + 1, whole=True)
        self.row_of = {dataset.members.member_id[member]: row for row, member in enumerate(self.queries.member.tolist())}

    def member_vectors(self, views: Sequence[MemberView]) -> Floats:
        """Float32 [B, D] of members as of their queries in the test window (one query per member)."""
        rows = np.array([self.row_of[view.member.member_id] for view in views], np.int64)
        return self.encoder.members(whole_views(self.dataset, self.queries.take(rows), self.timeline))
