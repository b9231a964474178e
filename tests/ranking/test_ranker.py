"""A ranker folder is complete or refused, and its scores are what the plain model says, calibrated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from index.errors import BrewlineError
from ranking.calibrate import Calibrator, sigmoid
from ranking.prefill.attend import BackendMissing
from ranking.prompts import RankBudgets, RankPrompts
from ranking.ranker import Ranker, RankerError, RankerFacts, labels_of, save_ranker
from ranking.tasks import TaskError, tasks_of
from retrieval.counts import Counts
from retrieval.data.schema import Dataset, MemberView
from retrieval.features import Quantizer
from retrieval.fingerprint import MissingPart
from retrieval.llama import Size, new_llama
from retrieval.tokens import Tokens


@pytest.fixture(scope="module")
def folder(
    tiny_dataset: Dataset, tiny_tokens: Tokens, tiny_quantizer: Quantizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An untrained ranker whose second task has its own calibrator. Shared: do not write into it."""
    torch.manual_seed(0)
    model = new_llama(Size(hidden=32, layers=2, heads=4, kv_heads=2, mlp=48), len(tiny_tokens), causal_lm=True)
    model.model.embed_tokens.weight.data.normal_()
    tasks = tasks_of(tiny_dataset)
    facts = RankerFacts(
        tasks=tasks,
        labels=labels_of(tiny_tokens, tasks),
        budgets=RankBudgets(),
        calibrators={"label": Calibrator("platt", 0.5, -1.0, 100)},
        encoder=None,
        training={"steps": 0},
    )
    out = tmp_path_factory.mktemp("ranker") / "ranker"
    save_ranker(out, model, RankPrompts(tiny_tokens, tiny_quantizer, facts.budgets), facts)
    return out


@pytest.fixture(scope="module")
def ranker(folder: Path) -> Ranker:
    return Ranker.load(folder)


@pytest.fixture(scope="module")
def view(tiny_dataset: Dataset) -> MemberView:
    from retrieval.records import ItemWords, records_of, view_of

    record = next(iter(records_of(tiny_dataset, tiny_dataset.meta.cut_test)))
    return view_of(record, ItemWords(tiny_dataset.items), "more beans")


def candidates(ranker: Ranker, dataset: Dataset) -> list[list[int]]:
    numbers = Counts.from_dataset(dataset).as_of(dataset.meta.cut_test)
    return ranker.item_tokens([dataset.items[row] for row in range(len(dataset.items))], numbers)


def test_scores_are_the_plain_models_calibrated(ranker: Ranker, folder: Path, tiny_dataset: Dataset, view: MemberView) -> None:
    tokens = candidates(ranker, tiny_dataset)
    relations = ["follows" if row % 3 == 0 else "" for row in range(len(tokens))]
    got = ranker.score(view, tokens, "label", relations)
    assert got.dtype == np.float32 and got.shape == (60,)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    yes, no = ranker.facts.labels["label"]
    prefix = ranker.prefix(view, "label")
    for row in range(0, 60, 7):
        with torch.inference_mode():
            ids = prefix + tokens[row] + ranker.prompts.suffix(relations[row])
            z = plain(torch.tensor([ids])).logits[0, -1].double().numpy()
        assert got[row] == pytest.approx(sigmoid(0.5 * (z[yes] - z[no]) - 1.0), abs=1e-5)


def test_scores_do_not_depend_on_the_order_or_the_budget_of_a_pass(
    ranker: Ranker, folder: Path, tiny_dataset: Dataset, view: MemberView
) -> None:
    tokens = candidates(ranker, tiny_dataset)
    base = ranker.score(view, tokens)
    np.testing.assert_allclose(ranker.score(view, tokens[::-1])[::-1], base, atol=1e-6)
    np.testing.assert_allclose(Ranker.load(folder, max_tokens=300, backend="reference").score(view, tokens), base, atol=1e-5)
    assert ranker.score(view, []).shape == (0,)


