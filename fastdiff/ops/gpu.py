"""Connect operations to their kernels for CUDA tensors, in Triton or in CUDA C++.

A kernel's launcher takes its operation's own arguments. torch.compile sees the Triton kernels
behind the operation, as it sees those behind a ``torch.library.triton_op``. That function itself
cannot be used here: it would take the place of the operation's kernel for a CPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.utils._pytree import tree_leaves

from fastdiff.ops.backend import kernels_on_cuda, missing, on_cuda

operations: dict[str, str] = {}  # the family of each operation that has kernels for CUDA tensors


def on_gpu(
    name: str, check: Callable[..., None], *, family: str | None = None, traced: bool = True
) -> None:
    """Give an operation its kernels for CUDA tensors.

    Args:
        name: an operation of the namespace fastdiff, already defined.
        check: is called with the operation's arguments, and raises if they do not fit.
        family: the family that the operation is a variant of; None where the family has its name.
            The Triton launcher is in ``kernels/<family>.py``.
        traced: whether torch.compile may look at the Triton kernels. It may not where they are
            given the addresses of tensors.
    """

    def kernel(*args: Any) -> Any:
        check(*args)
        return eager_kernel(name, kernels_on_cuda())(*args)

    torch.library.impl(f"fastdiff::{name}", "CUDA")(kernel)
    operations[name] = family or name
    if not traced:
        return

    def decompose(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if not _sees_triton(args):
            return mode.__torch_dispatch__(op, types, args, kwargs)
        from fastdiff.kernels.launch import tracing

        with mode, tracing():
            return gpu_kernel(name, "triton")(*args, **kwargs)

    torch.library.register_torch_dispatch(f"fastdiff::{name}", FunctionalTensorMode, decompose)


@cache
def eager_kernel(name: str, where: str | None) -> Callable[..., Any]:
    """The function of ``gpu_kernel``, which also tells autograd which tensors it has written."""
    kernel = gpu_kernel(name, where)
    arguments = getattr(torch.ops.fastdiff, name).default._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]
    if where != "triton" or not written:  # CUDA C++ tells autograd itself
        return kernel

    def run(*args: Any) -> Any:
        results = kernel(*args)
        tensors = tree_leaves([args[i] for i in written])
        torch.autograd.graph.increment_version(
            [t for t in tensors if t is not None and not t.is_inference()]
        )
        return results

    return run


def _sees_triton(args: Any) -> bool:
    tensors = (value for value in args if isinstance(value, Tensor))
    return on_cuda() == "triton" and any(value.is_cuda for value in tensors)


@cache
def gpu_kernel(name: str, where: str | None) -> Callable[..., Any]:
    """The function that computes an operation in Triton (``triton``) or CUDA C++ (``cuda``)."""
    if where == "triton":
        module = importlib.import_module(f"fastdiff.kernels.{operations[name]}")
        launcher: Callable[..., Any] = getattr(module, name)
        return launcher
    if where == "cuda":
        operation: Callable[..., Any] = getattr(torch.ops.fastdiff_cuda, name)
        return operation
    reasons = missing()
    raise RuntimeError(
        f"no kernel computes {name} on CUDA tensors: triton: {reasons['triton']}, "
        f"cuda: {reasons['cuda']}"
    )
