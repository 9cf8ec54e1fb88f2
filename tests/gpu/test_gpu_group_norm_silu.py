"""group_norm_silu on the GPU kernels: values, gradients, layouts, and what must not happen."""

from __future__ import annotations

import itertools

import pytest
import torch
from accuracy import LAYOUT_IDS, LAYOUTS
from conftest import DTYPE_IDS, DTYPES
from gpu_accuracy import assert_close_to_oracle

import fastdiff
from fastdiff import ops

OPTIONS = ("weight", "bias", "add", "scale", "shift", "residual")

# N, C, spatial..., groups
SHAPES = {
    "vector tails": ((3, 12, 5, 7), 3),
    "one pixel": ((2, 8, 1, 1), 2),
    "one channel a group": ((1, 20, 9, 3), 20),
    "one group": ((2, 24, 6, 6), 1),
    "groups across vectors": ((2, 40, 8, 8), 8),
    "stable diffusion's 10 a group": ((1, 80, 8, 8), 8),
    "ddpm's block": ((2, 32, 16, 16), 8),
    "one image, wide": ((1, 256, 4, 4), 8),
}

# In Triton the first stays in the registers; the second is split in float32, and in 16 bits it is
# one program's, too large for the registers, and so read twice.
WAYS = {"small": ((2, 16, 16, 16), 4), "large": ((1, 8, 48, 48), 1)}

DATA = {
    "mean 100 deviations": lambda x: x * 0.5 + 50,
    "mean 100,000 deviations": lambda x: x * 0.1 + 1e4,
    "drifting": lambda x: x * 0.1 + torch.linspace(-20, 20, x.shape[-2])[:, None],
    "outlier first": lambda x: x.index_put((torch.tensor(0),) * 4, torch.tensor(300.0)),
    "channels apart": lambda x: x + torch.linspace(-40, 40, x.shape[1])[:, None, None],
}


def make(gpu, shape, dtype, layout, options=(), data=lambda x: x):
    """x and the options' tensors, leaves that require gradients."""
    g = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=g)

    n, c = shape[:2]
    x = data(normal(*shape)).to(gpu.device, dtype)
    values = {"x": x.contiguous(memory_format=layout)}
    for name in options:
        if name == "residual":
            value = normal(*shape).to(gpu.device, dtype).contiguous(memory_format=layout)
        else:
            size = (c,) if name in ("weight", "bias") else (n, c)
            value = (normal(*size) * 0.5).to(gpu.device, dtype)
        values[name] = value
    return {name: value.requires_grad_() for name, value in values.items()}


def call(groups, names, silu=True):
    """A function of the tensors that returns the output and every gradient."""

    def run(*tensors):
        values = dict(zip(names, tensors, strict=True))
        y = ops.group_norm_silu(num_groups=groups, silu=silu, **values)
        # Normal numbers, for a smooth wave's sums over an image cancel to almost nothing.
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        return [y.detach(), *torch.autograd.grad(y, tensors, grad.to(y.device, y.dtype))]

    return run


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(gpu, shape, groups, dtype, layout) -> None:
    values = make(gpu, shape, dtype, layout, OPTIONS)
    # Where each channel has a group of its own, what is added to it has no effect or gradient.
    alone = groups == shape[1]
    assert_close_to_oracle(call(groups, list(values)), *values.values(), cancelling=alone)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize(("shape", "groups"), WAYS.values(), ids=WAYS)
def test_every_way_to_divide_the_work(gpu, shape, groups, dtype, layout) -> None:
    values = make(gpu, shape, dtype, layout, ("weight", "bias", "add"))
    assert_close_to_oracle(call(groups, list(values)), *values.values())


@pytest.mark.parametrize("tensors", [1, 2], ids=["forward", "backward"])
@pytest.mark.parametrize("nhwc", [False, True], ids=LAYOUT_IDS)
def test_the_shapes_go_every_way(nhwc, tensors) -> None:
    pytest.importorskip("triton")
    from fastdiff.kernels.channel_tiles import Activation
    from fastdiff.kernels.group_norm_plan import plan

    def way(name: str, itemsize: int) -> str:
        (n, c, h, w), groups = WAYS[name]
        found = plan(Activation(n, c, 0, h * w, itemsize, nhwc), groups, tensors)
        return "split" if not found.groups else "resident" if found.steps == 1 else "again"

    assert way("small", 2) == way("small", 4) == "resident"
    assert (way("large", 2), way("large", 4)) == ("again", "split")


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize(("shape", "groups"), WAYS.values(), ids=WAYS)
def test_ill_scaled_data(gpu, shape, groups, data, layout) -> None:
    values = make(gpu, shape, torch.float32, layout, ("weight", "bias", "add"), data)
    assert_close_to_oracle(call(groups, list(values)), *values.values())


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize(("shape", "groups"), WAYS.values(), ids=WAYS)
def test_a_mean_of_ten_thousand_beside_a_deviation_of_a_tenth(gpu, shape, groups, layout) -> None:
    values = make(gpu, shape, torch.float32, layout, (), DATA["mean 100,000 deviations"])
    y = ops.group_norm_silu(values["x"], groups)
    with fastdiff.backend("reference"):
        wanted = ops.group_norm_silu(values["x"].double().contiguous(), groups)
    assert (y - wanted).abs().max() < 2e-6


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "identity"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("option", [None, *OPTIONS])
def test_each_option_alone(gpu, option, layout, silu) -> None:
    options = () if option is None else (option,)
    values = make(gpu, (2, 24, 5, 6), torch.float32, layout, options)
    assert_close_to_oracle(call(4, list(values), silu), *values.values())


