"""How long each algorithm takes for a convolution of given sizes, measured once a machine.

The measurements are kept in the user's cache directory, one file for each processor, instruction
set and version of PyTorch. A file that cannot be read or is of another machine is not used.

Environment: FASTDIFF_CACHE names another directory. FASTDIFF_PLAN=heuristic measures nothing and
reads nothing: choices are then the same in every process (``plan.heuristic``).
"""

from __future__ import annotations

import json
import logging
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

from fastdiff import backend
from fastdiff.ops.conv2d import ALGORITHMS, conv2d, conv2d_pack, suits

log = logging.getLogger("fastdiff.compiler")
VERSION = 1  # of the file's form and of what the kernels do; another is not used
ROUNDS = 3  # of which the quickest counts
_lock = threading.RLock()


@dataclass(frozen=True)
class Sizes:
    """What the time of a convolution depends on.

    Attributes:
        x: [N, C, H, W] of what is read, the skip's channels included.
        weight: [K, C, R, S].
        stride: down and across.
        padding: above, below, left and right.
        upsample: whether pixels are read twice in both directions.
        dtype: of the images.
        threads: that compute.
    """

    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    upsample: bool
    dtype: torch.dtype
    threads: int

    @property
    def key(self) -> str:
        """As a line of the file names it."""
        numbers = (*self.x, *self.weight, *self.stride, *self.padding, int(self.upsample))
        return f"{','.join(map(str, numbers))},{str(self.dtype)[6:]},{self.threads}"

    @property
    def algorithms(self) -> list[str]:
        """Those that can compute it."""
        return [name for name in ALGORITHMS if suits(name, self.weight[2:], self.stride)]


def measured() -> bool:
    """Whether choices are made from measurements; ValueError for an unknown FASTDIFF_PLAN."""
    value = os.environ.get("FASTDIFF_PLAN", "measured")
    if value not in ("measured", "heuristic"):
        raise ValueError(f"FASTDIFF_PLAN must be measured or heuristic, got {value!r}")
    return value == "measured"


def of(sizes: Sequence[Sizes]) -> list[dict[str, float]]:
    """Seconds by algorithm for each of ``sizes``: from the file, or measured now and kept there."""
    with _lock:
        table = _table()
        missing = [s for s in dict.fromkeys(sizes) if set(table.get(s.key, ())) != {*s.algorithms}]
        if missing:
            log.info("measuring %d convolutions for %s", len(missing), path())
            for size in missing:
                table[size.key] = _measure(size)
            _save(table)
        return [table[s.key] for s in sizes]


def path() -> Path:
    """The file of this machine."""
    folder = os.environ.get("FASTDIFF_CACHE")
    if not folder:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = str(Path(home) / "fastdiff")
    name = "".join(c if c.isalnum() else "-" for c in f"{_processor()}-{backend.isa()}".lower())
    return Path(folder) / f"convolutions-{name}.json"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _machine() -> dict[str, Any]:
    return {"version": VERSION, "torch": torch.__version__, "cores": os.cpu_count()}


_tables: dict[Path, dict[str, dict[str, float]]] = {}


def _table() -> dict[str, dict[str, float]]:
    file = path()
    if file not in _tables:
        _tables[file] = _load(file)
    return _tables[file]


def _load(file: Path) -> dict[str, dict[str, float]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["machine"] != _machine():
            log.warning("%s is of another version or machine: measuring anew", file)
            return {}
        return {
            str(key): {str(name): float(seconds) for name, seconds in row.items()}
            for key, row in content["seconds"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be used (%s): measuring anew", file, error)
        return {}


def _save(table: dict[str, dict[str, float]]) -> None:
    """Write the file as a whole; where that cannot be done the process keeps what it measured."""
    file = path()
    # What another process has measured meanwhile.
    for key, row in _load(file).items():
        table.setdefault(key, row)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=file.parent, suffix=".new", delete=False, encoding="utf-8"
        ) as new:
            json.dump({"machine": _machine(), "seconds": table}, new)
        os.replace(new.name, file)
    except OSError as error:
        log.warning("%s cannot be written (%s): the next process measures again", file, error)


def _measure(sizes: Sizes) -> dict[str, float]:
    """Seconds by algorithm, in turns; of values that tell nothing, since times do not."""
    n, c, h, w = sizes.x
    with torch.inference_mode():
        layout = {"memory_format": torch.channels_last}
        x = torch.empty((n, c, h, w), dtype=sizes.dtype, **layout).fill_(0.5)  # type: ignore[arg-type]
        weight = torch.full(sizes.weight, 0.5, dtype=sizes.dtype)
        best: dict[str, float] = {}
        packed = {name: conv2d_pack(weight, name) for name in sizes.algorithms}
        for turn in range(ROUNDS + 1):  # the first warms up
            for name in packed:
                begin = time.perf_counter()
                conv2d(
                    x, weight, stride=sizes.stride, padding=sizes.padding, upsample=sizes.upsample,
                    packed=packed[name], algorithm=name,
                )  # fmt: skip
                seconds = time.perf_counter() - begin
                if turn > 0:
                    best[name] = min(seconds, best.get(name, seconds))
    return best
