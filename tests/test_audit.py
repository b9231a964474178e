"""What we depend on is what we pinned, under licences that we accept, and our own code calls nothing that runs what data says.

`make audit` runs this alone. Known holes of the pinned versions need the network and are asked for there, not here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
EXTRAS = ("cpu", "gpu", "evaluate", "dev")
"""What `make setup` installs, of cpu and gpu one."""
MAKERS = ("nvidia-", "cuda-")
"""Only GPU=1 brings these, under NVIDIA's own licence, which lets programs use them and nobody change them."""
ALLOWED = {
    *("Apache-2.0", "Apache Software License", "Apache 2.0 License", "Apache-2.0 WITH LLVM-exception"),
    *("MIT", "MIT License", "MIT-CMU", "ISC License (ISCL)", "Zlib", "BSL-1.0", "CC0-1.0"),
    *("0BSD", "BSD-2-Clause", "BSD-3-Clause", "BSD License", "3-Clause BSD License"),
    *("PSF-2.0", "Python Software Foundation License", "CNRI-Python"),
    *("MPL-2.0", "Mozilla Public License 2.0 (MPL 2.0)"),  # asks for changes of its own files only, and we change none
}


def installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def needed() -> dict[str, Distribution]:
    """Every installed distribution that ours asks for, directly or not, by its plain name."""
    found: dict[str, Distribution] = {}
    waiting: list[tuple[str, tuple[str, ...]]] = [("brewline", EXTRAS)]
    seen: set[tuple[str, tuple[str, ...]]] = set()
    while waiting:
        name, extras = waiting.pop()
        there = installed(name)
        if there is None or (name, extras) in seen:
            continue
        seen.add((name, extras))
        found[name] = there
        for line in there.requires or ():
            wish = Requirement(line)
            if wish.marker is None or any(wish.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                waiting.append((canonicalize_name(wish.name), tuple(sorted(wish.extras))))
    del found["brewline"]
    return found


def pins() -> dict[str, str]:
    """The version of each name in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(name): pin for name, _, pin in (line.partition("==") for line in lines) if pin and name[0] != "#"}


def licence(of: Distribution) -> str:
    """What a distribution says of its licence: the expression, else its classifiers, else the first line of the old field."""
    said = of.metadata
    classified = [one.rpartition(" :: ")[2] for one in said.get_all("Classifier") or () if one.startswith("License ::")]
    return said.get("License-Expression") or " AND ".join(classified) or str(said.get("License") or "").partition("\n")[0]


def refused(said: str) -> set[str]:
    """The terms of a licence that are not on the list; the whole of it, if it says nothing."""
    return set(re.split(r" AND | OR ", said)) - ALLOWED


def test_what_is_installed_is_what_is_pinned() -> None:
    pinned, found = pins(), needed()
    assert len(found) > 50 and {"torch", "grpcio", "pytest"} <= set(found)
    assert not sorted(set(found) - set(pinned)), "needed and not in constraints.txt"
    other = {
        name: f"{there.version}, pinned {pinned[name]}"
        for name, there in found.items()
        if Version(there.version).public != pinned[name]
    }
    assert not other, "make clean setup, or move the pin and say why in docs/log.md"


def test_licences_are_on_the_list() -> None:
    said = {name: licence(there) for name, there in needed().items() if not name.startswith(MAKERS)}
    assert not {name: words for name, words in said.items() if refused(words)}


@pytest.mark.parametrize("said", ["GPL-3.0-only", "MIT AND AGPL-3.0", "", "Proprietary", "LicenseRef-Other OR MIT"])
def test_the_list_can_refuse(said: str) -> None:
    assert refused(said)


MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"),
    *("torch.load", "torch.save", "torch.hub.load", "logging.config.listen"),
    *("yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell"),
    *("tempfile.mktemp", "ssl._create_unverified_context"),
}
WORDS = {"shell": False, "allow_pickle": False, "trust_remote_code": False, "weights_only": True}
"""Named arguments that may be given this value and no other."""
LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader", "yaml.BaseLoader"}


def names_of(parsed: ast.AST) -> dict[str, str]:
    """What each imported name stands for: `from os import system as run` makes run -> os.system."""
    found: dict[str, str] = {}
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            found |= {one.asname: one.name for one in node.names if one.asname}
        elif isinstance(node, ast.ImportFrom):
            found |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    return found


def offences(source: str) -> Iterator[str]:
    """ "line what" of each import and call that lets data run, by whatever name it was imported."""
    parsed = ast.parse(source)
    names = names_of(parsed)

    def called(node: ast.expr) -> str:
        first, dot, rest = ast.unparse(node).partition(".")
        return names.get(first, first) + dot + rest

    for node in ast.walk(parsed):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [one.name for one in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{node.lineno} {name}" for name in modules if name.partition(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            name = called(node.func)
            given = {word.arg: word.value for word in node.keywords if word.arg}
            loads = name in ("yaml.load", "yaml.load_all") and not any(called(one) in LOADERS for one in given.values())
            if name in CALLS or loads:
                yield f"{node.lineno} {name}"
            for word in WORDS.keys() & given.keys():
                if not (isinstance(given[word], ast.Constant) and given[word].value is WORDS[word]):
                    yield f"{node.lineno} {word}"


def test_our_code_runs_nothing_that_data_says() -> None:
    rooms = ("index", "retrieval", "ranking", "examples")
    files = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py")) if "_pb2" not in path.name]
    assert len(files) > 150
    found = [f"{path.relative_to(ROOT)}:{what}" for path in files for what in offences(path.read_text(encoding="utf-8"))]
    assert not found


BAD = (
    "import pickle",
    "from joblib import load",
    "eval(text)",
    "from torch import load\nload(path)",
    "import torch as t\nt.load(path)",
    "import yaml\nyaml.load(text)",
    "import yaml\nyaml.load(text, Loader=yaml.Loader)",
    "from yaml import unsafe_load as read\nread(text)",
    "from os import system as run\nrun(text)",
    "import subprocess\nsubprocess.run(text, shell=True)",
    "import subprocess\nsubprocess.run(text, shell=asked)",
    "import numpy as np\nnp.load(path, allow_pickle=True)",
    "AutoModel.from_pretrained(path, trust_remote_code=yes)",
)
GOOD = """
import re, subprocess, yaml
yaml.load(text, Loader=yaml.BaseLoader)
subprocess.run(words, shell=False)
re.compile(text)
model.eval()
"""


@pytest.mark.parametrize("source", BAD)
def test_the_rule_can_fail(source: str) -> None:
    assert list(offences(source)) and not list(offences(GOOD))
