"""The reference operations, against torch.nn and formulas written out, in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastdiff import reference


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


def test_sampler_step() -> None:
    x, out, z = normal(2, 3, 4, 4), normal(2, 6, 4, 4, seed=1), normal(2, 3, 4, 4, seed=2)
    table = normal(4, 10, seed=3)
    table[:, 2], table[:, 3] = -0.5, 0.5
    a, b, _, _, c, d, e, s, logvar, logvar_v = table[2].tolist()
    m, v = out.split(3, dim=1)
    mean = c * x + d * (a * x + b * m).clamp(-0.5, 0.5) + e * m
    step = torch.tensor(2)
    torch.testing.assert_close(reference.sampler_step(x, m, None, table, step), mean)
    torch.testing.assert_close(
        reference.sampler_step(x, m, z, table, step), mean + s * torch.tensor(logvar / 2).exp() * z
    )
    torch.testing.assert_close(
        reference.sampler_step(x, out, z, table, step),
        mean + s * ((logvar + logvar_v * v) / 2).exp() * z,
    )
