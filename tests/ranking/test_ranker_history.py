"""One rule for what a prefix shows: training writes at every moment what serving would have shown then."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ranking.learn.batches import GroupWriter
from ranking.prompts import RankBudgets, RankPrompts, relations_of
from ranking.tasks import tasks_of
from retrieval.data.schema import DAY, Connections, Dataset
from retrieval.features import Quantizer
from retrieval.records import ItemWords, records_of, view_of
from retrieval.tokens import Tokens

FIRST = 19_723 * DAY


@pytest.fixture(scope="module")
def restless(tiny_dataset: Dataset) -> Dataset:
    """Members who rate the same few items again and again, good and bad, and who follow a creator more than once."""
    log, rng = tiny_dataset.events, np.random.default_rng(0)
    events = replace(
        log,
        member=rng.integers(0, 4, len(log)).astype(np.int32),
        item=rng.integers(0, 12, len(log)).astype(np.int32),
        label=rng.integers(-1, 2, len(log)).astype(np.int8),
    )
    edges = Connections(
        member=np.array([0, 0, 0, 1, 2], np.int32),
        other_id=["author 1", "author 1", "author 2", "author 1", "author 3"],
        kind=["works with", "follows", "follows", "manages", "follows"],
        since=np.array([FIRST + 12 * DAY, FIRST + 3 * DAY, np.iinfo(np.int64).min, FIRST + 8 * DAY, FIRST]),
    )
    meta = replace(tiny_dataset.meta, retrieval_actions=("like", "hide", "impression"))
    return replace(tiny_dataset, meta=meta, events=events, connections=edges)


@pytest.mark.parametrize("newest", [7, 64, 1_024])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(member=st.integers(0, 4), second=st.integers(0, 20 * DAY))
def test_training_shows_what_serving_would_have_shown(
    restless: Dataset,
    tiny_tokens: Tokens,
    tiny_quantizer: Quantizer,
    monkeypatch: pytest.MonkeyPatch,
    newest: int,
    member: int,
    second: int,
) -> None:
    monkeypatch.setattr("retrieval.records.NEWEST", newest)
    prompts, tasks = RankPrompts(tiny_tokens, tiny_quantizer, RankBudgets(prefix=160)), tasks_of(restless)
    writer, moment = GroupWriter(restless, prompts, tasks, 1 << 60), FIRST + second
    view = view_of(list(records_of(restless, moment))[member], ItemWords(restless.items))
    assert len(view.history) <= newest
    for task in tasks.values():
        assert writer.prefix(member, moment, task) == prompts.prefix(view, task)
    creators = [restless.items.creator[row] for row in range(8)]
    assert writer.relations(member, np.arange(8), moment) == relations_of(view.connections, creators)


def test_a_later_edge_hides_no_earlier_one(restless: Dataset, tiny_tokens: Tokens, tiny_quantizer: Quantizer) -> None:
    writer = GroupWriter(restless, RankPrompts(tiny_tokens, tiny_quantizer, RankBudgets()), tasks_of(restless), 1 << 60)
    found = [writer.relations(0, np.array([1]), FIRST + day * DAY) for day in (3, 4, 13)]
    assert found == [[""], ["follows"], ["works with"]]
