"""Inpainting of correlated Gaussians, whose conditional distribution is known, and its schedule.

Two pixels of deviation 0.5 have a correlation of 0.9. Given the first, 0.5, the second is Gaussian
with mean 0.45 and deviation 0.5 sqrt(1 - 0.81) = 0.218. Putting in what is known at each level is
an approximation: the deviation comes out too large, the nearer the more often it is repeated.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fastdiff import sample, samplers, schedules
from fastdiff.sampling.inpainting import _visits, resampled

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = schedules.cosine(1000)
COVARIANCE = 0.25 * torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
MEAN, DEVIATION = 0.45, 0.2179
IMAGE = torch.tensor([0.5, 0.0], dtype=torch.float64).view(1, 2, 1)
MASK = torch.tensor([0.0, 1.0]).view(1, 2, 1)


def best(x, t):
    """The best prediction of eps."""
    alpha, sigma = SCHEDULE.alpha_t[t[0]], SCHEDULE.sigma_t[t[0]]
    total = alpha**2 * COVARIANCE + sigma**2 * torch.eye(2, dtype=torch.float64)
    return sigma * torch.linalg.solve(total, x.flatten(1).T).T.view(x.shape)


def moments(name, steps, **options):
    """Mean and deviation of the second pixel."""
    sampler = samplers.make(name, SCHEDULE, steps, grid="trailing", clip=None)
    drawn = sample(
        best, sampler, (20_000, 2, 1), image=IMAGE, mask=MASK, seed=0, dtype=torch.float64,
        progress=False, **options,
    )[:, 1]  # fmt: skip
    return drawn.mean().item(), drawn.std().item()


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_resampling_comes_nearer_to_the_conditional_distribution(name):
    # With one noise held for the known part all along, the deviations are 0.305 and 0.347.
    limits = {"ddpm": (0.275, 0.245), "ddim": (0.325, 0.265)}[name]
    mean, deviation = moments(name, 50)
    nearer, smaller = moments(name, 50, resamplings=10, jump_length=10)
    assert DEVIATION - 0.003 < smaller < limits[1] < deviation < limits[0]
    assert mean + 0.05 < nearer < MEAN + 0.01


def repaints(steps, length, times):
    """The times that the authors' text prescribes, as levels from steps - 1 down to 0, then -1."""
    jumps = {level: times - 1 for level in range(0, steps - length, length)}
    level, found = steps, []
    while level >= 1:
        level -= 1
        found.append(level)
        if jumps.get(level, 0) > 0:
            jumps[level] -= 1
            level += length
            found.append(level)
    return [*found, -1]


@pytest.mark.parametrize(
    ("steps", "length", "times"), [(7, 2, 3), (5, 1, 2), (10, 10, 4), (25, 10, 2), (2, 1, 4)]
)
def test_steps_are_repeated_as_repaint_does(steps, length, times):
    levels = [steps - 1]
    for step, back in _visits(steps, times, length):
        assert levels[-1] == steps - 1 - step
        levels.append(steps - 2 - step)
        if back is not None:
            assert back == step + 1 - length
            levels.append(steps - 1 - back)
    assert levels == repaints(steps, length, times)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "euler-ancestral", "heun", "dpmpp-sde"])
def test_a_way_back_is_the_forward_process(name):
    table = samplers.make(name, SCHEDULE, 8, grid="leading").table
    plan = resampled(table, 3, 2)
    assert plan.table.num_steps > table.num_steps
    assert len(plan.ends) == len(plan.steps) == plan.table.rows
    assert len(plan.jumps) == 2 * 3  # twice from each of three levels
    for row in range(plan.table.rows - 1):
        after = plan.table.levels[row + 1].tolist()
        if row not in plan.jumps:
            assert plan.ends[row] == tuple(after)
            continue
        (alpha, sigma), jump = plan.ends[row], plan.jumps[row]
        assert jump.share * alpha == pytest.approx(after[0])
        assert (jump.share * sigma) ** 2 + jump.sigma**2 == pytest.approx(after[1] ** 2)
        assert after[1] > sigma
    assert plan.ends[-1] == tuple(table.levels[-1].tolist())


def test_repeated_steps_count_and_draw_noise_of_their_own():
    seen, given = [], []

    def model(x, t):
        given.append((t[0].item(), x.clone()))
        return x / 2

    image = torch.zeros(2, 1, 2, 2)
    sampler = samplers.make("ddim", SCHEDULE, 4, grid="leading")
    options = {"image": image, "mask": torch.ones(1, 1, 2, 2), "progress": False, "seed": 1}
    repeated = {"resamplings": 2, "jump_length": 1}
    drawn, path = sample(
        model, sampler, (2, 1, 2, 2), return_trajectory=True,
        callback=lambda step, t, x: seen.append(step), **repeated, **options,
    )  # fmt: skip
    assert [t for t, _ in given] == [750, 750, 500, 500, 250, 250, 0]
    assert seen == list(range(7))
    assert len(path) == 8
    for (t, x), (after, again) in pairwise(given):
        assert t != after or not torch.equal(x, again)
    for max_batch in (1, 2):
        same = sample(model, sampler, (2, 1, 2, 2), max_batch=max_batch, **repeated, **options)
        assert torch.equal(same, drawn)
    scales = [1.0, 2.0, 1.0, 3.0]  # one for each of the sampler's own steps
    cond = {"cond": {"y": torch.ones(2)}, "uncond": {"y": torch.zeros(2)}, "guidance": scales}
    sample(
        lambda x, t, y: x * y.view(-1, 1, 1, 1), sampler, (2, 1, 2, 2), **cond, **repeated,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddpm", {"resamplings": 0}, "resamplings must be at least 1, got 0"),
        ("ddpm", {"jump_length": 0}, "jump_length must be at least 1, got 0"),
        ("ddpm", {"resamplings": 2}, "jump_length must be below the number of steps, 5, got 10"),
        ("ddpm", {"resamplings": 2, "mask": None}, "resamplings are for inpainting, with a mask"),
        ("unipc-2", {"resamplings": 2, "jump_length": 2}, "unipc-2 keeps for later ones"),
        ("dpm-2", {"resamplings": 2, "jump_length": 2}, "dpm-2 keeps for later ones"),
    ],
)
def test_what_is_refused(name, options, message):
    sampler = samplers.make(name, SCHEDULE, 5)
    options = {"image": IMAGE, "mask": MASK, "start": 0, **options}
    options["start"] = 1 if options["mask"] is None else 0
    with pytest.raises(ValueError, match=message):
        sample(best, sampler, (2, 2, 1), progress=False, **options)
