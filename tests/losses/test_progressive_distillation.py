"""Progressive distillation: a student that does what its teacher does in two steps has no loss."""

from __future__ import annotations

import pytest
import torch

from fastdiff import losses, process, schedules
from fastdiff.losses.jumps import ddim_jump, levels

PATH = schedules.cosine(100)
T, MIDDLE, S = torch.tensor([80, 40, 9]), torch.tensor([60, 30, 4]), torch.tensor([40, 20, -1])


def teacher(x, t):
    return 0.4 * x.cos()


@pytest.fixture
def x0(generator):
    return torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64)


@pytest.fixture
def noise(generator):
    return torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", process.KINDS)
def test_a_student_that_jumps_where_its_teacher_goes_has_no_loss(kind, x0, noise):
    x_t = process.q_sample(PATH, x0, T, noise)
    there = ddim_jump(PATH, teacher, "v", x_t, T, MIDDLE)
    there = ddim_jump(PATH, teacher, "v", there, MIDDLE, S)
    target = losses.progressive_target(PATH, x_t, there, T, S)
    eps = process.to_eps(PATH, x_t, T, target, "x0")
    known = process.target(PATH, target, T, eps, kind)
    student = lambda x, t: known  # noqa: E731
    torch.testing.assert_close(ddim_jump(PATH, student, kind, x_t, T, S), there)
    found = losses.progressive_loss(
        PATH, student, teacher, x0, T, MIDDLE, S, noise, kind=kind, teacher_kind="v"
    )
    assert found.shape == (3,)
    assert found.abs().max() < 1e-20


def test_it_is_the_weighted_error_of_the_image(x0, noise):
    x_t = process.q_sample(PATH, x0, T, noise)
    between = ddim_jump(PATH, teacher, "v", x_t, T, MIDDLE)
    there = ddim_jump(PATH, teacher, "v", between, MIDDLE, S)
    target = losses.progressive_target(PATH, x_t, there, T, S)
    found = losses.progressive_loss(
        PATH, lambda x, t: target + 0.1, teacher, x0, T, MIDDLE, S, noise,
        kind="x0", teacher_kind="v",
    )  # fmt: skip
    alpha, sigma = levels(PATH, T)
    torch.testing.assert_close(found, 0.01 * ((alpha / sigma) ** 2).clamp(min=1))
    assert (found > 0.0101).any()
    assert (found < 0.0101).any()


def test_the_teacher_is_not_trained_and_arguments_reach_both(x0, noise):
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    labels, seen = torch.tensor([1, 2, 3]), []

    def network(x, t, class_labels):
        seen.append((t.tolist(), class_labels))
        return weight * x

    losses.progressive_loss(
        PATH, network, lambda x, t, class_labels: network(x, t, class_labels).detach(), x0, T,
        MIDDLE, S, noise, class_labels=labels,
    ).sum().backward()  # fmt: skip
    assert [t for t, _ in seen] == [T.tolist(), MIDDLE.tolist(), T.tolist()]
    assert all(given is labels for _, given in seen)
    assert weight.grad.isfinite()


def test_refusals(x0, noise):
    call = (PATH, teacher, teacher, x0)
    with pytest.raises(ValueError, match="middle must be as many timesteps"):
        losses.progressive_loss(*call, T, T, S, noise)
    with pytest.raises(ValueError, match="s must be as many timesteps"):
        losses.progressive_loss(*call, T, MIDDLE, MIDDLE, noise)
    with pytest.raises(ValueError, match="kind"):
        losses.progressive_loss(*call, T, MIDDLE, S, noise, kind="w")
