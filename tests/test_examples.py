"""The examples of a nightly schedule are well formed, and the command that each of them runs is one that this version has."""

from __future__ import annotations

import re
import shlex
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from ranking.cli.main import app

EXAMPLES = Path(__file__).parent.parent / "examples"


def cron_line() -> str:
    text = (EXAMPLES / "nightly.cron").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line and not line.startswith("#") and not re.match(r"[A-Z_]+=", line)]
    return line


def unit(name: str) -> ConfigParser:
    read = ConfigParser(interpolation=None, strict=True)
    read.optionxform = str  # type: ignore[assignment, method-assign]
    read.read_string((EXAMPLES / name).read_text(encoding="utf-8"))
    return read


def cron_job() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((EXAMPLES / "nightly-cronjob.yaml").read_text(encoding="utf-8"))
    return found


def container() -> dict[str, Any]:
    (found,) = cron_job()["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    return dict(found)


def words_of(example: str) -> list[str]:
    """What follows the program's name."""
    if example == "cron":
        command = cron_line().split(">>")[0]
    elif example == "systemd":
        command = unit("brewline-night.service")["Service"]["ExecStart"]
    else:
        return [str(word) for word in container()["args"]]
    words = shlex.split(command)
    return words[next(place for place, word in enumerate(words) if word.endswith("bin/brewline")) + 1 :]


@pytest.mark.parametrize("example", ["cron", "systemd", "kubernetes"])
def test_the_command_is_one_that_this_version_has(example: str) -> None:
    root = typer.main.get_command(app)
    assert isinstance(root, typer.main.TyperGroup)
    name, *rest = words_of(example)
    read = root.commands[name].make_context(name, rest).params
    assert name == "nightly" and read["as_json"] and read["as_of"] == "now"
    assert read["metrics"].suffix == ".prom" and read["encoder"] and read["ranker"] and read["store"] and read["data"]


def test_cron_and_systemd_begin_at_the_same_time() -> None:
    minute, hour, *days, user, setting, _ = cron_line().split(maxsplit=7)
    assert (minute, hour, days, user) == ("30", "2", ["*", "*", "*"], "brewline") and setting == "BREWLINE_LOG=json"
    assert unit("brewline-night.timer")["Timer"]["OnCalendar"] == "*-*-* 02:30:00 UTC"
    assert unit("brewline-night.timer")["Install"]["WantedBy"] == "timers.target"
    service = unit("brewline-night.service")["Service"]
    store = words_of("systemd")[words_of("systemd").index("--store") + 1]
    assert service["Type"] == "oneshot" and store in service["ReadWritePaths"].split()


def test_the_cron_job_of_kubernetes_fits_together() -> None:
    job, spec = cron_job(), cron_job()["spec"]
    assert (job["apiVersion"], job["kind"], spec["schedule"], spec["concurrencyPolicy"]) == (
        "batch/v1",
        "CronJob",
        "30 2 * * *",
        "Forbid",
    )
    pod = spec["jobTemplate"]["spec"]["template"]["spec"]
    assert {mount["name"] for mount in container()["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    places = [mount["mountPath"] for mount in container()["volumeMounts"]]
    named = [word.partition("=")[2] for word in words_of("kubernetes") if "=/" in word]
    assert named and all(any(folder.startswith(place) for place in places) for folder in named)
    (rule,) = spec["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container()["name"], "operator": "In", "values": [2]}
    assert pod["restartPolicy"] == "Never", "what a failure policy of pods asks for"
