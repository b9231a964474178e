"""The house keeps its own rules: directions of imports, sizes, no cycles, nothing happens at import, nothing is pickled."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
import tokenize
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("index", "retrieval", "ranking")
MAX_FILE, MAX_FUNCTION, MAX_MEDIAN, MAX_ROOMS = 300, 60, 16, 36_800
# Code lines: 12,000 in the design, raised for importers, an ONNX twin, contenders, strong baselines, the factors of a table; then
# for what the design had no lines for: a write-ahead log, certified search, a hybrid stage, a fused head, a compression chain,
# shards, several servers on one port, stages of training, what only a GPU runs, and a member's wishes.
VAGUE = {"utils", "util", "common", "helpers", "helper", "misc", "base", "manager"}
TORCH_FREE = (
    "index.",
    "retrieval.data.",
    *(f"retrieval.{name}" for name in ("counts", "features", "prompts", "tokens", "catalog", "records")),
    *(f"retrieval.{name}" for name in ("terms", "parts", "lexical", "popular", "hybrid")),
    "ranking.tasks",
    *(f"ranking.prefill.{name}" for name in ("plan", "request", "operations", "onnx_engine")),
    "ranking.cli.",
)
"""Modules that load neither torch nor transformers, faiss or grpc: `--help` is quick and the data tools run anywhere."""
HEAVY = {"torch", "transformers", "sentence_transformers"}
SLOW_TO_START = {*HEAVY, "faiss", "grpc", "sklearn", "scipy", "matplotlib", "pyarrow"}


@cache
def files() -> dict[str, Path]:
    """Module name -> file, generated stubs left out."""
    found = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            if "_pb2" not in path.name:
                found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(files()[module].read_text(encoding="utf-8"))


def sized() -> list[Path]:
    return [*files().values(), *sorted((ROOT / "tests").rglob("*.py"))]


def test_import_contracts_hold() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("index.errors", "from retrieval.counts import Counts"),
        ("retrieval.counts", "def late():\n    import torch"),
        ("retrieval.counts", "import faiss"),
        ("ranking.tasks", "import grpc"),
        ("ranking.prefill.plan", "from ..serving import server"),
    ],
)
def test_import_contracts_can_fail(module: str, line: str, tmp_path: Path) -> None:
    """A copy of the rooms with one forbidden line more is refused: upwards, inside a function, external, relative."""
    for name, path in files().items():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        more = f"\n{line}\n" if name == module else ""
        copy.write_text(path.read_text(encoding="utf-8") + more, encoding="utf-8")
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    done = lint_imports(tmp_path)
    assert done.returncode != 0, f"{line!r} was let in\n{done.stdout}"
    assert f"{module} -> " in done.stdout, done.stdout


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Checks the contracts of the rooms in a folder."""
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_relative_imports_are_not_used() -> None:
    found = [
        f"{module}:{node.lineno}"
        for module in files()
        for node in ast.walk(tree(module))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not found


def test_package_files_are_empty() -> None:
    for room in ROOMS:
        for path in (ROOT / room).rglob("__init__.py"):
            assert path.read_text() == "", path
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_packages_are_listed_for_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {module.removesuffix(".__init__") for module in files() if module.endswith("__init__")}
    assert set(listed) == there


def test_files_are_short() -> None:
    lines = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in sized()}
    assert not {str(path): n for path, n in lines.items() if n > MAX_FILE}


