"""Readers who are told part of a synthetic world's truth: what they may know, and that they read it rightly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ranking import told_interests
from ranking.baselines import TOLD_DAYS, Scored, simple_rankers
from ranking.cli.evaluate_inputs import read_with_truth
from ranking.evaluate import labelled_test_rows
from ranking.evidence import KNOWS_TRUTH, evaluate_ranking, ranking_table
from ranking.metrics import auc
from ranking.told import INTERESTS, LAWS, TOLD, TOPICS, Asked, Shown, belief_columns, told_features
from ranking.told_interests import Belief, Reader
from ranking.told_state import FEWEST, LEAST_WEIGHT, PLACES, Moves
from ranking.told_world import BINS, FOLDS, Told, label_table
from retrieval.data.schema import DAY, Dataset
from retrieval.data.world import Truth, World, WorldSettings, make_world
from retrieval.evidence.protocol import EvidenceError


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(WorldSettings(members=160, items=400, days=12, seed=5, requests_per_day=1.0))


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(told_interests, "FIRST_BURN", 240)
    monkeypatch.setattr(told_interests, "BURN", 60)
    monkeypatch.setattr(told_interests, "SAMPLES", 16)
    yield


def asked_at(dataset: Dataset, moment: int, live: bool) -> Asked:
    """The rows shown at a moment and those a day later, as of the moment or of the start of its day."""
    log = dataset.events
    event = np.flatnonzero((log.label >= 0) & (log.timestamp >= moment) & (log.timestamp < moment + DAY))
    event = event[log.timestamp[event] == moment] if live else event
    day = np.full(len(event), moment // DAY)
    return Asked(event, day, np.full(len(event), moment) if live else day * DAY)


def busy_moment(dataset: Dataset) -> int:
    """A second request of a member on one day, late in the log."""
    log = dataset.events
    shown = np.flatnonzero(log.label >= 0)
    key = log.member[shown].astype(np.int64) * 100_000 + log.day[shown]
    latest = {one: int(log.timestamp[shown][key == one].max()) for one in np.unique(key).tolist()}
    first = {one: int(log.timestamp[shown][key == one].min()) for one in latest}
    moments = [latest[one] for one in latest if latest[one] > first[one] and latest[one] < dataset.meta.cut_test + DAY]
    return max(moments)


@pytest.mark.parametrize("live", [True, False])
def test_what_happens_from_the_moment_on_changes_no_feature_and_what_happened_before_does(world: World, live: bool) -> None:
    dataset, log = world.dataset, world.dataset.events
    moment = busy_moment(dataset)
    asked = asked_at(dataset, moment, live)
    known = told_features(Told(dataset, world.truth), asked)
    border = moment if live else moment // DAY * DAY

    def with_labels(label: np.ndarray) -> dict[str, np.ndarray]:
        changed = replace(dataset, events=replace(log, label=label.astype(np.int8)))
        return told_features(Told(changed, world.truth), asked)

    other = np.where(log.label >= 0, 1 - log.label, -1)
    later = with_labels(np.where(log.timestamp < border, log.label, other))
    earlier = with_labels(np.where(log.timestamp < border, other, log.label))
    assert len(asked.event) and all(np.isfinite(columns).all() for columns in known.values())
    for name in TOLD:
        np.testing.assert_array_equal(known[name], later[name])
        assert (known[name] != earlier[name]).any()
    without = log.take((log.timestamp < border) | np.isin(np.arange(len(log)), asked.event))
    place = np.searchsorted(without.event_id, log.event_id[asked.event])
    cut_off = told_features(Told(replace(dataset, events=without), world.truth), replace(asked, event=place))
    for name in TOLD:
        np.testing.assert_array_equal(known[name], cut_off[name])


def test_labels_of_the_same_day_before_the_moment_count(world: World) -> None:
    dataset, log = world.dataset, world.dataset.events
    moment = busy_moment(dataset)
    asked = asked_at(dataset, moment, live=True)
    member = log.member[asked.event[0]]
    today = (log.member == member) & (log.timestamp < moment) & (log.timestamp >= moment // DAY * DAY) & (log.label >= 0)
    label = np.where(today, 1 - log.label, log.label).astype(np.int8)
    changed = replace(dataset, events=replace(log, label=label))
    known, other = (told_features(Told(one, world.truth), asked) for one in (dataset, changed))
    assert today.any() and (known[LAWS] != other[LAWS]).any()
    np.testing.assert_array_equal(known[TOPICS], other[TOPICS])


def test_nobody_is_told_what_is_hidden(world: World) -> None:
    dataset, truth = world.dataset, world.truth
    rng = np.random.default_rng(1)
    asked = asked_at(dataset, busy_moment(dataset), live=False)
    hidden = replace(
        truth,
        quality=rng.permutation(truth.quality),
        taste=rng.permutation(truth.taste),
        ease=rng.permutation(truth.ease),
        trend=rng.permutation(truth.trend),
        evergreen=~truth.evergreen,
        p_label=rng.random(len(truth.p_label)),
        p_action=rng.random(truth.p_action.shape),
    )
    known, same = (told_features(Told(dataset, one), asked) for one in (truth, hidden))
    for name in TOLD:
        np.testing.assert_array_equal(known[name], same[name])
    order = rng.permutation(len(truth.theta_first))
    strangers = replace(truth, theta_first=truth.theta_first[order], theta_last=truth.theta_last[order])
    other = told_features(Told(dataset, strangers), asked)
    np.testing.assert_array_equal(known[TOPICS], other[TOPICS])
    assert (known[INTERESTS] != other[INTERESTS]).any()


def test_a_word_means_to_a_member_what_it_means_to_others(world: World) -> None:
    truth = world.truth
    member, chance = Told(world.dataset, truth).words
    mine = np.arange(len(truth.theta_first)) % FOLDS == 3
    changed = replace(truth, theta_first=np.where(mine[:, None], truth.theta_first[::-1], truth.theta_first))
    _, other = Told(world.dataset, changed).words
    np.testing.assert_array_equal(chance[mine[member]], other[mine[member]])
    assert (chance[~mine[member]] != other[~mine[member]]).any()
    share = (chance * truth.theta_first[member]).sum(1) / chance.sum(1)
    stranger = (chance * truth.theta_first[member][::-1]).sum(1) / chance.sum(1)
    assert share.mean() > 1.5 * stranger.mean()


def test_fit_connections_and_probabilities_are_those_of_the_law(world: World) -> None:
    truth, log = world.truth, world.dataset.events
    told = Told(world.dataset, truth)
    rows = Shown.of(log, np.flatnonzero(log.label >= 0)[::97])
    belief = Belief(truth.theta_first[None], (truth.theta_last - truth.theta_first)[None])
    fit = told.fit(next(belief.at(rows.member, told.moved(rows.time))), rows.item)
    expected = [float(truth.affinity(m[None], t[None], i[None])[0, 0]) for m, t, i in zip(rows.member, rows.time, rows.item)]
    np.testing.assert_allclose(fit, expected, atol=1e-5)
    connected = told.connected(rows.member, rows.item, rows.time)
    known = [bool(truth.connected(m[None], t[None], i[None])[0, 0]) for m, t, i in zip(rows.member, rows.time, rows.item)]
    assert connected.tolist() == known and any(known)
    plain = replace(truth, quality=0 * truth.quality, taste=0 * truth.taste, ease=0 * truth.ease)
    wish = plain.wish(rows.member, rows.item, fit, connected)
    chance = np.array(truth.law.attention)[rows.position] * (1 - np.prod(1 - wish, axis=0))
    code = told.code(np.ones(len(fit), np.int64), rows.position, rows.item, connected)
    exact = label_table(truth.law, spread=0).ravel()[code + (fit * (BINS - 0.01)).astype(int)]
    np.testing.assert_allclose(exact, chance, atol=0.03)
    total = told.probability(code, fit) + told.probability(told.code(0 * rows.label, rows.position, rows.item, connected), fit)
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_without_evidence_the_moves_keep_to_what_the_world_deals() -> None:
    topics, members = 9, 6_000
    rng = np.random.default_rng(2)
    guess = rng.dirichlet(np.full(topics, 2.0), members)
    moves = Moves(rng, np.full(topics, 1 / topics), guess)
    state = moves.any_state(members)
    dealt = state.share.max(1).mean()
    for step in range(240):
        proposed, gain = moves.named(("renew", "replace", "walk", "grow", "swap")[step % 5])(state)
        state = proposed.where(np.log(rng.random(members)) < gain, state)
    assert ((state.number >= FEWEST) & (state.number <= PLACES)).all() and (state.weight >= LEAST_WEIGHT).all()
    named = np.where(state.held, state.topic, -1 - np.arange(PLACES + 1))
    assert all(len(set(row)) == PLACES + 1 for row in named.tolist())
    np.testing.assert_allclose(np.bincount(state.number, minlength=6)[2:] / members, 0.25, atol=0.025)
    np.testing.assert_allclose(np.bincount(state.topic[:, PLACES], minlength=topics) / members, 1 / topics, atol=0.015)
    assert state.share.max(1).mean() == pytest.approx(dealt, abs=0.01)


def test_the_chance_of_all_evidence_equals_a_plain_sum_over_it(world: World) -> None:
    reader = Reader(Told(world.dataset, world.truth))
    day = world.dataset.meta.cut_test // DAY
    known = reader.known(day)
    reader._settle(known, 60)
    moves = Moves(reader.rng, reader.common, known.guess)
    one, other = moves.any_state(reader.members), reader.state
    fast = reader.log_chance(one, known) - reader.log_chance(other, known)
    for member in (0, 17, 80, 159):
        slow = [plain_log_chance(reader, known, state, member, day) for state in (one, other)]
        assert fast[member] == pytest.approx(slow[0] - slow[1], abs=0.02)


def plain_log_chance(reader: Reader, known: told_interests.Known, state: told_interests.State, member: int, day: int) -> float:
    """The slow twin of `Reader.log_chance` for one member."""
    told, truth, log = reader.told, reader.told.truth, world_log(reader)
    first, change = (part[member].astype(np.float64) for part in state.interests(reader.topics))
    late, seen, total = [], 0, 0.0
    for row in range(len(log)):
        if log.member[row] != member or log.label[row] < 0 or log.timestamp[row] >= day * DAY:
            continue
        item, time = int(log.item[row]), int(log.timestamp[row])
        late.append(moved := min((time - truth.start) / (len(truth.trend) * DAY), 1) * truth.law.drift)
        fit = 1 - 2 ** (-float((first + moved * change) @ truth.phi[item]) / truth.law.half_affinity)
        known_author = bool(truth.connected(np.array([member]), np.array([time]), np.array([item]))[0, 0])
        table = told.table.reshape(2, truth.law.slots, -1, 2, BINS)
        chance = table[log.label[row], log.position[row], truth.format[item], int(known_author), int(fit * (BINS - 0.01))]
        total, seen = total + np.log(chance) + truth.law.show_affinity * fit, seen + 1
    mean = first + (np.mean(late) if late else 0) * change
    stock = known.stock[member].astype(np.float64)
    second = (stock * 2 ** (-0.25 * mean / truth.law.half_affinity)).sum()
    shown = stock * np.exp(2 * (1 - 2 ** (-0.75 * mean / truth.law.half_affinity) * second))
    total -= seen * np.log(shown.sum())
    who, chance = told.words
    total += np.log(chance[who == member] @ first).sum()
    own = first**1.5 / (first**1.5).sum()
    for item in np.flatnonzero((truth.author == member) & (truth.created < day * DAY)):
        total += np.log(0.88 * own[told.topic[item]] + 0.12 / len(first)).sum()
    edges = truth.edge_since < day * DAY
    met = set(truth.edge_other[edges & (truth.edge_member == member)].tolist())
    met |= set(truth.edge_member[edges & (truth.edge_other == member)].tolist())
    return float(total + sum(np.log(0.75 * first @ reader.alike[friend] + 0.25 / reader.members) for friend in met))


def world_log(reader: Reader) -> told_interests.Events:
    return reader.told.dataset.events


def test_what_is_believed_comes_near_the_true_interests(world: World) -> None:
    day = world.dataset.meta.cut_test // DAY
    reader = Reader(Told(world.dataset, world.truth))
    common = np.tile(reader.common, (reader.members, 1))
    _, belief = next(reader.beliefs([day]))
    known, nothing = (np.abs(guess - world.truth.theta_first).sum(1).mean() for guess in (belief.first.mean(0), common))
    assert known < 0.5 * nothing
    np.testing.assert_allclose(belief.first.sum(2), 1, atol=1e-4)


def test_surprises_are_shrunk_sums_of_label_minus_chance(world: World) -> None:
    told, truth, log = Told(world.dataset, world.truth), world.truth, world.dataset.events
    day = world.dataset.meta.cut_test // DAY
    belief = Belief(truth.theta_first[None], (truth.theta_last - truth.theta_first)[None])
    past = Shown.of(log, np.flatnonzero(log.label >= 0))
    rows = past.take(np.flatnonzero(past.time >= day * DAY)[:5])
    found = belief_columns(told, belief, past, day, rows, np.full(5, day * DAY))
    before = past.take(past.time < day * DAY)
    fit = told.fit(next(belief.at(before.member, told.moved(before.time))), before.item)
    code = told.code(1 + 0 * before.label, before.position, before.item, told.connected(before.member, before.item, before.time))
    chance = told.probability(code, fit).astype(np.float64)
    for row in range(5):
        same = (before.member == rows.member[row]) & (truth.format[before.item] == truth.format[rows.item[row]])
        expected = (before.label - chance)[same].sum() / ((chance * (1 - chance))[same].sum() + 5)
        assert found[row, 5] == pytest.approx(expected, abs=1e-4)


def test_told_rows_stand_between_the_rivals_and_the_oracle_and_never_count_as_one(world: World) -> None:
    dataset = world.dataset
    rows = labelled_test_rows(dataset)
    steps: list[tuple[int, int]] = []
    scored = simple_rankers(dataset, rows, world.truth, lambda done, total: steps.append((done, total)), with_told=True)
    value = {(one.name, one.knowledge): auc(rows.label, one.probability) for one in scored}
    assert [name for name, _ in value][-7:] == [TOPICS, TOPICS, LAWS, LAWS, INTERESTS, INTERESTS, "Oracle"]
    rival = max(found for (name, _), found in value.items() if name not in (*TOLD, "Oracle"))
    for kind in ("frozen", "live"):
        assert rival < value[TOPICS, kind] < value[LAWS, kind] < value[INTERESTS, kind] < value["Oracle", "live"]
    days = TOLD_DAYS + len(np.unique(dataset.events.day[rows.event]))
    assert steps[-1] == (days, days)
    report = evaluate_ranking(dataset, rows, scored, "live")
    assert report.best and not report.best.startswith(("Told", "Oracle")) and report.caption == KNOWS_TRUTH
    assert evaluate_ranking(dataset, rows, [one for one in scored if one.name not in TOLD], "live").caption is None
    assert ranking_table(report).renderables


def test_a_truth_that_only_knows_probabilities_tells_nobody_anything(world: World) -> None:
    rows = labelled_test_rows(world.dataset)

    class Probabilities:
        event, p_label = world.truth.event, world.truth.p_label

    found = simple_rankers(world.dataset, rows, Probabilities(), with_told=True)
    assert isinstance(found[-1], Scored) and {one.name for one in found}.isdisjoint(TOLD)
    assert isinstance(world.truth, Truth)


def test_who_is_to_be_told_needs_a_world(tiny_folder: Path) -> None:
    assert read_with_truth(tiny_folder)[1] is None
    with pytest.raises(EvidenceError, match="--told needs a synthetic world"):
        read_with_truth(tiny_folder, told=True)
