"""The mean of a run's last weights: the mean by hand, also over a kill; and nothing of it where it is off."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from retrieval.data.schema import Dataset
from retrieval.encoder import FACTS, VALIDATION, Encoder
from retrieval.learn.average import Average
from retrieval.learn.batches import BatchSettings
from retrieval.learn.checkpoint import TrainingError
from retrieval.learn.fit import train_encoder
from retrieval.learn.settings import plan_of
from retrieval.learn.start import EncoderPlan, identity_of, start
from retrieval.learn.train import LoopSettings, Trainer
from retrieval.learn.validate import Exam
from retrieval.llama import Size

STEPS, SHARE, LAST = 10, 0.4, 4
PLAN = EncoderPlan(
    steps=STEPS,
    minutes=None,
    seed=3,
    size=Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=64, vocabulary=400),
    batch=BatchSettings(targets=24, random_items=16),
    loop=LoopSettings(learning_rate=5e-3),
)
AVERAGED = replace(PLAN, loop=replace(PLAN.loop, average=SHARE))


def weights(trainer: Trainer) -> torch.Tensor:
    return flat(trainer.model)


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()]).clone()


def stored_run(dataset: Dataset, plan: EncoderPlan) -> tuple[Trainer, list[torch.Tensor]]:
    """A whole run and the weights after each of its steps."""
    trainer = start(dataset, dataset.meta.cut_valid, plan, STEPS)
    stored: list[torch.Tensor] = []
    trainer.run(STEPS, lambda _done, _total: stored.append(weights(trainer)))
    return trainer, stored


def by_hand(stored: list[torch.Tensor], last: int) -> torch.Tensor:
    """The slow twin: the mean of the last stored weights in double precision."""
    return torch.stack(stored[-last:]).double().mean(0).float()


def test_the_weights_at_the_end_are_the_mean_by_hand_of_the_last_steps_of_the_same_run(tiny_dataset: Dataset) -> None:
    plain, steps = stored_run(tiny_dataset, PLAN)
    trainer, stored = stored_run(tiny_dataset, AVERAGED)
    assert trainer.averaged == LAST and plain.averaged == 0
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(stored, steps, strict=True)), "no step is another one"
    assert trainer.curve == plain.curve and torch.equal(weights(plain), steps[-1])
    torch.testing.assert_close(weights(trainer), by_hand(stored, LAST), atol=1e-6, rtol=1e-5)
    assert (weights(trainer) - stored[-1]).abs().max() > 1e-4, "the last step's weights are something else"


@pytest.mark.parametrize("share, last", [(1e-6, 1), (0.1, 1), (0.25, 2), (1.0, STEPS)])
def test_a_share_is_at_least_one_step_and_at_most_all(share: float, last: int) -> None:
    generator, weight = torch.Generator().manual_seed(0), torch.zeros(3, 5)
    average, stored = Average([("one", weight)], STEPS, share), []
    for done in range(1, STEPS + 1):
        weight.copy_(torch.randn(3, 5, generator=generator))
        stored.append(weight.clone())
        average.take(done)
    average.put()
    torch.testing.assert_close(weight, by_hand(stored, last))
    average.put()
    torch.testing.assert_close(weight, by_hand(stored, last), msg="put twice is put once")


@pytest.mark.parametrize("killed", [3, 8, STEPS])
def test_a_run_killed_before_in_and_at_the_end_of_the_mean_goes_on_to_the_same(
    killed: int, tiny_dataset: Dataset, tmp_path: Path
) -> None:
    whole, _ = stored_run(tiny_dataset, AVERAGED)

    def fresh() -> Trainer:
        return start(tiny_dataset, tiny_dataset.meta.cut_valid, AVERAGED, STEPS)

    before = fresh()

    def kill(done: int, _total: int) -> None:
        if done == killed:
            before.save(tmp_path)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        before.run(STEPS, kill)
    after = fresh()
    assert after.resume(tmp_path) and after.done == killed
    after.run(STEPS)
    torch.testing.assert_close(weights(after), weights(whole), atol=1e-6, rtol=1e-5)
    with pytest.raises(TrainingError, match=r"average was 0\.4"):
        start(tiny_dataset, tiny_dataset.meta.cut_valid, PLAN, STEPS).resume(tmp_path)


def test_the_folder_holds_the_mean_and_says_so_and_its_validation_run_was_judged_by_its_own(
    tiny_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[torch.Tensor] = []
    monkeypatch.setattr(Exam, "recall", lambda _exam, model: judged.append(flat(model)) or 0.5)
    report = train_encoder(tiny_dataset, tmp_path / "out", AVERAGED)
    assert report.averaged == LAST
    assert json.loads((tmp_path / "out" / "training" / "report.json").read_text())["averaged"] == LAST
    refit = start(tiny_dataset, tiny_dataset.meta.cut_test, AVERAGED, STEPS)
    stored: list[torch.Tensor] = []
    refit.run(STEPS, lambda _done, _total: stored.append(weights(refit)))
    saved = Encoder.load(tmp_path / "out")
    torch.testing.assert_close(flat(saved.model), by_hand(stored, LAST), atol=1e-6, rtol=1e-5)
    held = json.loads((tmp_path / "out" / FACTS).read_text())["training"]["settings"]["loop"]
    assert held["average"] == SHARE
    assert len(judged) == 1
    assert torch.equal(judged[0], flat(Encoder.load(tmp_path / "out" / VALIDATION).model))


def test_where_it_is_off_nothing_tells_of_it(tiny_dataset: Dataset, tmp_path: Path) -> None:
    """A training without it leaves the files that it left before there was such a setting."""
    report = train_encoder(tiny_dataset, tmp_path / "out", replace(PLAN, steps=2))
    assert report.averaged == 0
    assert "average" not in (tmp_path / "out" / FACTS).read_text()
    trainer = start(tiny_dataset, tiny_dataset.meta.cut_test, PLAN, 2)
    trainer.run(1)
    assert trainer.average is None and not [name for name, _ in trainer._weights() if name.startswith("average.")]


def test_weights_that_are_not_trained_stay_out_of_it(tiny_dataset: Dataset) -> None:
    trainer = start(tiny_dataset, tiny_dataset.meta.cut_test, AVERAGED, 2)
    names = {name for name, _ in trainer.model.named_parameters()}
    assert {name for name, _ in trainer._weights() if name.startswith("average.")} == {f"average.{name}" for name in names}
    frozen = next(iter(names))
    trainer.model.get_parameter(frozen).requires_grad_(requires_grad=False)
    again = trainer.again(2, 1e-3)
    assert again.average is not None and f"average.{frozen}" not in dict(again.average.tensors())


@pytest.mark.parametrize("wrong", [{"average": -0.1}, {"average": 1.1}, {"average": 0.25, "lora_rank": 4}])
def test_a_share_out_of_range_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(TrainingError, match=r"average \(expected a share of the steps, from 0 to 1, and 0 beside lora_rank"):
        plan_of(wrong)
    assert plan_of({"average": 0.25}).loop.average == 0.25 and plan_of({"lora_rank": 4}).loop.average == 0


def test_what_began_before_there_was_an_average_goes_on(tiny_dataset: Dataset) -> None:
    """Off, it is in no identity: neither of a plan nor of a run."""
    for plan in (PLAN, AVERAGED):
        held = [identity_of(tiny_dataset, plan), start(tiny_dataset, tiny_dataset.meta.cut_test, plan, 2).identity]
        assert ["average" in json.dumps(one, default=str) for one in held] == [plan is AVERAGED] * 2
