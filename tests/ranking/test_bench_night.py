"""`brewline bench night`: exact buckets lose nothing, looser policies encode less, and few changes cost few seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ranking.cli.main import app
from retrieval.data.schema import Dataset
from retrieval.llama import Size
from retrieval.night_bench import bench_fortnight, invented
from retrieval.packed_bench import made_encoder


def bench(*words: str) -> str:
    done = CliRunner().invoke(app, ["bench", "night", *words])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def encoder(tiny_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "encoder"
    made_encoder(tiny_dataset, Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=48), "mean+last", 0, folder)
    facts = json.loads((folder / "encoder.json").read_text())
    facts["training"] = {"data": "tiny", "cut": tiny_dataset.meta.cut_test}
    (folder / "encoder.json").write_text(json.dumps(facts))
    return folder


def test_a_replay_of_three_nights(encoder: Path, tiny_folder: Path) -> None:
    found = json.loads(bench(str(tiny_folder), "--encoder", str(encoder), "--nights=3", "--hysteresis=4,100", "--json"))
    assert (found["nights"], found["items"], found["data"]) == (3, 60, "tiny") and 0 < found["queries"] <= 40
    exact, four, never = found["policies"]
    assert [row["hysteresis"] for row in found["policies"]] == [0, 4, 100]
    assert exact["share_embedded"] > four["share_embedded"] > never["share_embedded"]
    assert found["largest_difference"] < 1e-6, "the replayed exact nights are a full rebuild"
    for row in found["policies"]:
        assert len(row["shares"]) == 3 and row["share_embedded"] == pytest.approx(sum(row["shares"]) / 3)
        assert row["recall@2000"] <= 1 and row["recall@10"] <= row["recall@100"]
        for name, minus in row["minus_exact"].items():
            assert minus["value"] == pytest.approx(row[name] - exact[name])
            assert minus["low"] <= minus["value"] + 1e-12 and minus["value"] <= minus["high"] + 1e-12
    assert exact["minus_exact"]["recall@10"] == {"value": 0, "error": 0, "low": 0, "high": 0}
    shown = bench(str(tiny_folder), "--encoder", str(encoder), "--nights=1", "--hysteresis=2")
    assert "1 nights" in shown and "%" in shown


def test_two_nights_of_an_invented_catalogue() -> None:
    found = json.loads(bench("--items", "400", "--changed", "0.05", "--hidden", "32", "--json"))
    assert (found["items"], found["embedded"]) == (400, 20)
    assert found["ratio"] == pytest.approx(found["seconds_embed_changed"] / found["seconds_embed_full"]) and found["ratio"] < 0.5
    assert found["largest_difference"] < 1e-6


def test_the_same_seed_invents_the_same_catalogue() -> None:
    one, two, other = invented(200, 3), invented(200, 3), invented(200, 4)
    assert one.items.title == two.items.title != other.items.title
    assert (one.events.timestamp == two.events.timestamp).all() and len(set(one.items.title)) > 190


@pytest.mark.parametrize("words", [[], ["--items", "500", "DATA"], ["DATA", "--encoder", "E", "--hysteresis", "0,-1"]])
def test_wishes_that_contradict_each_other_are_refused(words: list[str], tiny_folder: Path, encoder: Path) -> None:
    named = {"DATA": str(tiny_folder), "E": str(encoder)}
    done = CliRunner().invoke(app, ["bench", "night", *(named.get(word, word) for word in words)])
    assert done.exit_code == 2


def test_days_on_which_nobody_comes_back(tiny_dataset: Dataset, encoder: Path) -> None:
    from retrieval.encoder import Encoder
    from retrieval.evidence.protocol import EvidenceError

    with pytest.raises(EvidenceError, match="nobody comes back"):
        bench_fortnight(tiny_dataset, Encoder.load(encoder), [], 0)
