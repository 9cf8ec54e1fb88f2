"""The optimizer: the state and the results of torch.optim.AdamW, and averages in the same step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.training.adamw import AdamW, clipping_factor

CL = torch.channels_last


def make(dtype=torch.float32):
    """Weights of several layouts; the last has no gradient."""
    g = torch.Generator().manual_seed(0)
    shapes = [(8, 4, 3, 3), (8,), (), (5, 7), (3,)]
    values = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
    values[0] = values[0].contiguous(memory_format=CL)
    return [nn.Parameter(value) for value in values]


def give_gradients(parameters, step):
    g = torch.Generator().manual_seed(step)
    for p in parameters[:-1]:
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=g))


def assert_close(found, wanted, rtol=1e-5):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_it_does_what_torch_does(dtype, backend) -> None:
    ours, theirs = make(dtype), make(dtype)
    mine = AdamW(ours, lr=0.01, weight_decay=0.1)
    peer = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1, fused=True)
    for step in range(4):
        for parameters, optimizer in ((ours, mine), (theirs, peer)):
            give_gradients(parameters, step)
            if step == 2:  # so that numbers of steps differ
                parameters[1].grad = None
            with fastdiff.backend(backend):
                optimizer.step()
    assert_close(ours, theirs)
    assert ours[-1].equal(make(dtype)[-1])
    a, b = mine.state_dict(), peer.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for one, other in zip(a["state"].values(), b["state"].values(), strict=True):
        assert list(one) == list(other)
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-7)
            assert one[name].stride() == other[name].stride()


@pytest.mark.parametrize("ours_first", [True, False])
def test_either_goes_on_from_the_other(ours_first) -> None:
    wanted, parameters = make(), make()
    kinds = [AdamW, torch.optim.AdamW] if ours_first else [torch.optim.AdamW, AdamW]
    peer, state = torch.optim.AdamW(wanted, lr=0.01), None
    for step in range(4):
        optimizer = kinds[step // 2](parameters, lr=0.01)
        if state is not None:
            optimizer.load_state_dict(copy.deepcopy(state))
        for values, one in ((wanted, peer), (parameters, optimizer)):
            give_gradients(values, step)
            one.step()
        state = optimizer.state_dict()
    assert_close(parameters, wanted)


# bfloat16 is PyTorch's to update.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_averages_of_all_parameters(dtype) -> None:
    parameters = make(dtype)
    averages = [torch.full_like(p, 2.0) for p in parameters]
    give_gradients(parameters, 0)
    optimizer = AdamW(parameters[:2], lr=0.01)
    optimizer.add_param_group({"params": parameters[2:], "lr": 0.5})
    optimizer.step(averages=averages, average_weight=0.25)
    rtol = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert_close(averages, [2 + 0.25 * (p.detach() - 2) for p in parameters], rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_factor_is_that_of_smaller_gradients(dtype) -> None:
    plain, scaled = make(dtype), make(dtype)
    for parameters, factor in ((plain, 1.0), (scaled, 0.125)):
        optimizer = AdamW(parameters, lr=0.1, eps=1.0)
        give_gradients(parameters, 0)
        if factor == 1:
            for p in parameters[:-1]:
                p.grad.mul_(0.125)
        optimizer.step(gradient_factor=factor)
    assert all(map(torch.equal, plain, scaled))


def test_clipping_is_that_of_torch() -> None:
    parameters = make()
    for scale in (1e-3, 10.0):
        give_gradients(parameters, 0)
        gradients = [p.grad.mul_(scale).clone() for p in parameters[:-1]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        factor = clipping_factor(float(fastdiff.ops.gradient_norm(gradients)), 1.0)
        assert factor == 1.0 or norm > 1
        assert_close([g * factor for g in gradients], [p.grad for p in parameters[:-1]])


def test_a_closure() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamW([p], lr=0.1, weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        loss = (p * torch.tensor([1.0, -1.0, 2.0])).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2
    torch.testing.assert_close(p.detach(), torch.tensor([0.9, 1.1, 0.9]))


def test_what_a_loaded_state_asks_for_is_done() -> None:
    """amsgrad is PyTorch's to compute: the kernel would leave it out silently."""
    ours, theirs = make(), make()
    peer = torch.optim.AdamW(theirs, lr=0.1, amsgrad=True)
    mine = AdamW(ours, lr=0.1)
    for step in range(3):
        give_gradients(theirs, step)
        peer.step()
        if step == 0:
            mine.load_state_dict(copy.deepcopy(peer.state_dict()))
            with torch.no_grad():
                for p, q in zip(ours, theirs, strict=True):
                    p.copy_(q)
        else:
            give_gradients(ours, step)
            mine.step()
    assert_close(ours, theirs)


def test_a_schedule_of_the_rate() -> None:
    (p,) = parameters = [nn.Parameter(torch.zeros(1))]
    optimizer = AdamW(parameters, lr=1.0, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for _ in range(3):
        p.grad = torch.ones(1)
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(p.detach(), torch.tensor([-1.75]))


def test_another_number_of_averages() -> None:
    with pytest.raises(ValueError, match="as many averages as parameters, got 1 and 5"):
        AdamW(make()).step(averages=[torch.zeros(3)])
