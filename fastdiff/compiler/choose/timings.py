"""How long each algorithm takes for a convolution of given sizes, measured once a machine.

The measurements are kept in the user's cache directory, one file for each processor, instruction
set and version of PyTorch. What cannot be read, or is of another machine, is not used.
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
VERSION = 4  # of the file's form and of what the kernels do; another is not used
NAMES = ("plain", *ALGORITHMS)  # PyTorch's own convolution, which packs nothing, before ours
LEAST_CALLS, MOST_CALLS = 3, 12  # of which the quickest counts; until two of them agree
AGREEING_RATIO = 1.15  # two times agree within it
CALM_TRIES = 4  # calls until one is not interrupted
SLOW_SECONDS = 0.05  # from which a single call counts
# An algorithm is not called again once a call took both so many times the best and so long.
HOPELESS_RATIO, HOPELESS_SECONDS = 2.0, 0.005
LARGE_WEIGHT_BYTES = 8 << 20  # whose packed forms are not held at the same time
_lock = threading.RLock()
_op = torch.ops.fastdiff.conv2d.default
Table = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Sizes:
    """What the time of a convolution depends on.

    Attributes:
        x: [N, C, H, W] of what is read, the skip's channels included.
        spec: the convolution. It is measured bare: what it reads and writes through takes the same
            time whichever algorithm computes it.
        dtype: of the images.
        threads: that compute.
    """

    x: tuple[int, ...]
    spec: ConvSpec
    dtype: torch.dtype
    threads: int

    @property
    def key(self) -> str:
        """As a row of the file is named."""
        spec = self.spec
        numbers = (*self.x, *spec.weight, *spec.stride, *spec.padding, int(spec.upsample))
        return f"{','.join(map(str, numbers))},{str(self.dtype)[6:]},{self.threads}"

    def among(self, names: Sequence[str]) -> list[str]:
        """Those of ``names`` that can compute it."""
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


def of(sizes: Sequence[Sizes], names: Sequence[str] = NAMES) -> list[dict[str, float]]:
    """Seconds by algorithm for each of ``sizes``: from the file, or measured now and kept there.

    Args:
        sizes: of convolutions whose kernel runs here.
        names: wanted algorithms, of ``NAMES``; those that a convolution does not suit are not
            measured, and there may be others in what is returned.
    """
    with _lock:
        file = path()
        table = _tables.get(file)
        if table is None:
            table = _tables[file] = _load(file)
        missing = [s for s in dict.fromkeys(sizes) if _lacks(table, s, names)]
        if missing:
            log.info("measuring %d convolutions for %s", len(missing), file or "this process")
            for size in missing:
                if not _lacks(table, size, names):
                    continue  # it differs from one before in what is not measured
                row, sure = _measure(size, size.among(names))
                table.setdefault(size.key, {}).update(row)
                (_unsure.discard if sure else _unsure.add)(size.key)
            _save(file, table)
        return [dict(table[s.key]) for s in sizes]


def is_sure(sizes: Sizes) -> bool:
    """Whether the machine was at leisure when ``of`` measured them."""
    return sizes.key not in _unsure


def _lacks(table: Table, sizes: Sizes, names: Sequence[str]) -> bool:
    return not table.get(sizes.key, {}).keys() >= {*sizes.among(names)}


def path() -> Path | None:
    """The file of this machine; None where the user has no directory for it."""
    given, xdg = os.environ.get("FASTDIFF_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    try:
        if given:
            folder = Path(given).expanduser()
        else:
            # The XDG specification: a relative path is to be ignored.
            root = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"
            folder = root / "fastdiff"
    except RuntimeError:  # the user has no home
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
        "version": VERSION,
        "processor": _processor(),
        "isa": isa(),
        "torch": str(torch.__version__),
        "cores": os.cpu_count(),
    }


_tables: dict[Path | None, Table] = {}
_unsure: set[str] = set()  # measured while the machine did other things: not for later processes


def _load(file: Path | None, level: int = logging.WARNING) -> Table:
    """What a file says that can be believed; a notice tells of the rest."""
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
    return isinstance(row, dict) and all(
        name in NAMES and type(seconds) is float and math.isfinite(seconds) and seconds > 0
        for name, seconds in row.items()
    )


def _save(file: Path | None, table: Table) -> None:
    """Write the file as a whole; where that cannot be done the process keeps what it measured."""
    if file is None:
        return
    for key, row in _load(
        file, logging.DEBUG
    ).items():  # what other processes have measured meanwhile
        table[key] = {**row, **table.get(key, {})}
    kept = {key: row for key, row in table.items() if key not in _unsure}
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
    """Seconds by algorithm, of values that tell nothing: times do not depend on them.

    In turns, so that what else the machine does meanwhile hits all of them, but for weights so
    large that no two packed ones should be in memory.

    Returns:
        The seconds, and whether those of the quickest could be had again.
    """
    seconds_of: dict[str, list[float]] = {}  # ascending
    disturbed: set[str] = set()
    with torch.inference_mode():
        n, c, h, w = sizes.x
        x = torch.full((n, h, w, c), 0.5, dtype=sizes.dtype, device="cpu").permute(0, 3, 1, 2)
        weight = torch.full(sizes.spec.weight, 0.5, dtype=sizes.dtype, device="cpu")
        large = 4 * weight.numel() > LARGE_WEIGHT_BYTES
        packed: dict[str, Tensor] = {}
        likely = list(reversed(names))  # the quickest first, beside which others are hopeless
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
                    seconds_of[name] = sorted([*(seconds_of[name] if turn > 1 else ()), seconds])
                    best = min(times[0] for times in seconds_of.values())
                    hopeless = seconds > max(HOPELESS_RATIO * best, HOPELESS_SECONDS)
                    agreed = turn >= LEAST_CALLS and _agree(seconds_of[name])
                    if hopeless or agreed or (turn > 0 and seconds > SLOW_SECONDS):
                        together.remove(name)
    quickest = min(seconds_of, key=lambda name: seconds_of[name])
    sure = _agree(seconds_of[quickest]) and quickest not in disturbed
    return {name: times[0] for name, times in seconds_of.items()}, sure


def _agree(times: Sequence[float]) -> bool:
    return times[0] > SLOW_SECONDS or (len(times) > 1 and times[1] <= AGREEING_RATIO * times[0])


def _calm_time(*args: Any) -> tuple[float, bool]:
    """``_time``, and whether no thread had to make way for another process's meanwhile.

    Where one has, all others wait for it: a slice of the scheduler's, whatever is measured, and
    much only beside a short call.
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
