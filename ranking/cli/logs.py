"""Logs go to stderr, as text for people or as one JSON object a line for machines; stdout belongs to the answer."""

from __future__ import annotations

import logging
import re
import sys
from typing import Literal

import structlog
from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from index.errors import BrewlineError

NOISY = ("httpx", "urllib3", "faiss", "transformers", "sentence_transformers", "torch.onnx", "onnxscript", "onnx_ir")

SECRET = re.compile(r"(?i)(\bbearer\s+|\bauthorization\W{1,4}(?:bearer\s+)?|://[^\s/@:]*:)[^\s,;'\"@)}\]]+")
"""A token behind its scheme or its header, a password in the address of a store."""


class SettingsError(BrewlineError):
    """An environment variable of Brewline holds a value that it does not know."""


class LogSettings(BaseSettings):
    """BREWLINE_LOG is "text" or "json"; BREWLINE_LOG_LEVEL is a level of the standard library."""

    model_config = SettingsConfigDict(env_prefix="BREWLINE_")
    log: Literal["text", "json"] = "text"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "WARNING"


def set_up(*, verbose: bool) -> None:
    """Every logger of the process writes to stderr in one format. `verbose` lowers the level to DEBUG. Raises SettingsError."""
    settings = _read_settings()
    level = "DEBUG" if verbose else settings.log_level
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    before: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        stamp,
    ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=before,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_ending(settings)],
        )
    )
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    structlog.configure(
        processors=[*before, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def _read_settings() -> LogSettings:
    try:
        return LogSettings()
    except ValidationError as error:
        first = error.errors()[0]
        name = f"BREWLINE_{first['loc'][0]}".upper()
        raise SettingsError(f"{name} is {first['input']!r}; {first['msg']}") from error


def _ending(settings: LogSettings) -> list[structlog.typing.Processor]:
    # Tracebacks are made text before they are masked, and without the values of variables: those are members' words and tokens.
    before: list[structlog.typing.Processor] = [structlog.processors.format_exc_info, masked]
    if settings.log == "json":
        return [*before, structlog.processors.JSONRenderer()]
    return [*before, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)]


def masked(logger: object, name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """The line without what looks like a secret in any of its texts: the last wall, behind never logging one."""
    del logger, name
    return {key: SECRET.sub(r"\1***", value) if isinstance(value, str) else value for key, value in event.items()}
