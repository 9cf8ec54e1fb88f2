"""What figures were measured on: processor, cores, date and versions."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "diffusers", "fastdiff", "onnxruntime", "openvino")
ABSENT = "not installed"
NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def facts(threads: int) -> dict[str, Any]:
    """Processor, instruction sets, threads, date and versions, as plain values."""
    info = _cpu_info()
    flags = info.get("flags", info.get("Features", "")).split()
    wanted = ("avx2", "avx512f", "bf16", *NATIVE_BFLOAT16)
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "isa": [flag for flag in wanted if flag in flags],
        "native_bfloat16": any(flag in flags for flag in ("bf16", *NATIVE_BFLOAT16)),
        "cores": cores(),
        "threads": threads,
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version()} | _versions(),
    }


def with_this_one(machines: list[dict[str, Any]], threads: int) -> list[dict[str, Any]]:
    """The machines of earlier figures and this one, which is listed once."""
    here = facts(threads)
    return machines if here in machines else [*machines, here]


def line(found: dict[str, Any]) -> str:
    """The facts in one line."""
    versions = ", ".join(
        f"{name} {number}" for name, number in found["versions"].items() if number != ABSENT
    )
    bfloat16 = "" if found["native_bfloat16"] else " (no native bfloat16)"
    threads = f"{found['threads']} thread{'' if found['threads'] == 1 else 's'}"
    return (
        f"{found['cpu']}, {', '.join(found['isa']) or platform.machine()}{bfloat16}, "
        f"{threads} of {found['cores']} cores, {found['date']}; {versions}"
    )


def peak_memory() -> float | None:
    """MiB, the most this process has held in memory since it began or since ``reset_peak``."""
    for entry in _status():
        if entry.startswith("VmHWM:"):
            return int(entry.split()[1]) / 1024
    return None


def reset_peak() -> bool:
    """Begin ``peak_memory`` anew; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def keep_heap() -> None:
    """Freed memory stays with the process from now on, where the C library is glibc."""
    with contextlib.suppress(AttributeError):
        if sys.platform == "linux":
            for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
                ctypes.CDLL(None).mallopt(option, 1 << 30)


def give_back_freed() -> None:
    """Freed memory goes back to the system once."""
    with contextlib.suppress(AttributeError):
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)


def cpu_seconds(pid: int) -> float:
    """Processor time of all threads of a process; 0 where the system does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0.0
    fields = stat.rpartition(")")[2].split()  # from the third on: the second is the name
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _status() -> list[str]:
    try:
        return Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []


def _cpu_info() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (entry.partition(":") for entry in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = ABSENT
    return found
