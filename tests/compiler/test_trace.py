"""A function's calls as a graph: what is noted, for any batch, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nn.unet_cases import CASES, TINY, inputs, randomized
from torch import nn
from torch.fx import GraphModule

from fastdiff.compiler import trace as tracing
from fastdiff.compiler.trace import BATCH, NotTraceableError, trace
from fastdiff.nn import UNet2DModel


def shown(gm: GraphModule) -> list[tuple]:
    """A graph's nodes, in a form that can be compared."""
    return [(str(n.op), str(n.target), str(n.args), str(n.kwargs)) for n in gm.graph.nodes]


def traced_layers(options, batch, monkeypatch):
    monkeypatch.setattr(tracing, "BATCH", batch)
    model = randomized(UNet2DModel(**options)).eval()
    sample, timesteps, labels = inputs(options, batch)
    rows = model.precompute(timesteps[:1], labels, batch).at(0)
    rows = rows.expand(batch, -1) if rows.shape[0] == 1 else rows
    return trace(model.layers, (sample, rows.contiguous()), list(model.parameters()))


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_the_batch_decides_nothing(options, monkeypatch):
    two, three = (traced_layers(options, batch, monkeypatch) for batch in (2, 3))
    assert (shown(two[0]), two[1]) == (shown(three[0]), three[1])


@torch.no_grad()
def test_the_graph_computes_what_the_function_does():
    norm, conv = nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 3, padding=1)
    weights = [*norm.parameters(), *conv.parameters()]

    def function(x, rows):
        shift, scale = rows.expand(x.shape[0], -1).split(4, dim=1)
        h = (norm(x) * (1 + scale[:, :, None, None]) - shift[:, :, None, None]) / 2
        return conv(F.silu(h)).flatten(2).transpose(1, 2)

    gm, read = trace(function, (torch.randn(BATCH, 4, 5, 5), torch.randn(1, 8)), weights)
    assert sorted(read) == [0, 1, 2, 3]
    for n in (1, 2, 5):
        args = torch.randn(n, 4, 5, 5), torch.randn(1, 8)
        (found,) = gm(*args, *[weights[i] for i in read])
        assert torch.equal(found, function(*args))


def test_examples_hold_no_memory_and_have_the_strides_of_the_run():
    def function(x):
        return F.silu(x).transpose(1, 2)

    gm, _ = trace(function, (torch.randn(BATCH, 3, 4),), [])
    *_, last, _ = gm.graph.nodes
    example = last.meta["example_value"]
    assert (example.device.type, example.shape, example.stride()) == ("meta", (2, 4, 3), (12, 1, 4))


def test_weights_that_are_not_read_are_no_inputs():
    weights = [torch.randn(3), torch.randn(3), torch.randn(3)]
    gm, read = trace(lambda x: x * weights[2], (torch.randn(BATCH, 3),), weights)
    assert read == [2]
    assert sum(n.op == "placeholder" for n in gm.graph.nodes) == 2


elsewhere = torch.ones(3)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + elsewhere,
        lambda x: x.add_(1),
        lambda x: F.relu(x, inplace=True),
        lambda x: torch.add(x, 1, out=torch.empty(BATCH, 3)),
        lambda x: x.__iadd__(1),
        lambda x: x.clone().__setitem__(0, 1.0),
    ],
    ids=["tensor from elsewhere", "in place", "inplace=", "out=",
         "operator", "assignment"],
)  # fmt: skip
def test_what_a_graph_would_not_repeat_is_refused(function):
    with pytest.raises(NotTraceableError):
        trace(function, (torch.randn(BATCH, 3),), [])


def test_tiny_is_traced_whole():
    """No part of the graph is a call that the matcher does not know by name."""
    model = UNet2DModel(**TINY).eval()
    sample, timesteps, _ = inputs(TINY)
    rows = model.precompute(timesteps[:1]).at(0)
    _, read = trace(model.layers, (sample, rows), list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    skipped = {name for i, name in enumerate(names) if i not in read}
    assert all("time_emb" in name for name in skipped)
    assert len(read) + len(skipped) == len(names)
