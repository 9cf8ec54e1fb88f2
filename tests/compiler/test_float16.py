"""float16 models on a CPU, which are computed in float32 or in bfloat16."""

from __future__ import annotations

import pytest
import torch
from judging import assert_changes_are_seen, compiled, settled
from lowering import case, case_in, error, fused, run
from models import CASES
from small import small_inputs, small_net
from torch import nn

from fastdiff.compiler import explain
from fastdiff.ops import conv2d_pack
from fastdiff.ops.backend import isa

QUICK = ("guided", "conditional")
MODELS = ["small", *(n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES)]
HALF = torch.float16
needs_extension = pytest.mark.skipif(isa() == "none", reason="needs the C++ extension")


@pytest.mark.parametrize("precision", ["fast", "strict"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_no_less_accurate_than_eager(name, precision):
    found, plain = run(name, HALF, precision=precision)
    assert (found.dtype, found.stride()) == (plain.dtype, plain.stride())
    assert error(found, name) <= error(plain, name)


@torch.no_grad()
def test_in_bfloat16():
    found, _ = run("small", HALF, precision="bf16")
    model, args, kwargs = case_in("small", torch.bfloat16)
    assert found.dtype == HALF
    assert error(found, "small") <= 2 * error(model(*args, **kwargs), "small")
    model, args, _ = case_in("small", HALF)
    told = explain(model, *args, options={"precision": "bf16"})
    assert {row.dtype for row in told.fused} == {"bfloat16"}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_as_much_is_fused_as_in_a_float32_model(name):
    (model, args, kwargs), (half, half_args, half_kwargs) = case(name), case_in(name, HALF)
    told = explain(half, *half_args, **half_kwargs)
    assert told.reasons == ()
    assert fused(told) == fused(explain(model, *args, **kwargs))
    assert {row.dtype for row in told.fused} == {"float32"}


@torch.no_grad()
def test_values_between_operations_do_not_overflow():
    """The largest number of float16 is 65504."""
    model = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False)).half()
    model[0].weight.fill_(256)
    model[1].weight.fill_(2**-11)
    x = torch.full((1, 8, 4, 4), 64.0, dtype=HALF)
    assert model(x).isinf().all()
    assert torch.equal(compiled(model)(x), torch.full_like(x, 512))
    model[1].weight.fill_(1)
    assert compiled(model)(x).isinf().all()


@pytest.mark.usefixtures("runs")
@torch.no_grad()
def test_changed_weights_are_seen():
    model, args = small_net().half(), small_inputs(dtype=HALF)
    assert_changes_are_seen(compiled(model), model, args, HALF)


@needs_extension
@torch.no_grad()
def test_runs_from_a_list(runs):
    settled(compiled(small_net().half()), small_inputs(dtype=HALF))
    assert len(runs) == 1


@needs_extension
@pytest.mark.parametrize("algorithm", ["direct", "winograd2", "winograd4"])
def test_weights_are_packed_straight_from_float16(algorithm):
    weight = torch.randn(5, 7, 3, 3, generator=torch.Generator().manual_seed(0)).half()
    packed = conv2d_pack(weight, algorithm)
    assert torch.equal(packed, conv2d_pack(weight.float(), algorithm))


@needs_extension
def test_float64_weights_are_not_packed():
    with pytest.raises(TypeError, match="float32, bfloat16 or float16, got"):
        conv2d_pack(torch.ones(2, 2, 1, 1).double(), "direct")
