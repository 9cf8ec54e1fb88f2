"""Prints what torch.compile makes of each operation on CUDA tensors, as JSON; needs no GPU.

The tensors are fakes that say they are on a GPU, and Triton is told of one, so that it can find out
what a kernel writes. Run in a process of its own, without Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch._functorch.aot_autograd import aot_module_simplified
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from fastdiff import ops
from fastdiff.samplers import COLUMNS


class Traced(Exception):  # noqa: N818
    """There is nothing to run."""


class Hopper:
    """As much of a Triton driver as there is without a device."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def cases() -> dict[str, tuple[Callable[..., Any], Sequence[Any]]]:
    """A function of tensors for each operation, and tensors."""
    x, channels, images = normal(2, 64, 16, 16), normal(64), normal(2, 64)
    whole = {"dtype": torch.int64, "device": "cuda"}
    t, step, seed = (torch.empty(shape, **whole) for shape in ((2,), (1,), (2, 2)))
    table, mean = normal(5, len(COLUMNS) + 2), normal(2, 8, dtype=torch.float64)
    targets = (channels, channels, channels)
    operations = torch.ops.fastdiff
    return {
        "group_norm_silu": (
            lambda x, w, b, add: ops.group_norm_silu(x, 8, w, b, add=add),
            (x, channels, channels, images),
        ),
        "group_norm_silu_backward": (
            lambda g, x, m, r, w: operations.group_norm_silu_backward(
                g, x, m, r, 8, w, None, None, None, None, True, None
            ),
            (x, x, mean, mean, channels),
        ),
        "add_time_embedding": (ops.add_time_embedding, (x, images)),
        "q_sample": (ops.q_sample, (x, t, x, channels, channels)),
        "q_sample_from_seed": (ops.q_sample_from_seed, (x, t, seed, step, channels, channels)),
        "denoising_loss": (ops.denoising_loss, (x, None, x, t, *targets)),
        "denoising_loss_backward": (
            operations.denoising_loss_backward,
            (normal(2), x, x, None, t, *targets),
        ),
        "denoising_loss_from_seed": (
            ops.denoising_loss_from_seed,
            (x, x, seed, step, t, *targets),
        ),
        "denoising_loss_from_seed_backward": (
            operations.denoising_loss_from_seed_backward,
            (normal(2), x, x, seed, step, t, *targets),
        ),
        "philox_normal": (lambda seed: ops.philox_normal(seed, 3, (2, 4, 8, 8)), (seed,)),
        "sampler_step": (
            lambda x, m, h, table, step, seed: ops.sampler_step(
                x, m, h, None, table, step, seed=seed
            ),
            (x, normal(4, 64, 16, 16), normal(2, 2, 64, 16, 16), table, step, seed),
        ),
        "conv_epilogue": (
            lambda x, b, r: ops.conv_epilogue(x, b, None, r, statistics=True),
            (x, channels, x),
        ),
        "upsample_nearest2x": (ops.upsample_nearest2x, (x,)),
        "upsample_nearest2x_backward": (operations.upsample_nearest2x_backward, (x,)),
    }


def traced(call: Callable[..., Any], arguments: Sequence[Any]) -> dict[str, Any]:
    """The Triton kernels of call(*arguments) with what each writes, and fastdiff's opaque calls."""
    graphs = []

    def stop(*inputs: Any) -> Any:
        raise Traced

    def keep(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return stop

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return aot_module_simplified(graph, inputs, fw_compiler=keep)

    with contextlib.suppress(Traced):
        torch.compile(call, fullgraph=True, backend=backend)(*arguments)
    (graph,) = graphs
    kernels, opaque = [], []
    for node in graph.graph.nodes:
        if "triton_kernel_wrapper" in str(node.target):
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            kernels.append([kernel.fn.__name__, sorted(node.kwargs["tensors_to_clone"])])
        elif "fastdiff" in str(node.target):
            opaque.append(str(node.target))
    return {"kernels": kernels, "opaque": opaque}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    triton.runtime.driver.set_active(Hopper())
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = {name: traced(*case) for name, case in cases().items()}
    print(json.dumps(found))
