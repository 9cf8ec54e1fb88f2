"""Facts of the machine that this process runs on."""

from __future__ import annotations

import platform
import resource
import sys
from pathlib import Path


def processor() -> str:
    """The name of the CPU, as Linux tells it; elsewhere as Python does."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except (OSError, UnicodeDecodeError):
        pass
    return platform.processor() or platform.machine()


def peak_memory() -> int:
    """Largest resident memory of this process since its start, in bytes."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest
