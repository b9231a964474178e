"""Trainings as a whole: they learn, choose, can be repeated and resumed, and leave complete folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from retrieval.data.schema import MISSING_TIME, Dataset, Events, Items, Members, Meta
from retrieval.encoder import FACTS, VALIDATION, Encoder, stored_fingerprint
from retrieval.evidence.protocol import last_after_cut
from retrieval.learn import validate
from retrieval.learn.batches import BatchSettings
from retrieval.learn.checkpoint import TrainingError
from retrieval.learn.choose import choose_rate
from retrieval.learn.fit import train_encoder
from retrieval.learn.loop import Diverged
from retrieval.learn.prepare import NothingToLearn, known_items
from retrieval.learn.sessions import NOTE, with_sessions
from retrieval.learn.start import EncoderPlan, start
from retrieval.learn.train import LoopSettings, Trainer
from retrieval.learn.validate import Exam
from retrieval.llama import Size, new_llama

PLAN = EncoderPlan(
    steps=30,
    minutes=None,
    seed=3,
    size=Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=64, vocabulary=400),
    batch=BatchSettings(targets=24, random_items=16),
    loop=LoopSettings(learning_rate=5e-3),
)


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])


def test_training_learns_the_tiny_shop_from_random_words(tiny_dataset: Dataset) -> None:
    trainer = start(tiny_dataset, tiny_dataset.meta.cut_valid, replace(PLAN, warm_words=False), 30)
    before = recall_at_k(trainer, tiny_dataset, 10)
    trainer.run(30)
    assert np.mean([point["loss"] for point in trainer.curve[-5:]]) < trainer.curve[0]["loss"] - 0.3
    assert recall_at_k(trainer, tiny_dataset, 10) > before + 0.2
    queries = last_after_cut(tiny_dataset, "valid")
    exam = Exam(tiny_dataset, trainer.sampler.writer, queries)
    assert exam.recall(trainer.model) == 1.0, "60 items: the top 100 hold every candidate"


def test_warm_words_know_the_topics_before_any_training(tiny_dataset: Dataset) -> None:
    warm = start(tiny_dataset, tiny_dataset.meta.cut_valid, PLAN, 30)
    cold = start(tiny_dataset, tiny_dataset.meta.cut_valid, replace(PLAN, warm_words=False), 30)
    assert recall_at_k(warm, tiny_dataset, 10) > recall_at_k(cold, tiny_dataset, 10) + 0.2


def test_a_killed_run_goes_on_to_the_same_weights_and_another_plan_is_refused(tiny_dataset: Dataset, tmp_path: Path) -> None:
    cut = tiny_dataset.meta.cut_valid
    whole = start(tiny_dataset, cut, PLAN, 16)
    whole.run(16)
    killed = start(tiny_dataset, cut, PLAN, 16)
    killed.run(7)
    killed.save(tmp_path)
    resumed = start(tiny_dataset, cut, PLAN, 16)
    assert resumed.resume(tmp_path)
    resumed.run(16)
    torch.testing.assert_close(weights(whole), weights(resumed), atol=1e-6, rtol=1e-5)
    with pytest.raises(TrainingError, match="another plan"):
        start(tiny_dataset, cut, PLAN, 17).resume(tmp_path)


def recall_at_k(trainer: Trainer, dataset: Dataset, k: int) -> float:
    """Share of validation targets among the best k, without excluding the history: a rough gauge for the tiny shop."""
    from retrieval.counts import Counts
    from retrieval.evidence.protocol import member_views

    queries = last_after_cut(dataset, "valid")
    encoder = Encoder(trainer.model, trainer.sampler.writer, "", {})
    items = [dataset.items[row] for row in range(len(dataset.items))]
    vectors = encoder.items(items, Counts.from_dataset(dataset).as_of(dataset.meta.cut_valid))
    scores = encoder.members(member_views(dataset, queries)) @ vectors.T
    for row in range(len(queries)):
        scores[row, queries.excluded[row]] = -np.inf
    best = np.argsort(-scores, axis=1)[:, :k]
    trainer.model.train()
    return float(np.mean([np.isin(queries.targets[row], best[row]).mean() for row in range(len(queries))]))


def test_train_encoder_leaves_a_complete_folder_and_refuses_to_write_over_it(tiny_dataset: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "encoder"
    report = train_encoder(tiny_dataset, out, replace(PLAN, steps=3))
    assert report.steps == 3 and Encoder.load(out).fingerprint == report.fingerprint
    with pytest.raises(TrainingError, match="already holds an encoder"):
        train_encoder(tiny_dataset, out, PLAN)
    again = train_encoder(tiny_dataset, tmp_path / "again", replace(PLAN, steps=3))
    assert again.fingerprint == report.fingerprint


def test_a_killed_training_does_not_go_on_with_other_data_or_settings(tiny_dataset: Dataset, tmp_path: Path) -> None:
    whole = train_encoder(tiny_dataset, tmp_path / "encoder", replace(PLAN, steps=3))
    for name in (FACTS, "model.safetensors"):  # as if it had been killed right before the end
        (tmp_path / "encoder" / name).unlink()
    moved = replace(tiny_dataset, meta=replace(tiny_dataset.meta, cut_test=tiny_dataset.meta.cut_test - 1))
    with pytest.raises(TrainingError, match=r"the data changed since: digest \w{20}, now \w{20}"):
        train_encoder(moved, tmp_path / "encoder", replace(PLAN, steps=3))
    with pytest.raises(TrainingError, match=r"settings: plan\.seed was 3, is 4\)"):
        train_encoder(tiny_dataset, tmp_path / "encoder", replace(PLAN, steps=3, seed=4))
    assert train_encoder(tiny_dataset, tmp_path / "encoder", replace(PLAN, steps=3)).fingerprint == whole.fingerprint


def test_a_torn_checkpoint_is_named_and_not_read(tiny_dataset: Dataset, tmp_path: Path) -> None:
    trainer = start(tiny_dataset, tiny_dataset.meta.cut_test, PLAN, 4)
    trainer.run(1)
    trainer.save(tmp_path)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:40])
    with pytest.raises(TrainingError, match=r"state.safetensors cannot be read .* delete this file"):
        start(tiny_dataset, tiny_dataset.meta.cut_test, PLAN, 4).resume(tmp_path)


def test_the_validation_encoder_stands_beside_and_saw_nothing_after_its_cut(tiny_dataset: Dataset, tmp_path: Path) -> None:
    """Whatever happens from `cut_valid` on, to events and to items that appear then: the validation encoder stays the same."""
    cut, log = tiny_dataset.meta.cut_valid, tiny_dataset.events
    late = tiny_dataset.items.created_at >= cut
    titles = ["a title of tomorrow" if new else title for title, new in zip(tiny_dataset.items.title, late)]
    numbers = {"price": np.where(late, 1e6, tiny_dataset.items.numbers["price"])}
    other = np.where(log.timestamp >= cut, np.roll(log.item, 1), log.item)
    other = np.where((log.timestamp < cut) | ~late[other], other, 0)
    changed = replace(
        tiny_dataset,
        items=replace(tiny_dataset.items, title=titles, numbers=numbers),
        events=replace(log, item=other.astype(np.int32)),
    )
    plan, marks = replace(PLAN, steps=6), []
    for name, dataset in (("one", tiny_dataset), ("two", changed)):
        report = train_encoder(dataset, tmp_path / name, plan)
        held = {part: json.loads((tmp_path / name / part / FACTS).read_text())["training"] for part in (".", VALIDATION)}
        assert held[VALIDATION]["cut"] == cut and held["."]["cut"] == dataset.meta.cut_test
        assert report.fingerprint == stored_fingerprint(tmp_path / name)
        marks.append(Encoder.load(tmp_path / name / VALIDATION).fingerprint)
    assert marks[0] == marks[1] != report.fingerprint
    assert stored_fingerprint(tmp_path / "one") != stored_fingerprint(tmp_path / "two")


def test_without_a_validation_window_there_is_no_validation_encoder(tiny_dataset: Dataset, tmp_path: Path) -> None:
    for name, early in (("no window", tiny_dataset.meta.cut_test), ("nothing before it", 0)):
        meta = replace(tiny_dataset.meta, cut_valid=early)
        report = train_encoder(replace(tiny_dataset, meta=meta), tmp_path / name, replace(PLAN, steps=2))
        assert report.validation == {} and not (tmp_path / name / VALIDATION).exists()


def test_a_rate_is_taken_only_if_it_is_worth_it() -> None:
    def judge(rate: float) -> float:
        if rate > 5:
            raise Diverged("the loss became nan")
        return {1.0: 0.50, 2.0: 0.55, 4.0: 0.515}[rate]

    tried = {1.0: 0.50, 2.0: 0.55, 4.0: 0.515}
    assert choose_rate([1.0, 2.0, 4.0], judge, 0.02, 1.0) == (2.0, tried)
    assert choose_rate([4.0, 1.0, 8.0], judge, 0.02, 1.0) == (1.0, {1.0: 0.50, 4.0: 0.515, 8.0: 0.0})
    assert choose_rate([2.0, 4.0], lambda _: 0.3, 0.0, 4.0)[0] == 4.0, "a tie goes to the default"


def six_shops(dataset: Dataset) -> Dataset:
    """Six copies side by side, 90 items of each topic: a hundred of all 360 can miss what is looked for."""
    items, events, people = dataset.items, dataset.events, len(dataset.members)
    many = Items(
        [f"{item_id} of {shop}" for shop in range(6) for item_id in items.item_id],
        *(list(column) * 6 for column in (items.title, items.text, items.category, items.creator)),
        np.tile(items.created_at, 6),
    )
    rows = np.tile(np.arange(len(events)), 6)
    shop = np.repeat(np.arange(6), len(events))
    log = replace(
        events.take(rows),
        member=(events.member[rows] + shop * people).astype(np.int32),
        item=(events.item[rows] + shop * len(items)).astype(np.int32),
    )
    members = Members([f"m{n}" for n in range(6 * people)])
    in_time = np.argsort(log.timestamp, kind="stable")
    return replace(dataset, items=many, members=members, events=log.take(in_time), connections=None)


def test_rates_are_tried_and_named_and_a_fixed_rate_reproduces_the_weights(
    tiny_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default is far too high to learn anything, so the lower rate wins."""
    monkeypatch.setattr(validate, "TRIAL_LEAST", 1)
    monkeypatch.setattr(validate, "TRIAL_SHARE", 0.75)
    monkeypatch.setattr(validate, "RATES", (1.0, 1e-4))
    monkeypatch.setattr(validate, "_affordable", lambda *_: 60)
    shops, stages = six_shops(tiny_dataset), dict[str, int]()
    plan = replace(PLAN, minutes=1.0, steps=None, warm_words=False, loop=LoopSettings(learning_rate=50.0))
    by_time = train_encoder(shops, tmp_path / "time", plan, lambda stage, _, total: stages.update({stage: total}))
    far, near = by_time.trials.values()
    assert list(by_time.trials) == [50.0, 5e-3] and near > far + validate.WORTH and by_time.learning_rate == 5e-3
    assert stages == {"try rate 50": 12, "try rate 0.005": 12, "validate": 8, "train": by_time.steps}
    facts = json.loads((tmp_path / "time" / FACTS).read_text())["training"]
    assert facts["settings"]["loop"]["learning_rate"] == 5e-3 and facts["trials"] == {"50.0": far, "0.005": near}
    fixed = replace(plan, minutes=None, steps=by_time.steps, learning_rate=by_time.learning_rate)
    by_steps = train_encoder(shops, tmp_path / "steps", fixed)
    assert by_steps.trials == {} and by_steps.learning_rate == 5e-3
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("time", "steps")]
    assert weights[0] == weights[1]


