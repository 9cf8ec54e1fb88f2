"""What the sampler tests share: models without weights, and a run of a table in plain code."""

from __future__ import annotations

import torch

from fastdiff.samplers import COLUMNS

PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}  # our names and diffusers'


def fake_model(x, t, *, learned=False):
    """Some smooth function of images and timestep; with ``learned``, v in [-1, 1] beside it."""
    out = torch.sin(2 * x + 0.01 * t) + 0.3 * x
    return torch.cat([out, torch.cos(3 * x - 0.02 * t)], dim=1) if learned else out


def run_table(table, x, noises=None, model=fake_model, *, history=None):
    """Every x of a run from ``x``, [R + 1, ...]: an oracle that shares no code with the library.

    ``noises`` are one tensor a row. ``history`` begins a run whose first rows are left out.
    """
    path, history = [x], dict(history or {})
    for i, t in enumerate(table.timesteps.tolist()):
        row = dict(zip(COLUMNS, table.values[i].tolist(), strict=False))
        weights = table.values[i, len(COLUMNS) :].tolist()
        out = model(x, t)
        m, v = out.chunk(2, dim=1) if table.learned_variance else (out, None)
        x0 = row["x0_x"] * x + row["x0_m"] * m
        if row["quantile"] == 0:
            x0 = x0.clamp(row["clip_min"], row["clip_max"])
        else:
            limit = x0.abs().flatten(1).quantile(row["quantile"], dim=1)
            limit = limit.clamp(1, row["clip_max"]).view(-1, *[1] * (x.ndim - 1))
            x0 = x0.clamp(-limit, limit) / limit
        z = 0 if noises is None else noises[i]
        logvar = row["logvar"] + (0 if v is None else row["logvar_v"] * v)
        new = row["out_x"] * x + row["out_x0"] * x0 + row["out_m"] * m
        new = new + row["noise"] * torch.as_tensor(logvar / 2, dtype=x.dtype).exp() * z
        for slot, weight in enumerate(weights):
            if weight != 0:
                new = new + weight * history[slot]
        if row["slot"] >= 0:
            kept = row["keep_x"] * x + row["keep_x0"] * x0 + row["keep_m"] * m
            history[int(row["slot"])] = kept + row["keep_noise"] * z
        x = new
        path.append(x)
    return torch.stack(path)
