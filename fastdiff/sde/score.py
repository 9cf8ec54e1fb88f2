"""Conversion of networks' outputs to scores, and of scores to other predictions.

A score is a function (x, t) of images [N, ...] and float64 times [N] that returns
grad_x log p_t(x), like x.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from fastdiff.common.checks import beside, wide_dtype
from fastdiff.common.model import Model, Output
from fastdiff.process import KINDS, check_kind, conversion_at, linear
from fastdiff.sde.processes import EDM, SDE, VE

Score = Callable[[Tensor, Tensor], Tensor]
PARAMETRISATIONS = (*KINDS, "ncsn", "edm")


def score_fn(model: Model, parametrisation: str, sde: SDE, **cond: Any) -> Score:
    """The score that a network's output implies (Song et al. 2021, arXiv:2011.13456).

    Args:
        model: ``(x, label, **cond)`` -> a tensor like x. The label is ``sde.label(t)``, [N] in
            float32 at least, since 999 t has more digits than half precision; "ncsn" and "edm"
            differ as said below.
        parametrisation: one of

            eps, x0, v, score, flow: a prediction as in ``fastdiff.process``;
            ncsn: the output divided by sigma is the score, and sigma is the label (Song & Ermon
                2020, arXiv:2006.09011, technique 3);
            edm: the raw network F of the preconditioned denoiser, which gets c_in x (Karras et al.
                2022, arXiv:2206.00364, eq. 7); needs the SDE ``EDM``.

        sde: the process that the network was trained on.
        cond: further keyword arguments of the model.

    Raises:
        ValueError: an unknown parametrisation, "edm" with another SDE, or "ncsn" with a VE whose
            ``label_by`` is log-sigma. When the score is called:
            a model's output of another shape than x.
        TypeError: when the score is called, if the model returns no tensor.
    """
    check_parametrisation(parametrisation, sde)
    if isinstance(sde, EDM) and parametrisation == "edm":
        return partial(_score_of_edm, model, sde, cond)
    return partial(_score, model, parametrisation, sde, cond)


def _score(
    model: Model, parametrisation: str, sde: SDE, cond: dict[str, Any], x: Tensor, t: Tensor
) -> Tensor:
    alpha, sigma = sde.levels(sde.check_time(t, x))
    label = sigma if parametrisation == "ncsn" else sde.label(t.double())
    output = model_output(model, x, label, cond)
    if parametrisation == "ncsn":
        return (output / beside(sigma, x)).to(x.dtype)
    of_x, of_output = conversion_at(parametrisation, "score", alpha, sigma)
    return linear((of_x, of_output), x, output).to(x.dtype)


def _score_of_edm(model: Model, sde: EDM, cond: dict[str, Any], x: Tensor, t: Tensor) -> Tensor:
    t = sde.check_time(t, x)
    skip, out, scale = sde.preconditioning(t)
    scaled = (beside(scale, x) * x).to(x.dtype)
    output = model_output(model, scaled, sde.label(t), cond)
    # (D - x) / t^2 with D = skip x + out F
    return linear(((skip - 1) / t**2, out / t**2), x, output).to(x.dtype)


def check_parametrisation(parametrisation: str, sde: SDE) -> None:
    """ValueError unless ``parametrisation`` is one of PARAMETRISATIONS and fits the SDE."""
    if parametrisation not in PARAMETRISATIONS:
        raise ValueError(
            f"unknown parametrisation {parametrisation!r}, wanted one of "
            f"{', '.join(PARAMETRISATIONS)}"
        )
    if parametrisation == "edm" and not isinstance(sde, EDM):
        raise ValueError(f"parametrisation 'edm' needs the SDE EDM, got {sde!r}")
    if parametrisation == "ncsn" and isinstance(sde, VE) and sde.label_by == "log-sigma":
        raise ValueError(
            f"a network of the parametrisation 'ncsn' is told sigma, not its logarithm, got {sde!r}"
        )


def prediction_fn(score: Score, kind: str, sde: SDE) -> Score:
    """A function (x, t) -> the prediction of ``kind`` that a score implies, like x.

    Args:
        score: the score of the process.
        kind: eps, x0, v, score or flow.
        sde: the process.

    Raises:
        ValueError: an unknown kind.
    """
    check_kind(kind)
    return partial(_prediction, score, kind, sde)


def _prediction(score: Score, kind: str, sde: SDE, x: Tensor, t: Tensor) -> Tensor:
    alpha, sigma = sde.levels(sde.check_time(t, x))
    gradient = score(x, t)
    if kind == "score":
        return gradient
    of_x, of_score = conversion_at("score", kind, alpha, sigma)
    return linear((of_x, of_score), x, gradient).to(x.dtype)


def model_output(model: Model, x: Tensor, label: Tensor, cond: dict[str, Any]) -> Tensor:
    """The model's output for images x and a label [N] or []; both are float32 or float64."""
    wide = wide_dtype(x.dtype)
    wanted = Output(tuple(x.shape), wide, f"images of shape {tuple(x.shape)}")
    return wanted.of(model(x, label.to(x.device, wide).expand(x.shape[0]), **cond))
