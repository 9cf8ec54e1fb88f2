"""``precision="bf16"``: float32 models whose activations are bfloat16."""

from __future__ import annotations

import logging
import warnings

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from judging import LAYOUTS, assert_changes_are_seen, compiled, distance, graphs, settled
from lowering import case, case_in, error, fused, run
from models import CASES, in_float64
from random_unet import DRAWS, EMB, build, nets
from small import small_inputs, small_net
from torch import nn
from torch.utils import _pytree as pytree

from fastdiff.compiler import explain
from fastdiff.compiler.pipeline import Options, compile_graph
from fastdiff.compiler.report import GraphReport
from fastdiff.compiler.run import packing
from fastdiff.ops.backend import isa

BF16 = {"precision": "bf16"}
QUICK = ("lucid", "diffusers", "conditional")
MODELS = ["small", *(n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES)]
recorded = pytest.mark.skipif(isa() == "none", reason="without the C++ extension none are")


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_error_dtype_and_strides(name):
    """The error against float64 is at most twice that of the model in bfloat16 in eager mode."""
    found, plain = run(name, torch.float32, **BF16)
    assert (found.dtype, found.stride()) == (torch.float32, plain.stride())
    model, args, kwargs = case_in(name, torch.bfloat16)
    assert error(found, name) <= 2 * error(model(*args, **kwargs), name)
    assert error(found, name) > 10 * error(plain, name)  # or it was not computed in bfloat16


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_as_much_is_fused_as_in_a_bfloat16_model(name):
    (model, args, kwargs), (low, low_args, low_kwargs) = case(name), case_in(name, torch.bfloat16)
    told = explain(model, *args, options=BF16, **kwargs)
    assert (told.graphs, told.breaks, told.reasons) == (1, (), ())
    assert fused(told) == fused(explain(low, *low_args, **low_kwargs))
    assert {row.dtype for row in told.fused} == {"bfloat16"}
    assert "bfloat16" in str(told)
    assert {row.dtype for row in explain(model, *args, **kwargs).fused} == {"float32"}


