"""Weights that change between calls, in every way that programs change them: none is ever stale."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from diffusers.training_utils import EMAModel
from judging import assert_as_eager, compiled
from small import SmallNet, small_inputs, small_net
from torch import nn

WEIGHTS = ("conv_in", "conv1", "conv2", "shortcut", "q", "k", "v", "out", "time1", "time2")


def other(parameter, seed=5):
    """Values of the same size, seeded."""
    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    return (0.3 * noise + (parameter.ndim == 1)).to(parameter.dtype)


@torch.no_grad()
def in_place(model):
    for parameter in model.parameters():
        parameter.add_(other(parameter))


def through_data(model):
    for parameter in model.parameters():
        parameter.data.copy_(other(parameter))


def other_storage(model):
    for parameter in model.parameters():
        parameter.data = other(parameter)


def load(model):
    model.load_state_dict(small_net(seed=7).state_dict())


def load_assigned(model):
    model.load_state_dict(small_net(seed=7).state_dict(), assign=True)


def replaced_parameters(model):
    for module in model.children():
        for name, parameter in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(other(parameter)))


def optimizer_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for parameter in model.parameters():
        parameter.grad = other(parameter)
    optimizer.step()


def detached_in_place(model):
    for parameter in model.parameters():
        parameter.detach().mul_(1.5)


def through_numpy(model):
    """Nothing of PyTorch hears of this one."""
    for parameter in model.parameters():
        parameter.detach().numpy()[...] *= 1.5


def merged_low_rank(model):
    """A LoRA merged through .data."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            flat = parameter.data.view(len(parameter), -1)
            flat += 0.3 * other(flat[:, :1]) @ other(flat[:1])


def shared(model):
    model.k.weight = model.q.weight
    model.v = model.q


