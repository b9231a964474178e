"""What a client gets back: answers with their arrays as numpy, and facts, as plain records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

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


class ObeyedWish(NamedTuple):
    """A plain wish of the instruction, the words that say it, and how many candidates it is about (`ranking.wishes`)."""

    kind: str
    said: str
    items: int


@dataclass(frozen=True)
class Answer:
    """K items, best first. `scores`, `probabilities` float32 [K] (None where not computed), `places` int64 [K].

    `scores` are cosines if `first_stage` is "dense", merged scores if it is "hybrid".
    `rows` are the same with words, if they were asked for. `times` are microseconds by stage. Where several tasks were asked for,
    or wishes obeyed, `weights` and `wishes` make the final score that stands in `probabilities`, and `tasks` holds each task's
    own float32 [K].
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
    weights: Mapping[str, float] = field(default_factory=dict)
    tasks: Mapping[str, Floats] = field(default_factory=dict)
    wishes: Sequence[ObeyedWish] = ()

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class ListPlace:
    """Where an item stands in one list of the first stage (`place` None: the list does not hold it), and what that adds to the
    merged score (None where nothing is merged)."""

    list: str
    length: int
    place: int | None
    adds: float | None


@dataclass(frozen=True)
class Prompt:
    """The `row` ("member", "item") of a `model` ("encoder", "ranker") as text."""

    model: str
    row: str
    text: str
    tokens: int


@dataclass(frozen=True)
class Explanation:
    """Why one item is or is not in an answer: `outcome` as the contract names it ("OUTRANKED"); places from 0.

    None stands for what does not exist: an item that the catalogue does not hold has no cosine, one that was no candidate no
    place. `probability` is what orders the answer, wishes obeyed; of one that was no candidate what it would have been.
    """

    outcome: str
    detail: str
    known: bool
    withdrawn: bool
    seen: bool
    excluded: bool
    filtered: bool
    cosine: float | None
    lists: tuple[ListPlace, ...]
    first_place: int | None
    first_score: float | None
    candidates: int
    fanout: int
    probability: float | None
    place: int | None
    k: int
    prompts: tuple[Prompt, ...]
    task: str
    snapshot: str
    encoder: str
    ranker: str
    first_stage: str
    times: Mapping[str, int]
    request_id: str


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
        times=_times(reply.times),
        request_id=reply.request_id,
        task=task,
        candidates=candidates,
        degraded=Degraded(reply.degraded),
        degraded_detail=reply.degraded_detail,
        first_stage=reply.provenance.first_stage,
        weights={} if isinstance(reply, pb.RetrieveResponse) else {one.task: one.weight for one in reply.weights},
        tasks={one.task: np.frombuffer(one.probabilities, "<f4") for one in results.tasks},
        wishes=[] if isinstance(reply, pb.RetrieveResponse) else [ObeyedWish(w.kind, w.said, w.items) for w in reply.wishes],
    )


def explanation_of(reply: pb.ExplainResponse) -> Explanation:
    """The explanation of a reply."""
    made = reply.provenance
    return Explanation(
        outcome=pb.Outcome.Name(reply.outcome),
        detail=reply.detail,
        known=reply.known,
        withdrawn=reply.withdrawn,
        seen=reply.seen,
        excluded=reply.excluded,
        filtered=reply.filtered,
        cosine=reply.cosine if reply.HasField("cosine") else None,
        lists=tuple(map(_list_place, reply.lists)),
        first_place=reply.first_place if reply.HasField("first_place") else None,
        first_score=reply.first_score if reply.HasField("first_score") else None,
        candidates=reply.candidates,
        fanout=reply.fanout,
        probability=reply.probability if reply.HasField("probability") else None,
        place=reply.place if reply.HasField("place") else None,
        k=reply.k,
        prompts=tuple(Prompt(one.model, one.row, one.text, one.tokens) for one in reply.prompts),
        task=reply.task,
        snapshot=made.snapshot,
        encoder=made.encoder,
        ranker=made.ranker,
        first_stage=made.first_stage,
        times=_times(reply.times),
        request_id=reply.request_id,
    )


def _list_place(one: pb.ListPlace) -> ListPlace:
    place = one.place if one.HasField("place") else None
    return ListPlace(one.list, one.length, place, one.adds if one.HasField("adds") else None)


def _times(times: pb.StageTimes) -> dict[str, int]:
    return {stage.name: getattr(times, stage.name) for stage in pb.StageTimes.DESCRIPTOR.fields}


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
