"""``Diffusion``: a network, the process it belongs to, and what it predicts, in one object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff import losses, process, samplers, sde
from fastdiff.losses.score_matching import (
    denoising_score_matching,
    edm_loss,
    log_normal_sigma,
)
from fastdiff.ops.checks import check_floating
from fastdiff.sampling import sample
from fastdiff.sampling.arguments import real_parameter
from fastdiff.sampling.guidance import part_of
from fastdiff.sampling.loop import Model
from fastdiff.schedules import GaussianPath, NoiseSchedule

Conditions = Mapping[str, Any]


class Diffusion:
    """What a diffusion model is: its loss, its samples and its likelihood.

    Args:
        model: any callable (x, t, **cond) -> prediction, as in ``fastdiff.sample``.
        forward: a schedule from ``fastdiff.schedules``, with timesteps, or a continuous process
            from ``fastdiff.sde``.
        prediction: what the model predicts: eps, x0, v, score or flow; in continuous time also
            ncsn or edm, see ``fastdiff.sde.score_fn``.
        weighting: of the loss: with a schedule a name of ``fastdiff.losses.weighting``, such as
            "min_snr"; in continuous time "sigma" or "likelihood". None is the simple loss.

    Raises:
        TypeError: ``forward`` is neither.
        ValueError: the prediction is unknown or does not fit the process, or the weighting is
            unknown.

    Example:
        >>> diffusion = Diffusion(model, fastdiff.schedules.cosine(), "v")
        >>> diffusion.loss(x0, class_labels=labels).backward()
        >>> images = diffusion.sample((16, 3, 32, 32), cond={"class_labels": wanted})
        >>> bits = diffusion.bits_per_dim(x0)
    """

    def __init__(
        self,
        model: Model,
        forward: GaussianPath | sde.SDE,
        prediction: str = "eps",
        *,
        weighting: str | None = None,
    ) -> None:
        if not isinstance(forward, (GaussianPath, sde.SDE)):
            raise TypeError(f"forward must be a schedule or an SDE, got {type(forward).__name__}")
        self.model, self.forward = model, forward
        self.prediction, self.weighting = prediction, weighting
        self._weight: Tensor | None = None
        if isinstance(forward, GaussianPath):
            process.check_kind(prediction)
            if prediction in ("eps", "score") and forward.has_zero_terminal_snr:
                raise ValueError(
                    f"{prediction} says nothing of x0 at zero signal-to-noise ratio; predict x0, "
                    "v or flow with this schedule"
                )
            if weighting is not None:
                self._weight = losses.weighting(forward, prediction, weighting)
        else:
            sde.score_fn(model, prediction, forward)  # which checks that they fit
            if weighting not in (None, "sigma", "likelihood"):
                raise ValueError(
                    f"unknown weighting {weighting!r}, wanted sigma or likelihood with {forward!r}"
                )

    def __repr__(self) -> str:
        return f"Diffusion({type(self.model).__name__}, {self.forward!r}, {self.prediction!r})"

    def loss(self, x0: Tensor, *, generator: torch.Generator | None = None, **cond: Any) -> Tensor:
        """The training loss of a batch, a scalar, at random times with random noise.

        Args:
            x0: clean images [N, C, ...], floating point.
            generator: source of times and noise, on the CPU; None for PyTorch's global one.
            cond: keyword arguments of the model.
        """
        check_floating(x0, "x0")
        noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(x0.device)
        count = x0.shape[0]
        if isinstance(self.forward, GaussianPath):
            t = torch.randint(self.forward.num_timesteps, (count,), generator=generator)
            found = losses.simple_loss(
                self.forward, self.model, x0, t.to(x0.device), noise,
                kind=self.prediction, weight=self._weight, **cond,
            )  # fmt: skip
        else:
            t = _random_time(self.forward, count, generator).to(x0.device)
            if self.prediction == "edm":
                assert isinstance(self.forward, sde.EDM)
                found = edm_loss(self.model, self.forward, x0, t, noise, **cond)
            else:
                found = denoising_score_matching(
                    self.score(cond), self.forward, x0, t, noise,
                    weighting=self.weighting or "sigma",
                )  # fmt: skip
        return found.mean()

    def score(self, cond: Conditions | None = None) -> sde.Score:
        """grad log p_t(x) as a function of images and continuous times."""
        return sde.score_fn(self.model, self.prediction, self.continuous, **dict(cond or {}))

    @property
    def continuous(self) -> sde.SDE:
        """The process in continuous time; ValueError for schedules that have no such view."""
        if isinstance(self.forward, sde.SDE):
            return self.forward
        if not isinstance(self.forward, NoiseSchedule):
            raise ValueError(f"{self.forward!r} has no view in continuous time")
        return sde.Interpolated(self.forward)

    def sample(
        self,
        shape: tuple[int, ...],
        *,
        method: str | None = None,
        steps: int | None = None,
        cond: Conditions | None = None,
        generator: torch.Generator | None = None,
        progress: bool | str = True,
        **options: Any,
    ) -> Tensor:
        """Draw images.

        Args:
            shape: of the images, [N, C, ...].
            method: with a schedule one of ``fastdiff.samplers``, by default unipc-2; in continuous
                time "ode" (the default, to a tolerance), "adaptive" (the reverse SDE, likewise), or
                a method of ``fastdiff.sde.solve``.
            steps: of samplers and methods with fixed steps; None is 20 of a sampler, 500 of others.
            cond: keyword arguments of the model; tensors of N rows have one for each image.
            generator: source of all noise, None for PyTorch's global one.
            progress: show a progress bar.
            options: of ``fastdiff.sample``, or of the solver.

        Returns:
            Images, on the model's device where it is a module, else on the CPU.
        """
        cond = dict(cond or {})
        if isinstance(self.forward, GaussianPath):
            sampler = samplers.make(
                method or "unipc-2", self.forward, steps or 20, prediction=self.prediction
            )
            images: Tensor = sample(
                self.model, sampler, shape, cond=cond, generator=generator, progress=progress,
                **options,
            )  # fmt: skip
            return images
        own = real_parameter(self.model)
        device = torch.device("cpu") if own is None else own.device
        x = self.forward.prior_sample(tuple(shape), generator=generator, device=device)
        if method in (None, "ode"):
            return sde.solve_ode(
                self._indexed_score(cond, x.shape[0]), self.forward, x, conditioned=True,
                progress=bool(progress), **options,
            ).x  # fmt: skip
        if method == "adaptive":
            return sde.solve_adaptive(
                self._indexed_score(cond, x.shape[0]), self.forward, x, conditioned=True,
                generator=generator, progress=bool(progress), **options,
            ).x  # fmt: skip
        return sde.solve(
            self.score(cond), self.forward, x, steps or 500, method=method, generator=generator,
            progress=progress, **options,
        )  # fmt: skip

    def log_likelihood(
        self, x: Tensor, *, cond: Conditions | None = None, **options: Any
    ) -> sde.Likelihood:
        """log p(x) by the probability-flow ODE, see ``fastdiff.sde.log_likelihood``."""
        score = self._indexed_score(dict(cond or {}), x.shape[0])
        return sde.log_likelihood(score, self.continuous, x, conditioned=True, **options)

    def bits_per_dim(
        self,
        x0: Tensor,
        *,
        method: str | None = None,
        cond: Conditions | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        """Bits a value that 8-bit images in [-1, 1] take, float64 [N].

        Args:
            x0: images [N, C, ...] of 256 levels, -1 + 2 k / 255.
            method: "bound", the variational bound (schedules only, and their default), or "ode",
                the likelihood of uniformly dequantised images.
            cond: keyword arguments of the model.
            generator: of the dequantisation.
            options: of ``fastdiff.losses.bits_per_dim`` or ``fastdiff.sde.log_likelihood``.

        Raises:
            ValueError: an unknown method, or "bound" without a schedule.
        """
        bounded = isinstance(self.forward, NoiseSchedule)
        method = method or ("bound" if bounded else "ode")
        if method not in ("bound", "ode") or (method == "bound" and not bounded):
            wanted = "bound or ode" if bounded else "ode"
            raise ValueError(f"method must be {wanted} with {self.forward!r}, got {method!r}")
        if method == "bound":
            assert isinstance(self.forward, NoiseSchedule)
            found = losses.bits_per_dim(
                self.model, self.forward, x0, kind=self.prediction, **options, **dict(cond or {})
            )
            return found.total.double()
        spread = sde.dequantize(x0, generator=generator)
        return sde.bits_per_dim(
            self.log_likelihood(spread, cond=cond, **options).logp, x0.shape[1:]
        )

    def _indexed_score(self, cond: dict[str, Any], images: int) -> Any:
        """The score of some of the images, whose places come with them."""
        continuous = self.continuous

        def score(x: Tensor, t: Tensor, index: Tensor) -> Tensor:
            some = part_of(cond, None, images, index)
            return sde.score_fn(self.model, self.prediction, continuous, **some)(x, t)

        return score


def _random_time(forward: sde.SDE, images: int, generator: torch.Generator | None) -> Tensor:
    """Times to train at: log-normal for EDM, else uniform."""
    if isinstance(forward, sde.EDM):
        drawn = log_normal_sigma(images, generator=generator)
        return drawn.clamp(forward.smallest, forward.end)
    drawn = torch.rand(images, generator=generator, dtype=torch.float64)
    return forward.smallest + (forward.end - forward.smallest) * drawn