def test_the_members_own_instruction_the_task_and_the_relation_matter(
    ranker: Ranker, tiny_dataset: Dataset, view: MemberView
) -> None:
    tokens = candidates(ranker, tiny_dataset)
    base = ranker.score(view, tokens, "label")
    assert not np.allclose(ranker.score(MemberView(view.member, view.history, view.connections), tokens, "label"), base)
    assert not np.allclose(ranker.score(view, tokens, "label", ["follows"] * 60), base)
    assert not np.allclose(ranker.prefix(view, "like")[:5], ranker.prefix(view, "label")[:5])
    np.testing.assert_array_equal(ranker.score(view, tokens, ""), base)


def test_a_task_without_a_calibrator_gives_the_models_own_probability(
    ranker: Ranker, tiny_dataset: Dataset, view: MemberView
) -> None:
    tokens = candidates(ranker, tiny_dataset)[:5]
    raw = ranker.logits(ranker.prefix(view, "like"), tokens, "like")
    np.testing.assert_allclose(ranker.score(view, tokens, "like"), sigmoid(raw), atol=1e-6)


def test_wrong_questions_are_refused_by_type(ranker: Ranker, folder: Path, view: MemberView) -> None:
    with pytest.raises(TaskError, match="knows label, like"):
        ranker.score(view, [[1]], "buy")
    with pytest.raises(RankerError, match="2 relations were given for 1"):
        ranker.score(view, [[1]], "label", ["", ""])
    with pytest.raises(BackendMissing):
        Ranker.load(folder, backend="warp")


def test_the_fingerprint_covers_every_file_that_decides_a_score(folder: Path, ranker: Ranker, tmp_path: Path) -> None:
    assert len(ranker.fingerprint) == 20
    for name in ("ranker.json", "quantizer.json", "tokenizer.json", "config.json", "model.safetensors"):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        (copy / name).write_bytes((copy / name).read_bytes() + b"\n")
        if name != "model.safetensors":
            assert Ranker.load(copy).fingerprint != ranker.fingerprint
        (copy / name).unlink()
        with pytest.raises((MissingPart, RankerError), match=name):
            Ranker.load(copy)


def edited(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def apply(copy: Path) -> None:
        facts = json.loads((copy / "ranker.json").read_text())
        change(facts)
        (copy / "ranker.json").write_text(json.dumps(facts))

    return apply


def fewer_tokens(copy: Path) -> None:
    """Another ranker's tokenizer."""
    specials = json.loads((copy / "tokenizer.json").read_text())["added_tokens"]
    names = [token["content"] for token in sorted(specials, key=lambda token: token["id"])]
    Tokens.train(["other words"], 0, [*reversed(names)]).save(copy)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (edited(lambda facts: facts.update(rank_template=99)), "rank_template is 99"),
        (edited(lambda facts: facts.update(format=0)), "format is 0"),
        (edited(lambda facts: facts.pop("labels")), "incomplete"),
        (edited(lambda facts: facts["budgets"].update(more=1)), "incomplete"),
        (edited(lambda facts: facts["labels"].update(label=[1, 2])), "answers of task 'label'"),
        (edited(lambda facts: facts["tasks"].append({"name": "x"})), "a task needs"),
        (edited(lambda facts: facts["calibrators"].update(label={"a": 0})), "calibrator"),
        (lambda copy: (copy / "ranker.json").write_text("{"), "not JSON"),
        (lambda copy: (copy / "model.safetensors").write_bytes(b"short"), "no usable LLaMA checkpoint"),
        (fewer_tokens, "answers of task"),
    ],
)
def test_pieces_that_do_not_belong_together_are_refused(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], None], says: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    spoil(copy)
    with pytest.raises(BrewlineError, match=says):
        Ranker.load(copy)


def test_a_warm_prefix_changes_no_score_and_saves_its_tokens(
    folder: Path, ranker: Ranker, tiny_dataset: Dataset, view: MemberView
) -> None:
    tokens, fresh = candidates(ranker, tiny_dataset), Ranker.load(folder)
    assert fresh.prefill_prefix(view) == len(fresh.prefix(view))
    np.testing.assert_allclose(fresh.score(view, tokens), ranker.score(view, tokens), atol=1e-6)
    assert fresh.engine.stats.tokens_reused == len(fresh.prefix(view))
