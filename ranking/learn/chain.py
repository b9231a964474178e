"""A plan becomes models: every step a complete ranker folder, calibrated and judged against its parent before the next begins.

    OUT/teacher/                       what the teacher scores (its own folder stays where it is)
    OUT/answers/FINGERPRINT/           what a model said about every training candidate; it is asked once, whoever learns from it
    OUT/ROUTE/seed-S/N-STEP/           a ranker folder, and compress/ with the step's record, its scores and its learning curve
    OUT/results.json, results.md       the table, written after every step

A step's record names all that decides its bytes: parent, settings, seed, data. A killed chain goes on with the step it was in.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ranking.calibrate import ENOUGH, Calibrator, fit
from ranking.export import export_ranker
from ranking.learn.compare import start_to_compare
from ranking.learn.compress_plan import CompressPlan, Distill, Prune, Quantize, Scratch, Step, configs_of, facts_of
from ranking.learn.distill import Answers, Distiller, Learning
from ranking.learn.gates import Check, Measure, judge, measure
from ranking.learn.prune import MOST, prune, weights_of
from ranking.learn.quantize import quantized, stored
from ranking.learn.questions import Ground, Raw, Scoring
from ranking.prefill.engine import Engine
from ranking.prefill.onnx_engine import OnnxEngine
from ranking.prefill.onnx_folder import NotAdmitted
from ranking.ranker import Ranker, save_ranker
from ranking.tasks import LABEL
from retrieval.data.schema import Dataset
from retrieval.evidence.report import without_nan
from retrieval.fingerprint import FingerprintMismatch
from retrieval.learn.checkpoint import check_identity, write_json
from retrieval.learn.warm import start_from_words
from retrieval.llama import fit_vocabulary, load_llama, smooth_buckets

WORK, RECORD, SCORES = "compress", "step.json", "scores.npz"
ONNX = "onnx"

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""


@dataclass(frozen=True)
class Done:
    """A finished step. `record` is its file's content; `held` and `test` raw scores float32 of the two judging parts; `said`
    the probabilities of the test part as the folder's own calibrator gives them; `checks` the gate's lines."""

    route: str
    seed: int
    name: str
    folder: Path
    record: Mapping[str, Any]
    held: Raw
    test: Raw
    said: Raw
    checks: list[Check]

    @property
    def fingerprint(self) -> str:
        """The ranker folder's."""
        return str(self.record["fingerprint"])

    @property
    def refused(self) -> str:
        """Why the chain stops here, in words; "" if it goes on."""
        broken = [f"{one.metric} {one.measure.child:.4f} ({_told(one)})" for one in self.checks if not one.passed]
        onnx = self.record.get(ONNX, {})
        return "; ".join([*broken, *([str(onnx["refused"])] if onnx.get("refused") else [])])


def _told(check: Check) -> str:
    one = check.measure
    return f"{one.lost:+.4f}, 95 % {one.low:+.4f} .. {one.high:+.4f}, limit {check.limit:g}"


