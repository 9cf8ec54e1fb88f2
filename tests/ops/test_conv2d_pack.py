"""conv2d_pack: weights of every layout, and turned ones."""

from __future__ import annotations

import pytest
import torch
from accuracy import amid_nans

from fastdiff import ops
from fastdiff.ops.conv2d_algorithms import ALGORITHMS, packed_count
from fastdiff.ops.conv2d_spec import ConvSpec

pytestmark = pytest.mark.usefixtures("one_thread")

# Around panels of 16, 32 and 64 filters, and the 16 channels that are read at once.
SIZES = [(1, 1), (3, 2), (15, 17), (16, 16), (33, 31), (64, 48), (70, 5), (5, 70), (129, 64)]
KERNELS = [(3, 3), (1, 1), (2, 5), (1, 3), (4, 1), (11, 3)]
LAST = torch.channels_last
VIEWS = {
    "channels last": lambda w: w.contiguous(memory_format=LAST),
    "filters last": lambda w: w.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
    "kernel transposed": lambda w: w.mT.contiguous().mT,
    "amid NaNs": amid_nans,
    "amid NaNs, channels last": lambda w: amid_nans(w.contiguous(memory_format=LAST)),
}


def packable(algorithm, size) -> bool:
    try:
        packed_count(ALGORITHMS[algorithm], size)
    except ValueError:
        return False
    return True


CASES = [
    pytest.param((*size, *kernel), name, id=f"{name}-{'x'.join(map(str, (*size, *kernel)))}")
    for size in SIZES
    for kernel in KERNELS
    for name in ALGORITHMS
    if packable(name, (*size, *kernel)) and packable(name, (*size[::-1], *kernel))
]


def normal(size):
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def turned(weight):
    return weight.flip(2, 3).transpose(0, 1).contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "algorithm"), CASES)
def test_the_layout_does_not_change_the_bits(size, algorithm, dtype) -> None:
    weight = normal(size).to(dtype)
    wanted = ops.conv2d_pack(weight, algorithm)
    turned_wanted = ops.conv2d_pack(turned(weight), algorithm)
    assert torch.isfinite(wanted).all()
    assert torch.equal(ops.conv2d_pack(weight, algorithm, turned=True), turned_wanted)
    for make in VIEWS.values():
        view = make(weight)
        assert torch.equal(ops.conv2d_pack(view, algorithm), wanted)
        assert torch.equal(ops.conv2d_pack(view, algorithm, turned=True), turned_wanted)


def test_every_value_has_its_place() -> None:
    """By `direct`: panels of [R, S, C, filters], of as many filters as suit the vectors."""
    weight = normal((48, 5, 2, 3))
    packed = ops.conv2d_pack(weight, "direct")
    panels = [
        torch.cat([part.permute(2, 3, 1, 0).reshape(-1) for part in weight.split(panel)])
        for panel in (8, 16, 64)
    ]
    assert any(torch.equal(packed, wanted) for wanted in panels)


@pytest.mark.parametrize("algorithm", ["direct", "winograd2", "winograd4"])
@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (0, 2, 1, 0)])
def test_a_turned_weight_computes_the_gradient_of_the_input(algorithm, padding) -> None:
    weight, x = normal((20, 7, 3, 3)), normal((2, 7, 9, 8)).requires_grad_()
    spec = ConvSpec(20, 7, (3, 3), padding=padding)
    y, _ = ops.reference.conv2d(x, weight, spec)
    dy = normal(y.shape)
    (wanted,) = torch.autograd.grad(y, x, dy)
    found, _ = ops.conv2d(
        dy,
        turned(weight),
        padding=tuple(2 - p for p in padding),
        packed=ops.conv2d_pack(weight.to(memory_format=LAST), algorithm, turned=True),
        algorithm=algorithm,
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_threads_do_not_change_the_bits(algorithm) -> None:
    kernel = 3 if packable(algorithm, (96, 64, 3, 3)) else 1
    weight = normal((96, 64, kernel, kernel)).to(memory_format=LAST)
    if not packable(algorithm, weight.shape):
        pytest.skip(f"{algorithm} does not run here")
    wanted = ops.conv2d_pack(weight, algorithm, turned=True)
    for count in (2, 3, 4):
        torch.set_num_threads(count)
        assert torch.equal(ops.conv2d_pack(weight, algorithm, turned=True), wanted)


def test_opcheck_of_a_turned_weight() -> None:
    weight = normal((5, 6, 3, 3))
    number = ALGORITHMS["direct"].number
    torch.library.opcheck(torch.ops.fastdiff.conv2d_pack.default, (weight, number, True))
