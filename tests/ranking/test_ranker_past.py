"""What a ranker's training starts from, goes on from and is judged on knows nothing that it should not."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ranking.learn import validate
from ranking.learn.loop import LoopSettings
from ranking.learn.start import Origins, RankerPlan, origins_of
from ranking.learn.train import TrainReport, train_ranker
from ranking.prompts import RankBudgets
from ranking.ranker import FACTS, read_facts
from retrieval.data.schema import DAY, Dataset
from retrieval.encoder import VALIDATION, save_encoder, stored_fingerprint
from retrieval.learn.checkpoint import TrainingError
from retrieval.learn.fit import train_encoder
from retrieval.learn.sessions import NOTE, with_sessions
from retrieval.learn.start import EncoderPlan
from retrieval.learn.start import start as start_encoder
from retrieval.llama import Size
from retrieval.moments import moment_words
from retrieval.provenance import TrainedTooLate, check_provenance, saw_past

SMALL = RankerPlan(
    steps=2,
    minutes=None,
    size=Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=64, vocabulary=400),
    budgets=RankBudgets(item=48, prefix=120),
    loop=LoopSettings(learning_rate=5e-3, candidates=32),
)


def encoder(dataset: Dataset, folder: Path, before: int, cut: int, name: str = "tiny", seed: int = 0) -> str:
    """Saves an encoder of what was known `before`, whose folder says `cut`, and returns its fingerprint."""
    made = start_encoder(dataset, before, EncoderPlan(steps=1, size=SMALL.size, seed=seed), 1)
    return save_encoder(folder, made.model, made.sampler.writer, {"data": name, "cut": cut, "note": ""})


@pytest.fixture
def late(tiny_dataset: Dataset, tmp_path: Path) -> Path:
    """An encoder whose training went a day past the test cut."""
    cut = tiny_dataset.meta.cut_test
    encoder(tiny_dataset, tmp_path / "late", cut, cut + DAY)
    return tmp_path / "late"


@pytest.fixture(scope="module")
def bare(tiny_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainReport]:
    """A ranker without any encoder."""
    out = tmp_path_factory.mktemp("bare") / "ranker"
    return out, train_ranker(tiny_dataset, out, SMALL)


def test_a_later_encoder_is_no_start(tiny_dataset: Dataset, late: Path, tmp_path: Path) -> None:
    cut = tiny_dataset.meta.cut_test
    with pytest.raises(TrainedTooLate, match=f"up to {moment_words(cut + DAY)}.* is {moment_words(cut)}.*Train it again"):
        train_ranker(tiny_dataset, tmp_path / "ranker", replace(SMALL, encoder=str(late)))


def test_later_models_are_not_evaluated(
    tiny_dataset: Dataset, tiny_folder: Path, late: Path, tmp_path: Path, bare: tuple[Path, TrainReport]
) -> None:
    from ranking.cli.evaluate import app

    later = replace(tiny_dataset, meta=replace(tiny_dataset.meta, cut_test=tiny_dataset.meta.cut_test + DAY))
    train_ranker(later, tmp_path / "ranker", SMALL)
    for asked in (
        ["retrieval", "--encoder", str(late)],
        ["ranking", "--ranker", str(tmp_path / "ranker")],
        ["ranking", "--ranker", str(bare[0]), "--encoder", str(late)],
    ):
        result = CliRunner().invoke(app, [asked[0], str(tiny_folder), *asked[1:]])
        assert isinstance(result.exception, TrainedTooLate), (asked, result.output)


def test_a_model_of_other_data_is_let_in_with_a_warning(tiny_dataset: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    cut = tiny_dataset.meta.cut_test
    with caplog.at_level(logging.WARNING):
        check_provenance(Path("models/e"), {"data": "tiny", "cut": cut}, tiny_dataset)
        assert not caplog.records
        check_provenance(Path("models/e"), {"data": "shop", "cut": cut + DAY}, tiny_dataset)
    assert "models/e was trained on shop" in caplog.text and moment_words(cut + DAY) in caplog.text


def test_made_up_sessions_have_a_clock_of_their_own(tiny_dataset: Dataset) -> None:
    nothing = replace(tiny_dataset, events=tiny_dataset.events.take(np.zeros(0, np.int64)), connections=None)
    made, note = with_sessions(nothing, 0)
    trained = {"data": "tiny", "cut": made.meta.cut_test, "note": f"{note}; and more"}
    early = replace(tiny_dataset, meta=replace(tiny_dataset.meta, cut_valid=DAY, cut_test=2 * DAY))
    assert note == NOTE and not saw_past(trained, made, made.meta.cut_test) and saw_past(trained, made, made.meta.cut_valid)
    assert not saw_past(trained, early, early.meta.cut_test)
    assert not saw_past({**trained, "note": "", "cut": 1 << 40}, made, made.meta.cut_test)


def test_the_validation_run_takes_the_twin_or_nothing(
    tiny_dataset: Dataset, tmp_path: Path, bare: tuple[Path, TrainReport]
) -> None:
    meta, folder = tiny_dataset.meta, tmp_path / "encoder"
    whole = encoder(tiny_dataset, folder, meta.cut_test, meta.cut_test)
    plan = replace(SMALL, encoder=str(folder))
    alone = train_ranker(tiny_dataset, tmp_path / "alone", plan)
    facts = read_facts(tmp_path / "alone")
    assert "validation run did without it" in alone.note and facts.training["note"] == alone.note
    assert (facts.encoder, facts.training["validation_encoder"]) == (whole, None)
    assert alone.validation == bare[1].validation, "the encoder was read before the validation cut"
    twin = encoder(tiny_dataset, folder / VALIDATION, meta.cut_valid, meta.cut_valid, seed=1)
    beside = train_ranker(tiny_dataset, tmp_path / "beside", plan)
    facts = read_facts(tmp_path / "beside")
    assert "did without it" not in beside.note and (facts.encoder, facts.training["validation_encoder"]) == (whole, twin)
    assert beside.validation != alone.validation


def test_a_twin_that_knows_too_much_is_not_taken(tiny_dataset: Dataset, tmp_path: Path) -> None:
    meta, plan = tiny_dataset.meta, replace(SMALL, encoder=str(tmp_path))
    whole = encoder(tiny_dataset, tmp_path, meta.cut_test, meta.cut_test)
    encoder(tiny_dataset, tmp_path / VALIDATION, meta.cut_valid, meta.cut_valid + 1)
    assert origins_of(tiny_dataset, plan) == Origins(whole)
    other = encoder(tiny_dataset, tmp_path, meta.cut_test, meta.cut_test, name="shop")
    shutil.rmtree(tmp_path / VALIDATION)
    assert origins_of(tiny_dataset, plan) == Origins(other, str(tmp_path), other)


def test_an_encoder_training_leaves_the_twin(tiny_dataset: Dataset, tmp_path: Path) -> None:
    train_encoder(tiny_dataset, tmp_path, EncoderPlan(steps=1, minutes=None, size=SMALL.size))
    twin = tmp_path / VALIDATION
    found = origins_of(tiny_dataset, replace(SMALL, encoder=str(tmp_path)))
    assert found == Origins(stored_fingerprint(tmp_path), str(twin), stored_fingerprint(twin))


def test_a_training_goes_on_with_the_same_data_and_encoder_only(tiny_dataset: Dataset, tmp_path: Path) -> None:
    meta, first, out = tiny_dataset.meta, tmp_path / "first", tmp_path / "ranker"
    encoder(tiny_dataset, first, meta.cut_test, meta.cut_test)
    plan = replace(SMALL, encoder=str(first))
    fingerprint = train_ranker(tiny_dataset, out, plan).fingerprint
    (out / FACTS).unlink()  # as if killed before the end
    first.rename(tmp_path / "moved")
    moved = replace(plan, encoder=str(tmp_path / "moved"))
    assert train_ranker(tiny_dataset, out, moved).fingerprint == fingerprint
    (out / FACTS).unlink()
    flipped = replace(tiny_dataset, events=replace(tiny_dataset.events, label=1 - tiny_dataset.events.label))
    with pytest.raises(TrainingError, match="the data changed"):
        train_ranker(flipped, out, moved)
    with pytest.raises(TrainingError, match="the data changed"):
        train_ranker(replace(tiny_dataset, meta=replace(meta, cut_valid=meta.cut_valid - DAY)), out, moved)
    encoder(tiny_dataset, tmp_path / "moved", meta.cut_test, meta.cut_test, seed=1)
    with pytest.raises(TrainingError, match="encoder was"):
        train_ranker(tiny_dataset, out, moved)


def test_short_trials_choose_the_learning_rate(tiny_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "TRIAL_LEAST", 3)
    monkeypatch.setattr(validate, "RATES", (1.0, 5e-33))
    plan = replace(SMALL, steps=72, loop=replace(SMALL.loop, learning_rate=1e30))
    seen: dict[str, int] = {}
    report = train_ranker(tiny_dataset, tmp_path / "one", plan, lambda stage, _done, total: seen.update({stage: total}))
    assert report.learning_rate == pytest.approx(5e-3) and report.trials["1e+30"] == 0.0 < report.trials["0.005"]
    facts = read_facts(tmp_path / "one").training
    assert facts["trials"] == report.trials and facts["settings"]["loop"]["learning_rate"] == report.learning_rate
    assert seen["try rate 0.005"] * 2 + seen["validate"] == round(72 * 0.3 / 0.7)
    assert seen["try rate 0.005"] * 2 <= seen["validate"] / 4 + 1
    assert train_ranker(tiny_dataset, tmp_path / "two", plan).fingerprint == report.fingerprint
    given = train_ranker(tiny_dataset, tmp_path / "given", replace(plan, steps=2, learning_rate=1e-3))
    assert (given.trials, given.learning_rate) == ({}, 1e-3)
