"""A trunk spread over processes under torchrun learns what one process learns, and each holds its part only."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from retrieval.data.read import read_dataset
from retrieval.data.schema import Dataset
from retrieval.encoder import VALIDATION, Encoder, length_batches
from retrieval.learn.checkpoint import STATE, TrainingError
from retrieval.learn.fit import train_encoder
from retrieval.learn.ranks import Ranks, joined, whole
from retrieval.learn.settings import plan_of
from retrieval.learn.start import EncoderPlan, start
from retrieval.learn.train import Trainer

ROOT = Path(__file__).parent.parent.parent
STEPS, KILLED = 6, 3
SIZES: dict[str, object] = {"hidden": 32, "heads": 2, "layers": 2, "vocabulary": 400, "targets": 24, "random_items": 16}
MINED = {"hard": 2, "hard_from": "mined", "mine_every": 2, "mine_skip": 1, "mine_window": 5}
WAYS: dict[str, dict[str, object]] = {
    "plain": {},
    "all": {**MINED, "cached": True, "recompute": True, "matryoshka": [8], "near": 0.99, "pooling": "mean+last"},
    "bf16": {"precision": "bf16"},
}


def planned(world: int, way: dict[str, object]) -> EncoderPlan:
    """The plan of one way; only one process does without `shard`."""
    return plan_of({**SIZES, "forward_tokens": 250, **way, "shard": world > 1})


def weights_of(trainer: Trainer) -> Iterator[tuple[str, torch.Tensor]]:
    yield "log_scale", trainer.log_scale
    yield from trainer.model.named_parameters()


def measured(trainer: Trainer) -> dict[str, np.ndarray]:
    """The first gradients, the loss curve and the weights that it ended at, all whole."""
    found: dict[str, np.ndarray] = {}
    trainer.model.train()
    trainer.loss(trainer.sampler.batch(0)).backward()
    trainer.settle()
    for name, weight in weights_of(trainer):
        if weight.grad is not None:
            found[f"gradient {name}"] = whole(weight.grad).numpy()
    trainer.run(STEPS)
    found["curve"] = np.array([point["loss"] for point in trainer.curve])
    return found | {f"weight {name}": whole(weight.detach()).numpy() for name, weight in weights_of(trainer)}


def held(trainer: Trainer) -> np.ndarray:
    """Shares of all weights, gradients and moments that this process holds."""
    weights = list(trainer.model.parameters())
    grads = [weight.grad for weight in weights if weight.grad is not None]
    moments = [trainer.optimizer.state[weight]["exp_avg_sq"] for weight in weights]
    return np.array([sum(map(local_size, kind)) / sum(one.numel() for one in kind) for kind in (weights, grads, moments)])


def local_size(tensor: torch.Tensor) -> int:
    return tensor.to_local().numel() if isinstance(tensor, DTensor) else tensor.numel()


def passes(trainer: Trainer, world: int) -> list[int]:
    """How many passes over members each process has in the first batch."""
    lengths = np.array([len(row) for row in trainer.sampler.batch(0).member_rows])
    shares = Ranks(0, world).shares(lengths)
    return [len(list(length_batches(lengths[share].tolist(), trainer.settings.forward_tokens))) for share in shares]


def killed_run(dataset: Dataset, folder: Path, world: int) -> dict[str, np.ndarray]:
    """The weights of a run that goes on from `folder`, where one process or two leave a checkpoint first."""

    def fresh() -> Trainer:
        return start(dataset, dataset.meta.cut_test, planned(2, {}), STEPS)

    if world == 2:
        before = fresh()
        before.run(KILLED)
        before.save(folder)
        Ranks.here().wait()
    after = fresh()
    assert after.resume(folder) and after.done == KILLED
    after.run(STEPS)
    return {f"resumed {name}": whole(weight.detach()).numpy() for name, weight in weights_of(after)}


def program(data: Path, out: Path) -> None:
    """What each process does; three only go on from what two left."""
    found: dict[str, np.ndarray] = {}
    with joined("cpu") as ranks:
        dataset, world = read_dataset(data), ranks.world
        if world > 1:
            found |= killed_run(dataset, out / "checkpoint", world)
        if world < 3:
            for name, way in WAYS.items():
                trainer = start(dataset, dataset.meta.cut_test, planned(world, way), STEPS)
                found |= {f"{name} {part}": value for part, value in measured(trainer).items()}
            found |= {"held": held(trainer), "passes": np.array(passes(trainer, 2))}
            plan = planned(world, {**MINED, "steps": 4, "minutes": None})
            # Every step is followed by a checkpoint.
            train_encoder(dataset, out / f"encoder{world}", replace(plan, loop=replace(plan.loop, checkpoint_seconds=0.0)))
            based = planned(world, {"base": str(out / "encoder1"), "lora_rank": 2, "steps": 2, "minutes": None})
            train_encoder(dataset, out / f"lora{world}", based)
        np.savez(out / f"world{world}-rank{ranks.rank}.npz", **found)


def torchrun(data: Path, out: Path, world: int) -> None:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), __file__, str(data), str(out)]
    shared = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, *words], env=shared, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = run.communicate(timeout=300)[0]
    except subprocess.TimeoutExpired:  # one waits for passes that another does not make
        run.terminate()  # the launcher ends the processes
        raise
    assert run.returncode == 0, said


@pytest.fixture(scope="module")
def ran(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which one process, then two, then three did the program."""
    out = tmp_path_factory.mktemp("sharded")
    program(tiny_folder, out)
    for world in (2, 3):
        torchrun(tiny_folder, out, world)
    return out