def test_the_command_fixes_the_rate_and_names_it(tiny_folder: Path, tmp_path: Path) -> None:
    from ranking.cli.encoder import app

    asked = ["train", str(tiny_folder), "--out", str(tmp_path / "out"), "--steps", "1", "--learning-rate", "0.001", "--json"]
    result = CliRunner().invoke(app, [*asked, "--hidden", "32", "--layers", "1"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["learning_rate"] == 0.001 and printed["trials"] == {} and len(printed["validation"]) == 1
    assert Encoder.load(tmp_path / "out").facts["training"]["settings"]["loop"]["learning_rate"] == 0.001


def test_the_command_passes_its_flags_on_and_names_wrong_ones(tiny_folder: Path, tmp_path: Path) -> None:
    from ranking.cli.encoder import app

    asked = ["train", str(tiny_folder), "--steps", "1", "--hidden", "32", "--layers", "1", "--json", "--out"]
    flags = [
        "--loss",
        "bce",
        "--matryoshka",
        "8,16",
        "--hard",
        "1",
        "--precision",
        "bf16",
        "--cached",
        "--set",
        "share=0.9",
        "--set",
        "recompute=true",
    ]
    result = CliRunner().invoke(app, [*asked, str(tmp_path / "out"), *flags])
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "out" / FACTS).read_text())
    loop, batch = facts["training"]["settings"]["loop"], facts["training"]["settings"]["batch"]
    assert loop["loss"] == "bce" and loop["matryoshka"] == facts["matryoshka"] == [8, 16] and loop["cached"]
    assert loop["precision"] == "bf16" and batch["hard"] == 1 and batch["share"] == 0.9
    for wrong, said in (("sheer=1", "unknown settings sheer"), ("near=warm", "setting near is 'warm'")):
        failed = CliRunner().invoke(app, [*asked, str(tmp_path / "no"), "--set", wrong])
        assert isinstance(failed.exception, TrainingError) and said in str(failed.exception)


