from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Degraded(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NONE: _ClassVar[Degraded]
    RETRIEVAL_ORDER: _ClassVar[Degraded]
    STALE_MEMBER: _ClassVar[Degraded]
    FEWER_CANDIDATES: _ClassVar[Degraded]

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSAID: _ClassVar[Outcome]
    RETURNED: _ClassVar[Outcome]
    NOT_IN_CATALOGUE: _ClassVar[Outcome]
    WITHDRAWN: _ClassVar[Outcome]
    SEEN: _ClassVar[Outcome]
    EXCLUDED: _ClassVar[Outcome]
    FILTERED: _ClassVar[Outcome]
    NOT_RETRIEVED: _ClassVar[Outcome]
    OUTRANKED: _ClassVar[Outcome]
NONE: Degraded
RETRIEVAL_ORDER: Degraded
STALE_MEMBER: Degraded
FEWER_CANDIDATES: Degraded
OUTCOME_UNSAID: Outcome
RETURNED: Outcome
NOT_IN_CATALOGUE: Outcome
WITHDRAWN: Outcome
SEEN: Outcome
EXCLUDED: Outcome
FILTERED: Outcome
NOT_RETRIEVED: Outcome
OUTRANKED: Outcome

class Member(_message.Message):
    __slots__ = ("id", "description")
    ID_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    id: str
    description: Description
    def __init__(self, id: _Optional[str] = ..., description: _Optional[_Union[Description, _Mapping]] = ...) -> None: ...

class Description(_message.Message):
    __slots__ = ("profile", "history", "connections")
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    profile: _containers.RepeatedCompositeFieldContainer[ProfileField]
    history: _containers.RepeatedCompositeFieldContainer[Engagement]
    connections: _containers.RepeatedCompositeFieldContainer[Connection]
    def __init__(self, profile: _Optional[_Iterable[_Union[ProfileField, _Mapping]]] = ..., history: _Optional[_Iterable[_Union[Engagement, _Mapping]]] = ..., connections: _Optional[_Iterable[_Union[Connection, _Mapping]]] = ...) -> None: ...

class ProfileField(_message.Message):
    __slots__ = ("name", "words", "number")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    name: str
    words: str
    number: float
    def __init__(self, name: _Optional[str] = ..., words: _Optional[str] = ..., number: _Optional[float] = ...) -> None: ...

class Engagement(_message.Message):
    __slots__ = ("item_id", "action", "timestamp", "liked", "words")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    LIKED_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    action: str
    timestamp: int
    liked: bool
    words: ItemWords
    def __init__(self, item_id: _Optional[str] = ..., action: _Optional[str] = ..., timestamp: _Optional[int] = ..., liked: bool = ..., words: _Optional[_Union[ItemWords, _Mapping]] = ...) -> None: ...

class ItemWords(_message.Message):
    __slots__ = ("title", "text", "category", "creator", "created_at")
    TITLE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CATEGORY_FIELD_NUMBER: _ClassVar[int]
    CREATOR_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    title: str
    text: str
    category: str
    creator: str
    created_at: int
    def __init__(self, title: _Optional[str] = ..., text: _Optional[str] = ..., category: _Optional[str] = ..., creator: _Optional[str] = ..., created_at: _Optional[int] = ...) -> None: ...

class Connection(_message.Message):
    __slots__ = ("other_id", "kind", "since")
    OTHER_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    other_id: str
    kind: str
    since: int
    def __init__(self, other_id: _Optional[str] = ..., kind: _Optional[str] = ..., since: _Optional[int] = ...) -> None: ...

class Filter(_message.Message):
    __slots__ = ("categories", "creators", "languages", "regions", "blocked_creators", "by_connections")
    CATEGORIES_FIELD_NUMBER: _ClassVar[int]
    CREATORS_FIELD_NUMBER: _ClassVar[int]
    LANGUAGES_FIELD_NUMBER: _ClassVar[int]
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    BLOCKED_CREATORS_FIELD_NUMBER: _ClassVar[int]
    BY_CONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    categories: _containers.RepeatedScalarFieldContainer[str]
    creators: _containers.RepeatedScalarFieldContainer[str]
    languages: _containers.RepeatedScalarFieldContainer[str]
    regions: _containers.RepeatedScalarFieldContainer[str]
    blocked_creators: _containers.RepeatedScalarFieldContainer[str]
    by_connections: bool
    def __init__(self, categories: _Optional[_Iterable[str]] = ..., creators: _Optional[_Iterable[str]] = ..., languages: _Optional[_Iterable[str]] = ..., regions: _Optional[_Iterable[str]] = ..., blocked_creators: _Optional[_Iterable[str]] = ..., by_connections: bool = ...) -> None: ...

class Ids(_message.Message):
    __slots__ = ("plain", "packed", "ends")
    PLAIN_FIELD_NUMBER: _ClassVar[int]
    PACKED_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    plain: _containers.RepeatedScalarFieldContainer[str]
    packed: bytes
    ends: bytes
    def __init__(self, plain: _Optional[_Iterable[str]] = ..., packed: _Optional[bytes] = ..., ends: _Optional[bytes] = ...) -> None: ...

class Results(_message.Message):
    __slots__ = ("count", "ids", "scores", "probabilities", "places", "items", "tasks")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    count: int
    ids: Ids
    scores: bytes
    probabilities: bytes
    places: bytes
    items: _containers.RepeatedCompositeFieldContainer[ResultItem]
    tasks: _containers.RepeatedCompositeFieldContainer[TaskColumn]
    def __init__(self, count: _Optional[int] = ..., ids: _Optional[_Union[Ids, _Mapping]] = ..., scores: _Optional[bytes] = ..., probabilities: _Optional[bytes] = ..., places: _Optional[bytes] = ..., items: _Optional[_Iterable[_Union[ResultItem, _Mapping]]] = ..., tasks: _Optional[_Iterable[_Union[TaskColumn, _Mapping]]] = ...) -> None: ...

class TaskColumn(_message.Message):
    __slots__ = ("task", "probabilities")
    TASK_FIELD_NUMBER: _ClassVar[int]
    PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    task: str
    probabilities: bytes
    def __init__(self, task: _Optional[str] = ..., probabilities: _Optional[bytes] = ...) -> None: ...

class Weight(_message.Message):
    __slots__ = ("task", "weight")
    TASK_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    task: str
    weight: float
    def __init__(self, task: _Optional[str] = ..., weight: _Optional[float] = ...) -> None: ...

class Wish(_message.Message):
    __slots__ = ("kind", "said", "items")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SAID_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    said: str
    items: int
    def __init__(self, kind: _Optional[str] = ..., said: _Optional[str] = ..., items: _Optional[int] = ...) -> None: ...

class ResultItem(_message.Message):
    __slots__ = ("item_id", "title", "category", "creator", "score", "probability", "place")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    CATEGORY_FIELD_NUMBER: _ClassVar[int]
    CREATOR_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    title: str
    category: str
    creator: str
    score: float
    probability: float
    place: int
    def __init__(self, item_id: _Optional[str] = ..., title: _Optional[str] = ..., category: _Optional[str] = ..., creator: _Optional[str] = ..., score: _Optional[float] = ..., probability: _Optional[float] = ..., place: _Optional[int] = ...) -> None: ...

class Provenance(_message.Message):
    __slots__ = ("snapshot", "encoder", "ranker", "first_stage")
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    ENCODER_FIELD_NUMBER: _ClassVar[int]
    RANKER_FIELD_NUMBER: _ClassVar[int]
    FIRST_STAGE_FIELD_NUMBER: _ClassVar[int]
    snapshot: str
    encoder: str
    ranker: str
    first_stage: str
    def __init__(self, snapshot: _Optional[str] = ..., encoder: _Optional[str] = ..., ranker: _Optional[str] = ..., first_stage: _Optional[str] = ...) -> None: ...

class StageTimes(_message.Message):
    __slots__ = ("queue_us", "member_us", "encode_us", "search_us", "rank_us", "order_us", "total_us")
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    MEMBER_US_FIELD_NUMBER: _ClassVar[int]
    ENCODE_US_FIELD_NUMBER: _ClassVar[int]
    SEARCH_US_FIELD_NUMBER: _ClassVar[int]
    RANK_US_FIELD_NUMBER: _ClassVar[int]
    ORDER_US_FIELD_NUMBER: _ClassVar[int]
    TOTAL_US_FIELD_NUMBER: _ClassVar[int]
    queue_us: int
    member_us: int
    encode_us: int
    search_us: int
    rank_us: int
    order_us: int
    total_us: int
    def __init__(self, queue_us: _Optional[int] = ..., member_us: _Optional[int] = ..., encode_us: _Optional[int] = ..., search_us: _Optional[int] = ..., rank_us: _Optional[int] = ..., order_us: _Optional[int] = ..., total_us: _Optional[int] = ...) -> None: ...

class RecommendRequest(_message.Message):
    __slots__ = ("member", "k", "fanout", "task", "instruction", "exclude", "readable", "filter", "weights", "surface")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    FANOUT_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTION_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FIELD_NUMBER: _ClassVar[int]
    READABLE_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    SURFACE_FIELD_NUMBER: _ClassVar[int]
    member: Member
    k: int
    fanout: int
    task: str
    instruction: str
    exclude: Ids
    readable: bool
    filter: Filter
    weights: _containers.RepeatedCompositeFieldContainer[Weight]
    surface: str
    def __init__(self, member: _Optional[_Union[Member, _Mapping]] = ..., k: _Optional[int] = ..., fanout: _Optional[int] = ..., task: _Optional[str] = ..., instruction: _Optional[str] = ..., exclude: _Optional[_Union[Ids, _Mapping]] = ..., readable: bool = ..., filter: _Optional[_Union[Filter, _Mapping]] = ..., weights: _Optional[_Iterable[_Union[Weight, _Mapping]]] = ..., surface: _Optional[str] = ...) -> None: ...

class RecommendResponse(_message.Message):
    __slots__ = ("results", "candidates", "degraded", "degraded_detail", "provenance", "times", "task", "request_id", "weights", "wishes")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_DETAIL_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    WISHES_FIELD_NUMBER: _ClassVar[int]
    results: Results
    candidates: int
    degraded: Degraded
    degraded_detail: str
    provenance: Provenance
    times: StageTimes
    task: str
    request_id: str
    weights: _containers.RepeatedCompositeFieldContainer[Weight]
    wishes: _containers.RepeatedCompositeFieldContainer[Wish]
    def __init__(self, results: _Optional[_Union[Results, _Mapping]] = ..., candidates: _Optional[int] = ..., degraded: _Optional[_Union[Degraded, str]] = ..., degraded_detail: _Optional[str] = ..., provenance: _Optional[_Union[Provenance, _Mapping]] = ..., times: _Optional[_Union[StageTimes, _Mapping]] = ..., task: _Optional[str] = ..., request_id: _Optional[str] = ..., weights: _Optional[_Iterable[_Union[Weight, _Mapping]]] = ..., wishes: _Optional[_Iterable[_Union[Wish, _Mapping]]] = ...) -> None: ...

class RetrieveRequest(_message.Message):
    __slots__ = ("member", "k", "instruction", "exclude", "readable", "filter", "surface")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTION_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FIELD_NUMBER: _ClassVar[int]
    READABLE_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    SURFACE_FIELD_NUMBER: _ClassVar[int]
    member: Member
    k: int
    instruction: str
    exclude: Ids
    readable: bool
    filter: Filter
    surface: str
    def __init__(self, member: _Optional[_Union[Member, _Mapping]] = ..., k: _Optional[int] = ..., instruction: _Optional[str] = ..., exclude: _Optional[_Union[Ids, _Mapping]] = ..., readable: bool = ..., filter: _Optional[_Union[Filter, _Mapping]] = ..., surface: _Optional[str] = ...) -> None: ...

class RetrieveResponse(_message.Message):
    __slots__ = ("results", "provenance", "times", "request_id", "degraded", "degraded_detail")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_DETAIL_FIELD_NUMBER: _ClassVar[int]
    results: Results
    provenance: Provenance
    times: StageTimes
    request_id: str
    degraded: Degraded
    degraded_detail: str
    def __init__(self, results: _Optional[_Union[Results, _Mapping]] = ..., provenance: _Optional[_Union[Provenance, _Mapping]] = ..., times: _Optional[_Union[StageTimes, _Mapping]] = ..., request_id: _Optional[str] = ..., degraded: _Optional[_Union[Degraded, str]] = ..., degraded_detail: _Optional[str] = ...) -> None: ...

class RetrieveBatchRequest(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[RetrieveRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[RetrieveRequest, _Mapping]]] = ...) -> None: ...

