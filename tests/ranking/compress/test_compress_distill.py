"""The teacher is asked once and only for its own answers; a student comes nearer to it, also after a kill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from ranking.learn.distill import Answers, Distiller, Learning, forward_kl
from ranking.learn.examples import Pool
from ranking.learn.loop import Labels, answers, layers_of
from ranking.learn.questions import Ground
from ranking.ranker import Ranker
from retrieval.learn.checkpoint import TrainingError
from retrieval.llama import Size, new_llama

WHO: Mapping[str, object] = {"teacher": "t", "data": "d"}
SHORT = Learning(steps=4, learning_rate=5e-3, candidates=48)


def silent(_done: int, _total: int) -> None:
    """Hears progress and says nothing."""


@pytest.fixture(scope="module")
def kept(ground: Ground, teacher: Ranker, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    found = Answers(tmp_path_factory.mktemp("answers"), ground.pools, WHO, states=True)
    found.fill(teacher.engine.model, ground.labels, ground.writer, silent)
    return found


def student(ground: Ground, width: int = 16) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = Size(hidden=width, layers=2, heads=2, kv_heads=1, mlp=48)
    made = new_llama(shape, len(ground.writer.prompts.tokens), causal_lm=True)
    assert isinstance(made, LlamaForCausalLM)
    return made


def distiller(ground: Ground, kept: Answers | None, learning: Learning, width: int = 16) -> Distiller:
    return Distiller(student(ground, width), ground.writer, ground.pools, ground.labels, learning, {}, 3, kept)


def test_forward_kl_is_the_divergence_of_the_two_answers_and_zero_for_an_equal_student() -> None:
    teacher, other = torch.tensor([2.0, -1.0, 0.3]), torch.tensor([0.5, 0.0, -2.0])
    p, q = (torch.stack([(z / 2).sigmoid(), (-z / 2).sigmoid()], 1) for z in (teacher, other))
    by_hand = 4 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(forward_kl(teacher, other, 2.0), by_hand)
    assert float(forward_kl(teacher, teacher, 2.0)) == 0


def test_the_kept_answers_are_those_of_the_serving_engine(ground: Ground, teacher: Ranker, kept: Answers) -> None:
    chosen = [(name, group) for name in ground.pools for group in (0, 7, len(ground.pools[name]) - 1)]
    batch = ground.writer.write(ground.pools, chosen)
    logits = teacher.engine.score(batch.requests)
    wanted = []
    for (task, _), found in zip(chosen, logits):
        yes, no = (teacher.engine.label_ids.index(token) for token in ground.labels[task])
        wanted.append(found[:, yes] - found[:, no])
    said, states = kept.read(chosen)
    np.testing.assert_allclose(said.numpy(), np.concatenate(wanted), atol=1e-4)
    assert states is not None and states.shape == (len(batch.label), 32)


def test_answers_of_another_teacher_or_other_data_are_refused(
    ground: Ground, kept: Answers, pool_of_less: dict[str, Pool]
) -> None:
    for other in ({**WHO, "teacher": "u"}, {**WHO, "data": "e"}):
        with pytest.raises(TrainingError, match=r"teacher was 't', is 'u'|the data changed"):
            Answers(kept.folder, ground.pools, other, states=True)
    with pytest.raises(TrainingError, match="candidates"):
        Answers(kept.folder, pool_of_less, WHO, states=True)


@pytest.fixture
def pool_of_less(ground: Ground) -> dict[str, Pool]:
    return {name: pool.only(np.arange(len(pool)) > 0) for name, pool in ground.pools.items()}


def test_a_killed_teacher_is_asked_for_the_rest_alone(ground: Ground, teacher: Ranker, kept: Answers) -> None:
    files = sorted(kept.folder.glob("*.safetensors"))
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}
    files[-1].unlink()
    with pytest.raises(TrainingError, match="cannot be read"):
        kept.read([(list(ground.pools)[-1], 0)])
    kept.fill(teacher.engine.model, ground.labels, ground.writer, silent)
    assert files[-1].read_bytes() == before[files[-1]][1]
    assert all(file.stat().st_mtime_ns == before[file][0] for file in files[:-1])


def test_a_student_comes_nearer_to_its_teacher(ground: Ground, kept: Answers) -> None:
    run = distiller(ground, kept, replace(SHORT, steps=60, label=0.0))

    def apart() -> float:
        chosen = [("label", group) for group in range(40)]
        with torch.no_grad():
            _, own = answers(layers_of(run.model), ground.labels, ground.writer.write(ground.pools, chosen))
        return float(forward_kl(kept.read(chosen)[0], own))

    before = apart()
    run.run(60)
    assert apart() < 0.7 * before
    assert run.curve[-1]["hidden"] < 0.6 * run.curve[0]["hidden"]


@pytest.mark.parametrize(("width", "projected"), [(16, True), (32, False)])
def test_a_killed_student_goes_on_to_the_same_weights(
    ground: Ground, kept: Answers, tmp_path: Path, width: int, projected: bool
) -> None:
    whole = distiller(ground, kept, SHORT, width)
    assert ("projection" in whole.extra) == projected
    whole.run(4)
    half = distiller(ground, kept, SHORT, width)
    half.run(2)
    half.save(tmp_path)
    resumed = distiller(ground, kept, SHORT, width)
    assert resumed.resume(tmp_path)
    resumed.run(4)
    for one, two in zip(
        [*whole.model.parameters(), *whole.extra.values()], [*resumed.model.parameters(), *resumed.extra.values()]
    ):
        assert torch.equal(one, two)
    with pytest.raises(TrainingError, match=r"learning\.kl"):
        distiller(ground, kept, replace(SHORT, kl=2.0), width).resume(tmp_path)


def test_without_a_teacher_only_labels_can_be_learned_from(ground: Ground, labels: Labels) -> None:
    with pytest.raises(TrainingError, match="none are kept"):
        distiller(ground, None, SHORT)
    alone = distiller(ground, None, replace(SHORT, kl=0.0, hidden=0.0, label=1.0))
    alone.run(1)
    assert set(alone.curve[0]) == {"step", "loss"} and labels
