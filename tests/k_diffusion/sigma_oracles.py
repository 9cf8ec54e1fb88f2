"""k-diffusion's samplers in plain float64, by their formulas, for images x = x_0 + sigma eps.

Each takes ``f(x, sigma) -> denoised``, x, the levels as numbers, ``draw()``, which gives noise like
x, and its options. They share no code with the library.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np


def raised(x, a, draw, steps, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
    """x and its level after churn (Karras et al. 2022, algorithm 2, lines 4 to 6)."""
    if not s_churn:
        return x, a
    z = draw()
    gamma = min(s_churn / steps, math.sqrt(2) - 1) if s_tmin <= a <= s_tmax else 0.0
    hat = a * (1 + gamma)
    return x + math.sqrt(hat**2 - a**2) * s_noise * z, hat


def straight(f, x, a, b, at=None):
    """x moved from level a to b along the slope at ``at``, a pair of images and their level."""
    y, level = at or (x, a)
    return x + (b - a) * (y - f(y, level)) / level


def churning(step):
    """A sampler that raises each level and then takes a step."""

    def sampler(f, x, levels, draw, **churn):
        for a, b in pairwise(levels):
            x, hat = raised(x, a, draw, len(levels) - 1, **churn)
            x = step(f, x, hat, b)
        return x

    return sampler


def heun_step(f, x, a, b):
    end = straight(f, x, a, b)
    return end if b == 0 else (end + straight(f, x, a, b, at=(end, b))) / 2


def midpoint_step(f, x, a, b):
    if b == 0:
        return straight(f, x, a, b)
    middle = math.sqrt(a * b)
    return straight(f, x, a, b, at=(straight(f, x, a, middle), middle))


def exponential_midpoint_step(f, x, a, b):
    if b == 0:
        return straight(f, x, a, b)
    middle = math.sqrt(a * b)
    return towards(x, f(straight(f, x, a, middle), middle), b / a)


def towards(x, image, share):
    """``share`` of the way from x to the image is left."""
    return image + share * (x - image)


def split(a, b, eta):
    """The level to go down to from a, and the noise that leads back to b."""
    variance = (eta * b) ** 2 * (1 - (b / a) ** 2)
    return math.sqrt(b**2 - variance), math.sqrt(variance)


def ancestral(step):
    """A sampler that takes a step to a level below the next one, and adds noise."""

    def sampler(f, x, levels, draw, eta=1.0, s_noise=1.0):
        for a, b in pairwise(levels):
            down, up = split(a, b, eta)
            x = step(f, x, a, down)
            if up:
                x = x + up * s_noise * draw()
        return x

    return sampler


def lms(f, x, levels, draw, order=4):
    slopes = []
    for i, (a, b) in enumerate(pairwise(levels)):
        slopes.append((x - f(x, a)) / a)
        known = list(range(max(i + 1 - order, 0), i + 1))
        for j in known:
            others = [levels[k] for k in known if k != j]
            basis = np.polynomial.Polynomial.fromroots(others) if others else 1.0
            scale = math.prod(levels[j] - other for other in others)
            integral = (np.polynomial.Polynomial([1.0]) * basis).integ()
            x = x + (integral(b) - integral(a)) / scale * slopes[j]
    return x


def dpmpp_sde(f, x, levels, draw, eta=1.0, s_noise=1.0, r=0.5):
    for a, b in pairwise(levels):
        image = f(x, a)
        if b == 0:
            x = image
            continue
        middle = a ** (1 - r) * b**r
        down, up = split(a, middle, eta)
        inner = towards(x, image, down / a) + up * s_noise * draw()
        image = image + (f(inner, middle) - image) / (2 * r)
        down, up = split(a, b, eta)
        x = towards(x, image, down / a) + up * s_noise * draw()
    return x


def dpmpp_2m(f, x, levels, draw):
    before = None
    for i, (a, b) in enumerate(pairwise(levels)):
        image = f(x, a)
        ahead = image
        if before is not None and b > 0:
            ahead = image + (image - before) * math.log(a / b) / math.log(levels[i - 1] / a) / 2
        x, before = towards(x, ahead, b / a), image
    return x


def dpmpp_2m_sde(f, x, levels, draw, eta=1.0, s_noise=1.0, solver_type="midpoint"):
    before = None
    for i, (a, b) in enumerate(pairwise(levels)):
        image = f(x, a)
        if b == 0:
            return image
        h = math.log(a / b)
        z = h * (1 + eta)
        gone = 1 - math.exp(-z)
        x = towards(x, image, math.exp(-z))
        if before is not None:
            weight = gone / 2 if solver_type == "midpoint" else 1 - gone / z
            x = x + weight * h / math.log(levels[i - 1] / a) * (image - before)
        if eta:
            x = x + draw() * b * math.sqrt(1 - math.exp(-2 * eta * h)) * s_noise
        before = image
    return x


def dpmpp_3m_sde(f, x, levels, draw, eta=1.0, s_noise=1.0):
    images = []
    for i, (a, b) in enumerate(pairwise(levels)):
        images.append(f(x, a))
        if b == 0:
            return images[-1]
        h = math.log(a / b)
        z = h * (1 + eta)
        linear = 1 - (1 - math.exp(-z)) / z
        x = towards(x, images[-1], math.exp(-z))
        if i > 0:
            r = math.log(levels[i - 1] / a) / h
            slope = (images[-1] - images[-2]) / r
            if i > 1:
                q = math.log(levels[i - 2] / levels[i - 1]) / h
                bend = (slope - (images[-2] - images[-3]) / q) / (r + q)
                slope = slope + r * bend
                x = x - (linear / z - 0.5) * bend
            x = x + linear * slope
        if eta:
            x = x + draw() * b * math.sqrt(1 - math.exp(-2 * eta * h)) * s_noise
    return x


def third_order_step(f, x, a, b):
    """Lu et al. 2022, algorithm 2, for alpha = 1, in powers of b / a."""
    h, eps = math.log(a / b), lambda y, level: (y - f(y, level)) / level
    at = [a ** (1 - share) * b**share for share in (1 / 3, 2 / 3)]
    first = eps(x, a)
    second = eps(x + (at[0] - a) * first, at[0])
    curved = at[1] * 2 * ((a / at[1] - 1) / (2 * h / 3) - 1)
    third = eps(x + (at[1] - a) * first - curved * (second - first), at[1])
    curved = b * 1.5 * ((a / b - 1) / h - 1)
    return x + (b - a) * first - curved * (third - first)


def dpm_fast(f, x, levels, draw, n=7, eta=0.0, s_noise=1.0):
    """From the first to the last of ``levels``, in n evaluations."""
    high, low = levels[0], levels[-1]
    m = n // 3 + 1
    orders = [3] * (m - 2) + [2, 1] if n % 3 == 0 else [3] * (m - 1) + [n % 3]
    steps = {1: straight, 2: midpoint_step, 3: third_order_step}
    ends = [high * (low / high) ** (i / m) for i in range(m + 1)]
    for order, (a, b) in zip(orders, pairwise(ends), strict=True):
        down = max(split(a, b, eta)[0], low)
        up = math.sqrt(max(b**2 - down**2, 0.0))
        x = steps[order](f, x, a, down)
        if eta and b != ends[-1]:
            x = x + up * s_noise * draw()
    return x


SAMPLERS = {
    "euler": churning(straight),
    "heun": churning(heun_step),
    "dpm_2": churning(midpoint_step),
    "euler_ancestral": ancestral(straight),
    "dpm_2_ancestral": ancestral(midpoint_step),
    "dpmpp_2s_ancestral": ancestral(exponential_midpoint_step),
    "lms": lms,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
}
