"""`brewline demo`: the whole river on one machine, by the very commands that a user types, with numbers and a clean end."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table

from index.errors import BrewlineError
from ranking.cli import demo_chain
from ranking.cli.demo_chain import Small
from ranking.cli.output import console_err, emit, words

MARK = ".brewline-demo"
HEADLINE = ("recall@10", "recall@100")
ENCODER_SHARE = 0.5
MINUTES = 4.4
STEPS = {"encoder": 120, "ranker": 900}
"""Of the demo's own world: what MINUTES on two quiet cores give. Below some 400 the ranker has not begun to read, so by the
clock a demo on a busy machine ended with a model that was worse than none; by steps it ends later, with the same models."""
REFUSED = 2
"""Exit status of a command that said what is wrong; a bug ends with another one."""


class DemoError(BrewlineError):
    """A step of the demo failed."""


def demo(
    data: Annotated[Path | None, typer.Option(help="A data folder of yours; without it a synthetic world is made.")] = None,
    work: Annotated[Path, typer.Option(help="Where everything is put; an older demo there is replaced.")] = Path("demo"),
    minutes: Annotated[
        float | None,
        typer.Option(help=f"Training time of both models; without it {MINUTES:g}, or steps for the synthetic world.", min=0.1),
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides world, weights and batches.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")] = False,
) -> None:
    """Make or take data, train both models, make the ranker small, publish a snapshot, serve it, ask it, and say how good it is.

    Examples: `brewline demo`; `brewline demo --data movietweets --minutes 20`
    """
    started = time.monotonic()
    _clear(work)
    steps = Steps(work, as_json)
    folder = data if data is not None else work / "world"
    if data is None:
        steps.run("A synthetic world", ["data", "world", str(folder), "--seed", str(seed)])
    checked = steps.run("What the data holds", ["data", "check", str(folder)])
    encoder, teacher, store = work / "encoder", work / "ranker", work / "store"
    minutes = MINUTES if minutes is None and data is not None else minutes
    steps.run("The dual encoder learns", training("encoder", folder, encoder, minutes, seed))
    report = steps.run("The ranker learns", [*training("ranker", folder, teacher, minutes, seed), "--encoder", str(encoder)])
    small = go_small(steps, demo_chain.write_plan(work, folder, teacher, report, minutes, seed), teacher)
    models = ["--encoder", str(encoder), "--ranker", str(small.folder)]
    quality = judge(steps, folder, models) if checked["sizes"]["events"] else {}
    steps.run("A night: embed, build, check, publish", ["nightly", str(folder), *models, "--store", str(store), "--as-of", "end"])
    from ranking.cli.demo_talk import talk

    with steps.serving([*models, "--store", str(store)]) as port:
        answers = talk(folder, port)
    seconds = round(time.monotonic() - started, 1)
    result = {"data": str(folder), **answers, "chain": small.facts(), "leads": leads(quality), **quality, "seconds": seconds}
    emit(result, as_json=as_json, table=lambda: _tables(result, small))


def go_small(steps: Steps, plan: Path, teacher: Path) -> Small:
    """The ranker to serve: the last model of the chain that passed its gate, at worst its teacher; the terminal says which."""
    found = steps.run("The ranker goes small, with a gate at every step", ["ranker", "compress", str(plan)], stops=True)
    small = demo_chain.served(found, teacher)
    steps.console.print(words(f"  served: {small.model}; {small.why}"))
    return small


def judge(steps: Steps, folder: Path, models: Sequence[str]) -> dict[str, Any]:
    """The evaluation of both models beside the baselines, shown as its own commands show it."""
    found = {}
    for what, flags in (("retrieval", models[:2]), ("ranking", models)):
        out = steps.work / "evaluation" / what
        command = ["evaluate", what, str(folder), *flags, "--counts", "live", "--out", str(out)]
        steps.show(f"How good is {what}?", command)
        found[what] = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    return found


def leads(quality: dict[str, Any]) -> list[dict[str, Any]]:
    """Model minus the best simple baseline of the same run, with the paired 95 % interval, for the headline metrics."""
    rows = []
    if "retrieval" in quality:
        report = quality["retrieval"]
        for metric in HEADLINE:
            best = report["best_baseline"][metric]
            rows.append({"metric": metric, "baseline": best, **report["model_minus_baseline"][best][metric]})
    if "ranking" in quality:
        report = quality["ranking"]
        best = report["best_baseline"]
        rows.append({"metric": "auc", "baseline": best, **report["auc_model_minus_baseline"][best]})
    return rows


class Steps:
    """Runs the demo's commands one after the other, shown as a user would type them."""

    def __init__(self, work: Path, quiet: bool) -> None:
        self.work, self.quiet = work, quiet
        self.console = console_err()

    def run(self, title: str, arguments: Sequence[str], *, stops: bool = False) -> dict[str, Any]:
        """The JSON that the command printed. Raises DemoError if it failed; its own message is already on stderr. A command that
        `stops` may refuse after it has printed what it found."""
        self._announce(title, arguments)
        began = time.monotonic()
        done = subprocess.run([*_brewline(), *arguments, "--json"], stdout=subprocess.PIPE, check=False)
        if done.returncode and not (stops and done.returncode == REFUSED and done.stdout):
            raise DemoError(f"`brewline {' '.join(arguments)}` ended with status {done.returncode}; see its message above")
        self.console.print(f"  done in {time.monotonic() - began:.1f} s", style="dim")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def show(self, title: str, arguments: Sequence[str]) -> None:
        """The command's own tables, on stdout (on stderr if the demo owes stdout one JSON object)."""
        self._announce(title, arguments)
        done = subprocess.run([*_brewline(), *arguments], stdout=sys.stderr if self.quiet else None, check=False)
        if done.returncode:
            raise DemoError(f"`brewline {' '.join(arguments)}` ended with status {done.returncode}; see its message above")

    def serving(self, arguments: Sequence[str]) -> Serving:
        """A server on a free port for as long as the block lasts."""
        command = ["serve", *arguments, "--port", "0"]
        self._announce("A gRPC service", command)
        return Serving([*_brewline(), *command, "--json"])

    def _announce(self, title: str, arguments: Sequence[str]) -> None:
        self.console.print()
        self.console.print(title, style="bold")
        self.console.print(f"  $ brewline {' '.join(arguments)}", style="cyan", markup=False)


