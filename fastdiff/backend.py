"""Which implementation of the operations runs where.

``reference`` is plain PyTorch and runs everywhere. ``cpu`` is the C++ extension ``fastdiff._C``,
for CPU tensors. For CUDA tensors there are the Triton kernels, ``triton``, and those in CUDA C++,
``cuda``, the extension ``fastdiff._cuda``. The default, ``auto``, takes what can run for the
tensors at hand, Triton before CUDA C++.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

NAMES = ("auto", "reference", "cpu", "triton", "cuda")
GPU_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
KERNEL_DTYPES = GPU_DTYPES | {torch.float64}


def _load_extension(module: str, title: str) -> tuple[Any, str | None]:
    """An extension module and None, or None and the reason why it is not there."""
    try:
        extension = importlib.import_module(f"fastdiff.{module}")
    except ModuleNotFoundError as error:
        if error.name != f"fastdiff.{module}":
            raise
        return None, _why_not_built(module, title)
    except ImportError as error:
        # Typically an extension built for another torch: unresolved symbols.
        return None, _warned(f"the {title} extension cannot be loaded: {error}", module)
    if extension.torch_version != torch.__version__:
        return None, _warned(
            f"the {title} extension was built for torch {extension.torch_version}, "
            f"this is {torch.__version__}: reinstall fastdiff",
            module,
        )
    return extension, None


def _why_not_built(module: str, title: str) -> str:
    """What setup.py left beside a missing extension; warns of the CPU's unless that was wanted."""
    note = Path(__file__).with_name(f"{module}.not_built")
    text = "reinstall fastdiff to build it"
    if note.is_file():
        text = note.read_text(encoding="utf-8").strip()
    reason = f"the {title} extension was not built: {text}"
    # Without the CUDA extension Triton computes, and on a machine without a GPU nothing is missed.
    quiet = module == "_cuda" or text.startswith("FASTDIFF_CPU=0")
    return reason if quiet else _warned(reason, module)


def _warned(reason: str, module: str) -> str:
    consequence = "; running on the reference backend" if module == "_C" else ""
    warnings.warn(f"fastdiff: {reason}{consequence}", stacklevel=2)
    return reason


def _triton_missing() -> str | None:
    if torch.version.hip:
        return "the kernels are written for NVIDIA GPUs, this torch is built for AMD's"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return None


extension, cpu_missing = _load_extension("_C", "C++")
cuda_extension, cuda_missing = _load_extension("_cuda", "CUDA")
triton_missing = _triton_missing()

_AUTO_ON_CUDA = (
    "triton" if triton_missing is None else "cuda" if cuda_extension is not None else None
)

# What _current means for CPU and for CUDA tensors; read on every call.
_current = "auto"
_use_cpu = extension is not None
_on_cuda: str | None = _AUTO_ON_CUDA


class backend:  # noqa: N801 - used as a function and as a context manager
    """Set the backend, for good or for a ``with`` block. The setting is the whole process's.

    Args:
        name: ``auto``, ``reference``, ``cpu``, ``triton`` or ``cuda``. Each of the last three is
            about the tensors it can take; other tensors are computed as in ``auto``.

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
    global _current, _use_cpu, _on_cuda
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}, wanted one of {', '.join(NAMES)}")
    reason = None if name in ("auto", "reference") else missing()[name]
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
    _current = name
    _use_cpu = name != "reference" and extension is not None
    _on_cuda = {"reference": None, "triton": "triton", "cuda": "cuda"}.get(name, _AUTO_ON_CUDA)


def missing() -> dict[str, str | None]:
    """Every backend by name, with the reason why it cannot run here, or None."""
    no_gpu = None if torch.cuda.is_available() else "torch finds no CUDA device"
    return {
        "reference": None,
        "cpu": cpu_missing,
        "triton": triton_missing or no_gpu,
        "cuda": cuda_missing or no_gpu,
    }


def current() -> str:
    """The name that was set: ``auto`` unless someone changed it."""
    return _current


def on_cuda() -> str | None:
    """What computes an operation on CUDA tensors: ``triton``, ``cuda``, or None, the reference."""
    return _on_cuda


def kernel_runs(x: torch.Tensor) -> bool:
    """Whether a kernel, and not the reference, computes an operation on ``x``."""
    if x.is_cpu:
        return _use_cpu and x.dtype in KERNEL_DTYPES
    return _on_cuda is not None and x.is_cuda and x.dtype in GPU_DTYPES


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
