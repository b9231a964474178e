"""Nothing that appears after the cut reaches training, and no two data sets pass for one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from retrieval.counts import appeared
from retrieval.data.schema import DAY, MISSING_TIME, Connections, Dataset
from retrieval.learn.batches import BatchSettings, Sampler
from retrieval.learn.checkpoint import dataset_digest
from retrieval.learn.prepare import fit_quantizer, known_items
from retrieval.learn.start import EncoderPlan, start
from retrieval.llama import Size

PLAN = EncoderPlan(
    size=Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=64, vocabulary=400),
    batch=BatchSettings(targets=24, random_items=12),
)


def created(dataset: Dataset, **times: int) -> Dataset:
    """The dataset with other creation times of items, by id."""
    column = dataset.items.created_at.copy()
    for item_id, moment in times.items():
        column[dataset.items.row_of[item_id]] = moment
    return replace(dataset, items=replace(dataset.items, created_at=column))


def test_known_is_what_was_created_or_met_before_the_second_of_the_cut(tiny_dataset: Dataset) -> None:
    cut = tiny_dataset.meta.cut_test + 7
    quiet = replace(tiny_dataset, events=tiny_dataset.events.take(tiny_dataset.events.item > 3))
    dataset = created(quiet, i0=cut - 1, i1=cut, i2=MISSING_TIME)
    known = set(known_items(dataset, cut).tolist())
    assert 0 in known and not {1, 2} & known
    met = dataset.events.item[-1]
    first = int(dataset.events.timestamp[dataset.events.item == met][0])
    without = created(dataset, **{f"i{met}": MISSING_TIME})
    assert met not in known_items(without, first) and met in known_items(without, first + 1)


def test_a_folder_without_any_time_knows_all_its_items(tiny_dataset: Dataset) -> None:
    none = np.full(60, MISSING_TIME)
    timeless = replace(
        tiny_dataset, items=replace(tiny_dataset.items, created_at=none), events=tiny_dataset.events.take(np.zeros(0, np.int64))
    )
    assert known_items(timeless, 0).tolist() == list(range(60))


def grown(dataset: Dataset, more: int, moment: int) -> Dataset:
    """The dataset with many more items that were created at one moment and never met."""
    items = dataset.items
    columns = {name: [*getattr(items, name), *["new"] * more] for name in ("title", "text", "category", "creator")}
    new = replace(
        items,
        item_id=[*items.item_id, *(f"new{n}" for n in range(more))],
        created_at=np.concatenate([items.created_at, np.full(more, moment)]),
        numbers={"price": np.concatenate([items.numbers["price"], np.full(more, 1e6)])},
        **columns,
    )
    return replace(dataset, items=new)


def test_numbers_of_items_to_come_move_no_boundary(tiny_dataset: Dataset) -> None:
    cut = tiny_dataset.meta.cut_test
    plain, later = (fit_quantizer(dataset, cut, "percentile", 0) for dataset in (tiny_dataset, grown(tiny_dataset, 500, cut)))
    assert plain.names == later.names
    for name in plain.names:
        np.testing.assert_array_equal(plain.tables[name], later.tables[name], err_msg=name)
    before = fit_quantizer(grown(tiny_dataset, 500, cut - 1), cut, "percentile", 0)
    assert before.tables["price"][50] == 1e6, "one second earlier they count"
    assert before.tables["n_total"][40] > 0, "but on the days of the log they were not there, so their zeros do not"


def test_random_items_of_a_batch_were_there_on_its_day(tiny_dataset: Dataset) -> None:
    """Items of later days may have any words: no batch of an earlier day shows them, and its correction does not count them."""
    cut = tiny_dataset.meta.cut_test
    sampler = start(tiny_dataset, cut, PLAN, 10).sampler
    days = appeared(tiny_dataset) // DAY
    for step in range(12):
        run = sampler.runs[int(np.random.default_rng([0, step]).choice(len(sampler.runs), p=sampler._share))]
        day = int(sampler.timeline.day[run].max())
        titles = ["espresso " * 9 if late else title for title, late in zip(tiny_dataset.items.title, days > day)]
        changed = replace(tiny_dataset, items=replace(tiny_dataset.items, title=titles))
        theirs = Sampler(changed, sampler.writer, cut, PLAN.batch, 0).batch(step)
        assert theirs.item_rows == sampler.batch(step).item_rows
    nobody, day = np.zeros(0, np.int64), int(np.median(days))
    early, late = int(np.argmin(days)), int(np.argmax(days))
    odds = sampler._odds(day)
    found = sampler._inclusion(np.array([early, late]), nobody, sampler.runs[0], odds)
    assert found[0] == pytest.approx(odds[early]) and 0 < odds[early] < 1 and odds[late] == 0 and found[1] < 1e-6


def test_easy_negatives_come_as_often_as_their_correction_says(tiny_dataset: Dataset) -> None:
    """With half of them by popularity: what is popular that day comes more often, and every odds is what it is drawn with."""
    sampler = start(tiny_dataset, tiny_dataset.meta.cut_test, PLAN, 10).sampler
    day = int(sampler.timeline.day[sampler.runs[-1]].max())
    odds, n_7d = sampler._odds(day), sampler.counts.at(np.arange(60), np.full(60, day))["n_7d"]
    assert odds.sum() == pytest.approx(12) and odds[n_7d.argmax()] > 2 * odds[sampler.there(day)].min() > 0
    target = np.zeros(0, np.int64)
    drawn = np.zeros(60)
    for seed in range(400):
        batch = sampler._with_items([], target, target, sampler.runs[-1][-1:], sampler.runs[-1], np.random.default_rng(seed))
        drawn[batch.columns[1:] if batch.columns[0] == batch.columns[batch.positive[0]] else batch.columns] += 1
    here = sampler.there(batch.day) & (np.arange(60) != sampler.timeline.item[sampler.runs[-1][-1]])
    assert np.abs(drawn[here] / 400 - sampler._odds(batch.day)[here]).max() < 0.1


def test_an_item_weighs_one_on_average_however_many_of_its_days_a_batch_shows(tiny_dataset: Dataset) -> None:
    """Over many batches the columns of an item add up to one item: the correction is that of items, not of columns."""
    settings = BatchSettings(targets=60, targets_per_member=2, random_items=12)
    sampler = start(tiny_dataset, tiny_dataset.meta.cut_test, replace(PLAN, batch=settings), 10).sampler
    run = max(sampler.runs, key=lambda one: len(np.unique(sampler.timeline.day[one])))
    assert len(np.unique(sampler.timeline.day[run])) > 1
    sampler.runs, sampler._share = [run], np.ones(1)
    batches = 300
    weight, seen = np.zeros(60), np.zeros(60)
    for step in range(batches):
        batch = sampler.batch(step)
        np.add.at(weight, batch.columns, np.exp(-batch.log_q) / batches)
        seen[np.unique(batch.columns)] += 1
    often = seen > batches / 2
    assert often.sum() > 5 and abs(weight[often].mean() - 1) < 0.06 and weight[often].max() < 1.6, weight[often].round(2)


def test_strangers_stand_for_what_nobody_has_met(tiny_dataset: Dataset) -> None:
    """Without creation times, a batch shows known items with no counts, as many as its correction says; with them, none."""
    undated = created(tiny_dataset, **{f"i{row}": MISSING_TIME for row in range(60)})
    settings = replace(PLAN.batch, strangers=4)
    sampler = start(undated, undated.meta.cut_test, replace(PLAN, batch=settings), 10).sampler
    met = appeared(undated) // DAY
    met[appeared(undated) >= undated.meta.cut_test] = np.iinfo(np.int64).max
    most = 0
    for step in range(40):
        batch = sampler.batch(step)
        items = [undated.items[row] for row in batch.columns.tolist()]
        nothing, today = (np.full(len(items), day, np.int64) for day in (-9, batch.day))
        bare, full = (sampler.writer.items(items, sampler.counts.at(batch.columns, day)) for day in (nothing, today))
        unmet = int((met > batch.day).sum())
        wanted = set(batch.positive.tolist())
        strangers = [n for n, row in enumerate(batch.item_rows) if row == bare[n] != full[n] and n not in wanted]
        assert len(strangers) <= min(4, unmet) and (met[batch.columns[strangers]] <= batch.day).all()
        assert batch.log_q[strangers] == pytest.approx(np.log(min(4, unmet) / max(unmet, 1)))
        most = max(most, len(strangers))
    assert most == 4
    plans = [replace(PLAN, batch=replace(settings, strangers=strangers)) for strangers in (4, 0)]
    some, none = (start(tiny_dataset, tiny_dataset.meta.cut_test, plan, 10).sampler.batch(0) for plan in plans)
    assert some.item_rows == none.item_rows


def second_item(dataset: Dataset, name: str, values: list[str]) -> Dataset:
    """The dataset with the first words of a text column of its items replaced."""
    column = [*values, *getattr(dataset.items, name)[len(values) :]]
    return replace(dataset, items=replace(dataset.items, **{name: column}))


def edges(dataset: Dataset) -> Connections:
    assert dataset.connections is not None
    return dataset.connections


CHANGES: dict[str, Callable[[Dataset], Dataset]] = {
    "cut": lambda d: replace(d, meta=replace(d.meta, cut_valid=d.meta.cut_valid + 1)),
    "cuts exchanged": lambda d: replace(d, meta=replace(d.meta, cut_valid=d.meta.cut_test, cut_test=d.meta.cut_valid)),
    "actions": lambda d: replace(d, meta=replace(d.meta, retrieval_actions=("like", "hide"))),
    "meaning": lambda d: replace(d, meta=replace(d.meta, label="", value=d.meta.label)),
    "words moved": lambda d: second_item(d, "title", ["ab", "c"]),
    "words moved back": lambda d: second_item(d, "title", ["a", "bc"]),
    "column": lambda d: second_item(d, "text", ["ab", "c"]),
    "created": lambda d: created(d, i3=5),
    "number": lambda d: replace(d, items=replace(d.items, numbers={"cost": d.items.numbers["price"]})),
    "profile": lambda d: replace(d, members=replace(d.members, profile={"job": d.members.profile["role"]})),
    "no edges": lambda d: replace(d, connections=None),
    "since": lambda d: replace(d, connections=replace(edges(d), since=edges(d).since + 1)),
    "one event less": lambda d: replace(d, events=d.events.take(slice(0, -1))),
    "label": lambda d: replace(d, events=replace(d.events, label=-np.abs(d.events.label))),
    "action names": lambda d: replace(d, events=replace(d.events, actions=("impression", "love", "hide"))),
}


def test_no_change_that_can_decide_weights_leaves_the_digest(tiny_dataset: Dataset) -> None:
    digests = {name: dataset_digest(change(tiny_dataset)) for name, change in CHANGES.items()}
    assert len({dataset_digest(tiny_dataset), *digests.values()}) == len(CHANGES) + 1
    assert dataset_digest(replace(tiny_dataset)) == dataset_digest(tiny_dataset)
    renamed = replace(tiny_dataset, meta=replace(tiny_dataset.meta, name="other"))
    assert dataset_digest(renamed) == dataset_digest(tiny_dataset), "a name decides no weight"
