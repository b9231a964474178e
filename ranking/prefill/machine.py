"""What a measurement should say about the process and machine it was made on."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable
from pathlib import Path

PROC = Path("/proc/self")


def growth(work: Callable[[], object]) -> int | None:
    """Bytes by which the process was at its peak larger during `work` than before it; None where Linux's /proc is missing.

    The kernel's record of the peak is set back first; where it refuses, an earlier, higher peak makes the answer too large.
    """
    if not PROC.exists():
        work()
        return None
    held = int((PROC / "statm").read_text().split()[1]) * resource.getpagesize()
    with contextlib.suppress(OSError):  # a sandbox refuses: the record stays, the figure is an upper bound
        (PROC / "clear_refs").write_text("5")
    work()
    return max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held)


def allocator(process: Path = PROC) -> str:
    """The memory allocator that a process has loaded: "tcmalloc", "jemalloc", else "glibc" ("unknown" without /proc)."""
    if not process.exists():
        return "unknown"
    maps = (process / "maps").read_text()
    return next((name for name in ("tcmalloc", "jemalloc") if name in maps), "glibc")
