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
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastdiff.common.machine_facts import processor
from fastdiff.compiler.choose.measuring import COLD_BYTES, constants, measure, weight_bytes
from fastdiff.compiler.choose.sizes import Sizes
from fastdiff.ops.backend import isa
from fastdiff.ops.conv2d_algorithms import ALGORITHMS

log = logging.getLogger("fastdiff.compiler")
FILE_VERSION = 6  # of the file's format and of the kernels' speed; other versions are ignored
# ``plain`` is PyTorch's convolution, which packs no weight.
ALGORITHM_NAMES = ("plain", *ALGORITHMS)
_lock = threading.RLock()
Table = dict[str, dict[str, float]]  # seconds, by ``Sizes.key`` and algorithm


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
            table, _disturbed[file] = _load(file)
            _tables[file] = table
        missing = [s for s in dict.fromkeys(sizes) if _lacks(table, s, names)]
        if missing:
            log.info("measuring %d convolutions for %s", len(missing), file or "this process")
            largest = max(weight_bytes(size, size.among(names)) for size in missing)
            weights = constants(max(largest, COLD_BYTES))
            for size in missing:
                if not _lacks(table, size, names):
                    continue  # an earlier size with the same key was measured just now
                row, sure = measure(size, size.among(names), weights)
                before = _disturbed.get(file, {}).get(size.key, {})
                row = {name: min(row[name], before.get(name, math.inf)) for name in row}
                table.setdefault(size.key, {}).update(row)
                sure = sure or before.keys() >= row.keys()
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
    name = f"{processor()}-{isa()}-torch-{torch.__version__}".lower()
    return folder / f"convolutions-{''.join(c if c.isalnum() else '-' for c in name)}.json"


def _machine() -> dict[str, Any]:
    return {
        "version": FILE_VERSION,
        "processor": processor(),
        "isa": isa(),
        "torch": str(torch.__version__),
        "cores": os.cpu_count(),
    }


_tables: dict[Path | None, Table] = {}
_unsure_keys: set[str] = set()  # of measurements of this process that were disturbed
# Measurements of earlier processes that were disturbed. One more measurement makes them final, so
# that a machine that is always busy does not measure in every process.
_disturbed: dict[Path | None, Table] = {}


def _load(file: Path | None, level: int = logging.WARNING) -> tuple[Table, Table]:
    """The valid rows of a file, and those that were disturbed. All else is logged at ``level``."""
    if file is None:
        return {}, {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["machine"] != _machine():
            log.log(level, "%s is of another version or machine: measuring anew", file)
            return {}, {}
        rows = content["seconds"].items()
        disturbed = content.get("disturbed", {}).items()
    except FileNotFoundError:
        return {}, {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.log(level, "%s cannot be used (%r): measuring anew", file, error)
        return {}, {}
    table, unsure = ({key: row for key, row in of if _is_row(row)} for of in (rows, disturbed))
    wrong = len(rows) - len(table) + len(disturbed) - len(unsure)
    if wrong:
        log.log(level, "%s: %d rows are not seconds by algorithm: measuring anew", file, wrong)
    return table, unsure


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
    of_others, disturbed = _load(file, logging.DEBUG)
    for key, row in of_others.items():
        mine = table.get(key, {})
        table[key] = {**mine, **row} if key in _unsure_keys else {**row, **mine}
        _unsure_keys.discard(key)
    kept = {key: row for key, row in table.items() if key not in _unsure_keys}
    disturbed |= {key: table[key] for key in _unsure_keys if key in table}
    disturbed = {key: row for key, row in disturbed.items() if key not in kept}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own on every machine that shares the folder; tempfile's are for one user.
        partial = file.with_name(f"{uuid.uuid4().hex}.new")
        try:
            with partial.open("x", encoding="utf-8") as new:
                rows = {"seconds": kept, "disturbed": disturbed}
                json.dump({"machine": _machine(), **rows}, new)
            os.replace(partial, file)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
    except OSError as error:
        log.warning("%s cannot be written (%s): the next process measures again", file, error)
