"""The whole river, by the command that a newcomer types first: data, two trainings, a night, a server, questions, numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ranking.cli.demo import STEPS, training
from retrieval.data.schema import Dataset, Members, Meta
from retrieval.data.write import write_dataset


def demo(data: Path, work: Path) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "ranking.cli.main",
        "demo",
        "--data",
        str(data),
        "--work",
        str(work),
        "--minutes",
        "0.1",
        "--json",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_demo_runs_from_a_folder_to_ranked_answers_and_a_clean_end(tiny_folder: Path, tmp_path: Path) -> None:
    found = demo(tiny_folder, tmp_path / "work")
    warm, wishing, cold = found["conversations"]
    for spoken in (warm, wishing, cold):
        assert spoken["recommended"] and spoken["degraded"] == "NONE"
        assert all(0 < row["probability"] < 1 for row in spoken["recommended"])
        assert not set(spoken["history"]) & {row["title"] for row in spoken["recommended"]}, "what was liked is not recommended"
    assert wishing["instruction"] and not cold["history"]
    assert {lead["metric"] for lead in found["leads"]} == {"recall@10", "recall@100", "auc"}
    assert set(found["latencies_ms"]) >= {"search", "rank", "total"}
    what_is_served(found["chain"], warm["ranker"], tmp_path / "work")
    again = subprocess.run(
        [sys.executable, "-m", "ranking.cli.main", "demo", "--work", str(tiny_folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 2 and "is not an older demo" in again.stderr, "a folder that no demo made is never removed"


def what_is_served(chain: dict[str, Any], answered: str, work: Path) -> None:
    """The model that answered (its fingerprint) is the chain's last one that passed in float32, with the teacher's tasks and
    head."""
    steps = [row["step"] for row in chain["rows"]]
    assert steps == ["teacher", "student", "pruned", "int8"][: len(steps)] and len(steps) > 1
    stopped = [row["step"] for row in chain["rows"] if row["refused"]]
    last = chain["rows"][-1] if not stopped else chain["rows"][-2]
    assert chain["served"] == (last["step"] if last["step"] != "int8" else "pruned")
    assert answered == next(row["fingerprint"] for row in chain["rows"] if row["step"] == chain["served"])
    assert (f"stopped at {stopped[0]}" if stopped else "every gate passed") in chain["why"]
    told, teacher = (json.loads((Path(at) / "ranker.json").read_text()) for at in (chain["folder"], work / "ranker"))
    assert told["tasks"] == teacher["tasks"] and told["encoder"] == teacher["encoder"]
    assert (Path(chain["folder"]) / "fusion.json").is_file() == (work / "ranker" / "fusion.json").is_file()
    assert chain["rows"][1]["parameters"] < chain["rows"][0]["parameters"]


def test_a_table_without_interactions_gets_answers_too(tiny_dataset: Dataset, tmp_path: Path) -> None:
    nothing = tiny_dataset.events.take(tiny_dataset.events.timestamp < 0)
    shop = replace(tiny_dataset, events=nothing, connections=None, members=Members([]), meta=Meta("shop", 0, 0, ()))
    write_dataset(shop, tmp_path / "shop")
    found = demo(tmp_path / "shop", tmp_path / "work")
    assert found["leads"] == [] and len(found["conversations"]) == 2
    chain = found["chain"]
    assert chain["served"] == "teacher" and chain["rows"] == []
    assert "did not begin" in chain["why"] and "could not be judged" in chain["why"]
    visitor = found["conversations"][-1]
    assert visitor["recommended"] and visitor["history"][0] not in {row["title"] for row in visitor["recommended"]}


def test_the_own_world_is_trained_by_steps_and_other_data_by_the_clock() -> None:
    """By the clock a busy machine makes another demo: one whose ranker had not begun to read was once served."""
    for what in ("encoder", "ranker"):
        own, other = (training(what, Path("data"), Path("out"), minutes, 0) for minutes in (None, 4.0))
        assert own[own.index("--steps") + 1] == str(STEPS[what]) and "--minutes" not in own
        assert other[other.index("--minutes") + 1] == "2" and "--steps" not in other
