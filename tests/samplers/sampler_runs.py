"""What the sampler tests share: a model without weights, and a run of a table."""

from __future__ import annotations

import torch

from fastdiff import ops

PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}  # our names and diffusers'


def fake_model(x, t, *, learned=False):
    """Some smooth function of images and timestep; with ``learned``, v in [-1, 1] beside it."""
    out = torch.sin(2 * x + 0.01 * t) + 0.3 * x
    return torch.cat([out, torch.cos(3 * x - 0.02 * t)], dim=1) if learned else out


def run_table(sampler, x, noises, model=fake_model):
    """Every x of the sampler's run from ``x``, [S + 1, ...], with the given noise of each step."""
    path = [x]
    table = sampler.table.to(x.dtype)
    for i, t in enumerate(sampler.timesteps.tolist()):
        out = model(path[-1], t)
        path.append(ops.sampler_step(path[-1], out, noises[i], table, torch.tensor(i)))
    return torch.stack(path)
