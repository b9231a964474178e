"""What a deployment is made of, read strictly: images that can be built from this tree, commands that exist, pieces that fit."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer.main
import yaml
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from ranking.cli.main import app

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "examples" / "deploy"
DOCKERFILES = ("Dockerfile", "Dockerfile.gpu")
INSTRUCTIONS = {"FROM", "WORKDIR", "RUN", "COPY", "ENV", "USER", "EXPOSE", "ENTRYPOINT", "CMD"}
SECRET = re.compile(r"password|passwd|secret|token|api_?key|private", re.IGNORECASE)
PINNED = re.compile(r"[a-z0-9./-]+:\d+\.\d+\.\d+[\w.-]*")


class Strict(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error, as Kubernetes has it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        if len(keys) != len(set(keys)):
            raise yaml.YAMLError(f"a key stands twice: {keys}")
        return dict(super().construct_mapping(node, deep))


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.load_all((DEPLOY / name).read_text(encoding="utf-8"), Strict))


def kinds() -> dict[tuple[str, str], dict[str, Any]]:
    return {(one["kind"], one["metadata"]["name"]): one for one in documents("kubernetes.yaml")}


def pod(kind: str, name: str) -> dict[str, Any]:
    return dict(kinds()[kind, name]["spec"]["template"]["spec"])


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile and what follows them, continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def faults(text: str) -> list[str]:
    """What a Dockerfile must not be, found in it."""
    found, read = [], instructions(text)
    found += [f"unknown {word}" for word, _ in read if word not in INSTRUCTIONS]
    found += [f"base not pinned: {rest}" for word, rest in read if word == "FROM" and not PINNED.fullmatch(rest.split(" ")[0])]
    for word, rest in read:
        words = rest.split()
        if word == "COPY" and not words[0].startswith("--from="):
            found += [f"no {source}" for source in words[:-1] if not (ROOT / source).exists()]
        if word == "ENV":
            found += [f"secret {name}" for name in re.findall(r"(\w+)=", rest) if SECRET.search(name)]
        if word == "RUN" and re.search(r"(curl|wget)[^|]*\|", rest):
            found.append("runs what it downloads")
    users = [rest for word, rest in read if word == "USER"]
    last_stage = max(place for place, (word, _) in enumerate(read) if word == "FROM")
    if not users or users[-1].split(":")[0] in ("0", "root") or "USER" not in [word for word, _ in read[last_stage:]]:
        found.append("runs as root")
    return found


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_can_be_built_from_this_tree(name: str) -> None:
    text = (DEPLOY / name).read_text(encoding="utf-8")
    assert faults(text) == []
    assert "NOT RUN" in text.splitlines()[0], "nobody has built it, and it says so"
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    copied = {source for word, rest in instructions(text) if word == "COPY" for source in rest.split()[:-1]}
    assert {package.split(".")[0] for package in packages} <= copied
    ignored = (DEPLOY / f"{name}.dockerignore").read_text(encoding="utf-8").splitlines()
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    assert {source for source in copied if not source.startswith(("--from", "/opt"))} <= let_in and "*" in ignored


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("FROM python:latest", "base not pinned"),
        ("COPY nowhere.txt /x", "no nowhere.txt"),
        ("ENV API_KEY=abc", "secret API_KEY"),
        ("RUN curl https://example.org/x | sh", "runs what it downloads"),
        ("USER root", "runs as root"),
        ("ADD https://example.org/x /x", "unknown ADD"),
    ],
)
def test_a_bad_dockerfile_is_seen(line: str, fault: str) -> None:
    good = "FROM python:3.11.9-slim\nUSER 10001\n"
    assert faults(good) == []
    assert fault in "; ".join(faults(good + line + "\n"))


def commands() -> Iterator[tuple[str, list[str]]]:
    """Where a `brewline` command stands, and its words."""
    yield "kubernetes", pod("Deployment", "recommender")["containers"][0]["args"]
    yield "compose", documents("compose.yaml")[0]["services"]["server"]["command"]
    for name in DOCKERFILES:
        header = re.sub(r"\\\n#\s*", "", (DEPLOY / name).read_text(encoding="utf-8").partition("FROM")[0])
        ran = re.search(r"docker run .*?brewline[\w-]*:\S+ (.*)", header)
        if ran:
            yield name, ran[1].split()


@pytest.mark.parametrize(("where", "words"), list(commands()))
def test_the_commands_are_ones_that_this_version_has(where: str, words: list[str], tmp_path: Path) -> None:
    found: Any = typer.main.get_command(app)
    rest = [re.sub(r"^/data$", str(tmp_path), word) for word in words]
    while isinstance(found, typer.main.TyperGroup):
        found, rest = found.commands[rest[0]], rest[1:]
    read = found.make_context(where, rest).params
    if found.name == "serve":
        assert not read["insecure_public"] and read["tls_cert"] and read["tls_key"] and read["tokens"]


def test_version_and_image_are_one() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    service = documents("compose.yaml")[0]["services"]
    images = [pod("Deployment", "recommender")["containers"][0]["image"], service["server"]["image"]]
    assert images == [f"registry.example.org/brewline:{version}"] * 2
    redis = [pod("StatefulSet", "members")["containers"][0]["image"], service["members"]["image"]]
    assert redis[0] == redis[1] and PINNED.fullmatch(redis[0])


@pytest.mark.parametrize("name", ["compose.yaml", "kubernetes.yaml"])
def test_the_header_says_what_was_not_run(name: str) -> None:
    assert "NOT RUN" in (DEPLOY / name).read_text(encoding="utf-8").split("\n\n")[0][:300]


@pytest.mark.parametrize(("kind", "name"), [("Deployment", "recommender"), ("StatefulSet", "members")])
def test_a_pod_fits_together_and_may_do_little(kind: str, name: str) -> None:
    made, spec = pod(kind, name), kinds()[kind, name]["spec"]
    (container,) = made["containers"]
    claims = [one["metadata"]["name"] for one in spec.get("volumeClaimTemplates", [])]
    assert {one["name"] for one in container["volumeMounts"]} == {*claims, *(one["name"] for one in made.get("volumes", []))}
    places = [one["mountPath"] for one in container["volumeMounts"]]
    named = [word.partition("=")[2] for word in container["args"] if "=/" in word] + [
        one["value"] for one in container.get("env", [])
    ]
    assert all(any(path.startswith(place) for place in places) for path in named)
    assert made["securityContext"]["runAsNonRoot"] and made["securityContext"]["runAsUser"] > 0
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["requests"] and container["resources"]["limits"]["memory"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    service = kinds()["Service", name]["spec"]
    assert service["selector"].items() <= labels.items()
    assert {one["targetPort"] for one in service["ports"]} <= {one["name"] for one in container["ports"]}


def test_the_server_is_probed_drained_and_keeps_its_key() -> None:
    made = pod("Deployment", "recommender")
    (container,) = made["containers"]
    ports = {one["containerPort"] for one in container["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        program, script, address, name = container[probe]["exec"]["command"]
        assert (program, script) == ("python", "/opt/probe.py") and int(address.rpartition(":")[2]) in ports
        assert name == kinds()["Service", "recommender"]["metadata"]["name"]
        assert container[probe]["timeoutSeconds"] > 12, "the probe's own patience"
    drain = int(next(word for word in container["args"] if word.startswith("--drain-seconds=")).partition("=")[2])
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert made["terminationGracePeriodSeconds"] > drain + pause
    secrets = [one["secret"] for one in made["volumes"] if "secret" in one]
    assert len(secrets) == 2 and all(one["defaultMode"] & 0o007 == 0 for one in secrets)
    scaled = kinds()["HorizontalPodAutoscaler", "recommender"]["spec"]["scaleTargetRef"]
    assert (scaled["kind"], scaled["name"]) in kinds() and scaled["kind"] == "Deployment"


def test_the_night_and_the_server_share_store_models_and_members() -> None:
    night = yaml.load((DEPLOY.parent / "nightly-cronjob.yaml").read_text(encoding="utf-8"), Strict)
    told = night["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    made = pod("Deployment", "recommender")
    for flag in ("--store=", "--encoder=", "--ranker=", "--members="):
        words = [[word for word in one["containers"][0]["args"] if word.startswith(flag)] for one in (told, made)]
        assert words[0] == words[1] and words[0]
    claims = [
        {one["persistentVolumeClaim"]["claimName"] for one in some["volumes"] if "persistentVolumeClaim" in one}
        for some in (told, made)
    ]
    assert claims[1] <= claims[0]
    assert kinds()["Service", "members"]["spec"]["ports"][0]["port"] == 6379


def test_compose_fits_together_and_holds_no_secret() -> None:
    (compose,) = documents("compose.yaml")
    server, members = compose["services"]["server"], compose["services"]["members"]
    assert (DEPLOY / server["build"]["context"] / server["build"]["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
    assert set(server["secrets"]) == set(compose["secrets"])
    paths = [word.partition("=")[2] for word in server["command"] if "=/run/secrets/" in word] + [
        server["environment"]["BREWLINE_CA"]
    ]
    assert {path.removeprefix("/run/secrets/") for path in paths} == set(server["secrets"])
    for one in (server, members):
        assert set(one["networks"]) <= set(compose["networks"]) and one["healthcheck"]["test"][0] == "CMD"
    assert compose["networks"]["inside"]["internal"] and members["networks"] == ["inside"] and "ports" not in members
    assert not SECRET.search(
        " ".join(f"{name}={value}" for name, value in server["environment"].items()).replace("/run/secrets", "")
    )


@pytest.mark.parametrize(("state", "status"), [("SERVING", 0), ("NOT_SERVING", 1)])
def test_the_probe_tells_a_server_that_answers_from_one_that_does_not(state: str, status: int) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    service = health.HealthServicer()
    service.set("", health_pb2.HealthCheckResponse.ServingStatus.Value(state))
    health_pb2_grpc.add_HealthServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    done = probed(f"127.0.0.1:{port}")
    server.stop(None).wait()
    assert (done.returncode, done.stderr) == (status, "" if status == 0 else f"127.0.0.1:{port}: {state}\n")


def test_the_probe_fails_where_nobody_listens() -> None:
    assert probed("127.0.0.1:1").returncode == 1


def probed(address: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(DEPLOY / "probe.py"), address]
    return subprocess.run(words, capture_output=True, text=True, timeout=30, check=False, env={"PATH": "/usr/bin"})
