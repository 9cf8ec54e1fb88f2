"""Regions with graphs of their own, and random numbers: values and gradients are eager's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from judging import assert_as_eager, compiled, settled
from models import inputs, make
from small import small_inputs
from test_grad import assert_same_gradients
from torch import nn
from torch._higher_order_ops import scan, while_loop
from torch.func import vmap
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fastdiff.compiler import explain


class Region(nn.Module):
    """Convolutions with a region between them, which has one as well."""

    def __init__(self, region) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.inner, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.region = region

    def block(self, h):
        h = F.silu(self.norm(self.inner(h)))
        return F.dropout(h, 0.3, self.training)

    def forward(self, x, emb):
        h = self.block(self.first(x))
        return self.last(F.silu(self.norm(self.region(self.block, h)))) + emb.mean()


def region(function, train=False):
    torch.manual_seed(0)
    return Region(function).train(train)


def selective():
    kept = [torch.ops.aten.convolution.default]
    return create_selective_checkpoint_contexts(kept)


def nested_checkpoints(block, h):
    def outer(h):
        return checkpoint(block, F.dropout(h, 0.2), use_reentrant=False) + 1

    return checkpoint(outer, h, use_reentrant=False)


CHECKPOINTS = {
    "not reentrant": lambda block, h: checkpoint(block, h, use_reentrant=False),
    "reentrant": lambda block, h: checkpoint(block, h, use_reentrant=True),
    "other numbers": lambda block, h: checkpoint(
        block, h, use_reentrant=False, preserve_rng_state=False
    ),
    "selective": lambda block, h: checkpoint(
        block, h, use_reentrant=False, context_fn=selective
    ),
    "in another": nested_checkpoints,
    "twice": lambda block, h: checkpoint(
        block, checkpoint(block, h, use_reentrant=False), use_reentrant=False
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_recompute_with_the_same_numbers(name):
    model = region(CHECKPOINTS[name], train=True)
    net = compiled(model)
    for seed in (0, 1):
        assert_same_backward(net, model, small_inputs(), seed)


def assert_same_backward(net, model, arguments, seed=0, tolerance=1e-4):
    """``.grad`` of all weights; the reentrant checkpoint knows no other way."""
    found = []
    for call in (net, model):
        torch.manual_seed(seed)
        model.zero_grad()
        x, emb = (a.clone().requires_grad_() for a in arguments)
        call(x, emb).square().sum().backward()
        found.append([x.grad, *(p.grad for p in model.parameters()), torch.rand(3)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance * max(1, b.abs().max()), rtol=tolerance)


def test_checkpoints_under_autocast():
    model = region(CHECKPOINTS["not reentrant"], train=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_backward(compiled(model), model, small_inputs(), tolerance=2e-2)


@pytest.mark.parametrize("name", ["diffusers", "fastdiff"])
def test_gradient_checkpointing_of_a_model(name):
    model = make(name).train()
    getattr(model, "model", model).enable_gradient_checkpointing()
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    for module in dropouts:
        module.p = 0.3
    assert len(dropouts) > 4
    args, _ = inputs(name, 2, (8, 8))
    assert_same_gradients(compiled(model), model, args)


@torch.no_grad()
def test_checkpoints_cost_no_speed_where_nothing_is_differentiated():
    model, case = region(CHECKPOINTS["twice"]), small_inputs()
    assert_as_eager(settled(compiled(model), case), model, case)
    assert len(explain(model, *case).fused) == 5


nested_block = torch.compiler.nested_compile_region(lambda block, h: block(h))


def attended(block, h):
    rows = h.flatten(2).transpose(1, 2)[:, None]
    return block(flex_attention(rows, rows, rows)[:, 0].transpose(1, 2).reshape(h.shape))


REGIONS = {
    "nested_compile_region": lambda block, h: nested_block(block, nested_block(block, h)),
    "cond": lambda block, h: torch.cond(h.mean() > 0, block, lambda h: h - 1, (h,)),
    "scan": lambda _, h: scan(lambda c, y: (c + y, c * y), torch.zeros_like(h[0]), h)[1],
    "while_loop": lambda _, h: while_loop(
        lambda i, h: i < 3, lambda i, h: (i + 1, 0.5 * h + 1), (torch.tensor(0), h)
    )[1],
    "flex_attention": attended,
}


@pytest.mark.parametrize("name", REGIONS)
@torch.no_grad()
def test_regions(name):
    """At every call: the second one is recorded, where it can be."""
    model = region(REGIONS[name])
    net = compiled(model)
    for seed in range(4):
        case = small_inputs(seed=seed)
        assert_as_eager(net(*case), model, case)


@pytest.mark.parametrize("name", [name for name in REGIONS if name != "flex_attention"])
def test_gradients_of_regions(name):
    """PyTorch's flex_attention has none on a CPU."""
    model = region(REGIONS[name], train=name == "nested_compile_region")
    assert_same_gradients(compiled(model), model, small_inputs())


@torch.no_grad()
def test_vmap_within_a_model():
    """Its calls see one image at a time; no fused operation has a rule for that."""
    model = region(lambda block, h: vmap(lambda h: block(block(h[None]))[0])(h))
    case = small_inputs()
    assert_as_eager(settled(compiled(model), case), model, case)


def attention_with_dropout(h):
    return F.scaled_dot_product_attention(h, h, h, dropout_p=0.3)


RANDOM = {
    "dropout": lambda h: F.dropout(h, 0.3),
    "dropout in place": lambda h: F.dropout(h + 1, 0.3, inplace=True),
    "torch.dropout": lambda h: torch.dropout(h, 0.3, True),
    "dropout2d": lambda h: F.dropout2d(h, 0.3),
    "alpha_dropout": lambda h: F.alpha_dropout(h, 0.3, True),
    "feature_alpha_dropout": lambda h: F.feature_alpha_dropout(h, 0.3, True),
    "rrelu": lambda h: F.rrelu(h, training=True),
    "rrelu in place": lambda h: F.rrelu(h + 1, training=True, inplace=True),
    "attention": attention_with_dropout,
    "bernoulli": lambda h: h * torch.bernoulli(torch.full_like(h, 0.5)),
    "rand_like": lambda h: h + torch.rand_like(h),
    "randn": lambda h: h + torch.randn(h.shape),
    "randperm": lambda h: h[:, torch.randperm(16)],
    "gumbel_softmax": lambda h: F.gumbel_softmax(h, dim=1),
    "dropout that nobody reads": lambda h: (F.dropout(h, 0.3), F.dropout(h, 0.3))[1],
    "attention that nobody reads": lambda h: (attention_with_dropout(h), F.dropout(h, 0.3))[1],
}


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_are_those_of_eager_mode(name, grad):
    """In the order in which eager mode draws them, at every call, and the generator ends alike."""
    model = region(lambda block, h: RANDOM[name](h), train=True)
    net, found = compiled(model), {net: [] for net in ("eager", "compiled")}
    with torch.set_grad_enabled(grad):
        for kind, call in (("eager", model), ("compiled", net)):
            torch.manual_seed(0)
            for seed in range(3):
                found[kind] += [call(*small_inputs(seed=seed)), torch.rand(3)]
    torch.testing.assert_close(found["compiled"], found["eager"], atol=1e-4, rtol=1e-4)
    if grad:
        assert_same_gradients(net, model, small_inputs())
