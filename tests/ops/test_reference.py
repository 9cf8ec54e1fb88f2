"""The reference operations, against torch.nn and formulas written out, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastdiff.ops import reference
from fastdiff.samplers.table import COLUMNS


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_group_norm_silu() -> None:
    x, residual = normal(2, 6, 4, 5), normal(2, 6, 4, 5, seed=1)
    add, scale, shift = (normal(2, 6, seed=s) for s in (2, 3, 4))
    norm = torch.nn.GroupNorm(3, 6, eps=1e-3, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    wide = (..., None, None)
    h = norm(x + add[wide]) * (1 + scale[wide]) + shift[wide]
    arguments = (3, norm.weight, norm.bias, 1e-3, add, scale, shift, residual)
    torch.testing.assert_close(
        reference.group_norm_silu(x, *arguments, True), torch.nn.SiLU()(h) + residual
    )
    torch.testing.assert_close(reference.group_norm_silu(x, *arguments, False), h + residual)


def test_group_norm_silu_without_weight_or_with_one_value() -> None:
    x, bias = normal(2, 6, 4, 5).requires_grad_(), normal(6).requires_grad_()
    nothing = [None] * 4
    y = reference.group_norm_silu(x, 3, None, bias, 1e-5, *nothing, False)
    torch.testing.assert_close(y, F.group_norm(x, 3) + bias[:, None, None])
    (dbias,) = torch.autograd.grad(y.sum(), bias)
    torch.testing.assert_close(dbias, torch.full_like(dbias, 40))
    one = reference.group_norm_silu(normal(1, 1, 1, 1), 1, None, None, 1e-5, *nothing, False)
    assert one.item() == 0


def test_add_time_embedding() -> None:
    x, emb = normal(2, 3, 4, 5), normal(2, 3, seed=1)
    wanted = torch.stack([x[n, c] + emb[n, c] for n in range(2) for c in range(3)])
    assert torch.equal(reference.add_time_embedding(x, emb), wanted.view_as(x))


def test_q_sample() -> None:
    x0, noise = normal(3, 2, 4), normal(3, 2, 4, seed=1)
    signal, sigma = torch.rand(2, 10, dtype=torch.float64)
    t = torch.tensor([9, 0, 4])
    wanted = [signal[k] * x0[n] + sigma[k] * noise[n] for n, k in enumerate(t)]
    torch.testing.assert_close(reference.q_sample(x0, t, noise, signal, sigma), torch.stack(wanted))


def test_q_sample_from_seed() -> None:
    x0, seed = normal(3, 2, 4), torch.tensor([[5, 0], [-1, 2], [5, 1]])
    signal, sigma = torch.rand(2, 10, dtype=torch.float64)
    t, row = torch.tensor([9, 0, 4]), torch.tensor([6])
    noise = torch.empty_like(x0)
    reference.philox_normal(seed, 6, noise)
    found = reference.q_sample_from_seed(x0, t, seed, row, signal, sigma)
    assert torch.equal(found, reference.q_sample(x0, t, noise, signal, sigma))


def test_denoising_loss() -> None:
    prediction, x0 = normal(3, 2, 4), normal(3, 2, 4, seed=1)
    p, q, weight = torch.rand(3, 10, dtype=torch.float64)
    t, seed, row = torch.tensor([9, 0, 4]), torch.tensor([[5, 0], [-1, 2], [5, 1]]), 6
    noise = torch.empty_like(x0)
    reference.philox_normal(seed, row, noise)

    def wanted(target):
        each = zip(prediction, target, t, strict=True)
        return torch.stack([weight[k] * F.mse_loss(value, aim) for value, aim, k in each])

    of_x0, of_noise = p[t, None, None] * x0, q[t, None, None] * noise
    tables = (t, p, q, weight)
    for clean, part in ((x0, of_x0), (None, torch.zeros_like(x0))):
        found = reference.denoising_loss(prediction, clean, noise, *tables)
        torch.testing.assert_close(found, wanted(part + of_noise))
        given = reference.denoising_loss(prediction, clean, None, *tables)
        torch.testing.assert_close(given, wanted(part))
        drawn = reference.denoising_loss_from_seed(
            prediction, clean, seed, torch.tensor(row), *tables
        )
        assert torch.equal(drawn, found)


def row_of(depth=0, **columns):
    """A table with one row: out_x = 1 and the given columns, h0.. among them."""
    names = [*COLUMNS, *(f"h{j}" for j in range(depth))]
    columns = {"out_x": 1.0, "slot": -1.0, **columns}
    return torch.tensor([[columns.get(name, 0.0) for name in names]], dtype=torch.float64)


def step(x, model_out, *, history=None, z=None, seed=None, **columns):
    """What the row of these columns gives."""
    table = row_of(0 if history is None else len(history), **columns)
    out = torch.full_like(x, torch.nan)
    zero = torch.tensor(0)
    reference.sampler_step(x, model_out, history, z, table, zero, seed, out)
    return out


X, M, V, Z = (normal(2, 3, 4, 4, seed=seed) for seed in range(4))
LINEAR = {"x0_x": 0.9, "x0_m": -0.4, "clip_min": -0.5, "clip_max": 0.5,
          "out_x": 0.3, "out_x0": 0.6, "out_m": 0.1}  # fmt: skip
MEAN = 0.3 * X + 0.6 * (0.9 * X - 0.4 * M).clamp(-0.5, 0.5) + 0.1 * M
THRESHOLD = {"x0_x": 3.0, "out_x": 0.0, "out_x0": 1.0}


def test_sampler_step_and_its_noise() -> None:
    noise = {"noise": 0.7, "logvar": -0.5, "logvar_v": 0.8}
    torch.testing.assert_close(step(X, M, **LINEAR, **noise), MEAN)
    plain = MEAN + 0.7 * torch.tensor(-0.25, dtype=torch.float64).exp() * Z
    torch.testing.assert_close(step(X, M, z=Z, **LINEAR, **noise), plain)
    learned = MEAN + 0.7 * ((-0.5 + 0.8 * V) / 2).exp() * Z
    both = torch.cat([M, V], dim=1)
    torch.testing.assert_close(step(X, both, z=Z, **LINEAR, **noise), learned)
    seed = torch.tensor([[3, 0], [3, 1]])
    drawn = torch.empty_like(X)
    reference.philox_normal(seed, 0, drawn)
    torch.testing.assert_close(
        step(X, both, seed=seed, **LINEAR, **noise), step(X, both, z=drawn, **LINEAR, **noise)
    )


def test_sampler_step_guided() -> None:
    both = torch.cat([V, M])  # unconditional, conditional
    guided = V + 3 * (M - V)
    torch.testing.assert_close(step(X, both, **LINEAR, guidance=3.0), step(X, guided, **LINEAR))
    ratio = M.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
    torch.testing.assert_close(
        step(X, both, **LINEAR, guidance=3.0, rescale=0.7),
        step(X, guided * (0.3 + 0.7 * ratio), **LINEAR),
    )


def test_sampler_step_with_dynamic_thresholding() -> None:
    found = (3 * X).abs().flatten(1).quantile(0.9, dim=1).view(-1, 1, 1, 1)
    assert (found > 1).all()
    wanted = torch.clamp(3 * X, -found, found) / found
    torch.testing.assert_close(step(X, M, **THRESHOLD, quantile=0.9, clip_max=50.0), wanted)
    low = (3 * X).clamp(-1.2, 1.2) / 1.2
    torch.testing.assert_close(step(X, M, **THRESHOLD, quantile=0.9, clip_max=1.2), low)
    inside = step(X / 9, M, **THRESHOLD, quantile=0.9, clip_max=1.2)  # s is never below 1
    torch.testing.assert_close(inside, (X / 3).clamp(-1, 1))


def test_sampler_step_and_its_history() -> None:
    history = torch.stack([V, Z, torch.full_like(Z, torch.nan)])
    keep = {"keep_x": 0.1, "keep_x0": 0.2, "keep_m": 0.3}
    got = step(X, M, history=history, h0=0.4, h1=-0.5, slot=1.0, **LINEAR, **keep)
    torch.testing.assert_close(got, MEAN + 0.4 * V - 0.5 * Z)
    kept = 0.1 * X + 0.2 * (0.9 * X - 0.4 * M).clamp(-0.5, 0.5) + 0.3 * M
    torch.testing.assert_close(history[:2], torch.stack([V, kept]))
    assert history[2].isnan().all()
    before = history[:2].clone()
    step(X, M, history=history, **LINEAR, **keep)  # slot -1
    assert torch.equal(history[:2], before)


def test_philox_normal() -> None:
    """By Python's integers: tests/ops/test_philox_normal.py has the published answers."""
    seed, out = torch.tensor([[7, 2]]), torch.empty(1, 3, dtype=torch.float64)
    reference.philox_normal(seed, 5, out)
    words = reference.philox(
        [torch.tensor(c) for c in (0, 0, 2, 5)], [torch.tensor(7), seed[0, 0] * 0]
    )
    u = [(int(word) >> 8) / 2**24 for word in words]
    wanted = [
        math.sqrt(-2 * math.log(1 - a)) * f(2 * math.pi * b)
        for a, b, f in ((u[0], u[1], math.cos), (u[0], u[1], math.sin), (u[2], u[3], math.cos))
    ]
    assert out[0].tolist() == pytest.approx(wanted, rel=1e-12)


def test_ema_update_is_not_recorded() -> None:
    average, parameter = normal(3), normal(3, seed=1).requires_grad_()
    wanted = 0.75 * average + 0.25 * parameter.detach()
    reference.ema_update([average], [parameter], torch.tensor(0.25))
    assert not average.requires_grad
    torch.testing.assert_close(average, wanted)
