"""The command line teaches itself, keeps stdout for the answer, and says one line about what a person can mend."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
from typer.testing import CliRunner

from index.errors import BrewlineError
from ranking.cli import main as cli
from ranking.cli.logs import SettingsError, set_up
from ranking.cli.output import emit, one_line, progress_bar, words
from retrieval.encoder import save_encoder
from retrieval.features import Quantizer
from retrieval.llama import Size, new_llama
from retrieval.tokens import Tokens
from retrieval.writer import Budgets, Writer

ROOT = Path(__file__).parent.parent
PROMISED = """
data world, data check, data import movietweets, data import movielens, data import goodbooks, data import mind,
data import amazon, data import steam, data import csv,
encoder train, ranker train, nightly, serve, ask recommend, ask retrieve, ask rank, ask info,
prompt show, index list, index rollback, evaluate, bench prefill, demo
"""
JSON_TOO = ("data world", "data check", "encoder train", "ranker train", "nightly", "serve", "ask recommend", "prompt show")


@cache
def commands() -> dict[tuple[str, ...], Any]:
    """Every group and command by its words, the root as ()."""
    found: dict[tuple[str, ...], Any] = {}
    waiting: list[tuple[tuple[str, ...], Any]] = [((), typer.main.get_command(cli.app))]
    while waiting:
        path, command = waiting.pop()
        found[path] = command
        if isinstance(command, typer.main.TyperGroup):
            waiting += [((*path, name), child) for name, child in command.commands.items()]
    return found


def leaves() -> list[tuple[str, ...]]:
    return sorted(path for path, command in commands().items() if not isinstance(command, typer.main.TyperGroup))


def options(path: tuple[str, ...]) -> set[str]:
    return {name for parameter in commands()[path].params for name in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("path", sorted(commands()), ids=" ".join)
def test_every_command_teaches_its_use(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(cli.app, [*path, "--help"], env={"COLUMNS": "120"})
    assert shown.exit_code == 0, shown.output
    assert "Usage" in shown.output
    assert len((commands()[path].help or "").split()) >= 4, "no help text"
    for parameter in commands()[path].params:
        if parameter.param_type_name == "option" and parameter.name != "help":
            assert (parameter.help or "").strip(), f"{parameter.opts} has no help"


@pytest.mark.parametrize("promised", [" ".join(name.split()) for name in PROMISED.split(",")])
def test_promised_commands_exist(promised: str) -> None:
    assert tuple(promised.split()) in commands()


@pytest.mark.parametrize("promised", JSON_TOO)
def test_promised_commands_speak_json(promised: str) -> None:
    assert "--json" in options(tuple(promised.split()))


@dataclass(frozen=True)
class Written:
    """A command as a document writes it."""

    where: str
    line: str

    def __str__(self) -> str:
        return f"{self.where}: {self.line}"


def written() -> list[Written]:
    """Every `brewline ...` in README.md and docs/: in code blocks whole lines, elsewhere what stands between backticks."""
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.md"))]:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.S | re.M)
        lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()]
        lines += re.findall(r"`(brewline [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
        found += [Written(path.name, line) for line in lines if line.startswith("brewline ")]
    return found


@pytest.mark.parametrize("command", written(), ids=str)
def test_documented_commands_exist(command: Written) -> None:
    said = shlex.split(re.split(r" [|>&#] ?| 2>|;", command.line)[0].replace("...", " "))[1:]
    path: tuple[str, ...] = ()
    while len(path) < len(said) and (*path, said[len(path)]) in commands():
        path = (*path, said[len(path)])
    group = isinstance(commands()[path], typer.main.TyperGroup)
    rest = said[len(path) :]
    assert path or said[:1] in (["--help"], ["--version"], ["--verbose"]), f"no such command: {command}"
    assert not (group and rest and rest[0][:1].isalpha() and rest[0].islower() and "|" not in rest[0]), (
        f"no such command: {command}"
    )
    known = options(path) | options(()) | {"--help"}
    for word in rest:
        flag = word.strip("[]").partition("=")[0]
        if re.fullmatch(r"--[a-z][a-z-]*", flag) and not group:
            assert flag in known, f"{command}: {flag} is unknown to {' '.join(path)}"


def brewline(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the real command in a process of its own."""
    command = [sys.executable, "-c", "from ranking.cli.main import main; main()", *words]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=60
    )


def test_a_mendable_error_is_one_line_and_status_2(tmp_path: Path) -> None:
    done = brewline("prompt", "show", str(tmp_path / "nothing"), "--item", "i1")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]+nothing[^\n]+\n", done.stderr)


