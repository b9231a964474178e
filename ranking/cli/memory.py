"""Keep freed memory: training small models on CPU otherwise spends a quarter of its time on page faults."""

from __future__ import annotations

import ctypes
import platform
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
MMAP_THRESHOLD = 1 << 30
TRIM_THRESHOLD = (1 << 31) - 1
TOP_PAD = 1 << 28


def keep_freed_memory() -> bool:
    """Tells glibc to reuse large freed blocks instead of returning them to the kernel; False where that cannot be said.

    By default every large activation is a fresh mmap whose pages fault in one by one. Measured 2026-11-22 on 2 cores: a training
    step of a 128-wide, 2-layer LLaMA took 0.65 to 0.75 of the time (docs/log.md). Only the training commands ask for it.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = ((M_MMAP_THRESHOLD, MMAP_THRESHOLD), (M_TRIM_THRESHOLD, TRIM_THRESHOLD), (M_TOP_PAD, TOP_PAD))
    return [mallopt(name, value) for name, value in wanted] == [1, 1, 1]
