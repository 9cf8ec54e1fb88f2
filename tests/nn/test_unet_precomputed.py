"""What the blocks take from timesteps and labels, computed for all steps before a sampling loop."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from unet_cases import CASES, TINY, inputs, randomized

from fastdiff.nn import Precomputed, ResnetBlock2D, UNet2DModel

# Every way in which timesteps and labels come in, and every order of residual blocks
NAMES = [
    "tiny", "classes", "class-timestep", "class-identity", "scale-shift", "fourier", "learned",
    "resnet-resampling", "attention-resnet-resampling", "no-middle", "cifar",
]  # fmt: skip


def make(name):
    return randomized(UNet2DModel(**CASES[name])).eval()


def steps_of(name):
    return torch.tensor([0.3, 12.5, 50.0] if name == "fourier" else [3, 981, 20])


def beside(name, timestep):
    """The timestep that a model needs beside what is precomputed."""
    return timestep if name == "fourier" else None


def residual_blocks(model):
    return [module for module in model.modules() if isinstance(module, ResnetBlock2D)]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_step_gives_the_output_of_the_plain_call(name):
    model, steps = make(name), steps_of(name)
    sample, _, labels = inputs(CASES[name])
    precomputed = model.precompute(steps, labels, len(sample))
    width = sum(block.time_emb_proj.out_features for block in residual_blocks(model))
    assert precomputed.rows.shape == (3, 1 if labels is None else 2, width)
    for i, t in enumerate(steps):
        expected = model(sample, t, labels)
        for step in (i, torch.tensor(i), torch.tensor([i])):
            got = model(sample, beside(name, t), precomputed=precomputed.at(step))
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(got, model(sample, steps[0], labels), atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_nothing_of_the_time_embedding_is_left_in_the_loop(name):
    model, (sample, t, labels) = make(name), inputs(CASES[name])
    expected = model(sample, t[:1], labels)
    parts = [model.time_embedding.linear_1, *(b.time_emb_proj for b in residual_blocks(model))]
    calls = []
    for part in parts:
        part.register_forward_hook(lambda *_: calls.append(1))
    rows = model.precompute(t[:1], labels, len(sample)).at(0)
    assert len(calls) == len(parts)
    # Weights that would spoil the output if they were read again
    for module in (*parts, model.time_embedding, model.class_embedding or nn.Identity()):
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    got = model(sample, beside(name, t[:1]), precomputed=rows)
    assert len(calls) == len(parts)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    model(sample, t, labels)
    assert len(calls) == 2 * len(parts)


@pytest.mark.parametrize("name", ["classes", "class-timestep", "class-identity"])
@pytest.mark.parametrize(
    ("order", "distinct"),
    [([1, 0, 1, 1, 0], 2), ([3, 3, 3], 1), ([2, 0, 3, 1], 4), ([2], 1), ([], 0)],
    ids=["some-alike", "all-alike", "all-different", "one", "none"],
)
@torch.no_grad()
def test_labels_that_are_alike_are_computed_once(name, order, distinct):
    model, (_, _, labels) = make(name), inputs(CASES[name], batch=4 if name != "classes" else 3)
    if name == "classes":
        labels = torch.tensor([7, 1, 9, 0])
    labels, sample = labels[order], torch.randn(len(order), 3, 8, 8)
    precomputed = model.precompute(torch.tensor([5, 900]), labels, len(order))
    assert precomputed.rows.shape[:2] == (2, distinct)
    for i, t in enumerate((5, 900)):
        rows = precomputed.at(i)
        assert len(rows) in (1, len(order))
        torch.testing.assert_close(precomputed.at(torch.tensor(i)), rows, rtol=0, atol=0)
        got = model(sample, precomputed=rows)
        torch.testing.assert_close(got, model(sample, t, labels), rtol=0, atol=1e-5)


def test_a_step_without_an_index_is_a_view():
    precomputed = Precomputed(torch.randn(3, 2, 5))
    assert precomputed.at(1).data_ptr() == precomputed.rows[1].data_ptr()
    with pytest.raises(IndexError):
        precomputed.at(3)


@torch.no_grad()
def test_a_number_is_one_step():
    model, (sample, _, _) = make("tiny"), inputs(TINY)
    precomputed = model.precompute(9.75)
    assert len(precomputed.rows) == 1
    got = model(sample, precomputed=precomputed.at(0))
    torch.testing.assert_close(got, model(sample, 9.75), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny", "classes", "scale-shift"])
@pytest.mark.parametrize("inside", [True, False], ids=["under-autocast", "before"])
@torch.no_grad()
def test_autocast(name, inside):
    model, (sample, t, labels) = make(name), inputs(CASES[name])
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        precomputed = model.precompute(t[:1], labels, 2)
    assert precomputed.rows.dtype == (torch.bfloat16 if inside else torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(sample, precomputed=precomputed.at(0))
        expected = model(sample, t[:1], labels)
    assert got.dtype == expected.dtype == torch.bfloat16
    exact = model(sample, t[:1], labels)
    assert (got - exact).norm() <= 1.2 * (expected - exact).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["tiny", "class-identity"])
@torch.no_grad()
def test_dtypes(name, dtype):
    model, (sample, t, labels) = make(name).to(dtype), inputs(CASES[name])
    sample = sample.to(dtype)
    precomputed = model.precompute(t[:1], labels, 2)
    got, expected = model(sample, precomputed=precomputed.at(0)), model(sample, t[:1], labels)
    assert precomputed.rows.dtype == got.dtype == dtype
    assert (got - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.usefixtures("no_graphs")
@pytest.mark.parametrize("name", ["tiny", "classes", "fourier", "resnet-resampling"])
@torch.no_grad()
def test_all_steps_compile_to_one_graph(name):
    model, steps = make(name), steps_of(name)
    sample, _, labels = inputs(CASES[name], batch=3)
    if labels is not None:
        labels = labels[[0, 1, 0]]  # so that there is an index
    precomputed = model.precompute(steps, labels, 3)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=backend)
    def predict(timestep, step):
        return model(sample, timestep, precomputed=precomputed.at(step))

    for i, t in enumerate(steps):
        got = predict(beside(name, t), torch.tensor(i))
        torch.testing.assert_close(got, model(sample, t, labels), rtol=0, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["classes", "resnet-resampling"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradients_flow_through_it(name, checkpointing):
    plain = make(name).train()
    ready = copy.deepcopy(plain)
    if checkpointing:
        ready.enable_gradient_checkpointing()
    sample, t, labels = inputs(CASES[name])
    plain(sample, t[:1], labels).square().sum().backward()
    rows = ready.precompute(t[:1], labels, 2).at(0)
    ready(sample, precomputed=rows).square().sum().backward()
    for (key, expected), got in zip(plain.named_parameters(), ready.parameters(), strict=True):
        torch.testing.assert_close(
            got.grad, expected.grad, rtol=1e-4, atol=1e-4, msg=lambda m, k=key: k + m
        )
