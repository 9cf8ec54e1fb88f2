"""The backends, and which of them computes an operation.

``reference`` is plain PyTorch and runs everywhere. ``cpu`` is the C++ extension ``fastdiff._C`` and
runs on CPU tensors. ``triton``, the Triton kernels, and ``cuda``, the CUDA C++ extension
``fastdiff._cuda``, run on CUDA tensors; an operation that has no such kernel (those that have are
in ``fastdiff.ops.gpu.operations``) runs on the reference there. The default, ``auto``, takes the
kernels that can run on the given tensors, and Triton rather than CUDA C++.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
import warnings
from contextlib import nullcontext
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

NAMES = ("auto", "reference", "cpu", "triton", "cuda")
GPU_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
KERNEL_DTYPES = GPU_DTYPES | {torch.float64}


def _load_extension(module: str, title: str) -> tuple[Any, str | None]:
    """An extension module and None, or None and the reason why there is none."""
    try:
        extension = importlib.import_module(f"fastdiff.{module}")
    except ModuleNotFoundError as error:
        if error.name != f"fastdiff.{module}":
            raise
        return None, _why_not_built(module, title)
    except ImportError as error:
        # Usually the extension was built for another torch and has unresolved symbols.
        return None, _warned(f"the {title} extension cannot be loaded: {error}", module)
    if extension.torch_version != torch.__version__:
        return None, _warned(
            f"the {title} extension was built for torch {extension.torch_version}, "
            f"this is {torch.__version__}: reinstall fastdiff",
            module,
        )
    return extension, None


def _why_not_built(module: str, title: str) -> str:
    """The reason that setup.py left in a file in place of the extension.

    Warns if the C++ extension is missing, unless FASTDIFF_CPU=0 asked for that.
    """
    note = Path(__file__).parents[1] / f"{module}.not_built"
    text = "reinstall fastdiff to build it"
    if note.is_file():
        text = note.read_text(encoding="utf-8").strip()
    reason = f"the {title} extension was not built: {text}"
    # A missing CUDA extension is no reason to warn: Triton takes its place, or there is no GPU.
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


class _Choice:
    """A backend set by name, and what it means on this machine; each ``backend`` call makes one."""

    def __init__(self, name: str) -> None:
        if name not in NAMES:
            raise ValueError(f"unknown backend {name!r}, wanted one of {', '.join(NAMES)}")
        reason = None if name in ("auto", "reference") else missing()[name]
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run here: {reason}")
        self.name = name
        self.on_cpu = name != "reference" and extension is not None
        self.on_cuda: str | None = {"reference": None, "triton": "triton", "cuda": "cuda"}.get(
            name, _AUTO_ON_CUDA
        )
        self.instead: _Choice | None = None  # the choice that replaced this one when it was undone


_innermost: ContextVar[_Setting] = ContextVar("innermost")


class _Setting:
    """A place that holds a choice: the process's, or that of an open block of ``owner``."""

    # ``_process.here`` is read on every call of an operation. It is the setting of the innermost
    # block that is open in this context, else ``_process``, which is passed as the default of
    # ``get``. It is a property implemented in C, since Dynamo evaluates such a property and guards
    # on its value, but cannot trace ``ContextVar.get``.
    here = property(_innermost.get)

    def __init__(self, choice: _Choice, owner: backend | None = None) -> None:
        self.choice, self.owner = choice, owner


_blocks: ContextVar[tuple[_Setting, ...]] = ContextVar("blocks", default=())  # innermost last
_lock = threading.Lock()  # held while a setting's choice changes


class backend:  # noqa: N801 - used as a function and as a context manager
    """Set the backend, permanently or for a ``with`` block.

    A permanent setting, ``backend(name)``, is that of the whole process. The setting of a block is
    that of the thread, or the asyncio task, that entered it, and of the threads on which autograd
    computes gradients for CUDA tensors while that thread waits in ``backward``; other threads keep
    theirs. A permanent setting made inside a block ends with the block. An object that is made
    ahead of its ``with`` statement is a permanent setting until the block is entered.

    Args:
        name: ``auto``, ``reference``, ``cpu``, ``triton`` or ``cuda``. ``cpu``, ``triton`` and
            ``cuda`` concern only the tensors that they can take; other tensors are computed as in
            ``auto``.

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend cannot run on this machine; the message says why.

    Example:
        >>> with fastdiff.backend("reference"):
        ...     y = model(x, t)
    """

    def __init__(self, name: str) -> None:
        self.name, self._choice = name, _Choice(name)
        # Whether a block will be entered is not known yet: until then the setting is permanent.
        with nullcontext() if torch.compiler.is_compiling() else _lock:
            self._setting: _Setting = _process.here
            self._before = self._setting.choice
            self._setting.choice = self._choice

    def __enter__(self) -> backend:
        if torch.compiler.is_compiling():  # __exit__ undoes this within the traced graph
            self._setting.choice = self._choice
            return self
        with _lock:
            before = self._before
            while before.instead is not None:  # a block of another thread has undone this choice
                before = before.instead
            self._choice.instead = before
            if self._setting.choice is self._choice:
                self._setting.choice = before
        _open((*_blocks.get(), _Setting(_Choice(self.name), self)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if torch.compiler.is_compiling():
            self._setting.choice = self._before
            return
        blocks = _blocks.get()
        mine = [index for index, block in enumerate(blocks) if block.owner is self]
        if mine:  # blocks may be left in any order
            _open(blocks[: mine[-1]] + blocks[mine[-1] + 1 :])


def _open(blocks: tuple[_Setting, ...]) -> None:
    """Make ``blocks`` the open blocks of this context."""
    _blocks.set(blocks)
    _innermost.set(blocks[-1] if blocks else _process)


_process = _Setting(_Choice("auto"))


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
    """The name of the backend that is set, ``auto`` by default."""
    return _chosen().name


def on_cuda() -> str | None:
    """The backend for CUDA tensors: ``triton``, ``cuda``, or None for the reference."""
    return _chosen().on_cuda


def kernels_on_cuda() -> str | None:
    """As ``on_cuda``, but ``triton`` or ``cuda`` in place of the reference if one of them can run.

    It is for calls that need a kernel whatever is set, such as the gradient of a kernel's result,
    which may be computed after the block in which the kernel ran.
    """
    return on_cuda() or _AUTO_ON_CUDA


def _chosen() -> _Choice:
    """The choice of this context, or of the context that waits in ``backward`` for this thread."""
    here: _Setting = _process.here
    if torch.compiler.is_compiling():
        return here.choice
    # On the threads of ``backward`` PyTorch stores a copy of the waiting thread's context.
    if here is _process and torch._C._is_key_in_tls("context"):
        here = torch._C._get_obj_in_tls("context").get(_innermost, here)
    return here.choice


def kernel_runs(x: torch.Tensor) -> bool:
    """Whether a kernel, and not the reference, computes an operation on ``x``."""
    if x.is_cpu:
        return _process.here.choice.on_cpu and x.dtype in KERNEL_DTYPES
    return x.is_cuda and x.dtype in GPU_DTYPES and on_cuda() is not None


def isa() -> str:
    """Instruction set that the CPU kernels use: DEFAULT (portable), AVX2 or AVX512, or none."""
    return "none" if extension is None else extension.isa()


def describe() -> dict[str, Any]:
    """What computes an operation on CPU tensors now: backend, instruction set, threads."""
    kernels = _chosen().on_cpu
    return {
        "backend": "cpu" if kernels else "reference",
        "isa": isa() if kernels else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
