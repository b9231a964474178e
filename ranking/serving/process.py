"""The server's own process, under the names that every Prometheus dashboard knows."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

from ranking.serving.meters import Reading, Readings, Registry

SELF = Path("/proc/self")


def add_process(registry: Registry) -> None:
    """Memory, CPU, files and garbage collection are read by every scrape; without /proc the first and the third are left out."""
    began = time.time()
    registry.add(Reading("process_resident_memory_bytes", "Memory of the process that is in RAM, bytes.", _resident))
    registry.add(Reading("process_cpu_seconds_total", "CPU time of all threads, seconds.", _cpu, kind="counter"))
    registry.add(Reading("process_open_fds", "Open files and connections.", _open_files))
    registry.add(Reading("process_start_time_seconds", "When the server began, seconds since 1970.", lambda: {(): began}))
    told = "Runs of the garbage collector by generation."
    registry.add(Reading("python_gc_collections_total", told, _collections, ("generation",), "counter"))


def _resident() -> Readings:
    if not SELF.exists():
        return {}
    pages = int((SELF / "statm").read_text().split()[1])
    return {(): float(pages * os.sysconf("SC_PAGE_SIZE"))}


def _cpu() -> Readings:
    return {(): time.process_time()}


def _open_files() -> Readings:
    return {(): float(sum(1 for _ in (SELF / "fd").iterdir()))} if SELF.exists() else {}


def _collections() -> Readings:
    return {(str(generation),): float(told["collections"]) for generation, told in enumerate(gc.get_stats())}
