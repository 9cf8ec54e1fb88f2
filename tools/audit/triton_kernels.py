"""Compiles what the launchers launch, without a GPU, and looks at the machine code.

A launcher is called with tensors on ``meta`` and its launches are recorded. Triton's own binder
then says what it would compile for them at run time: types, constants, and which arguments are
divisible by 16. Tensors on ``meta`` have the address of their offset, so they count as aligned just
where a tensor from the allocator would be.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tools.audit.cases import Case, Source, tensors
from tools.audit.measured import WIDE, Measured, exemption
from tools.audit.sass import NotCheckedError

# What a launch would get is looked at, with or without fused multiply-adds.
warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")


class Compilation(NamedTuple):
    """Everything that decides a binary; equal ones are compiled once. It crosses processes."""

    operation: str
    module: str
    kernel: str
    arch: int
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], tuple[tuple[str, int], ...]], ...]
    options: tuple[tuple[str, Any], ...]
    activations: tuple[str, ...]  # arguments that are activations


def compilations(
    cases: Iterable[tuple[Case, Source]], archs: Sequence[int]
) -> dict[Compilation, list[str]]:
    """What the cases would have compiled, with the names of the cases that share it."""
    found: dict[Compilation, list[str]] = {}
    for case, source in cases:
        for kernel, args, constants, activations in _launches(case, source):
            for arch in archs:
                key = _compilation(case.operation, kernel, args, constants, activations, arch)
                names = found.setdefault(key, [])
                if case.name not in names:
                    names.append(case.name)
    return found


def _launches(case: Case, source: Source) -> Iterator[tuple[Any, Any, Any, tuple[str, ...]]]:
    """The launches of a case, each with the names of the arguments that are activations."""
    from fastdiff.kernels.launch import recording
    from fastdiff.ops.gpu import gpu_kernel

    args = case.make(source)
    with recording() as launches:
        results = gpu_kernel(case.operation, "triton")(*args)
    own = {storage(value) for value in tensors((args, results)) if value.numel() >= case.activation}
    for launch in launches:
        named = [
            (name, value)
            for name, value in zip(launch.kernel.arg_names, launch.args, strict=False)
            if isinstance(value, Tensor)
        ]
        names = tuple(
            name for name, value in named if storage(value) in own and name not in case.interleaved
        )
        if case.addresses:  # the activations are behind a table of addresses
            names = tuple(name for name, value in named if value.dtype == torch.int64)
        yield launch.kernel, launch.args, launch.constants, names


def storage(tensor: Tensor) -> int:
    """What two tensors have in common that share memory."""
    return int(tensor.untyped_storage()._cdata)


def _compilation(
    operation: str, kernel: Any, args: Any, constants: Any, activations: tuple[str, ...], arch: int
) -> Compilation:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", arch, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"debug": False, **constants}
    bound, specialisation, rest = bind(*args, **options)
    _, signature, constexprs, attributes = kernel._pack_args(
        backend, options, bound, specialisation, rest
    )
    return Compilation(
        operation=operation,
        module=kernel.fn.__module__,
        kernel=kernel.fn.__qualname__,
        arch=arch,
        signature=tuple(signature.items()),
        constants=tuple((path, _frozen(value)) for path, value in constexprs.items()),
        attributes=tuple((path, tuple(map(tuple, value))) for path, value in attributes.items()),
        options=tuple((k, v) for k, v in options.items() if k not in signature),
        activations=activations,
    )


def _frozen(value: Any) -> Any:
    """A constant that can be compared and sent to another process: a kernel becomes its name."""
    value = getattr(value, "value", value)
    if hasattr(value, "fn") and hasattr(value, "cache_key"):
        return _Function(value.fn.__module__, value.fn.__qualname__)
    return value


class _Function(NamedTuple):
    module: str
    name: str

    def resolve(self) -> Any:
        return getattr(importlib.import_module(self.module), self.name)


def compile_all(todo: Sequence[Compilation], processes: int) -> Iterator[Measured]:
    """Compile and measure, in processes of their own, in the order that they finish in."""
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        yield from pool.map(measure, todo, chunksize=1)


def measure(todo: Compilation) -> Measured:
    """Compile one kernel and read what the compiler made of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tools.audit import ptx, sass

    kernel = _Function(todo.module, todo.kernel).resolve()
    constants = {
        path: value.resolve() if isinstance(value, _Function) else value
        for path, value in todo.constants
    }
    source = ASTSource(
        fn=kernel,
        signature=dict(todo.signature),
        constexprs=constants,
        attrs={path: [list(pair) for pair in pairs] for path, pairs in todo.attributes},
    )
    try:
        compiled = triton.compile(
            source, target=GPUTarget("cuda", todo.arch, 32), options=dict(todo.options)
        )
    except Exception as error:
        raise NotCheckedError(
            f"{todo.operation} {todo.kernel} does not compile for sm_{todo.arch}: {error}"
        ) from None
    (code,) = sass.inspect(compiled.asm["cubin"], todo.arch)
    parameters = [(name, kind) for name, kind in todo.signature if kind != "constexpr"]
    pointers = {i for i, (_, kind) in enumerate(parameters) if kind.startswith("*")}
    by_number = ptx.widths(compiled.asm["ptx"], pointers)
    arguments = {
        "unknown" if number is None else parameters[number][0]: found
        for number, found in by_number.items()
    }
    activations = {
        name: found for name, found in arguments.items() if name in (*todo.activations, "unknown")
    }
    worst = max if exemption("triton", todo.operation, todo.kernel).tails else min
    load, store = (
        # The machine code cannot have widened what the PTX has.
        min(worst(widths, default=0), max(in_machine_code, default=0))
        for widths, in_machine_code in (
            (set().union(*(found.loads for found in activations.values())), code.loads),
            (set().union(*(found.stores for found in activations.values())), code.stores),
        )
    )
    return Measured(
        language="triton",
        operation=todo.operation,
        kernel=todo.kernel,
        arch=todo.arch,
        configuration="",
        threads=code.threads,
        registers=code.registers,
        shared=code.shared + compiled.metadata.shared,
        stack=code.stack,
        spills=code.spills,
        load=load,
        store=store,
        narrow=tuple(
            f"{what} of {name}: {worst(widths)}"
            for name, found in activations.items()
            for what, widths in (("load", found.loads), ("store", found.stores))
            if widths and worst(widths) < WIDE
        ),
    )


def refuse_the_interpreter() -> None:
    """Raise NotCheckedError where Triton would interpret the kernels instead of compiling them."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise NotCheckedError("TRITON_INTERPRET is set, so Triton does not compile: unset it")
    try:
        import triton  # noqa: F401
    except ImportError:
        raise NotCheckedError("Triton is not installed (pip install triton)") from None
