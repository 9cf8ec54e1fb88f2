"""The noise level at a model's times, and functions of the x0 that a prediction implies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.common.model import Model, tensor_of
from fastdiff.process import check_kind, conversion_at, linear, x0_and_eps
from fastdiff.schedules import GaussianPath
from fastdiff.sde.discretization import DiscretizedSDE

Levels = Callable[[Tensor], tuple[Tensor, Tensor]]  # t [N] -> alpha and sigma, float64 [N]


def levels_at(path: GaussianPath, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma, float64 [N], where a sampler of ``path`` calls its model with the times t.

    Between two timesteps log(sigma / alpha) is linear in t, as in the samplers' grids.
    """
    if isinstance(path, DiscretizedSDE):  # its timesteps may lie beyond 0..T-1
        return path.sde.levels(path.time(t.double()))
    place = path.timestep(t.double()).clamp(0, path.num_timesteps - 1)
    below = place.floor().long()
    above = (below + 1).clamp(max=path.num_timesteps - 1)
    alpha, sigma = path.coefficients(t.device, torch.float64)
    lam = (alpha / sigma).log()
    between = path.levels(torch.exp(-torch.lerp(lam[below], lam[above], place - below)))
    whole = place == below  # exactly the table's, also where alpha is 0
    return (
        torch.where(whole, alpha[below], between[0]),
        torch.where(whole, sigma[below], between[1]),
    )


def denoised(
    model: Model, function: Callable[[Tensor], Tensor], path: GaussianPath, *, kind: str = "eps"
) -> nn.Module:
    """A model whose predicted x0 is put through a function before the sampler sees it.

    guided-diffusion calls the function ``denoised_fn``. With ``lambda x0: x0.clamp(-1, 1)`` the
    prediction is clipped before other guidance that wraps this model, while a sampler's ``clip``
    clips it afterwards. Samplers see eps, v and the others as they follow from the changed x0.

    Args:
        model: ``(x, t, **cond)`` -> the prediction [N, C, ...]; or with a learned variance [N, 2 C,
            ...], whose second half is not changed.
        function: x0 [N, C, ...], float32 or float64, -> like x0.
        path: the schedule that the model was trained on.
        kind: what the model predicts, one of ``process.KINDS``.

    Raises:
        ValueError: an unknown kind, or a kind eps or score of a schedule with zero terminal SNR,
            which say nothing of x0 there. When called: the function returns another shape.
    """
    check_kind(kind)
    if kind in ("eps", "score") and path.has_zero_terminal_snr:
        raise ValueError(f"{kind} says nothing of x0 where {path!r} has no signal")
    return _Denoised(model, function, path, kind)


class _Denoised(nn.Module):
    """The model of :func:`denoised`."""

    def __init__(
        self, model: Model, function: Callable[[Tensor], Tensor], path: GaussianPath, kind: str
    ) -> None:
        super().__init__()
        self.model, self.function, self.path, self.kind = model, function, path, kind
        self.train(model.training if isinstance(model, nn.Module) else False)

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        prediction, *values = tensor_of(self.model(x, t, **cond)).split(x.shape[1], dim=1)
        levels = levels_at(self.path, t.expand(x.shape[0]))
        x0 = linear(x0_and_eps(self.kind, *levels)[0], x, prediction)
        changed = self.function(x0)
        if changed.shape != x.shape:
            raise ValueError(
                f"the function must return x0 of shape {tuple(x.shape)}, got {tuple(changed.shape)}"
            )
        prediction = linear(conversion_at("x0", self.kind, *levels), x, changed).to(x.dtype)
        return torch.cat([prediction, *values], dim=1) if values else prediction