@pytest.mark.parametrize("channels", [(8, 16), (5, 7), (12, 0), (0, 12), (16, 48)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_two_inputs(gpu, channels, dtype, layout) -> None:
    """Tiles and groups straddle the seam."""
    values = make(gpu, (2, sum(channels), 5, 6), dtype, layout, OPTIONS)
    names = [name for name in values if name != "x"]
    x, skip = (
        part.detach().contiguous(memory_format=layout).requires_grad_()
        for part in values.pop("x").split(channels, dim=1)
    )
    run = call(4, ["x", "skip", *names])
    assert_close_to_oracle(run, x, skip, *values.values())
    y = ops.group_norm_silu(x, 4, skip=skip)
    assert y.is_contiguous(memory_format=layout) or not x.numel()  # y is laid out like x


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
def test_two_large_inputs(gpu, layout) -> None:
    values = make(gpu, (1, 8, 48, 48), torch.float32, layout, ("weight", "add"))
    x, skip = (
        part.detach().contiguous(memory_format=layout).requires_grad_()
        for part in values.pop("x").split((5, 3), dim=1)
    )
    run = call(1, ["x", "skip", *values])
    assert_close_to_oracle(run, x, skip, *values.values())


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", [(2, 8, 17, 19), (1, 40, 4, 4)], ids=str)
def test_statistics_that_a_convolution_left(gpu, shape, dtype, layout) -> None:
    values = make(gpu, shape, dtype, layout, ("weight", "bias", "add", "residual"))
    x, others = values["x"].detach(), [value.detach() for value in list(values.values())[1:]]
    x, statistics = ops.conv_epilogue(x, statistics=True)

    def run(x, *others):
        given = statistics if x.dtype == dtype else None
        options = dict(zip(("weight", "bias", "add", "residual"), others, strict=True))
        return [ops.group_norm_silu(x, 4, statistics=given, **options)]

    assert_close_to_oracle(run, x, *others)


def test_statistics_are_taken_in_place_of_x(gpu) -> None:
    x = torch.randn(2, 8, 6, 6, device=gpu.device)
    _, statistics = ops.conv_epilogue(x, statistics=True)
    y = ops.group_norm_silu(x, 2, statistics=statistics, silu=False)
    statistics[:, :, 3] *= 4  # twice the deviations
    statistics[:, :, 1:3] = 0  # around zero
    changed = ops.group_norm_silu(x, 2, statistics=statistics, silu=False)
    assert (changed.std() / y.std() - 0.5).abs() < 0.05


@pytest.mark.parametrize("dims", [0, 1, 3], ids=["no pixels", "1d", "3d"])
def test_other_numbers_of_dimensions(gpu, dims) -> None:
    # Groups of 8 channels: without pixels, those of 2 elements have gradients that all but vanish.
    x = torch.randn(2, 24, *range(3, 3 + dims), generator=torch.Generator().manual_seed(0))
    x = x.to(gpu.device).requires_grad_()
    assert_close_to_oracle(call(3, ["x"]), x)


def test_keeps_shape_dtype_and_layout(gpu) -> None:
    for layout, dtype in itertools.product(LAYOUTS, DTYPES):
        x = torch.randn(2, 8, 3, 5, device=gpu.device).to(dtype).contiguous(memory_format=layout)
        y = ops.group_norm_silu(x, 4)
        assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, x.stride())


def test_tensors_that_are_not_contiguous(gpu) -> None:
    wide = torch.randn(2, 16, 9, 10, device=gpu.device)
    x = wide[:, ::2, 1:, ::3].requires_grad_()
    add = torch.randn(1, 8, device=gpu.device).expand(2, 8).requires_grad_()
    scale, shift = torch.randn(2, 16, device=gpu.device).chunk(2, dim=1)
    bias = torch.randn(16, device=gpu.device)[::2].requires_grad_()
    values = {"x": x, "bias": bias, "add": add}
    values |= {"scale": scale.requires_grad_(), "shift": shift.requires_grad_()}
    assert_close_to_oracle(call(4, list(values)), *values.values())


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)], ids=["no images", "no pixels"])
def test_nothing_to_do(gpu, shape, layout) -> None:
    x = torch.empty(shape, device=gpu.device).contiguous(memory_format=layout).requires_grad_()
    weight = torch.ones(8, device=gpu.device, requires_grad=True)
    y = ops.group_norm_silu(x, 4, weight)
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert y.shape == dx.shape == shape
    assert not dweight.any()


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize(
    ("shape", "groups"), [*WAYS.values(), ((2, 20, 3, 3), 5)], ids=[*WAYS, "odd"]
)
def test_writes_all_of_its_results(gpu, shape, groups, layout) -> None:
    values = make(gpu, shape, torch.float16, layout, ("weight", "add", "shift"))
    for result in call(groups, list(values))(*values.values()):
        assert torch.isfinite(result).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
def test_touches_nothing_outside_its_output(gpu, layout) -> None:
    """Inputs lie in the middle of NaNs: reading beyond them would show in the result."""
    memory = torch.full((3, 5 * 7 * 11), torch.nan, device=gpu.device)
    memory[1] = torch.randn(5 * 7 * 11)
    strides = (385, 77, 11, 1) if layout == torch.contiguous_format else (385, 1, 55, 5)
    x = memory.as_strided((1, 5, 7, 11), strides, storage_offset=385)
    assert torch.isfinite(ops.group_norm_silu(x, 5)).all()
    assert torch.isnan(memory[::2]).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
def test_nan_stays_in_its_group(gpu, layout) -> None:
    x = torch.randn(2, 32, 9, 9, device=gpu.device).contiguous(memory_format=layout)
    x[1, 9, 4, 4] = torch.nan
    broken = torch.isnan(ops.group_norm_silu(x, 8)).flatten(2).any(-1).cpu()
    wanted = torch.zeros(2, 32, dtype=torch.bool)
    wanted[1, 8:12] = True
    assert torch.equal(broken, wanted)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize(("shape", "groups"), WAYS.values(), ids=WAYS)
def test_two_runs_agree_bit_for_bit(gpu, shape, groups, layout) -> None:
    values = make(gpu, shape, torch.float32, layout, ("weight", "bias", "scale"))
    run = call(groups, list(values))
    first, second = run(*values.values()), run(*values.values())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
