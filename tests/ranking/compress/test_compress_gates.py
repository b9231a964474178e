"""A gate measures what was lost, knows how sure it is, and lets nothing through that it could not measure."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ranking.learn.gates import Gates, Measure, crossed, judge, measure
from ranking.learn.questions import NothingToJudge, ground_of
from ranking.metrics import auc, member_aucs
from ranking.ranker import Ranker
from retrieval.data.schema import Dataset

RNG = np.random.default_rng(3)
MEMBERS, EACH = 50, 12
MEMBER = np.repeat(np.arange(MEMBERS) * 7, EACH)
PARENT = RNG.normal(size=MEMBERS * EACH)
LABEL = (RNG.random(len(PARENT)) < 1 / (1 + np.exp(-2 * PARENT))).astype(np.int8)
NOISY = PARENT + RNG.normal(size=len(PARENT)) * 1.5


def passed(measured: dict[str, Measure], gates: Gates) -> dict[str, bool]:
    return {one.metric: one.passed for one in judge(measured, gates)}


def test_an_equal_child_loses_nothing_and_passes_the_strictest_gate() -> None:
    found = measure(LABEL, MEMBER, PARENT, PARENT.copy(), resamples=40)
    assert all(one.lost == one.low == one.high == 0 for name, one in found.items() if name not in ("overlap", "kendall"))
    assert all(found[name].lost == found[name].low == 1 for name in ("overlap", "kendall"))
    assert all(passed(found, Gates(auc=0, gauc=0, ndcg=0, ne=0, ece=0, overlap=1, kendall=1)).values())


def test_a_worse_child_loses_what_the_metrics_say() -> None:
    found = measure(LABEL, MEMBER, PARENT, NOISY, resamples=100)
    truth = LABEL.astype(np.float64)
    best, worse = auc(truth, PARENT), auc(truth, NOISY)
    assert found["auc"].lost == pytest.approx((best - worse) / best)
    assert found["auc"].low < found["auc"].lost < found["auc"].high
    within, weight = member_aucs(truth, NOISY, MEMBER)
    assert found["gauc"].child == pytest.approx(np.average(within, weights=weight))
    assert found["ne"].lost > 0.1 and found["kendall"].lost < 0.6
    assert not passed(found, Gates(auc=0.02, judged_by="value"))["auc"]


def test_a_monotone_change_costs_no_order_and_recalibration_takes_it_back() -> None:
    found = measure(LABEL, MEMBER, PARENT, 3 * PARENT - 5, resamples=40)
    assert found["kendall"].lost == 1 and found["auc"].lost == found["ndcg"].lost == 0
    assert abs(found["ne"].lost) < 1e-3 and abs(found["ece"].lost) < 1e-3


def test_the_bound_is_stricter_than_the_value() -> None:
    one = {"auc": Measure(0.8, 0.797, 0.004, -0.002, 0.01)}
    assert passed(one, Gates(auc=0.005, judged_by="value"))["auc"]
    assert not passed(one, Gates(auc=0.005))["auc"]
    kept = {"kendall": Measure(1.0, 0.9, 0.9, 0.84, 0.95)}
    assert passed(kept, Gates(kendall=0.85, judged_by="value"))["kendall"] and not passed(kept, Gates(kendall=0.85))["kendall"]


def test_the_better_bound_stops_only_what_surely_broke() -> None:
    unsure, broken = Measure(0.8, 0.78, 0.021, 0.009, 0.034), Measure(0.8, 0.75, 0.06, 0.03, 0.09)
    gates = Gates(auc=0.02, kendall=0.9, judged_by="better_bound")
    assert passed({"auc": unsure}, gates)["auc"] and not passed({"auc": unsure}, Gates(auc=0.02, judged_by="value"))["auc"]
    assert not passed({"auc": broken}, gates)["auc"]
    assert passed({"kendall": Measure(1.0, 0.88, 0.88, 0.84, 0.91)}, gates)["kendall"]
    assert not passed({"kendall": Measure(1.0, 0.8, 0.8, 0.76, 0.85)}, gates)["kendall"]


def test_what_could_not_be_measured_fails_if_it_is_demanded() -> None:
    unknown = {"gauc": Measure(np.nan, np.nan, np.nan, np.nan, np.nan)}
    assert not passed(unknown, Gates())["gauc"] and passed(unknown, Gates(gauc=None))["gauc"]
    alone = measure(LABEL, np.arange(len(LABEL)), PARENT, NOISY, resamples=20)
    assert np.isnan(alone["gauc"].lost) and np.isnan(alone["kendall"].lost)
    assert not passed(alone, Gates(kendall=0.1))["kendall"]


def test_no_candidate_is_judged_by_a_calibrator_that_saw_it() -> None:
    _, code = np.unique(MEMBER, return_inverse=True)
    said = crossed(PARENT, LABEL, code, "platt")
    changed = LABEL.copy()
    changed[code % 2 == 0] = 1 - changed[code % 2 == 0]
    np.testing.assert_array_equal(crossed(PARENT, changed, code, "platt")[code % 2 == 0], said[code % 2 == 0])
    assert (crossed(PARENT, changed, code, "platt")[code % 2 == 1] != said[code % 2 == 1]).any()


@pytest.mark.parametrize(("after", "said"), [("one member", "among 1 members after"), ("liked", " 0 answers of the rarer kind")])
def test_a_thin_test_part_is_refused_before_anything_runs(tiny_dataset: Dataset, teacher: Ranker, after: str, said: str) -> None:
    """What is held back would do; after the test cut one member answers everything, or everything is liked."""
    log, cut = tiny_dataset.events, tiny_dataset.meta.cut_test
    late = log.timestamp >= cut
    if after == "one member":
        events = replace(log, member=np.where(late, log.member[0], log.member))
    else:
        events = replace(log, label=np.where(late, np.int8(1), log.label))
    with pytest.raises(NothingToJudge, match=said):
        ground_of(replace(tiny_dataset, events=events), teacher, 20_000)
