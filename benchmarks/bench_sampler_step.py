"""sampler_step against the plain PyTorch expression of the same row."""

from __future__ import annotations

import pytest
import torch
from comparison import every_dtype, every_shape

from fastdiff import ops, samplers, schedules

STEPS, STEP = 50, 20
GUIDED = {"guidance": 3.0}
RESCALED = {**GUIDED, "rescale": 0.7}
# For each case a sampler, its options, and columns of its table to overwrite.
CASES = {
    "ddim": ("ddim", {}, {}),
    "ddpm": ("ddpm", {}, {}),
    "ddpm-learned": ("ddpm", {"variance": "learned_range"}, {}),
    "unipc-3": ("unipc-3", {}, {}),
    "ddim-guided": ("ddim", {}, GUIDED),
    "ddim-rescaled": ("ddim", {}, RESCALED),
    "ddim-threshold": ("ddim", {}, {"quantile": 0.995, "clip_max": 100.0}),
}


def plain(x, model_out, history, z, row):
    """The row in PyTorch, as for a single known sampler: terms whose factor is 0 are left out."""
    c = dict(zip(samplers.COLUMNS, row, strict=False))
    factors = row[len(samplers.COLUMNS) :]
    n, channels = x.shape[:2]
    m, v = model_out[:, :channels], model_out[-n:, channels:]
    if len(m) == 2 * n:
        m_u, m_c = m.chunk(2)
        m = m_u + c["guidance"] * (m_c - m_u)
        if c["rescale"]:
            ratio = m_c.std((1, 2, 3), keepdim=True) / m.std((1, 2, 3), keepdim=True)
            m = m * (1 - c["rescale"] + c["rescale"] * ratio)
    x0 = c["x0_x"] * x + c["x0_m"] * m
    if c["quantile"]:
        s = x0.abs().flatten(1).float().quantile(c["quantile"], dim=1)
        s = s.clamp(1, c["clip_max"]).to(x.dtype).view(-1, 1, 1, 1)
        x0 = torch.clamp(x0, -s, s) / s
    elif c["clip_max"] < float("inf"):
        x0 = x0.clamp(c["clip_min"], c["clip_max"])
    terms = [(c["out_x"], x), (c["out_x0"], x0), (c["out_m"], m), *zip(factors, history)]  # noqa: B905
    y = total(terms)
    if c["noise"]:
        logvar = c["logvar"] + c["logvar_v"] * v if v.shape[1] else torch.tensor(c["logvar"])
        y = y + c["noise"] * torch.exp(logvar / 2) * z
    if c["slot"] >= 0:
        kept = [(c["keep_x"], x), (c["keep_x0"], x0), (c["keep_m"], m), (c["keep_noise"], z)]
        history[int(c["slot"])] = total(kept)
    return y.to(x.dtype)


def total(terms):
    """The sum of factor * tensor over the factors that are not 0."""
    first, *others = [(factor, value) for factor, value in terms if factor]
    y = first[0] * first[1]
    for factor, value in others:
        y = y + factor * value
    return y


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@every_dtype
@every_shape((16, 3, 32, 32), (8, 4, 64, 64), (64, 3, 64, 64))
def bench_sampler_step(versus, shape, dtype, case) -> None:
    name, options, columns = case
    sampler = samplers.make(name, schedules.cosine(), steps=STEPS, **options).table
    table = sampler.values.clone()
    for column, value in columns.items():
        table[:, samplers.COLUMNS.index(column)] = value
    n, channels, *rest = shape
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g).to(dtype)
    model_out = torch.randn(
        n * (2 if "guidance" in columns else 1), channels * (2 if sampler.learned_variance else 1),
        *rest, generator=g,
    ).to(dtype)  # fmt: skip
    noise = torch.randn(shape, generator=g).to(dtype) if sampler.noisy[STEP] else None
    history = ops.new_history(x, sampler.depth) if sampler.depth else None
    theirs = [] if history is None else history.to(dtype, copy=True)
    ours, step, out = table.float(), torch.tensor(STEP), torch.empty_like(x)
    row = ours[STEP].tolist()

    def fused():
        return ops.sampler_step(x, model_out, history, noise, ours, step, out=out)

    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for _ in range(4):  # so that slots of the history are read that an earlier call has written
        torch.testing.assert_close(
            fused(), plain(x, model_out, theirs, noise, row), atol=tolerance, rtol=tolerance
        )
    versus(fused, {"torch": lambda: plain(x, model_out, theirs, noise, row)})


@every_shape((16, 3, 32, 32), (8, 4, 64, 64))
def bench_noise_of_a_seed(versus, shape) -> None:
    """Noise from a seed within the step, against torch.randn followed by the step.

    Both noises are standard normal; their values differ.
    """
    table = samplers.make("ddpm", schedules.cosine(), steps=STEPS).table.values.float()
    x, model_out, step = torch.randn(shape), torch.randn(shape), torch.tensor(STEP)
    seed = torch.stack([torch.full((shape[0],), 7), torch.arange(shape[0])], dim=1)
    noise, out = ops.philox_normal(seed, STEP, shape), torch.empty_like(x)

    def from_seed():
        return ops.sampler_step(x, model_out, None, None, table, step, seed=seed, out=out)

    def randn():
        z = torch.randn(shape)
        return ops.sampler_step(x, model_out, None, z, table, step, out=out)

    given = ops.sampler_step(x, model_out, None, noise, table, step)
    torch.testing.assert_close(from_seed(), given)
    versus(from_seed, {"randn": randn})
