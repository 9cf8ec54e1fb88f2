"""Seconds that each algorithm takes for a convolution of given sizes, measured once per machine.

The measurements are kept in the user's cache directory, one file for each processor, instruction
set and version of PyTorch. A file that cannot be read, or is from another machine, is ignored.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.ops import reference
from fastdiff.ops.backend import isa
from fastdiff.ops.conv2d import conv2d_pack
from fastdiff.ops.conv2d_algorithms import ALGORITHMS, suits
from fastdiff.ops.conv2d_spec import ConvSpec

try:
    import resource
except ImportError:  # not a Unix
    resource = None  # type: ignore[assignment]

log = logging.getLogger("fastdiff.compiler")
FILE_VERSION = 4  # of the file's format and of the kernels' speed; other versions are ignored
# ``plain`` is PyTorch's convolution, which packs no weight.
ALGORITHM_NAMES = ("plain", *ALGORITHMS)
# Each algorithm is called from 3 to 12 times, until its two quickest calls agree within the ratio.
LEAST_CALLS, MOST_CALLS, AGREEING_RATIO = 3, 12, 1.15
CALM_TRIES = 4  # a call is repeated up to so often until the scheduler does not interrupt it
SLOW_SECONDS = 0.05  # a call that takes longer is not repeated: its time counts alone
# An algorithm is not called again after a call of more than both ratio * best and these seconds.
HOPELESS_RATIO, HOPELESS_SECONDS = 2.0, 0.005
LARGE_WEIGHT_BYTES = 8 << 20  # of larger weights only one packed form is in memory at a time
_lock = threading.RLock()
_op = torch.ops.fastdiff.conv2d.default
Table = dict[str, dict[str, float]]  # seconds, by ``Sizes.key`` and algorithm


@dataclass(frozen=True)
class Sizes:
    """What the time of a convolution depends on.

    Attributes:
        x: sizes [N, C, H, W] of the input, the channels of a skip included.
        spec: the convolution. It is measured without prologue and epilogue, which take the same
            time whichever algorithm computes the convolution.
        dtype: of input and weight.
        threads: how many threads compute it.
    """

    x: tuple[int, ...]
    spec: ConvSpec
    dtype: torch.dtype
    threads: int

    @property
    def key(self) -> str:
        """The name of its row in the file."""
        spec = self.spec
        numbers = (*self.x, *spec.weight, *spec.stride, *spec.padding, int(spec.upsample))
        return f"{','.join(map(str, numbers))},{str(self.dtype)[6:]},{self.threads}"

    def among(self, names: Sequence[str]) -> list[str]:
        """The algorithms in ``names`` that suit this convolution."""
        return [name for name in names if name == "plain" or suits(name, self.spec, self.dtype)]


def measured(otherwise: str = "measured") -> bool:
    """Whether choices are made from measurements; ValueError for an unknown FASTDIFF_PLAN.

    Args:
        otherwise: the plan where the variable is not set.
    """
    value = os.environ.get("FASTDIFF_PLAN", otherwise)
    if value not in ("measured", "heuristic"):
        raise ValueError(f"FASTDIFF_PLAN must be measured or heuristic, got {value!r}")
    return value == "measured"


def seconds_by_algorithm(
    sizes: Sequence[Sizes], names: Sequence[str] = ALGORITHM_NAMES
) -> list[dict[str, float]]:
    """Seconds by algorithm for each of ``sizes``: from the file, or measured now and saved there.

    Args:
        sizes: of convolutions whose kernels run on this machine.
        names: the wanted algorithms, from ``ALGORITHM_NAMES``. Those that do not suit a convolution
            are not measured. A result may have algorithms that are not among ``names``.
    """
    with _lock:
        file = cache_file()
        table = _tables.get(file)
        if table is None:
            table = _tables[file] = _load(file)
        missing = [s for s in dict.fromkeys(sizes) if _lacks(table, s, names)]
        if missing:
            log.info("measuring %d convolutions for %s", len(missing), file or "this process")
            for size in missing:
                if not _lacks(table, size, names):
                    continue  # an earlier size with the same key was measured just now
                row, sure = _measure(size, size.among(names))
                table.setdefault(size.key, {}).update(row)
                (_unsure_keys.discard if sure else _unsure_keys.add)(size.key)
            _save(file, table)
        return [dict(table[s.key]) for s in sizes]


def is_sure(sizes: Sizes) -> bool:
    """Whether ``seconds_by_algorithm`` could reproduce its measurements of these sizes."""
    return sizes.key not in _unsure_keys


def _lacks(table: Table, sizes: Sizes, names: Sequence[str]) -> bool:
    return not table.get(sizes.key, {}).keys() >= {*sizes.among(names)}


def cache_file() -> Path | None:
    """The file of this machine; None where the user has no directory for it."""
    given, xdg = os.environ.get("FASTDIFF_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    try:
        if given:
            folder = Path(given).expanduser()
        else:
            # The XDG base directory specification: a relative path must be ignored.
            root = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"
            folder = root / "fastdiff"
    except RuntimeError:  # the user has no home directory
        return None
    name = f"{_processor()}-{isa()}-torch-{torch.__version__}".lower()
    return folder / f"convolutions-{''.join(c if c.isalnum() else '-' for c in name)}.json"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except (OSError, UnicodeDecodeError):
        pass
    return platform.processor() or platform.machine()


def _machine() -> dict[str, Any]:
    return {
        "version": FILE_VERSION,
        "processor": _processor(),
        "isa": isa(),
        "torch": str(torch.__version__),
        "cores": os.cpu_count(),
    }


_tables: dict[Path | None, Table] = {}
_unsure_keys: set[str] = set()  # of measurements that were disturbed, and are not saved


def _load(file: Path | None, level: int = logging.WARNING) -> Table:
    """The valid rows of a file. Whatever else the file has is logged at ``level``."""
    if file is None:
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["machine"] != _machine():
            log.log(level, "%s is of another version or machine: measuring anew", file)
            return {}
        rows = content["seconds"].items()
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.log(level, "%s cannot be used (%r): measuring anew", file, error)
        return {}
    table = {key: row for key, row in rows if _is_row(row)}
    if len(table) < len(rows):
        wrong = len(rows) - len(table)
        log.log(level, "%s: %d rows are not seconds by algorithm: measuring anew", file, wrong)
    return table


def _is_row(row: Any) -> bool:
    """Whether a row of the file is seconds by algorithm."""
    return isinstance(row, dict) and all(
        name in ALGORITHM_NAMES and type(value) is float and math.isfinite(value) and value > 0
        for name, value in row.items()
    )


def _save(file: Path | None, table: Table) -> None:
    """Replace the file atomically. Where it cannot be written, a warning is logged."""
    if file is None:
        return
    # The file may have new rows, from other processes.
    for key, row in _load(file, logging.DEBUG).items():
        table[key] = {**row, **table.get(key, {})}
    kept = {key: row for key, row in table.items() if key not in _unsure_keys}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=file.parent, suffix=".new")
        try:
            with open(descriptor, "w", encoding="utf-8") as new:
                json.dump({"machine": _machine(), "seconds": kept}, new)
            os.replace(name, file)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        log.warning("%s cannot be written (%s): the next process measures again", file, error)


def _measure(sizes: Sizes, names: Sequence[str]) -> tuple[dict[str, float], bool]:
    """Time each algorithm on constant tensors: times do not depend on the values.

    The algorithms take turns, so that other work of the machine slows all of them alike. With large
    weights they follow one another, so that only one packed weight is in memory.

    Returns:
        Seconds by algorithm, and whether the times of the quickest were reproducible.
    """
    times_of: dict[str, list[float]] = {}  # ascending
    disturbed: set[str] = set()
    with torch.inference_mode():
        n, c, h, w = sizes.x
        x = torch.full((n, h, w, c), 0.5, dtype=sizes.dtype, device="cpu").permute(0, 3, 1, 2)
        weight = torch.full(sizes.spec.weight, 0.5, dtype=sizes.dtype, device="cpu")
        large = 4 * weight.numel() > LARGE_WEIGHT_BYTES
        packed: dict[str, Tensor] = {}
        likely = list(reversed(names))  # probably the quickest first, so that slow ones end early
        left = [[name] for name in likely] if large else [likely]
        for together in left:
            packed.clear()
            for turn in range(MOST_CALLS + 1):
                for name in list(together):
                    if name != "plain" and name not in packed:
                        packed[name] = conv2d_pack(weight, name)
                    seconds, calm = _calm_time(sizes, name, x, weight, packed.get(name))
                    if not calm:
                        disturbed.add(name)
                    times_of[name] = sorted([*(times_of[name] if turn > 1 else ()), seconds])
                    best = min(times[0] for times in times_of.values())
                    hopeless = seconds > max(HOPELESS_RATIO * best, HOPELESS_SECONDS)
                    agreed = turn >= LEAST_CALLS and _agree(times_of[name])
                    if hopeless or agreed or (turn > 0 and seconds > SLOW_SECONDS):
                        together.remove(name)
    quickest = min(times_of, key=lambda name: times_of[name])
    sure = _agree(times_of[quickest]) and quickest not in disturbed
    return {name: times[0] for name, times in times_of.items()}, sure


def _agree(times: Sequence[float]) -> bool:
    return times[0] > SLOW_SECONDS or (len(times) > 1 and times[1] <= AGREEING_RATIO * times[0])


def _calm_time(*args: Any) -> tuple[float, bool]:
    """Seconds of ``_time``, and whether no thread of this process was preempted meanwhile.

    If a thread is preempted, the other threads wait for it. That adds one time slice of the
    scheduler, which matters only for short calls.
    """
    quickest = math.inf
    for _ in range(CALM_TRIES):
        before = _interruptions()
        seconds = _time(*args)
        if seconds > SLOW_SECONDS or _interruptions() == before:
            return seconds, True
        quickest = min(quickest, seconds)
    return quickest, False


def _interruptions() -> int:
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _time(sizes: Sizes, name: str, x: Tensor, weight: Tensor, packed: Tensor | None) -> float:
    spec = sizes.spec.bare
    numbers = spec.encode()
    begin = time.perf_counter()
    if packed is None:
        reference.conv2d(x, weight, spec)
    else:
        _op(x, packed, numbers, ALGORITHMS[name].number)
    return time.perf_counter() - begin
