"""Training with self-conditioning: some images get the estimate of x0 of a first pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.common.conditions import Conditions
from fastdiff.common.estimates import limited
from fastdiff.common.model import Model, tensor_of
from fastdiff.process import LinearForm, linear, x0_and_eps
from fastdiff.schedules import GaussianPath
from fastdiff.sde import EDM, SDE


def with_first_estimate(
    model: Model,
    forward: GaussianPath | SDE,
    prediction: str,
    t: Tensor,
    estimated: Tensor,
) -> Model:
    """A self-conditioned model for one loss of a batch, whose ``estimate`` is filled in.

    Chen et al. 2022, arXiv:2208.04202, section 3.2: an image in ``estimated`` gets the x0 that the
    model predicts without an estimate, through which no gradient flows; the others get zeros. The
    first pass is for these images alone. If there are none it is for one image, whose result
    is not used: a network that several processes share must be called equally often by all.

    Args:
        model: (x_t, label, *, estimate, **cond) -> prediction, perhaps with values of a variance as
            further channels.
        forward: the forward process.
        prediction: what the model predicts, see ``fastdiff.objectives.make``.
        t: times of the loss, [N]: timesteps int64, or an SDE's times float64.
        estimated: which images get an estimate, bool [N], on the CPU.

    Returns:
        (x_t, label, **cond) -> prediction. Tensors of ``cond`` with a row an image are recognised
        as ``fastdiff.common.conditions`` says.
    """

    def aided(x_t: Tensor, label: Tensor, **cond: Any) -> Any:
        images, estimate = x_t.shape[0], torch.zeros_like(x_t)
        if images:
            chosen = estimated.nonzero().flatten()
            used = len(chosen) > 0
            places = chosen if used else torch.zeros(1, dtype=torch.int64, device="cpu")
            places = places.to(x_t.device)
            part = Conditions(cond, None, images, cut=True).part(places)
            with torch.no_grad():
                x, zeros = x_t[places], estimate[places]
                output = tensor_of(model(x, label[places], **part, estimate=zeros))
                form = x0_form(forward, prediction, t[places])
                x0 = limited(linear(form, x, output[:, : x.shape[1]]))
            if used:
                estimate[places] = x0.to(estimate.dtype)
        return model(x_t, label, **cond, estimate=estimate)

    return aided


def x0_form(forward: GaussianPath | SDE, prediction: str, t: Tensor) -> LinearForm:
    """x0 as a linear form a x + b output of what a network is given and returns at times t.

    Args:
        forward: the forward process.
        prediction: what the network predicts: one of ``process.KINDS``, or with an SDE ncsn or edm,
            where x is c_in x_t.
        t: timesteps int64 [N], or times float64 [N].

    Returns:
        a and b, float64 [N].
    """
    if isinstance(forward, GaussianPath):
        alpha, sigma = forward.coefficients(t.device, torch.float64)
        return x0_and_eps(prediction, alpha[t], sigma[t])[0]
    if prediction == "edm":
        assert isinstance(forward, EDM)
        skip, out, scale = forward.preconditioning(t)
        return skip / scale, out
    alpha, sigma = forward.levels(t)
    if prediction == "ncsn":  # the output is -eps
        return 1 / alpha, sigma / alpha
    return x0_and_eps(prediction, alpha, sigma)[0]