class Chain:
    """The steps of one plan over one data set and one teacher."""

    def __init__(self, plan: CompressPlan, dataset: Dataset, ground: Ground, teacher: Ranker, tell: Progress) -> None:
        """Raises PruneError and QuantizeError for a step that cannot be, before anything is trained."""
        self.plan, self.dataset, self.ground, self.teacher, self.tell = plan, dataset, ground, teacher, tell
        for steps in plan.routes.values():
            configs_of(steps, teacher.engine.model.config)

    def root(self) -> Done:
        """The teacher, scored as every step is."""
        folder = self.plan.out / "teacher"
        identity = {"teacher": self.teacher.fingerprint, **self.ground.identity, "judged": self.plan.judged}
        if (record := remembered_step(folder, identity)) is None:
            folder.mkdir(parents=True, exist_ok=True)
            facts = self._scored(self.plan.teacher, folder)
            record = {"identity": identity, "fingerprint": self.teacher.fingerprint, "steps": 0, "seconds": 0.0, **facts}
            write_json(folder / RECORD, record)
        return _done("", 0, "teacher", self.plan.teacher, folder, record, [])

    def route(self, name: str, seed: int, root: Done) -> Iterator[Done]:
        """Each step of a route as it is finished; the last one is the first whose gate it did not pass."""
        gates, parent = self.plan.gates_of(name), root
        for number, step in enumerate(self.plan.routes[name]):
            folder = self.plan.out / name / f"seed-{seed}" / f"{number + 1}-{step.name}"
            identity = self._identity(step, seed, parent)
            record = remembered_step(folder / WORK, identity)
            if record is None:
                record = self._run(step, seed, parent, folder, identity)
            checks = judge(measures_of(record["measured"]), gates) if gates else []
            if gates and ONNX in record and (held := record[ONNX].get("measured")):
                checks += [replace(one, metric=f"{one.metric}, onnxruntime") for one in judge(measures_of(held), gates)]
            parent = _done(name, seed, step.name, folder, folder / WORK, record, checks)
            yield parent
            if parent.refused and gates:
                return

    def _identity(self, step: Step, seed: int, parent: Done) -> dict[str, object]:
        """All that decides a step's bytes."""
        judged = {"calibration": self.plan.calibration, "judged": self.plan.judged}
        if self.plan.taught is not None:  # folders of before do not name it
            judged["taught"] = self.plan.taught
        origins = {"parent": parent.fingerprint, "root": self.teacher.fingerprint}
        return {**origins, "step": facts_of(step), "seed": seed, **self.ground.identity, **judged}

    def _run(self, step: Step, seed: int, parent: Done, folder: Path, identity: dict[str, object]) -> dict[str, Any]:
        began, work = time.monotonic(), folder / WORK
        work.mkdir(parents=True, exist_ok=True)
        model, learned = self._model(step, seed, parent, work, identity)
        fingerprint = self._save(step, model, parent, folder, learned)
        record: dict[str, Any] = {"identity": identity, "fingerprint": fingerprint, "steps": learned}
        record |= self._scored(folder, work)
        held = np.load(work / SCORES)["held"]
        record["measured"] = self._compared(parent.held, held)
        if isinstance(step, Quantize) and step.onnx:
            record[ONNX] = self._exported(folder, parent)
        record["seconds"] = round(time.monotonic() - began, 1)
        write_json(work / f"{RECORD}.tmp", record)
        (work / f"{RECORD}.tmp").replace(work / RECORD)
        shutil.rmtree(work / "checkpoint", ignore_errors=True)
        return record

    def _model(
        self, step: Step, seed: int, parent: Done, work: Path, identity: Mapping[str, object]
    ) -> tuple[LlamaForCausalLM, int]:
        """A step's weights, and how many steps they learned."""
        if isinstance(step, Quantize):
            return quantized(loaded(parent.folder), step.to), 0
        learning = replace(step.learn, kl=0.0, hidden=0.0, label=1.0) if isinstance(step, Scratch) else step.learn
        ground = self.ground
        model = self._pruned(step, seed, parent) if isinstance(step, Prune) else self._student(step, seed, parent)
        kept = None
        if learning.taught and learning.steps and not isinstance(step, Scratch):
            kept = self._answers(parent.folder if step.teacher == "parent" else self.plan.teacher, learning)
        if not learning.steps:
            return model, 0
        run = Distiller(model, ground.writer, ground.pools, ground.labels, learning, identity, seed, kept, ground.places)
        if run.positions is not None:
            run.positions.begin(self.teacher.facts.training)
        run.resume(work / "checkpoint")
        stage = f"{work.parent.parent.parent.name}, seed {seed}, {step.name}"
        run.run(learning.steps, lambda done, total: self.tell(stage, done, total), work / "checkpoint")
        curve = "".join(json.dumps(point) + "\n" for point in run.curve)
        (work / "curve.jsonl").write_text(curve, encoding="utf-8")
        return run.model, run.done

    def _student(self, step: Distill | Scratch, seed: int, parent: Done) -> LlamaForCausalLM:
        """A checkpoint with room for the field tokens, or a new model that knows its words from its parent."""
        torch.manual_seed(seed)
        prompts = self.teacher.prompts
        if step.base is not None:
            model = loaded(step.base)
            if model.get_input_embeddings().num_embeddings < len(prompts.tokens):
                fit_vocabulary(model, prompts.tokens)
                smooth_buckets(model, prompts.tokens, prompts.quantizer)
            return model.to(self.plan.device)
        (config,) = configs_of([step], self.teacher.engine.model.config)
        model = LlamaForCausalLM(config)
        vectors = self._words(config, seed) if isinstance(step, Scratch) else loaded(parent.folder).get_input_embeddings().weight
        if not start_to_compare(model, prompts.tokens, vectors, self.ground.labels):
            smooth_buckets(model, prompts.tokens, prompts.quantizer)
        return model.to(self.plan.device)

    def _words(self, config: LlamaConfig, seed: int) -> torch.Tensor:
        """Word vectors [V, D] that nobody taught: where `brewline ranker train` begins without an encoder."""
        prompts, known = self.teacher.prompts, LlamaForCausalLM(config)
        smooth_buckets(known, prompts.tokens, prompts.quantizer)
        start_from_words(known, prompts.tokens, self.dataset, self.dataset.meta.cut_test, seed)
        return known.get_input_embeddings().weight

    def _pruned(self, step: Prune, seed: int, parent: Done) -> LlamaForCausalLM:
        ground = self.ground
        pool = {ground.main: ground.pools[ground.main]}
        order = np.random.default_rng([seed, 8]).permutation(len(pool[ground.main]))
        each = max(1, round(step.learn.candidates * len(order) / max(1, len(pool[ground.main].label))))
        starts = range(0, min(len(order), each * step.batches), each)
        batches = [
            ground.writer.write(pool, [(ground.main, group) for group in order[first : first + each].tolist()])
            for first in starts
        ]
        most = 1.0 if step.one_shot else MOST
        return prune(loaded(parent.folder).to(self.plan.device), step.keep, ground.labels, batches, seed=seed, most=most)

    def _answers(self, folder: Path, learning: Learning) -> Answers:
        """What the model of a folder says about all training candidates, kept under its fingerprint."""
        teacher = Ranker.load(folder, device=self.plan.device)
        states = learning.hidden > 0
        place = self.plan.out / "answers" / f"{teacher.fingerprint}{'-states' if states else ''}"
        kept = Answers(place, self.ground.pools, {"teacher": teacher.fingerprint, **self.ground.identity}, states=states)
        kept.fill(teacher.engine.model, self.ground.labels, self.ground.writer, lambda done, of: self.tell("teacher", done, of))
        return kept

    def _save(self, step: Step, model: LlamaForCausalLM, parent: Done, folder: Path, learned: int) -> str:
        """A complete ranker folder with calibrators of its own; tasks with too few answers held back keep their parent's."""
        before = Ranker.load(parent.folder)
        if before.fingerprint != parent.fingerprint:
            raise FingerprintMismatch(
                str(parent.folder), before.fingerprint, parent.fingerprint, "remove the folder, start again"
            )
        engine = Engine(model, self.teacher.engine.label_ids)
        raw = {name: questions.scores(engine, self.ground.labels) for name, questions in self.ground.held.items()}
        answers = {name: self.ground.expected(name, one) for name, one in raw.items()}
        fitted = {name: fit(one, answers[name], self.plan.calibration) for name, one in raw.items()}
        enough = {name: one for name, one in fitted.items() if self.ground.held[name].rarer >= ENOUGH}
        made = {"parent": parent.fingerprint, "root": self.teacher.fingerprint, "step": facts_of(step), "learned": learned}
        training = {**before.facts.training, "compressed": {**made, "recalibrated": sorted(enough)}}
        facts = replace(before.facts, calibrators={**before.facts.calibrators, **enough}, training=training)
        head = before.head
        if head is not None and LABEL in enough:
            head = replace(head, text=fit(raw[LABEL], answers[LABEL]))
        return save_ranker(folder, stored(model, step.to) if isinstance(step, Quantize) else model, before.prompts, facts, head)

    def _scored(self, folder: Path, work: Path) -> dict[str, Any]:
        """Scores of a ranker folder as it is loaded to serve, on disk, and what it weighs."""
        ranker, ground = Ranker.load(folder, device=self.plan.device), self.ground
        held, test = (part.scores(ranker.engine, ground.labels) for part in (ground.asked, ground.test))
        said = ranker.facts.calibrators.get(ground.main, Calibrator()).probabilities(test)
        np.savez(work / SCORES, held=held, test=test, said=said)
        total, body = weights_of(ranker.engine.model.config)
        cold = Engine(ranker.engine.model, ranker.engine.label_ids, cache_bytes=0)
        return {
            "parameters": total,
            "outside_embeddings": body,
            "bytes": (folder / "model.safetensors").stat().st_size,
            "items_per_second": round(ground.test.items_per_second(cold), 1),
        }

    def _compared(self, parent: Raw, child: Raw) -> dict[str, object]:
        asked = self.ground.asked
        found = measure(asked.label, asked.member, parent, child, self.plan.calibration)
        return {name: without_nan(asdict(one)) for name, one in found.items()}

    def _exported(self, folder: Path, parent: Done) -> dict[str, Any]:
        """The folder's onnxruntime int8 engine under its own gate and the plan's: what was measured, or why it was refused."""
        shutil.rmtree(folder / ONNX, ignore_errors=True)
        try:
            facts = export_ranker(folder, self.dataset, folder / ONNX, int8=True)
        except NotAdmitted as refusal:
            return {"refused": str(refusal)}
        engine: Scoring = OnnxEngine(folder / ONNX, cache_bytes=0)
        ground = self.ground
        held, test = (part.scores(engine, ground.labels) for part in (ground.asked, ground.test))
        calibrator = Ranker.load(folder).facts.calibrators.get(ground.main, Calibrator())
        np.savez(folder / WORK / f"{ONNX}-{SCORES}", test=test, said=calibrator.probabilities(test))
        speed = round(ground.test.items_per_second(engine), 1)
        measured = self._compared(parent.held, held)
        return {"refused": "", "bytes": facts["bytes"], "items_per_second": speed, "measured": measured}


def loaded(folder: Path | str) -> LlamaForCausalLM:
    """The weights of a folder, with gradients and unfused."""
    model: LlamaForCausalLM = load_llama(folder, causal_lm=True)
    return model.eval()


def measures_of(held: Mapping[str, Mapping[str, float | None]]) -> dict[str, Measure]:
    """Measures as a record holds them, where null is what could not be measured."""
    known = {name: {part: np.nan if value is None else value for part, value in one.items()} for name, one in held.items()}
    return {name: Measure(**one) for name, one in known.items()}


def remembered_step(folder: Path, identity: Mapping[str, object]) -> dict[str, Any] | None:
    """The record of a finished step, None if there is none. Raises TrainingError if it is of another step."""
    path = folder / RECORD
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    check_identity(path, record["identity"], identity)
    return record


def _done(route: str, seed: int, name: str, folder: Path, work: Path, record: Mapping[str, Any], checks: list[Check]) -> Done:
    with np.load(work / SCORES) as held:
        return Done(route, seed, name, folder, record, held["held"], held["test"], held["said"], checks)
