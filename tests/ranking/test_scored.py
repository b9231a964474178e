"""A ranker in the evaluation: every labelled event gets the score that serving that member at that moment would give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ranking.calibrate import Calibrator
from ranking.evaluate import RankingEvidenceError, Rows, labelled_test_rows
from ranking.evidence import evaluate_ranking, tasks_table
from ranking.prompts import RankBudgets, RankPrompts, relations_of
from ranking.ranker import Ranker, RankerFacts, labels_of, save_ranker
from ranking.scored import check_encoder, moments, other_tasks, score_rows
from ranking.tasks import tasks_of
from retrieval.counts import Counts
from retrieval.data.schema import DAY, TEST, Dataset, MemberView
from retrieval.evidence.protocol import engagements
from retrieval.features import Quantizer
from retrieval.llama import Size, new_llama
from retrieval.tokens import Tokens


@pytest.fixture(scope="module")
def ranker(
    tiny_dataset: Dataset, tiny_tokens: Tokens, tiny_quantizer: Quantizer, tmp_path_factory: pytest.TempPathFactory
) -> Ranker:
    torch.manual_seed(0)
    model = new_llama(Size(hidden=32, layers=1, heads=4, kv_heads=2, mlp=32), len(tiny_tokens), causal_lm=True)
    model.model.embed_tokens.weight.data.normal_()
    tasks = tasks_of(tiny_dataset)
    facts = RankerFacts(
        tasks=tasks,
        labels=labels_of(tiny_tokens, tasks),
        budgets=RankBudgets(),
        calibrators={"label": Calibrator("platt", 0.5, -1.0, 100)},
        encoder="an encoder",
        training={},
    )
    path: Path = tmp_path_factory.mktemp("scored") / "ranker"
    save_ranker(path, model, RankPrompts(tiny_tokens, tiny_quantizer, facts.budgets), facts)
    return Ranker.load(path)


def served(dataset: Dataset, ranker: Ranker, rows: Rows, row: int, counts: str) -> float:
    """The score of one event through `Ranker.score`, from a view built by hand."""
    log = dataset.events
    event = int(rows.event[row])
    moment = int(log.timestamp[event]) if counts == "live" else dataset.meta.cut_test
    member, item = int(rows.member[row]), int(rows.item[row])
    liked = dataset.engagements
    past = np.flatnonzero((liked.member == member) & (liked.timestamp < moment))
    edges = dataset.connections_of(member, before=moment)
    view = MemberView(dataset.members[member], engagements(dataset, liked, past, {}), edges)
    numbers = Counts.from_dataset(dataset, before=None if counts == "live" else moment).at(
        np.array([item]), np.array([moment // DAY])
    )
    tokens = ranker.item_tokens([dataset.items[item]], numbers)
    return float(ranker.score(view, tokens, "label", relations_of(edges, [dataset.items.creator[item]]))[0])


@pytest.mark.parametrize("counts", ["live", "frozen"])
def test_scores_are_those_of_the_served_ranker(ranker: Ranker, tiny_dataset: Dataset, counts: str) -> None:
    rows = labelled_test_rows(tiny_dataset)
    found = score_rows(tiny_dataset, rows, ranker, "live" if counts == "live" else "frozen").final
    assert found.shape == (len(rows),)
    for row in (0, 1, len(rows) // 2, len(rows) - 1):
        assert found[row] == pytest.approx(served(tiny_dataset, ranker, rows, row, counts), abs=2e-5)


def test_live_groups_share_a_moment_and_frozen_ones_a_member(tiny_dataset: Dataset) -> None:
    rows = labelled_test_rows(tiny_dataset)
    live, back = moments(tiny_dataset, rows, "live")
    frozen, _ = moments(tiny_dataset, rows, "frozen")
    assert live.event[back].tolist() == rows.event.tolist()
    assert len(frozen) == len(np.unique(rows.member)) < len(live)
    times = tiny_dataset.events.timestamp[live.event]
    assert (np.repeat(live.moment, np.diff(live.start)) == times).all()


def test_a_ranker_of_another_encoder_is_refused(ranker: Ranker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ranking.scored.stored_fingerprint", lambda folder: f"that of {folder.name}")
    with pytest.raises(RankingEvidenceError, match=r"trained beside encoder an encoder, .* is that of other"):
        check_encoder(ranker, tmp_path / "other")


def test_a_ranker_that_was_not_taught_labels_says_what_it_knows(ranker: Ranker, tiny_dataset: Dataset) -> None:
    tasks = {name: task for name, task in ranker.tasks.items() if name != "label"}
    asked = Ranker(ranker.prompts, replace(ranker.facts, tasks=tasks), ranker.fingerprint, ranker.engine)
    with pytest.raises(RankingEvidenceError, match=r"not taught labels, its tasks are like: .* --task"):
        score_rows(tiny_dataset, labelled_test_rows(tiny_dataset), asked, "live")


def test_labels_of_one_kind_and_of_before_the_cut_are_told(tiny_dataset: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    log = tiny_dataset.events
    liked = replace(tiny_dataset, events=replace(log, label=np.where(log.label < 0, -1, 1).astype(np.int8)))
    with pytest.raises(RankingEvidenceError, match="Give events from the test cut on label 0 too"):
        labelled_test_rows(liked)
    with pytest.raises(RankingEvidenceError, match=r"0 labelled test events.* on labels too"):
        labelled_test_rows(replace(liked, events=replace(log, label=np.full(len(log), -1, np.int8))))
    labelled_test_rows(tiny_dataset)
    assert not caplog.records
    split = np.where(np.arange(len(log)) % 2, log.split, TEST).astype(np.int8)
    rows = labelled_test_rows(replace(tiny_dataset, events=replace(log, split=split)))
    early = int((log.timestamp[rows.event] < tiny_dataset.meta.cut_test).sum())
    assert early and f"{early:,} of {len(rows):,} labelled events of the test split are before" in caplog.records[-1].getMessage()


@pytest.mark.parametrize(("held_out", "told"), [(True, "never (held out)"), (False, "yes")])
def test_a_task_that_was_held_out_of_training_says_so(ranker: Ranker, tiny_dataset: Dataset, held_out: bool, told: str) -> None:
    tasks = {name: replace(task, held_out=held_out) for name, task in ranker.tasks.items()}
    asked = Ranker(ranker.prompts, replace(ranker.facts, tasks=tasks), ranker.fingerprint, ranker.engine)
    found = other_tasks(tiny_dataset, asked, "live")
    assert {name: one["held_out"] for name, one in found.items()} == {"like": held_out}
    report = evaluate_ranking(tiny_dataset, labelled_test_rows(tiny_dataset), [], "live", None, found)
    assert [list(column.cells) for column in tasks_table(report).columns[:2]] == [["like"], [told]]