class Serving:
    """A server process: entering waits until it answers and gives its port, leaving stops it and checks how it ended."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)

    def __enter__(self) -> int:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise DemoError(f"the server ended with status {self._process.wait()} before it was ready; see its message above")
        return int(json.loads(line)["port"])

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._process.terminate()
        try:
            status = self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise DemoError("the server did not stop within 30 s of SIGTERM") from None
        if status and kind is None:
            raise DemoError(f"the server ended with status {status} after SIGTERM, expected 0")


def _brewline() -> list[str]:
    return [sys.executable, "-m", "ranking.cli.main"]


def training(what: str, data: Path, out: Path, minutes: float | None, seed: int) -> list[str]:
    """The command that trains the `encoder` or the `ranker`: so many `minutes` for both together, or STEPS (None)."""
    share = ENCODER_SHARE if what == "encoder" else 1 - ENCODER_SHARE
    length = ["--steps", str(STEPS[what])] if minutes is None else ["--minutes", f"{minutes * share:g}"]
    return [what, "train", str(data), "--out", str(out), *length, "--seed", str(seed)]


def _clear(work: Path) -> None:
    """An empty folder with the demo's mark. Raises DemoError rather than remove what no demo made."""
    if work.exists():
        if not (work / MARK).is_file():
            raise DemoError(f"{work} exists and is not an older demo; choose another --work or remove it")
        shutil.rmtree(work)
    work.mkdir(parents=True)
    (work / MARK).touch()


def _tables(result: dict[str, Any], small: Small) -> RenderableType:
    from ranking.cli.demo_talk import conversation, latencies

    parts: list[RenderableType] = [*map(conversation, result["conversations"]), latencies(result["latencies_ms"])]
    if small.rows:
        parts.append(demo_chain.side_by_side(small))
    parts.append(words(f"The ranker that was served: {small.model}; {small.why}."))
    if result["leads"]:
        parts.append(_lead_table(result["leads"]))
    parts.append(words(f"The whole demo took {result['seconds'] / 60:.1f} minutes."))
    return Group(*parts)


def _lead_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="The models against the best simple baseline (paired 95 % intervals over members)", title_justify="left")
    for name in ("metric", "best simple baseline", "model minus baseline", "interval", ""):
        table.add_column(name)
    for row in rows:
        verdict = "better" if row["low"] > 0 else "worse" if row["high"] < 0 else "no clear difference"
        interval = f"{row['low']:+.4f} to {row['high']:+.4f}"
        table.add_row(row["metric"], row["baseline"], f"{row['value']:+.4f}", interval, verdict)
    return table