def test_the_rooms_are_small_together() -> None:
    """Code alone is counted: a budget that counted docstrings would be met by leaving them out."""
    lines = {module: len(code_lines(path.read_text(encoding="utf-8"))) for module, path in files().items()}
    by_room = {room: sum(n for module, n in lines.items() if module.startswith(f"{room}.")) for room in ROOMS}
    assert sum(by_room.values()) <= MAX_ROOMS, by_room


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that hold code: no blank, comment or docstring."""
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (
            tokenize.COMMENT,
            tokenize.NL,
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
            tokenize.ENDMARKER,
        ):
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return found


def test_functions_are_short() -> None:
    lengths = {}
    for module in files():
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                lengths[f"{module}.{node.name}:{node.lineno}"] = node.end_lineno - node.lineno + 1
    assert not {name: n for name, n in lengths.items() if n > MAX_FUNCTION}
    assert sorted(lengths.values())[len(lengths) // 2] <= MAX_MEDIAN


def test_names_say_something() -> None:
    assert not [str(path) for path in sized() if path.stem.strip("_") in VAGUE]


def test_no_import_cycles() -> None:
    graph = {module: module_imports(module) for module in files()}
    settled: set[str] = set()
    for module in graph:
        walk(module, graph, (), settled)


def walk(module: str, graph: dict[str, set[str]], path: tuple[str, ...], settled: set[str]) -> None:
    """Depth first; fails with the cycle it runs into."""
    assert module not in path, " -> ".join((*path[path.index(module) :], module))
    if module in settled:
        return
    for imported in sorted(graph[module]):
        walk(imported, graph, (*path, module), settled)
    settled.add(module)


def module_imports(module: str) -> set[str]:
    """Our modules that this one imports when it is loaded (not inside functions, not for the type checker only)."""
    found: set[str] = set()
    waiting: list[ast.stmt] = list(tree(module).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            waiting += [child for child in ast.walk(node) if isinstance(child, ast.stmt) and child is not node]
    return {name for name in found if name in files() and name != module}


def test_importing_a_module_has_no_side_effect(tmp_path: Path) -> None:
    """Each module is loaded in one process: no output, file or thread, no change of the environment or of torch's settings."""
    names = [module.removesuffix(".__init__") for module in files()]
    script = f"""
import importlib, json, logging, os, random, sys, threading
sys.path.insert(0, {str(ROOT)!r})
import numpy, rich.console, torch  # rich draws from `random` when it is loaded
state = numpy.random.get_state()[1].tolist(), torch.random.initial_seed(), torch.get_num_threads(), torch.is_grad_enabled()
before = dict(os.environ), list(logging.getLogger().handlers), random.getstate(), logging.getLogger().level
for name in {names!r}:
    importlib.import_module(name)
after = dict(os.environ), list(logging.getLogger().handlers), random.getstate(), logging.getLogger().level
changed = [key for key in {{*before[0], *after[0]}} if before[0].get(key) != after[0].get(key)]
assert not [key for key in changed if not key.startswith(("KMP_", "OMP_", "TORCHINDUCTOR_"))], changed
assert before[1:] == after[1:]
assert state == (
    numpy.random.get_state()[1].tolist(), torch.random.initial_seed(), torch.get_num_threads(), torch.is_grad_enabled()
)
assert [thread.name for thread in threading.enumerate()] == ["MainThread"], threading.enumerate()
"""
    done = run_python(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
    assert not list(tmp_path.iterdir())


def test_light_modules_load_nothing_heavy(tmp_path: Path) -> None:
    light = [module.removesuffix(".__init__") for module in files() if module.startswith(TORCH_FREE)]
    script = f"""
import importlib, json, sys
sys.path.insert(0, {str(ROOT)!r})
found = {{}}
for name in {light!r}:
    importlib.import_module(name)
    loaded = sorted({HEAVY!r} & set(sys.modules))
    if loaded:
        found[name] = loaded
        break
print(json.dumps(found))
"""
    done = run_python(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}


def test_the_command_line_starts_without_the_libraries(tmp_path: Path) -> None:
    script = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import ranking.cli.main
print(json.dumps(sorted({SLOW_TO_START!r} & set(sys.modules))))
"""
    done = run_python(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def run_python(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a script in an empty folder, writing no bytecode there."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "ignore", "HOME": str(folder)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)  # a module that loads onnxruntime is caught by the file it writes
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120)


FORBIDDEN_CALLS = {"pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps", "torch.load", "torch.save", "eval", "exec"}
UNSAFE = {"allow_pickle": "True", "trust_remote_code": "True", "weights_only": "False"}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pandas", "polars", "peft"}


def test_nothing_is_pickled_and_nothing_probed() -> None:
    found = [f"{module}:{line}" for module in files() for line in offences(tree(module))]
    assert not found


def offences(parsed: ast.AST) -> list[str]:
    """ "line what" for each call or import that the house forbids."""
    found = []
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{node.lineno} import {name}" for name in names if name.partition(".")[0] in FORBIDDEN_IMPORTS]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            probing = called == "hasattr" or (called == "getattr" and len(node.args) + len(node.keywords) > 2)
            unsafe = any(ast.unparse(word.value) == UNSAFE.get(word.arg or "") for word in node.keywords)
            if called in FORBIDDEN_CALLS or probing or unsafe:
                found.append(f"{node.lineno} {called}")
    return found


LOAD = "np.load(p, allow_pickle=True)"
PICKLES = ("import pickle", "from joblib import load", "torch.load(path)", LOAD, "hasattr(a, 'b')", "eval(x)")


@pytest.mark.parametrize("line", PICKLES)
def test_the_rule_against_pickles_can_fail(line: str) -> None:
    assert offences(ast.parse(line))
    assert not offences(ast.parse("np.load(p, allow_pickle=False)\nmodel.eval()\ngetattr(a, name)"))
