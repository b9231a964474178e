"""Plans that people write as YAML: read and checked in one way, refused in the words of whoever asks for one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from index.errors import BrewlineError
from retrieval.yaml_keys import repeated_key

T = TypeVar("T")


def read_plan(path: Path, kind: type[T], refused: type[BrewlineError], prepared: Callable[[Any], Any] = lambda plain: plain) -> T:
    """The file as a dataclass `kind`, `prepared` having seen its plain content. Raises `refused` naming the first thing wrong."""
    try:
        text = path.read_text(encoding="utf-8")
        repeated = repeated_key(yaml.compose(text, Loader=yaml.SafeLoader))
        plain = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise refused(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if repeated:
        raise refused(f"{path}: {repeated} stands twice in one mapping; which of the two is meant?")
    try:
        return TypeAdapter(kind).validate_python(prepared(plain))
    except ValidationError as error:
        seen = error.errors()[0]
        raise refused(f"{path}: {'.'.join(map(str, seen['loc'])) or 'the file'}: {seen['msg']}") from error
