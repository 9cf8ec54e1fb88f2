"""Which implementation of the operations runs where.

``reference`` is plain PyTorch and runs everywhere. ``cpu`` is the C++ extension ``fastdiff._C``,
for CPU tensors. The default, ``auto``, takes the fastest that can run for the tensors at hand.
"""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

NAMES = ("auto", "reference", "cpu")
KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


def _load_extension() -> tuple[Any, str | None]:
    """The extension module and None, or None and the reason why it is not there."""
    try:
        extension = importlib.import_module("fastdiff._C")
    except ModuleNotFoundError as error:
        if error.name != "fastdiff._C":
            raise
        return None, _why_not_built()
    except ImportError as error:
        # Typically an extension built for another torch: unresolved symbols.
        return None, _warned(f"the C++ extension cannot be loaded: {error}")
    if extension.torch_version != torch.__version__:
        return None, _warned(
            f"the C++ extension was built for torch {extension.torch_version}, "
            f"this is {torch.__version__}: reinstall fastdiff"
        )
    return extension, None


def _why_not_built() -> str:
    """What setup.py left beside the missing extension; warns unless it was left out on purpose."""
    note = Path(__file__).with_name("_C.not_built")
    if not note.is_file():
        return _warned("the C++ extension was not built: reinstall fastdiff to build it")
    text = note.read_text(encoding="utf-8").strip()
    reason = f"the C++ extension was not built: {text}"
    return reason if text.startswith("FASTDIFF_CPU=0") else _warned(reason)


def _warned(reason: str) -> str:
    warnings.warn(f"fastdiff: {reason}; running on the reference backend", stacklevel=2)
    return reason


extension, cpu_missing = _load_extension()

_current = "auto"
_use_cpu = extension is not None  # what _current means for CPU tensors; read on every call


class backend:  # noqa: N801 - used as a function and as a context manager
    """Set the backend, for good or for a ``with`` block. The setting is the whole process's.

    Args:
        name: ``auto``, ``reference`` or ``cpu``.

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend cannot run on this machine; the message says why.

    Example:
        >>> with fastdiff.backend("reference"):
        ...     y = model(x, t)
    """

    def __init__(self, name: str) -> None:
        self.name, self.previous = name, _current
        _set(name)

    def __enter__(self) -> backend:
        _set(self.name)  # again, for an object that is entered a second time
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _set(self.previous)


def _set(name: str) -> None:
    global _current, _use_cpu
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}, wanted one of {', '.join(NAMES)}")
    if name == "cpu" and extension is None:
        raise RuntimeError(f"backend 'cpu' cannot run here: {cpu_missing}")
    _current = name
    _use_cpu = name != "reference" and extension is not None


def current() -> str:
    """The name that was set: ``auto`` unless someone changed it."""
    return _current


def kernel_runs(x: torch.Tensor) -> bool:
    """Whether a kernel, and not the reference, computes an operation on ``x``."""
    return _use_cpu and x.is_cpu and x.dtype in KERNEL_DTYPES


def isa() -> str:
    """Instruction set that the CPU kernels use: DEFAULT (portable), AVX2 or AVX512, or none."""
    return "none" if extension is None else extension.isa()


def describe() -> dict[str, Any]:
    """What an operation on CPU tensors runs on now: backend, instruction set, threads."""
    return {
        "backend": "cpu" if _use_cpu else "reference",
        "isa": isa() if _use_cpu else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
