"""Each documented make target exists, says what it is for, and calls commands that exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROMISED = ("help", "setup", "demo", "check", "test", "audit", "soak", "proto", "nightly", "serve", "bench", "clean")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*words: str) -> str:
    # A make that runs these tests hands its own variables down, by MAKEFLAGS and each by its name.
    own = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    done = subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60, env=own)
    assert done.returncode == 0, done.stderr
    return done.stdout


def documented() -> set[str]:
    """Targets that README.md and docs/ tell people to make."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    return set(re.findall(r"(?:^\$? ?|`)make ([a-z]+)", text, re.M))


def test_help_lists_each_target_with_its_purpose() -> None:
    listed = dict(re.findall(r"^  make (\w+) +(\S.*)$", make(), re.M))
    assert set(listed) == set(PROMISED)
    assert all(len(purpose) > 10 for purpose in listed.values())
    assert make("help") == make()


@pytest.mark.parametrize("target", sorted({*PROMISED, *documented()}))
def test_target_can_be_made(target: str) -> None:
    assert make("-n", target, "DATA=some/data").strip()


def test_variables_reach_the_commands() -> None:
    said = make("-n", "demo", "DATA=some/data", "MINUTES=2", "WORK=elsewhere")
    assert "demo --work elsewhere --data some/data --minutes 2" in said
    said = make("-n", "serve", "STORE=s", "ENCODER=e", "RANKER=r", "PORT=7", "MEMBERS=redis://localhost")
    assert "serve --store s --encoder e --ranker r --members redis://localhost --port 7" in said


def test_setup_takes_the_cpu_build_unless_told(tmp_path: Path) -> None:
    cpu = make("-n", "setup", f"VENV={tmp_path / 'none'}")
    gpu = make("-n", "setup", f"VENV={tmp_path / 'none'}", "GPU=1")
    assert "[cpu,evaluate,dev]" in cpu and "[gpu,evaluate,dev]" in gpu
    assert "+cpu" not in gpu
    assert "[cpu,evaluate,dev,kernels]" in make("-n", "setup", f"VENV={tmp_path / 'none'}", "EXTRAS=kernels")


def test_commands_in_the_makefile_exist() -> None:
    import typer.main

    from ranking.cli.main import app

    root = typer.main.get_command(app)
    assert isinstance(root, typer.main.TyperGroup)
    for line in (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if not line.startswith("\t$(BREWLINE)"):
            continue
        command, flags = root.commands[line.split()[1]], set(re.findall(r"--[a-z-]+", line))
        if isinstance(command, typer.main.TyperGroup):
            command = command.commands[line.split()[2]]
        known = {name for parameter in command.params for name in parameter.opts}
        assert flags <= known, f"{line.strip()}: {flags - known}"


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert re.search(r"^exec .*make test EXTRAS=kernels$", script.read_text(), re.M)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


def test_every_pin_is_exact_and_covers_what_the_project_needs() -> None:
    import tomllib

    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9][A-Za-z0-9.]*", line) for line in pins)
    pinned = {line.partition("==")[0] for line in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(need for name in ("cpu", "gpu", "evaluate", "dev") for need in extras[name])]
    names = {re.split(r"[<>=;\[ ]", need)[0].lower().replace("_", "-") for need in wanted}
    assert names <= pinned
