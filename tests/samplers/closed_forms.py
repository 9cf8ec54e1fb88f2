"""Data whose noised density is known at every level: mixtures of Gaussians.

For them the best prediction, the solution of the probability-flow ODE and the moments of a run are
known without training or sampling, so that the error of a sampler is its own alone. Everything is
float64, images are [N, D].
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.special import ndtr

from fastdiff.samplers import COLUMNS
from fastdiff.samplers.grids import Point, point_at_time
from fastdiff.schedules import FlowSchedule


def float64(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def slope(counts, errors):
    """The order of convergence: least squares of log error against log count, sign changed."""
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


class Mixture:
    """x_0 ~ sum_k weight_k N(mean_k, covariance_k), K components in D dimensions."""

    def __init__(self, weights, means, covariances):
        self.weights, self.means = float64(weights), float64(means)  # [K], [K, D]
        self.variances, self.axes = torch.linalg.eigh(float64(covariances))  # [K, D], [K, D, D]
        self._to_axes = self.axes.permute(1, 0, 2).flatten(1)  # [D, K D]
        self._centers = torch.einsum("kd,kde->ke", self.means, self.axes)  # along the axes

    def predict(self, x, alpha, sigma, kind="eps"):
        """E[kind | x_t = x] at the level x_t = alpha x_0 + sigma eps."""
        along = (x @ self._to_axes).view(len(x), *self.means.shape) - alpha * self._centers
        total = alpha**2 * self.variances + sigma**2  # variance of x_t along each axis
        log_density = self.weights.log() - (along**2 / total + total.log()).sum(2) / 2
        share = log_density.softmax(1)  # of each component, given x_t
        unscaled = share[:, :, None] * along / total
        eps = sigma * unscaled.flatten(1) @ self._to_axes.T
        if kind == "eps":
            return eps
        x0 = share @ self.means + alpha * (self.variances * unscaled).flatten(1) @ self._to_axes.T
        return {
            "x0": x0,
            "v": alpha * eps - sigma * x0,
            "score": -eps / sigma,
            "flow": eps - x0,
        }[kind]

    def model(self, path, kind="eps"):
        """The best model, a function of images and time; the time is the same for all images."""

        def model(x, t):
            label = float64(t).flatten()[0].item()
            if isinstance(path, FlowSchedule):  # whose networks are told T sigma
                sigma = label / path.num_timesteps
                return self.predict(x, 1 - sigma, sigma, kind)
            at = point_at_time(path, label)
            return self.predict(x, at.alpha, at.sigma, kind)

        return model

    def solve(self, x, start: Point, end: Point):
        """Where the probability-flow ODE takes x: dy/dr = eps, y = x / alpha, r = sigma / alpha.

        An eighth-order Runge-Kutta method of another library, in log r, to twelve digits.
        """

        def derivative(u, y):
            r = math.exp(u)
            return r * self.predict(float64(y).view(x.shape), 1.0, r).flatten().numpy()

        y = (x / start.alpha).flatten().numpy()
        limits = (math.log(start.ratio), math.log(end.ratio))
        found = solve_ivp(derivative, limits, y, method="DOP853", rtol=1e-12, atol=1e-13)
        return end.alpha * float64(found.y[:, -1]).view(x.shape)

    def draw(self, count, generator, alpha=1.0, sigma=0.0):
        """x_t [count, D] at a level; exactly x_0 without noise."""
        k = self.weights.multinomial(count, replacement=True, generator=generator)
        z = torch.randn(2, count, self.means.shape[1], generator=generator, dtype=torch.float64)
        spread = torch.einsum("nde,ne->nd", self.axes[k], self.variances[k].sqrt() * z[0])
        return alpha * (self.means[k] + spread) + sigma * z[1]

    def mean(self, alpha=1.0):
        """Mean of x_t, [D]."""
        return alpha * self.weights @ self.means

    def covariance(self, alpha=1.0, sigma=0.0):
        """Covariance of x_t, [D, D]."""
        each = torch.einsum("kde,ke,kfe->kdf", self.axes, self.variances, self.axes)
        within = torch.einsum("k,kdf->df", self.weights, each)
        apart = self.means - self.mean()
        between = torch.einsum("k,kd,ke->de", self.weights, apart, apart)
        return alpha**2 * (within + between) + sigma**2 * torch.eye(len(within), dtype=within.dtype)

    def cdf(self, x, alpha=1.0, sigma=0.0):
        """P(x_t <= x) in one dimension, NumPy in and out."""
        std = (alpha**2 * self.variances + sigma**2).sqrt().numpy()[:, 0]
        z = (np.asarray(x)[..., None] - alpha * self.means.numpy()[:, 0]) / std
        return ndtr(z) @ self.weights.numpy()


def two_bumps():
    """Two unequal components in one dimension."""
    return Mixture([0.4, 0.6], [[-1.0], [0.7]], [[[0.09]], [[0.25]]])


def three_clouds(dimensions):
    """Three components with correlations, always the same."""
    generator = torch.Generator().manual_seed(dimensions)
    apart = 0.8 if dimensions == 2 else 0.12
    means = apart * torch.randn(3, dimensions, generator=generator, dtype=torch.float64)
    roots = torch.randn(3, dimensions, dimensions, generator=generator, dtype=torch.float64)
    covariances = 0.2 * roots @ roots.mT / dimensions + 0.1 * torch.eye(dimensions)
    return Mixture([0.2, 0.3, 0.5], means, covariances)


class Gaussian(Mixture):
    """x_0 ~ N(mean, std^2) in one dimension."""

    def __init__(self, mean, std):
        super().__init__([1.0], [[mean]], [[[std**2]]])
        self.center, self.std = mean, std

    def solution(self, x, start: Point, end: Point):
        """Mixture.solve in closed form: y - mean keeps its place in a growing deviation."""
        grown = math.sqrt((self.std**2 + end.ratio**2) / (self.std**2 + start.ratio**2))
        return end.alpha * (self.center + grown * (x / start.alpha - self.center))

    def jump(self, path, to, boundary=None):
        """A model that is the consistency function: the ODE's solution in one evaluation.

        Args:
            path: the schedule.
            to: sigma / alpha where the function ends, its value being x / alpha there.
            boundary: skip and out as a function of the point, where the function is skip x + out
                times the model's output.
        """

        def model(x, t):
            s = point_at_time(path, float64(t).flatten()[0].item())
            f = self.solution(x, s, Point(0.0, 1.0, to))
            if boundary is None:
                return f
            skip, out = boundary(s)
            return (f - skip * x) / out

        return model

    def moments(self, level):
        """Mean and variance of x_t at a level (alpha, sigma)."""
        alpha, sigma = level
        return alpha * self.center, alpha**2 * self.std**2 + sigma**2


def consistency_boundary(s, r_min=0.05, sigma_data=0.5):
    """arXiv:2303.01469, appendix C, on x / alpha."""
    above = s.ratio - r_min
    skip = sigma_data**2 / (above**2 + sigma_data**2) / s.alpha
    return skip, sigma_data * above / math.sqrt(s.ratio**2 + sigma_data**2)


def lcm_boundary(s, timestep_scaling=10.0):
    """arXiv:2310.04378, section 4.1, with s = 0.5."""
    u = timestep_scaling * s.t
    return 0.25 / (u**2 + 0.25), u / math.sqrt(u**2 + 0.25)


def final_moments(table, model, start):
    """Mean and variance of a run's result, without sampling.

    The model must be linear in x, so x and the history are jointly Gaussian: their mean and
    covariance are carried through the table.

    Args:
        table: of a sampler without clipping, of one dimension.
        model: the model.
        start: mean and variance of the x to begin with.
    """
    size = 1 + table.depth
    mean, covariance = np.zeros(size), np.zeros((size, size))
    mean[0], covariance[0, 0] = start
    for t, values in zip(table.timesteps.tolist(), table.values.tolist(), strict=True):
        row = dict(zip(COLUMNS, values, strict=False))
        at_0, at_1 = (model(float64([[x]]), t).item() for x in (0.0, 1.0))
        shift, slope = at_0, at_1 - at_0  # m = shift + slope x

        def form(x, x0, m, row=row, shift=shift, slope=slope):  # as so much of x, and a constant
            of_x = x + x0 * (row["x0_x"] + row["x0_m"] * slope) + m * slope
            return of_x, x0 * row["x0_m"] * shift + m * shift

        A, b, c = np.eye(size), np.zeros(size), np.zeros(size)  # A (x, history) + b + c z
        A[0, 0], b[0] = form(row["out_x"], row["out_x0"], row["out_m"])
        A[0, 1:] = values[len(COLUMNS) :]
        c[0] = row["noise"] * math.exp(row["logvar"] / 2)
        if row["slot"] >= 0:
            slot = 1 + int(row["slot"])
            A[slot] = 0
            A[slot, 0], b[slot] = form(row["keep_x"], row["keep_x0"], row["keep_m"])
            c[slot] = row["keep_noise"]
        mean = A @ mean + b
        covariance = A @ covariance @ A.T + np.outer(c, c)
    return mean[0], covariance[0, 0]