@pytest.mark.slow
@hypothesis.given(
    spec=nets(),
    batch=st.integers(1, 3),
    size=st.sampled_from([(5, 7), (8, 6), (12, 16)]),
    layout=st.sampled_from(list(LAYOUTS)),
    dynamic=st.sampled_from([None, None, None, True]),
)
@DRAWS
@torch.no_grad()
def test_drawn_nets(spec, batch, size, layout, dynamic):
    torch.compiler.reset()
    model = build(spec)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, *size, generator=generator)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    emb = torch.randn(batch, EMB, generator=generator)
    exact = in_float64(model, (x.clone(), emb.clone()), {})
    plain = model(x.clone(), emb.clone())
    low = build(spec).bfloat16()(x.bfloat16(), emb.bfloat16())
    # Written arguments differ from call to call.
    found = compiled(model, options=BF16, dynamic=dynamic)(x.clone(), emb.clone())
    for a, b, c, d in zip(*map(pytree.tree_leaves, (found, plain, low, exact)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert distance(a, d) <= max(2 * distance(c, d), 4 * torch.finfo(torch.bfloat16).eps)


@torch.no_grad()
def test_a_bfloat16_model_is_computed_as_by_default():
    model, args = small_net().bfloat16(), small_inputs(dtype=torch.bfloat16)
    found = compiled(model, options=BF16)(*args)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, compiled(model)(*args))


@torch.no_grad()
def test_parameters_are_untouched_and_changes_are_seen():
    model, args = small_net(), small_inputs()
    net = compiled(model, options=BF16)
    assert_changes_are_seen(net, model, args, torch.float32)
    assert torch.equal(settled(net, args), compiled(model, options=BF16)(*args))


@torch.no_grad()
def test_one_graph_and_one_copy_of_the_weights_for_all_batches():
    model = small_net()
    net = compiled(model, options=BF16, dynamic=True)
    net(*small_inputs(2))

    def packed():
        ids = set(map(id, model.parameters()))
        held = [w for key, w in packing._packed.items() if ids.intersection(key)]
        return {id(t) for w in held for t in (*w.by_algorithm.values(), *w.by_dtype.values())}

    before = packed()
    for batch in (1, 3, 5):
        args = small_inputs(batch)
        found = settled(net, args)
        exact = in_float64(model, args, {})
        low = small_net().bfloat16()(*(x.bfloat16() for x in args))
        assert distance(found, exact) <= 2 * distance(low, exact)
    assert packed() >= before  # nothing is packed again
    assert len(packed()) == len(before) or isa() != "none"
    assert graphs() <= 2  # dynamo specialises for a batch of one


@recorded
@torch.no_grad()
def test_runs_from_a_list(runs):
    model, args = small_net(), small_inputs()
    settled(compiled(model, options=BF16), args)
    assert len(runs) == 1


@torch.no_grad()
def test_nothing_is_warned_of(caplog):
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        compiled(small_net(), options=BF16)(*small_inputs())
    assert not caplog.records


class Timed(nn.Module):
    """Returns the embedding of its timesteps too, and what an operation makes of its features."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.time = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 16)

    def forward(self, x, t):
        frequencies = torch.exp(-torch.arange(8, device=t.device) / 3)
        angles = t[:, None].float() * frequencies
        emb = torch.cat([angles.sin(), angles.cos()], dim=1)
        h = self.conv(x) + self.time(emb)[:, :, None, None]
        return h, emb, torch.logcumsumexp(h, dim=1), h.softmax(1).std(1), h.shape[1] * x


@torch.no_grad()
def test_embeddings_of_times_and_unknown_operations_are_float32():
    model, x, t = Timed().eval(), torch.randn(3, 3, 6, 7), torch.tensor([999, 998, 0])
    h, emb, cumulated, deviation, scaled = settled(compiled(model, options=BF16), (x, t))
    assert torch.equal(emb, model(x, t)[1])
    assert torch.equal(h, h.bfloat16().float())
    assert torch.equal(cumulated, torch.logcumsumexp(h, dim=1))
    assert torch.equal(deviation, h.softmax(1).std(1))
    assert torch.equal(scaled, 16 * x)


@torch.no_grad()
def test_the_callers_tensors_are_not_rounded_by_a_last_step():
    """x - sigma model(x), of a model that gives 0."""
    conv, sigma = nn.Conv2d(3, 3, 3, padding=1), torch.tensor([0.5, 2.0]).view(2, 1, 1, 1)
    for parameter in conv.parameters():
        parameter.zero_()
    x = torch.randn(2, 3, 5, 4)
    found = compiled(lambda x: x - sigma * conv(x), options=BF16)(x)
    assert torch.equal(found, x)


class Written(nn.Module):
    """Writes to its features through views, which must stay one memory."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        h = self.first(x)
        half = h[:, :4]
        half.mul_(2)
        parts = F.silu(h).chunk(2, dim=1)
        return self.last(torch.cat([parts[1], parts[0]], dim=1)), h


@torch.no_grad()
def test_writes_through_views():
    model, x = Written().eval(), torch.randn(2, 3, 6, 5)
    found, exact = compiled(model, options=BF16)(x), in_float64(model, (x,), {})
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.float32
        assert distance(a, b) <= 4 * torch.finfo(torch.bfloat16).eps


def test_gradients_are_those_of_float32():
    model, (x, emb) = small_net(), small_inputs()
    grads = []
    for net in (compiled(model, options=BF16), model):
        model.zero_grad()
        net(x, emb).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


def test_cuda_graphs_are_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 8, 4, 4, device="cuda")
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    node.meta["example_value"] = x
    graph.output((node,))
    gm = torch.fx.GraphModule({}, graph)
    with pytest.raises(ValueError, match="a CPU, got a graph of CUDA tensors"):
        compile_graph(gm, [x], Options(precision="bf16"), GraphReport())