CHANGES = [
    in_place, through_data, other_storage, load, load_assigned, replaced_parameters,
    optimizer_step, detached_in_place, through_numpy, merged_low_rank, shared,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_change_is_seen(change):
    model, inputs = small_net(), small_inputs()
    net = compiled(model)
    with torch.no_grad():
        before = net(*inputs)
        assert_as_eager(before, model, inputs)
        change(model)
        after = net(*inputs)
        assert (after - before).abs().max() > 1e-2
        assert_as_eager(after, model, inputs)
        assert torch.equal(net(*inputs), after)


@pytest.mark.parametrize("kind", ["weight", "bias"])
@torch.no_grad()
def test_each_parameter_alone(kind):
    """The parts of concatenated weights (q, k, v; the time embedding's) are each watched."""
    model, inputs = small_net(), small_inputs()
    net = compiled(model)
    out = net(*inputs)
    for name in (*WEIGHTS, "norm1", "norm3", "norm4"):
        if (name, kind) == ("k", "bias"):
            continue  # softmax does not see it
        getattr(model, name).get_parameter(kind).data.mul_(-1.5)
        before, out = out, net(*inputs)
        assert (out - before).abs().max() > 1e-3, name
        assert_as_eager(out, model, inputs)


@pytest.mark.parametrize("axis", [0, 1], ids=["output", "input"])
@torch.no_grad()
def test_one_channel_changed_through_data(axis):
    model, inputs = small_net(), small_inputs()
    net = compiled(model)
    out = net(*inputs)
    for name in ("conv1", "conv2", "shortcut", "q", "v", "time2"):
        weight = getattr(model, name).weight
        for channel in (0, 7, weight.shape[axis] - 1):
            weight.data.select(axis, channel).mul_(-3)
            before, out = out, net(*inputs)
            assert (out - before).abs().max() > 1e-4, (name, channel)
            assert_as_eager(out, model, inputs)


@torch.no_grad()
def test_swaps_by_pointer():
    """Averages that change places with the weights, and are written to meanwhile."""
    model, inputs = small_net(), small_inputs()
    net = compiled(model)
    shadow = [other(parameter) for parameter in model.parameters()]
    for _ in range(4):
        assert_as_eager(net(*inputs), model, inputs)
        for index, parameter in enumerate(model.parameters()):
            parameter.data, shadow[index] = shadow[index], parameter.data
            shadow[index].mul_(1.1)


@torch.no_grad()
def test_new_weights_at_the_address_of_old_ones():
    """The allocator gives freed memory again: neither id, address nor version tells them apart."""
    model, inputs = small_net(), small_inputs()
    net = compiled(model)
    net(*inputs)
    for seed in range(6):
        shape = model.conv1.weight.shape
        del model.conv1.weight
        model.conv1.weight = nn.Parameter(other(torch.empty(shape), seed))
        assert_as_eager(net(*inputs), model, inputs)


@torch.no_grad()
def test_average_stored_copied_and_restored():
    model, inputs = small_net(), small_inputs()
    net = compiled(model)
    before = net(*inputs)
    average = EMAModel(small_net(seed=7).parameters())
    average.store(model.parameters())
    average.copy_to(model.parameters())
    swapped = net(*inputs)
    assert (swapped - before).abs().max() > 1e-2
    assert_as_eager(swapped, model, inputs)
    average.restore(model.parameters())
    assert torch.equal(net(*inputs), before)


@torch.no_grad()
def test_to_bfloat16_and_back():
    model, inputs = small_net(), small_inputs()
    net = compiled(model)
    net(*inputs)
    model.bfloat16()
    rounded = tuple(value.bfloat16() for value in inputs)
    assert_as_eager(net(*rounded), model, rounded)
    model.float()
    assert_as_eager(net(*inputs), model, inputs)
    model.double()
    doubled = tuple(value.double() for value in inputs)
    assert_as_eager(net(*doubled), model, doubled)


def test_weights_made_under_inference_mode():
    """Such tensors have no version."""
    with torch.inference_mode():
        model, inputs = small_net(), small_inputs()
        net = compiled(model)
        for scale in (1, -1.5):
            for parameter in model.parameters():
                parameter.mul_(scale)
            assert_as_eager(net(*inputs), model, inputs)


@torch.no_grad()
def test_two_models_of_one_class_share_nothing():
    first, second = small_net(seed=1), small_net(seed=2)
    nets, inputs = [compiled(first), compiled(second)], small_inputs()
    for _ in range(2):
        for net, model in zip(nets, (first, second), strict=True):
            assert_as_eager(net(*inputs), model, inputs)


@torch.no_grad()
def test_a_copy_is_on_its_own():
    model, inputs = small_net(), small_inputs()
    net = compiled(model)
    before = net(*inputs)
    twin = copy.deepcopy(model)
    through_data(twin)
    assert_as_eager(compiled(twin)(*inputs), twin, inputs)
    assert torch.equal(net(*inputs), before)


@torch.no_grad()
def test_called_with_other_weights():
    """torch.func.functional_call hands a module weights that it does not have."""
    model, inputs = small_net(), small_inputs()

    def call(weights, *args):
        return torch.func.functional_call(model, weights, args)

    net = compiled(call)
    for seed in (1, 2, 1):
        donor = small_net(seed=seed)
        assert_as_eager(net(dict(donor.named_parameters()), *inputs), donor, inputs)


@torch.no_grad()
def test_weights_are_freed():
    """What was packed for weights that are gone does not hold memory for each of them."""
    model, inputs = small_net(), small_inputs()
    net = compiled(model)
    net(*inputs)
    alive = []
    for seed in range(5):
        weight = nn.Parameter(other(model.conv1.weight, seed))
        model.conv1.weight = weight
        net(*inputs)
        alive.append(weakref.ref(weight))
        del weight
    assert sum(ref() is not None for ref in alive) <= 2


def test_state_dict_round_trip_of_the_compiled_module():
    model, inputs = small_net(), small_inputs()
    net = compiled(model)
    with torch.no_grad():
        net(*inputs)
        net.load_state_dict(compiled(small_net(seed=3)).state_dict())
        found = net(*inputs)
    assert_as_eager(found, model, inputs)
    fresh = SmallNet().eval()
    fresh.load_state_dict(model.state_dict())
    assert_as_eager(found, fresh, inputs)
