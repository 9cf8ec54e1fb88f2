"""The stages of the report, in the order of their worth: what comes last may find no time."""

from __future__ import annotations

import csv
import os
import re
import sys

from tools.build.common import ROOT
from tools.gpu.machine import Machine
from tools.gpu.stage import Stage

PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q")
# One large feature map and one batch of latents of each kernel, in the dtype of production: every
# case that there is would have Inductor compile for most of an hour.
CHOICE = "bf16 and (4x320x64x64 or 16x4x64x64 or ema)"
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory, % of peak",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "arithmetic, % of peak",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy, %",
    "launch__registers_per_thread": "registers",
}


def stages(here: Machine) -> list[Stage]:
    """What to run on that machine, within ten minutes altogether."""
    python = sys.executable
    gpu = ("device", "pytest", "hypothesis")
    workers = min(8, os.cpu_count() or 1)
    parallel = ("-n", str(workers)) if "pytest-xdist" in here.found else ()
    sanitizer = here.found.get("compute-sanitizer", "compute-sanitizer")
    ncu = here.found.get("ncu", "ncu")
    profiler = (ncu, "--clock-control", "none", "--profile-from-start", "off", "--csv")
    kernels = (python, "-m", "tools.gpu.kernels")
    return [
        Stage(
            "build",
            "Both extensions compiled in place, the CUDA part for this device alone",
            (python, "setup.py", "-q", "build_ext", "--inplace"),
            limit=180,
            needs=("torch", "device", "nvcc", "compiler", "ninja"),
            environment={"FASTDIFF_CUDA": "1"},
        ),
        Stage(
            "doctor",
            "Every operation of every backend against float64",
            (python, "-m", "fastdiff", "doctor"),
            limit=60,
            needs=("torch",),
            shown=lambda lines: lines,
        ),
        Stage(
            "tests",
            "The tests that need a device",
            (*PYTEST, *parallel, "-m", "gpu", "-rfE", "--tb=short", *gpu_tests()),
            limit=140,
            needs=gpu,
        ),
        Stage(
            "kernels",
            "Every kernel beside PyTorch, Inductor and a copy of its bytes",
            (*PYTEST, "benchmarks/bench_gpu.py", "--benchmark-disable", "-k", CHOICE, "--tb=short"),
            limit=120,
            needs=(*gpu, "pytest-benchmark"),
            shown=benchmark_lines,
        ),
        Stage(
            "unet",
            "A U-Net's step and a sampling loop: eager, compiled, as CUDA graphs",
            (*PYTEST, "benchmarks/bench_gpu_unet.py", "--benchmark-disable", "--tb=short"),
            limit=110,
            needs=(*gpu, "pytest-benchmark"),
            shown=benchmark_lines,
        ),
        Stage(
            "sanitizer",
            "One case of each kernel under compute-sanitizer",
            (sanitizer, "--tool", "memcheck", "--error-exitcode", "1", *kernels, "small"),
            limit=60,
            needs=("device", "compute-sanitizer"),
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # else blocks hide what is beyond
        ),
        Stage(
            "ncu",
            "One case of each kernel under Nsight Compute",
            (*profiler, "--metrics", ",".join(METRICS), *kernels, "large"),
            limit=60,
            needs=("device", "ncu"),
            shown=profile_lines,
        ),
    ]


def gpu_tests() -> list[str]:
    """The test files in which something is marked to need a device, and the folder of kernels."""
    marked = re.compile(r"\bmark\.gpu\b")
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    found = [path for path in files if marked.search(path.read_text(encoding="utf-8"))]
    folder = ROOT / "tests" / "gpu"
    others = [path for path in found if folder not in path.parents]
    return [str(path.relative_to(ROOT)) for path in (folder, *others)]


def benchmark_lines(lines: list[str]) -> list[str]:
    """The comparisons that a benchmark printed, and how it ended."""
    compared = [line for line in lines if " us" in line or " ms" in line]
    return [*compared, *lines[-12:]]


def profile_lines(lines: list[str]) -> list[str]:
    """Nsight Compute's CSV as a line for each kernel, with what METRICS calls its numbers."""
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return lines[-30:]
    kernels: dict[tuple[str, str], list[str]] = {}
    for row in csv.DictReader(lines[begin:]):
        name = METRICS.get(row["Metric Name"] or "")
        if name is not None:
            unit = row["Metric Unit"] if name == "time" else ""
            number = f"{name} {row['Metric Value']} {unit}".strip()
            kernels.setdefault((row["ID"], row["Kernel Name"]), []).append(number)
    return [f"{kernel[:60]:<60} {'; '.join(numbers)}" for (_, kernel), numbers in kernels.items()]
