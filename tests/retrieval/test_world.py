"""The synthetic world: pinned by hash, honest about its probabilities, and not solvable by matching words."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from retrieval.data.read import read_dataset
from retrieval.data.schema import DAY, EVENT_COLUMNS, DataError, Dataset
from retrieval.data.world import Truth, World, WorldSettings, make_world, read_truth, write_world
from retrieval.data.world_people import make_tongue

SMALL = WorldSettings(members=60, items=120, days=10, seed=3)
SMALL_HASH = "a600fedd6e982afdd7d60b9602265182041dde1ba42619d9e0a08f20ef70daef"
DEFAULT_HASH = "7844f486e85048910018bc815229e8003e9745e3b56b9ff8db43decc68447739"


@pytest.fixture(scope="module")
def small() -> World:
    return make_world(SMALL)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(WorldSettings())


def digest(dataset: Dataset) -> str:
    """sha256 over every column, coded columns as words: it depends on no file format and no numbering of codes."""
    items, members, edges, events = dataset.items, dataset.members, dataset.connections, dataset.events
    assert edges is not None
    words: list[Sequence[str]] = [items.item_id, items.title, items.text, items.category, items.creator]
    words += [members.member_id, *members.profile.values(), edges.other_id, edges.kind]
    words += [np.array(events.actions)[events.action].tolist(), np.array(events.requests)[events.request].tolist()]
    words += [np.array(events.surfaces)[events.surface].tolist()]
    coded = ("value", "action", "request", "surface")
    numbers = [items.created_at, edges.member, edges.since]
    numbers += [getattr(events, name) for name in EVENT_COLUMNS if name not in coded]
    total = hashlib.sha256(repr((dataset.meta.cut_valid, dataset.meta.cut_test)).encode())
    for column in words:
        total.update("\n".join(column).encode() + b"\0")
    for array in numbers:
        total.update(array.astype("<i8").tobytes())
    return total.hexdigest()


def auc(label: npt.NDArray[np.integer], score: npt.NDArray[np.float64]) -> float:
    rank = np.empty(len(score))
    rank[np.argsort(score, kind="stable")] = np.arange(len(score))
    positive = label == 1
    return float((rank[positive].mean() - (positive.sum() - 1) / 2) / (~positive).sum())


def test_the_small_world_is_pinned(small: World) -> None:
    assert digest(small.dataset) == SMALL_HASH


def test_the_default_world_is_pinned(world: World) -> None:
    assert digest(world.dataset) == DEFAULT_HASH


def test_equal_settings_give_equal_worlds_and_another_seed_another(small: World) -> None:
    assert digest(make_world(SMALL).dataset) == digest(small.dataset)
    assert digest(make_world(WorldSettings(60, 120, 10, 4)).dataset) != digest(small.dataset)


def test_members_and_posts_share_no_topic_word(world: World) -> None:
    settings = WorldSettings()
    streams = np.random.SeedSequence(settings.seed).spawn(8)
    tongue = make_tongue(settings, np.random.Generator(np.random.PCG64(streams[3])))
    items = {word for text in (*world.dataset.items.title, *world.dataset.items.text) for word in text.split()}
    members = {w for column in world.dataset.members.profile.values() for text in column for w in text.split()}
    assert items & members <= set(tongue.filler)
    assert items - set(tongue.filler) == set(tongue.item.words)
    assert members - set(tongue.filler) - set(tongue.places) == set(tongue.member.words)


def test_every_topic_word_has_two_or_three_topics_and_is_seen_often(world: World) -> None:
    settings = WorldSettings()
    streams = np.random.SeedSequence(settings.seed).spawn(8)
    speech = make_tongue(settings, np.random.Generator(np.random.PCG64(streams[3]))).item
    weight = np.diff(speech.cumulative, axis=1, prepend=0.0).reshape(settings.topics, settings.registers, -1)
    topics = (weight.sum(axis=1) > 0).sum(axis=0)
    assert set(topics.tolist()) == {2, 3}
    engaged = " ".join(f"{world.dataset.items.title[i]} {world.dataset.items.text[i]}" for i in world.dataset.engagements.item)
    counts = dict.fromkeys(speech.words, 0)
    for word in engaged.split():
        if word in counts:
            counts[word] += 1
    assert np.median(list(counts.values())) > 300


def test_impressions_are_labelled_by_the_actions_of_their_request(world: World) -> None:
    events = world.dataset.events
    shown = events.action == 0
    pair = events.request.astype(np.int64) * len(world.dataset.items) + events.item
    assert len(np.unique(pair[shown])) == shown.sum()
    np.testing.assert_array_equal(np.isin(pair[shown], pair[~shown]), events.label[shown] == 1)
    assert np.isin(pair[~shown], pair[shown]).all()
    assert (events.label[~shown] == -1).all()
    shown_at = dict(zip(pair[shown].tolist(), events.timestamp[shown].tolist(), strict=True))
    delay = events.timestamp[~shown] - np.array([shown_at[p] for p in pair[~shown].tolist()])
    assert delay.min() > 0
    assert delay.max() < 1800


def test_events_are_in_time_order_and_split_at_day_starts(world: World) -> None:
    events, meta = world.dataset.events, world.dataset.meta
    assert (np.diff(events.timestamp) >= 0).all()
    assert meta.cut_valid % DAY == meta.cut_test % DAY == 0
    assert meta.cut_valid < meta.cut_test
    np.testing.assert_array_equal(events.split, (events.timestamp >= meta.cut_valid) + (events.timestamp >= meta.cut_test) * 1)
    share = np.bincount(events.split) / len(events)
    assert 0.75 < share[0] < 0.85


def test_the_default_world_has_its_size(world: World) -> None:
    engagements = len(world.dataset.engagements)
    assert 30_000 < engagements < 45_000
    assert 150_000 < len(world.dataset.events) - engagements < 300_000


def test_posts_are_shown_only_while_they_live_and_never_after_an_engagement(world: World) -> None:
    events, truth = world.dataset.events, world.truth
    shown = events.action == 0
    age = events.timestamp[shown] - truth.created[events.item[shown]]
    assert age.min() >= 0
    assert (age < truth.life[events.item[shown]]).all()
    done = dict[tuple[int, int], int]()
    for member, item, when, first in zip(events.member, events.item, events.timestamp, shown, strict=True):
        if first:
            assert done.get((member, item), when) >= when
        else:
            done.setdefault((member, item), when)


def test_new_members_and_posts_keep_coming(world: World) -> None:
    events, meta = world.dataset.events, world.dataset.meta
    first_seen = np.full(len(world.dataset.members), np.iinfo(np.int64).max)
    np.minimum.at(first_seen, events.member, events.timestamp)
    late = (first_seen >= meta.cut_test) & (first_seen < np.iinfo(np.int64).max)
    assert late.sum() > 20
    for cut in (meta.cut_valid, meta.cut_test):
        after = world.dataset.engagements.timestamp >= cut
        cold = ~np.isin(world.dataset.engagements.item[after], world.dataset.engagements.item[~after])
        assert 0.25 < cold.mean() < 0.6


def test_probabilities_are_calibrated(world: World) -> None:
    truth, events = world.truth, world.dataset.events
    label = events.label[truth.event]
    order = np.argsort(truth.p_label, kind="stable")
    for bucket in np.array_split(order, 20):
        expected, error = (
            truth.p_label[bucket].mean(),
            np.sqrt((truth.p_label[bucket] * (1 - truth.p_label[bucket])).mean() / len(bucket)),
        )
        assert abs(label[bucket].mean() - expected) < 4.5 * error
    for action in range(1, len(events.actions)):
        expected = truth.p_action[:, action - 1].sum()
        assert abs((events.action == action).sum() - expected) < 4.5 * np.sqrt(expected)


def test_the_top_of_the_page_gets_more_attention(world: World) -> None:
    events = world.dataset.events
    shown = events.action == 0
    rate = [(events.label[shown & (events.position == place)] == 1).mean() for place in (0, 7)]
    assert rate[0] > 1.25 * rate[1]


def test_the_oracle_ranks_far_above_the_item_rate(world: World) -> None:
    truth, events = world.truth, world.dataset.events
    test = events.timestamp[truth.event] >= world.dataset.meta.cut_test
    label, item = events.label[truth.event], events.item[truth.event]
    shown, liked = (np.bincount(item[~test], keep, len(truth.phi)) for keep in (np.ones((~test).sum()), label[~test] == 1))
    rate = ((liked + 1.5) / (shown + 10))[item[test]]
    assert auc(label[test], truth.p_label[test]) > 0.85
    assert auc(label[test], rate) < 0.6


def test_engage_scores_predict_what_is_engaged_with(world: World) -> None:
    """The expected number of engagements per request, summed over requests, is the number in the log; the ranks are high."""
    truth, events = world.truth, world.dataset.events
    request, row = np.unique(events.request, return_index=True)
    some = np.random.default_rng(0).choice(len(request), 400, replace=False)
    expected, happened, hits = 0.0, 0, 0
    for event in row[some].tolist():
        scores = truth.engage_scores(int(events.member[event]), int(events.timestamp[event]))
        inside = (events.request == events.request[event]) & (events.label == 1)
        expected += scores.sum()
        happened += int(inside.sum())
        hits += int((scores.argsort()[-100:][:, None] == events.item[inside]).any(axis=0).sum())
    assert abs(happened - expected) < 4.5 * np.sqrt(expected)
    assert hits > 0.8 * happened


def test_label_probability_is_found_by_event_id(small: World) -> None:
    events, truth = small.dataset.events, small.truth
    found = truth.label_probability(events.event_id)
    np.testing.assert_array_equal(np.isnan(found), events.action != 0)
    np.testing.assert_array_equal(found[truth.event], truth.p_label)


def test_a_world_survives_the_disk(small: World, tmp_path: Path) -> None:
    write_world(small, tmp_path / "w")
    assert digest(read_dataset(tmp_path / "w")) == digest(small.dataset)
    truth = read_truth(tmp_path / "w")
    for name in (f.name for f in fields(Truth)):
        np.testing.assert_array_equal(getattr(truth, name), getattr(small.truth, name))
    when = small.dataset.meta.cut_test
    np.testing.assert_array_equal(truth.engage_scores(5, when), small.truth.engage_scores(5, when))


def test_a_folder_without_a_truth_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no readable truth"):
        read_truth(tmp_path)
    (tmp_path / "truth").mkdir()
    (tmp_path / "truth" / "truth.json").write_text("{}")
    with pytest.raises(DataError, match="no readable truth"):
        read_truth(tmp_path)


@pytest.mark.parametrize("bad", [{"members": 3}, {"days": 2}, {"seed": -1}, {"start": 7}])
def test_impossible_settings_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(DataError, match=next(iter(bad))):
        make_world(WorldSettings(**bad))


def test_progress_counts_the_days() -> None:
    seen: list[tuple[int, int]] = []
    make_world(SMALL, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (10, 10)
    assert seen == sorted(seen)
