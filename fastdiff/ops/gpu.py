"""How operations reach the kernels for CUDA tensors, in Triton or in CUDA C++.

Both take an operation's own arguments. torch.compile sees the Triton kernels behind the operation,
as it does with ``torch.library.triton_op``, of which this is the mechanism for an operation that
has kernels for a CPU too.
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

operations: set[str] = set()  # that have kernels for CUDA tensors

TRITON_FILES = {  # of operations that share one with another
    "denoising_loss_backward": "denoising_loss",
    "denoising_loss_from_seed": "denoising_loss",
    "denoising_loss_from_seed_backward": "denoising_loss",
    "q_sample_from_seed": "q_sample",
    "upsample_nearest2x_backward": "upsample_nearest2x",
}


def on_gpu(name: str, check: Callable[..., None], *, traced: bool = True) -> None:
    """Give an operation its kernels for CUDA tensors.

    Args:
        name: an operation of the namespace fastdiff, already defined.
        check: called with the operation's arguments, raises if a kernel must not have them.
        traced: whether torch.compile may look at the Triton kernels; not where they get addresses.
    """

    def kernel(*args: Any) -> Any:
        check(*args)
        return eager_kernel(name, kernels_on_cuda())(*args)

    torch.library.impl(f"fastdiff::{name}", "CUDA")(kernel)
    operations.add(name)
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
    """What ``gpu_kernel`` gives, after which autograd knows of the tensors that were written."""
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
        module = importlib.import_module(f"fastdiff.kernels.{TRITON_FILES.get(name, name)}")
        found: Callable[..., Any] = getattr(module, name)
        return found
    if where == "cuda":
        operation: Callable[..., Any] = getattr(torch.ops.fastdiff_cuda, name)
        return operation
    reasons = missing()
    raise RuntimeError(
        f"no kernel computes {name} on CUDA tensors: triton: {reasons['triton']}, "
        f"cuda: {reasons['cuda']}"
    )
