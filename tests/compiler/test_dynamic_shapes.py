"""Other batch and image sizes: right, and without a new graph for each."""

from __future__ import annotations

import pytest
import torch
from judging import assert_as_eager, compiled, graphs
from models import inputs, make
from small import small_inputs, small_net

SIZES = [(2, (8, 12)), (3, (16, 16)), (5, (4, 6)), (2, (10, 8)), (7, (24, 4)), (3, (5, 7))]


@torch.no_grad()
def test_dynamic():
    model = small_net()
    net = compiled(model, dynamic=True)
    for batch, size in SIZES:
        arguments = small_inputs(batch, size)
        assert_as_eager(net(*arguments), model, arguments)
    assert graphs() == 1


@torch.no_grad()
def test_marked_dynamic():
    model = small_net()
    net = compiled(model)
    for batch, size in SIZES:
        x, emb = small_inputs(batch, size)
        for dim in (0, 2, 3):
            torch._dynamo.mark_dynamic(x, dim)
        torch._dynamo.mark_dynamic(emb, 0)
        assert_as_eager(net(x, emb), model, (x.detach().clone(), emb.clone()))
    assert graphs() == 1


@torch.no_grad()
def test_only_the_batch_marked():
    model = small_net()
    net = compiled(model)
    for batch in (2, 5, 3, 8):
        x, emb = small_inputs(batch)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(emb, 0)
        assert_as_eager(net(x, emb), model, (x.detach().clone(), emb.clone()))
    assert graphs() == 1


@torch.no_grad()
def test_sizes_found_to_be_dynamic():
    """Without a word from the caller: the second size makes the graph that the others use."""
    model = small_net()
    net = compiled(model)
    for batch, size in SIZES:
        arguments = small_inputs(batch, size)
        assert_as_eager(net(*arguments), model, arguments)
    assert graphs() == 2


@torch.no_grad()
def test_layouts_change_under_dynamic_sizes():
    model = small_net()
    net = compiled(model, dynamic=True)
    for layout in (torch.channels_last, torch.contiguous_format) * 2:
        for batch, size in SIZES[:2]:
            x, emb = small_inputs(batch, size)
            x = x.contiguous(memory_format=layout)
            assert_as_eager(net(x, emb), model, (x, emb))
    assert graphs() <= 2


@torch.no_grad()
def test_weights_change_under_dynamic_sizes():
    model = small_net()
    net = compiled(model, dynamic=True)
    for batch, size in SIZES[:4]:
        arguments = small_inputs(batch, size)
        assert_as_eager(net(*arguments), model, arguments)
        for parameter in model.parameters():
            parameter.data.mul_(1.1)
    assert graphs() == 1


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        pytest.param("lucid", [(2, (8, 12)), (3, (16, 10)), (2, (6, 4))], marks=pytest.mark.slow),
        ("diffusers", [(2, (8, 12)), (3, (16, 10)), (2, (6, 4))]),
        ("plain-decoder", [(2, (8, 12)), (3, (5, 3)), (2, (2, 7))]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@torch.no_grad()
def test_models(name, sizes):
    model = make(name)
    net = compiled(model, dynamic=True)
    for batch, size in sizes:
        args, kwargs = inputs(name, batch, size)
        assert_as_eager(net(*args, **kwargs), model, args, kwargs)
    assert graphs() == 1