def test_a_time_too_short_for_its_preparation_is_still_ten_steps(tiny_dataset: Dataset, tmp_path: Path) -> None:
    report = train_encoder(tiny_dataset, tmp_path / "encoder", replace(PLAN, steps=None, minutes=1e-6))
    assert report.steps in (5, 8, 10) and max(report.validation) == 5


def test_from_a_base_checkpoint_with_lora(tiny_dataset: Dataset, tiny_tokens, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    base = tmp_path / "base"
    new_llama(PLAN.size, len(tiny_tokens), causal_lm=True).save_pretrained(base)
    tiny_tokens.save(base)
    report = train_encoder(tiny_dataset, tmp_path / "out", replace(PLAN, steps=2, base=str(base), lora_rank=2))
    encoder = Encoder.load(tmp_path / "out")
    assert report.fingerprint == encoder.fingerprint
    assert encoder.model.get_input_embeddings().num_embeddings >= len(encoder.writer.tokens)


def test_a_catalogue_without_interactions_trains_on_its_text_and_says_so(tiny_dataset: Dataset, tmp_path: Path) -> None:
    catalogue = replace(tiny_dataset, events=no_events(), connections=None, members=Members([]), meta=Meta("shop", 0, 0, ()))
    made_up, note = with_sessions(catalogue, seed=0)
    assert len(known_items(made_up, made_up.meta.cut_valid)) == len(catalogue.items), "real times say nothing here"
    assert note == NOTE and len(made_up.engagements) > 0
    topic = np.array([row % 4 for row in range(len(catalogue.items))])
    same = [len(set(topic[made_up.events.item[made_up.events.member == member]])) == 1 for member in range(20)]
    assert np.mean(same) > 0.5, "look-alike sessions mostly stay within a topic"
    report = train_encoder(catalogue, tmp_path / "encoder", replace(PLAN, steps=2))
    encoder = Encoder.load(tmp_path / "encoder")
    assert report.note == NOTE and not {"n_total", "n_7d"} & set(encoder.writer.quantizer.names)


def no_events() -> Events:
    empty = np.zeros(0, np.int64)
    return Events(*[empty.astype(kind) for kind in ("i8", "i4", "i4", "i8", "i2", "i1", "f4", "i1", "i4", "i2", "i2")])


def test_a_catalogue_without_words_is_refused(tiny_dataset: Dataset, tmp_path: Path) -> None:
    n = len(tiny_dataset.items)
    mute = Items(tiny_dataset.items.item_id, [""] * n, [""] * n, [""] * n, [""] * n, np.full(n, MISSING_TIME))
    with pytest.raises(NothingToLearn, match="no item has a title or a text"):
        train_encoder(replace(tiny_dataset, items=mute), tmp_path / "encoder", PLAN)
