"""What a client gets back: answers with their arrays as numpy, and facts, as plain records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ranking.pipeline import Degraded
from ranking.serving import recommender_pb2 as pb
from ranking.serving.messages import unpack_ids

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """One row of an answer with its words; `score` or `probability` is None where it was not computed."""

    item_id: str
    title: str
    category: str
    creator: str
    score: float | None
    probability: float | None
    place: int


@dataclass(frozen=True)
class Answer:
    """K items, best first. `scores`, `probabilities` float32 [K] (None where not computed), `places` int64 [K].

    `scores` are cosines if `first_stage` is "dense", merged scores if it is "hybrid".
    `rows` are the same with words, if they were asked for. `times` are microseconds by stage.
    """

    ids: list[str]
    scores: Floats | None
    probabilities: Floats | None
    places: npt.NDArray[np.int64]
    rows: list[Row]
    snapshot: str
    encoder: str
    ranker: str
    times: Mapping[str, int]
    request_id: str
    task: str = ""
    candidates: int = 0
    degraded: Degraded = Degraded.NONE
    degraded_detail: str = ""
    first_stage: str = ""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class ServerInfo:
    """What is being served; `as_of` in seconds UTC. `live_items` of the `items` were put in since, up to `live_position`."""

    version: str
    snapshot: str
    encoder: str
    ranker: str
    items: int
    dims: int
    index: str
    tasks: list[str] = field(default_factory=list)
    as_of: int = 0
    attention: str = ""
    uptime_seconds: float = 0.0
    requests: int = 0
    codes: str = ""
    first_stage: str = ""
    live_position: int = 0
    live_items: int = 0


@dataclass(frozen=True)
class Changed:
    """A change that is kept: the log's position, and how many of the items named were there before (withdrawals)."""

    position: int
    snapshot: str
    request_id: str
    were_here: int = 0


@dataclass(frozen=True)
class Recorded:
    """How many engagements were new and how many known already."""

    recorded: int
    known: int
    request_id: str


def info_of(reply: pb.InfoResponse) -> ServerInfo:
    """The facts of a reply."""
    return ServerInfo(
        version=reply.version,
        snapshot=reply.provenance.snapshot,
        encoder=reply.provenance.encoder,
        ranker=reply.provenance.ranker,
        items=reply.items,
        dims=reply.dims,
        index=reply.index,
        tasks=list(reply.tasks),
        as_of=reply.as_of,
        attention=reply.attention,
        uptime_seconds=reply.uptime_seconds,
        requests=reply.requests,
        codes=reply.codes,
        first_stage=reply.provenance.first_stage,
        live_position=reply.live_position,
        live_items=reply.live_items,
    )


def answer_of(
    reply: pb.RecommendResponse | pb.RetrieveResponse | pb.RankResponse,
    *,
    candidates: int,
    task: str = "",
    degraded: Degraded = Degraded.NONE,
    detail: str = "",
) -> Answer:
    """The answer of a reply."""
    results = reply.results
    return Answer(
        ids=unpack_ids(results.ids),
        scores=_floats(results.scores),
        probabilities=_floats(results.probabilities),
        places=np.frombuffer(results.places, "<u4").astype(np.int64),
        rows=[_row(item) for item in results.items],
        snapshot=reply.provenance.snapshot,
        encoder=reply.provenance.encoder,
        ranker=reply.provenance.ranker,
        times={stage.name: getattr(reply.times, stage.name) for stage in pb.StageTimes.DESCRIPTOR.fields},
        request_id=reply.request_id,
        task=task,
        candidates=candidates,
        degraded=degraded,
        degraded_detail=detail,
        first_stage=reply.provenance.first_stage,
    )


def _floats(packed: bytes) -> Floats | None:
    return np.frombuffer(packed, "<f4") if packed else None


def _row(item: pb.ResultItem) -> Row:
    return Row(
        item_id=item.item_id,
        title=item.title,
        category=item.category,
        creator=item.creator,
        score=item.score if item.HasField("score") else None,
        probability=item.probability if item.HasField("probability") else None,
        place=item.place,
    )