@pytest.mark.parametrize("command", ["encoder train", "ranker train"])
def test_a_training_of_no_steps_is_refused_before_anything_is_read(command: str, tmp_path: Path) -> None:
    for steps in ("0", "-1"):
        asked = [*command.split(), str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"), "--steps", steps]
        shown = CliRunner().invoke(cli.app, asked, catch_exceptions=False)
        assert shown.exit_code == 2 and "equal to 1" in shown.stderr and not shown.stdout


@pytest.mark.parametrize("out", ["file", "file/below"])
@pytest.mark.parametrize("command", ["evaluate baselines", "encoder train", "ranker train"])
def test_results_that_cannot_be_written_are_refused_before_anything_is_read(command: str, out: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    asked = [*command.split(), str(tmp_path / "nowhere"), "--out", str(tmp_path / out)]
    shown = CliRunner().invoke(cli.app, asked, env={"COLUMNS": "400"}, catch_exceptions=False)
    assert shown.exit_code == 2 and "file is a file; name a folder" in shown.stderr and not shown.stdout
    with pytest.raises(BrewlineError, match="nowhere is not a folder"):
        CliRunner().invoke(cli.app, [*asked[:4], str(tmp_path / "new" / "deep")], catch_exceptions=False)
    assert not (tmp_path / "new").exists()


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_libraries_are_told_not_to_call_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setattr(cli, "app", lambda: None)
    cli.main()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()

    @app.command()
    def wait() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["brewline"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130


def test_an_error_cannot_command_the_terminal() -> None:
    assert one_line(BrewlineError("id '\x1b[2J'\nis\tunknown")) == "id '·[2J' is unknown"
    assert words("[red]\x07title", width=9).plain == "[red]·ti…"


def test_unknown_log_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BREWLINE_LOG", "xml")
    with pytest.raises(SettingsError, match="BREWLINE_LOG is 'xml'"):
        set_up(verbose=False)


def test_json_logs_go_to_stderr() -> None:
    script = (
        "import logging; from ranking.cli.logs import set_up; set_up(verbose=True); logging.getLogger('x').warning('a %s', 1)"
    )
    import os

    environment = {**os.environ, "BREWLINE_LOG": "json"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    line = json.loads(done.stderr)
    assert (line["event"], line["level"], line["logger"]) == ("a 1", "warning", "x")


def test_emit_writes_one_object_of_plain_json(capsys: pytest.CaptureFixture[str]) -> None:
    content = {
        "n": np.int64(3),
        "p": np.float32(0.5),
        "bad": float("nan"),
        "v": np.array([1.0, np.inf]),
        "path": Path("a"),
        "é": (),
    }
    emit(content, as_json=True, table=lambda: None)
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"n": 3, "p": 0.5, "bad": None, "v": [1.0, None], "path": "a", "é": []}
    assert shown.out.count("\n") == 1
    with pytest.raises(TypeError):
        emit({"thing": object()}, as_json=True, table=lambda: None)


def test_progress_without_a_terminal_is_plain_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("work") as report:
        for done in range(1, 1001):
            report(done, 1000)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(r"work: 1/1000 after 0 s\nwork: 1000/1000 after \d s\n", shown.err)


def show(*words: str) -> dict:
    """What `brewline prompt show ... --json` says."""
    shown = CliRunner().invoke(cli.app, ["prompt", "show", *words, "--json"], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    found: dict = json.loads(shown.stdout)
    return found


def test_prompt_show_without_a_model_is_words_alone(tiny_folder: Path) -> None:
    item = show(str(tiny_folder), "--item", "i1", "--as-of", "end")
    assert item["text"].startswith("<|item|><|title|>")
    assert item["text"].count("<|category|>trains") == 1
    assert item["tokens"] == []
    member = show(str(tiny_folder), "--member", "m1", "--as-of", "end")
    assert "<|profile|>role: fond of" in member["text"]
    assert "<|did|>like" in member["text"]
    early = show(str(tiny_folder), "--member", "m1", "--as-of", "2024-01-01")
    assert "<|entry|>" not in early["text"]


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokens: Tokens, tiny_quantizer: Quantizer) -> Path:
    """An untrained encoder of the smallest size."""
    folder = tmp_path_factory.mktemp("encoder") / "encoder"
    model = new_llama(Size(hidden=32, layers=1, heads=2, kv_heads=1, mlp=32), len(tiny_tokens), causal_lm=False)
    save_encoder(folder, model, Writer(tiny_tokens, tiny_quantizer, Budgets(item=24)), {})
    return folder


def test_prompt_show_is_what_the_encoder_reads(tiny_folder: Path, encoder_folder: Path, tiny_tokens: Tokens) -> None:
    item = show(str(tiny_folder), "--item", "i1", "--as-of", "end", "--encoder", str(encoder_folder))
    assert item["length"] == len(item["ids"]) == len(item["tokens"]) <= item["budget"] == 24
    assert item["ids"][0] == tiny_tokens.id("<|item|>")
    assert item["tokens"][1].startswith("<|n_total:")
    assert "".join(item["tokens"]).replace(" ", "") == item["text"].replace(" ", "")


@pytest.mark.parametrize("words", [(), ("--item", "i1", "--member", "m1"), ("--item", "nobody")])
def test_prompt_show_refuses_what_it_cannot_show(words: tuple[str, ...], tiny_folder: Path) -> None:
    with pytest.raises(BrewlineError, match=r"--item ID or --member ID|has no item 'nobody'; it has 60"):
        CliRunner().invoke(cli.app, ["prompt", "show", str(tiny_folder), *words], catch_exceptions=False)
