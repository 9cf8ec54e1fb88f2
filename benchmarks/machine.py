"""Facts of this machine and process: processor, versions and date of figures; memory and time."""

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
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def facts(threads: int | None) -> dict[str, Any]:
    """Processor, instruction sets, threads, date and versions, as plain values.

    ``isa`` is what the processor has, ``kernels`` the set that fastdiff's kernels use of it.
    ``threads`` is None where each figure has its own.
    """
    from fastdiff.ops.backend import isa  # not before a caller wants it: it loads PyTorch

    info = _cpu_info()
    flags = info.get("flags", info.get("Features", "")).split()
    wanted = ("avx2", "avx512f", "bf16", *NATIVE_BFLOAT16)
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "isa": [flag for flag in wanted if flag in flags],
        "kernels": isa(),
        "native_bfloat16": any(flag in flags for flag in ("bf16", *NATIVE_BFLOAT16)),
        "cores": cores(),
        "threads": threads,
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version()} | _versions(),
    }


def with_this_one(machines: list[dict[str, Any]], threads: int) -> list[dict[str, Any]]:
    """The list of machines of earlier figures, with this machine appended unless it is in it."""
    here = facts(threads)
    return machines if here in machines else [*machines, here]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two results of :func:`facts` are of one processor, used in the same way."""
    return all(one.get(name) == other.get(name) for name in ("cpu", "isa", "kernels", "cores"))


def line(measured_on: dict[str, Any]) -> str:
    """The result of :func:`facts` in one line of text."""
    versions = ", ".join(
        f"{name} {number}" for name, number in measured_on["versions"].items() if number != ABSENT
    )
    bfloat16 = "" if measured_on["native_bfloat16"] else " (no native bfloat16)"
    kernels = f", fastdiff on {measured_on['kernels']}" if "kernels" in measured_on else ""
    threads = measured_on["threads"]
    of = "" if threads is None else f"{threads} thread{'' if threads == 1 else 's'} of "
    return (
        f"{measured_on['cpu']}, {', '.join(measured_on['isa']) or platform.machine()}{bfloat16}"
        f"{kernels}, {of}{measured_on['cores']} cores, {measured_on['date']}; {versions}"
    )


def peak_memory() -> float | None:
    """Largest resident memory of this process in MiB, since its start or ``reset_peak``."""
    for entry in _status():
        if entry.startswith("VmHWM:"):
            return int(entry.split()[1]) / 1024
    return None


def reset_peak() -> bool:
    """Restart the measurement of ``peak_memory``; False if the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def keep_heap() -> None:
    """From now on keep freed memory in the process; does nothing without glibc."""
    with contextlib.suppress(AttributeError):
        if sys.platform == "linux":
            for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
                ctypes.CDLL(None).mallopt(option, 1 << 30)


def give_back_freed() -> None:
    """Return freed memory to the system once; does nothing without glibc."""
    with contextlib.suppress(AttributeError):
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)


def cpu_seconds(pid: int) -> float:
    """Processor time of all threads of a process, in seconds; 0 on systems other than Linux."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0.0
    fields = stat.rpartition(")")[2].split()  # proc(5)'s fields from the third on, after the name
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
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = ABSENT
    return versions
