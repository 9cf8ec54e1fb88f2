"""The variance of the model's steps, fixed and learned."""

from __future__ import annotations

import math

import pytest
import torch

from fastdiff import NoiseSchedule, losses, schedules

LINEAR = schedules.linear(1000)
ALL = torch.arange(1000)


def test_fixed_variances_by_hand():
    betas, abar, small, large = LINEAR.betas.tolist(), 1.0, [], []
    for beta in betas:
        before, abar = abar, abar * (1 - beta)
        small.append(beta * (1 - before) / (1 - abar))
        large.append(beta)
    small[0] = large[0] = small[1]
    for kind, wanted in (("fixed_small", small), ("fixed_large", large)):
        found = losses.fixed_log_variance(LINEAR, kind)
        assert found.dtype == torch.float64
        torch.testing.assert_close(
            found.exp(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-10, atol=0
        )
        images = losses.model_variance(LINEAR, torch.zeros(1000, 2, 3), ALL, kind)
        assert images.shape == (1000, 1, 1)
        assert images.dtype == torch.float32
        torch.testing.assert_close(images.flatten(), found.float())


def test_learned_is_the_log_variance_itself(generator):
    v = torch.randn(2, 3, 4, 4, generator=generator)
    assert losses.model_variance(LINEAR, v, ALL[:2], "learned") is v
    assert losses.model_variance(LINEAR, v.bfloat16(), ALL[:2], "learned").dtype == torch.float32


def test_learned_range_goes_from_the_small_to_the_large_variance(generator):
    v = torch.randn(1000, 2, generator=generator, dtype=torch.float64)
    v[:, 0] = torch.tensor([-1.0, 1.0, 0.0, 0.5, -3.0], dtype=torch.float64).repeat(200)
    found = losses.model_variance(LINEAR, v, ALL, "learned_range")
    small = losses.fixed_log_variance(LINEAR, "fixed_small")
    large = LINEAR.betas.log()  # at t = 0 too, unlike fixed_large
    frac = (v + 1) / 2
    wanted = frac * large[:, None] + (1 - frac) * small[:, None]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[::5, 0], small[::5])
    torch.testing.assert_close(found[1::5, 0], large[1::5])


@pytest.mark.parametrize("kind", ["learned", "learned_range"])
def test_gradients(kind, generator):
    v = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0, 10, 999])
    assert torch.autograd.gradcheck(lambda v: losses.model_variance(LINEAR, v, t, kind), v)


def test_one_step():
    one = NoiseSchedule(torch.tensor([0.5], dtype=torch.float64))
    for kind in ("fixed_small", "fixed_large"):
        assert losses.fixed_log_variance(one, kind).item() == math.log(0.5)


X = torch.zeros(2, 1, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param((LINEAR, X, ALL[:2], "small"), ValueError, "variance 'small'", id="kind"),
        pytest.param((LINEAR, X, ALL[999:] + 1, "learned"), ValueError, r"\(2,\)", id="t's shape"),
        pytest.param((LINEAR, X, ALL[998:] + 1, "learned"), IndexError, "999 to 1000", id="t"),
        pytest.param((LINEAR, X.int(), ALL[:2], "learned"), TypeError, "int32", id="v"),
        pytest.param(
            (schedules.flow(9), X, ALL[:2], "fixed_small"), TypeError, "got FlowSchedule", id="flow"
        ),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        losses.model_variance(*arguments)