def loaded(out: Path, world: int, rank: int) -> dict[str, np.ndarray]:
    return dict(np.load(out / f"world{world}-rank{rank}.npz"))


@pytest.mark.parametrize("way", ["plain", "all"])
@pytest.mark.parametrize("rank", [0, 1])
def test_spread_over_two_processes_it_learns_as_in_one(ran: Path, way: str, rank: int) -> None:
    alone, here = loaded(ran, 1, 0), loaded(ran, 2, rank)
    mine = {name: value for name, value in alone.items() if name.startswith(f"{way} ")}
    assert any(" gradient " in name for name in mine)
    for name, value in mine.items():
        if " weight " in name:  # AdamW makes a full step of a gradient that is rounding alone, but of few entries
            np.testing.assert_allclose(here[name], value, atol=5e-3, err_msg=name)
            assert np.abs(here[name] - value).mean() < 2e-5, name
        else:
            np.testing.assert_allclose(here[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_in_bf16_it_learns_nearly_the_same(ran: Path) -> None:
    alone, here = loaded(ran, 1, 0), loaded(ran, 2, 1)
    np.testing.assert_allclose(here["bf16 curve"], alone["bf16 curve"], rtol=0.02)
    assert not np.array_equal(here["bf16 curve"], here["plain curve"])


def test_each_process_holds_half_and_has_passes_of_its_own(ran: Path) -> None:
    """Passes differ in number, or the test of equal learning would say nothing about those that make up for it."""
    halves = [loaded(ran, 2, rank)["held"] for rank in (0, 1)]
    np.testing.assert_allclose(halves[0], 0.5, atol=0.02)
    np.testing.assert_allclose(halves[0] + halves[1], 1.0)
    first, second = loaded(ran, 1, 0)["passes"].tolist()
    assert first != second


def test_a_killed_run_goes_on_also_over_another_number_of_processes(ran: Path) -> None:
    two, three = loaded(ran, 2, 0), loaded(ran, 3, 2)
    resumed = [name for name in two if name.startswith("resumed ")]
    assert resumed
    for name in resumed:
        whole_run = two[name.replace("resumed", "plain weight")]
        np.testing.assert_array_equal(two[name], whole_run, err_msg=name)
        np.testing.assert_allclose(three[name], whole_run, atol=5e-3, err_msg=name)
        assert np.abs(three[name] - whole_run).mean() < 2e-5, name


def test_the_folder_is_whole_and_that_of_one_process(ran: Path) -> None:
    for kind in ("encoder1/validation", "encoder1", "lora1"):
        one, two = (Encoder.load(ran / part) for part in (kind, kind.replace("1", "2")))
        for mine, theirs in zip(one.model.parameters(), two.model.parameters(), strict=True):
            np.testing.assert_allclose(mine.detach(), theirs.detach(), atol=5e-3)
    assert (ran / "encoder2" / VALIDATION).is_dir() and not (ran / "encoder2" / "training" / "checkpoint").exists()
    assert (ran / "checkpoint" / STATE).is_file()


def test_a_process_alone_has_nobody_to_share_with(tiny_dataset: Dataset) -> None:
    with pytest.raises(TrainingError, match="torchrun"):
        start(tiny_dataset, tiny_dataset.meta.cut_test, planned(2, {}), 1)


if __name__ == "__main__":
    program(Path(sys.argv[1]), Path(sys.argv[2]))
    # All is written; an interpreter that unwinds beside gloo's threads was seen to abort, once in some dozens of runs.
    os._exit(0)