class RetrieveBatchResponse(_message.Message):
    __slots__ = ("rows", "provenance", "times", "request_id")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedCompositeFieldContainer[BatchRow]
    provenance: Provenance
    times: StageTimes
    request_id: str
    def __init__(self, rows: _Optional[_Iterable[_Union[BatchRow, _Mapping]]] = ..., provenance: _Optional[_Union[Provenance, _Mapping]] = ..., times: _Optional[_Union[StageTimes, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class BatchRow(_message.Message):
    __slots__ = ("results", "status", "message")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    results: Results
    status: int
    message: str
    def __init__(self, results: _Optional[_Union[Results, _Mapping]] = ..., status: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class RankRequest(_message.Message):
    __slots__ = ("member", "items", "task", "instruction", "readable", "weights")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTION_FIELD_NUMBER: _ClassVar[int]
    READABLE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    member: Member
    items: Ids
    task: str
    instruction: str
    readable: bool
    weights: _containers.RepeatedCompositeFieldContainer[Weight]
    def __init__(self, member: _Optional[_Union[Member, _Mapping]] = ..., items: _Optional[_Union[Ids, _Mapping]] = ..., task: _Optional[str] = ..., instruction: _Optional[str] = ..., readable: bool = ..., weights: _Optional[_Iterable[_Union[Weight, _Mapping]]] = ...) -> None: ...

class RankResponse(_message.Message):
    __slots__ = ("results", "provenance", "times", "task", "request_id", "weights", "degraded", "degraded_detail", "wishes")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_DETAIL_FIELD_NUMBER: _ClassVar[int]
    WISHES_FIELD_NUMBER: _ClassVar[int]
    results: Results
    provenance: Provenance
    times: StageTimes
    task: str
    request_id: str
    weights: _containers.RepeatedCompositeFieldContainer[Weight]
    degraded: Degraded
    degraded_detail: str
    wishes: _containers.RepeatedCompositeFieldContainer[Wish]
    def __init__(self, results: _Optional[_Union[Results, _Mapping]] = ..., provenance: _Optional[_Union[Provenance, _Mapping]] = ..., times: _Optional[_Union[StageTimes, _Mapping]] = ..., task: _Optional[str] = ..., request_id: _Optional[str] = ..., weights: _Optional[_Iterable[_Union[Weight, _Mapping]]] = ..., degraded: _Optional[_Union[Degraded, str]] = ..., degraded_detail: _Optional[str] = ..., wishes: _Optional[_Iterable[_Union[Wish, _Mapping]]] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("question", "item_id")
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    question: RecommendRequest
    item_id: str
    def __init__(self, question: _Optional[_Union[RecommendRequest, _Mapping]] = ..., item_id: _Optional[str] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("outcome", "detail", "known", "withdrawn", "seen", "excluded", "filtered", "cosine", "lists", "first_place", "first_score", "candidates", "fanout", "probability", "place", "k", "prompts", "task", "provenance", "times", "request_id")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    WITHDRAWN_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_FIELD_NUMBER: _ClassVar[int]
    FILTERED_FIELD_NUMBER: _ClassVar[int]
    COSINE_FIELD_NUMBER: _ClassVar[int]
    LISTS_FIELD_NUMBER: _ClassVar[int]
    FIRST_PLACE_FIELD_NUMBER: _ClassVar[int]
    FIRST_SCORE_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    FANOUT_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    outcome: Outcome
    detail: str
    known: bool
    withdrawn: bool
    seen: bool
    excluded: bool
    filtered: bool
    cosine: float
    lists: _containers.RepeatedCompositeFieldContainer[ListPlace]
    first_place: int
    first_score: float
    candidates: int
    fanout: int
    probability: float
    place: int
    k: int
    prompts: _containers.RepeatedCompositeFieldContainer[Prompt]
    task: str
    provenance: Provenance
    times: StageTimes
    request_id: str
    def __init__(self, outcome: _Optional[_Union[Outcome, str]] = ..., detail: _Optional[str] = ..., known: bool = ..., withdrawn: bool = ..., seen: bool = ..., excluded: bool = ..., filtered: bool = ..., cosine: _Optional[float] = ..., lists: _Optional[_Iterable[_Union[ListPlace, _Mapping]]] = ..., first_place: _Optional[int] = ..., first_score: _Optional[float] = ..., candidates: _Optional[int] = ..., fanout: _Optional[int] = ..., probability: _Optional[float] = ..., place: _Optional[int] = ..., k: _Optional[int] = ..., prompts: _Optional[_Iterable[_Union[Prompt, _Mapping]]] = ..., task: _Optional[str] = ..., provenance: _Optional[_Union[Provenance, _Mapping]] = ..., times: _Optional[_Union[StageTimes, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class ListPlace(_message.Message):
    __slots__ = ("list", "length", "place", "adds")
    LIST_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    ADDS_FIELD_NUMBER: _ClassVar[int]
    list: str
    length: int
    place: int
    adds: float
    def __init__(self, list: _Optional[str] = ..., length: _Optional[int] = ..., place: _Optional[int] = ..., adds: _Optional[float] = ...) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("model", "row", "text", "tokens")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    model: str
    row: str
    text: str
    tokens: int
    def __init__(self, model: _Optional[str] = ..., row: _Optional[str] = ..., text: _Optional[str] = ..., tokens: _Optional[int] = ...) -> None: ...

class UpsertItemsRequest(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[ItemRecord]
    def __init__(self, items: _Optional[_Iterable[_Union[ItemRecord, _Mapping]]] = ...) -> None: ...

class ItemRecord(_message.Message):
    __slots__ = ("item_id", "words", "numbers")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    words: ItemWords
    numbers: _containers.RepeatedCompositeFieldContainer[ItemNumber]
    def __init__(self, item_id: _Optional[str] = ..., words: _Optional[_Union[ItemWords, _Mapping]] = ..., numbers: _Optional[_Iterable[_Union[ItemNumber, _Mapping]]] = ...) -> None: ...

class ItemNumber(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class UpsertItemsResponse(_message.Message):
    __slots__ = ("position", "provenance", "request_id")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    position: int
    provenance: Provenance
    request_id: str
    def __init__(self, position: _Optional[int] = ..., provenance: _Optional[_Union[Provenance, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class WithdrawItemsRequest(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: Ids
    def __init__(self, items: _Optional[_Union[Ids, _Mapping]] = ...) -> None: ...

class WithdrawItemsResponse(_message.Message):
    __slots__ = ("position", "were_here", "provenance", "request_id")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    WERE_HERE_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    position: int
    were_here: int
    provenance: Provenance
    request_id: str
    def __init__(self, position: _Optional[int] = ..., were_here: _Optional[int] = ..., provenance: _Optional[_Union[Provenance, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class RecordEngagementsRequest(_message.Message):
    __slots__ = ("member_id", "events")
    MEMBER_ID_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    member_id: str
    events: _containers.RepeatedCompositeFieldContainer[MemberEvent]
    def __init__(self, member_id: _Optional[str] = ..., events: _Optional[_Iterable[_Union[MemberEvent, _Mapping]]] = ...) -> None: ...

class MemberEvent(_message.Message):
    __slots__ = ("event_id", "item_id", "action", "timestamp", "liked", "request_id", "surface")
    EVENT_ID_FIELD_NUMBER: _ClassVar[int]
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    LIKED_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SURFACE_FIELD_NUMBER: _ClassVar[int]
    event_id: str
    item_id: str
    action: str
    timestamp: int
    liked: bool
    request_id: str
    surface: str
    def __init__(self, event_id: _Optional[str] = ..., item_id: _Optional[str] = ..., action: _Optional[str] = ..., timestamp: _Optional[int] = ..., liked: bool = ..., request_id: _Optional[str] = ..., surface: _Optional[str] = ...) -> None: ...

class RecordEngagementsResponse(_message.Message):
    __slots__ = ("recorded", "known", "request_id")
    RECORDED_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    recorded: int
    known: int
    request_id: str
    def __init__(self, recorded: _Optional[int] = ..., known: _Optional[int] = ..., request_id: _Optional[str] = ...) -> None: ...

class InfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InfoResponse(_message.Message):
    __slots__ = ("version", "provenance", "items", "dims", "index", "tasks", "as_of", "attention", "uptime_seconds", "requests", "codes", "live_position", "live_items")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROVENANCE_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    DIMS_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    AS_OF_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    CODES_FIELD_NUMBER: _ClassVar[int]
    LIVE_POSITION_FIELD_NUMBER: _ClassVar[int]
    LIVE_ITEMS_FIELD_NUMBER: _ClassVar[int]
    version: str
    provenance: Provenance
    items: int
    dims: int
    index: str
    tasks: _containers.RepeatedScalarFieldContainer[str]
    as_of: int
    attention: str
    uptime_seconds: float
    requests: int
    codes: str
    live_position: int
    live_items: int
    def __init__(self, version: _Optional[str] = ..., provenance: _Optional[_Union[Provenance, _Mapping]] = ..., items: _Optional[int] = ..., dims: _Optional[int] = ..., index: _Optional[str] = ..., tasks: _Optional[_Iterable[str]] = ..., as_of: _Optional[int] = ..., attention: _Optional[str] = ..., uptime_seconds: _Optional[float] = ..., requests: _Optional[int] = ..., codes: _Optional[str] = ..., live_position: _Optional[int] = ..., live_items: _Optional[int] = ...) -> None: ...
