"""Two processes over gloo take the step of one: the same loss, the same gradients, one folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from retrieval.data.read import read_dataset
from retrieval.encoder import VALIDATION, Encoder
from retrieval.learn.fit import train_encoder
from retrieval.learn.ranks import Ranks, joined
from retrieval.learn.settings import plan_of
from retrieval.learn.start import start

ROOT = Path(__file__).parent.parent.parent
WAYS: dict[str, dict[str, object]] = {
    "plain": {},
    "all": {"cached": True, "matryoshka": [8], "hard": 1, "near": 0.99, "pooling": "last"},
}
SHAPE: dict[str, object] = {"hidden": 32, "heads": 2, "layers": 1, "vocabulary": 400}
SIZES = {**SHAPE, "targets": 24, "random_items": 16, "forward_tokens": 300}
MINED = {"hard": 2, "hard_from": "mined", "mine_every": 1, "mine_skip": 1, "mine_window": 5}


def program(folder: Path, out: Path) -> None:
    """What each process does: the first loss and its gradients in two ways, then a whole training."""
    found = {}
    with joined("cpu") as ranks:
        dataset = read_dataset(folder)
        for name, way in WAYS.items():
            trainer = start(dataset, dataset.meta.cut_test, plan_of({**SIZES, **way}), 10)
            trainer.model.train()
            loss = trainer.loss(trainer.sampler.batch(0))
            loss.backward()
            trainer.settle()
            weights = {"scale": trainer.log_scale, **dict(trainer.model.named_parameters())}
            found |= {f"{name} {part}": weight.grad.numpy() for part, weight in weights.items() if weight.grad is not None}
            found[f"{name} loss"] = loss.detach().numpy()
        report = train_encoder(dataset, out / "encoder", plan_of({**SIZES, **MINED, "steps": 4, "minutes": None}))
        np.savez(out / f"rank{ranks.rank}.npz", **found, steps=np.array(report.steps))


def in_processes(folder: Path, out: Path, world: int) -> None:
    """The program in `world` processes, as torchrun would describe them to each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(out)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    said = [process.communicate(timeout=60)[0] for process in started]
    assert not any(process.returncode for process in started), "\n".join(said)


def test_two_processes_take_the_step_of_one(tiny_folder: Path, tmp_path: Path) -> None:
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
    program(tiny_folder, tmp_path / "1")
    in_processes(tiny_folder, tmp_path / "2", 2)
    alone = dict(np.load(tmp_path / "1" / "rank0.npz"))
    for rank in (0, 1):
        here = dict(np.load(tmp_path / "2" / f"rank{rank}.npz"))
        assert here.keys() == alone.keys()
        for name, value in alone.items():
            np.testing.assert_allclose(here[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    one, two = (Encoder.load(tmp_path / str(world) / "encoder") for world in (1, 2))
    for mine, theirs in zip(one.model.parameters(), two.model.parameters()):
        np.testing.assert_allclose(mine.detach(), theirs.detach(), atol=2e-3)
    folder = tmp_path / "2" / "encoder"
    assert (folder / VALIDATION).is_dir() and not (folder / "training" / "checkpoint").exists()
    assert json.loads((folder / "training" / "report.json").read_text())["fingerprint"] == two.fingerprint


@pytest.mark.parametrize("rows", [0, 1, 2, 7])
def test_shares_hold_every_row_once(rows: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 50, rows)
    shares = Ranks(1, 3).shares(lengths)
    assert sorted(np.concatenate(shares).tolist()) == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


if __name__ == "__main__":
    program(Path(sys.argv[1]), Path(sys.argv[2]))
