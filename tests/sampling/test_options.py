"""Seeds, beginning from images, inpainting, slices, and what may be seen of the loop."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import fastdiff
from fastdiff import ops, sample, samplers, schedules
from fastdiff.samplers import DDIM, DDPM, Table
from fastdiff.sampling.inpainting import KNOWN_ROW

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = schedules.cosine(100)
SHAPE = (3, 2, 6, 6)
HEUN = samplers.make("heun", SCHEDULE, 4)
UNIPC = samplers.make("unipc-2", SCHEDULE, 4)


def half(x, t):
    return x / 2


def shifted(x, t, shift):
    return x / 2 + shift


SHIFT = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1, 1)


def draw(model, sampler, x_T, **options):
    return sample(model, sampler, x_T.shape, x_T=x_T, **{"progress": False, **options})


@pytest.fixture(name="x_T")
def starting_noise(generator):
    return torch.randn(SHAPE, generator=generator, dtype=torch.float64)


def test_seeded_noise_is_that_of_the_counter():
    """x_T has a row of its own; each other row is numbered as in the table."""
    sampler = DDPM(SCHEDULE, 4)
    seeds = torch.tensor([[7, 0], [7, 1], [7, 2]])
    x = ops.philox_normal(seeds, 2**32 - 1, SHAPE, torch.float64)
    for row, t in enumerate(sampler.table.timesteps):
        z = ops.philox_normal(seeds, row, SHAPE, torch.float64)
        x = ops.sampler_step(x, half(x, t), None, z, sampler.table.values, torch.tensor(row))
    drawn = sample(half, sampler, SHAPE, seed=7, dtype=torch.float64, progress=False)
    torch.testing.assert_close(drawn, x)


def test_an_image_with_a_seed_is_the_same_in_any_batch():
    def images(seed, **options):
        count = len(seed) if isinstance(seed, (list, torch.Tensor)) else 3
        return sample(
            half, DDPM(SCHEDULE, 4), (count, 2, 6, 6), seed=seed, progress=False, **options
        )

    together = images([5, 6, 2**64 - 1])
    for index, seed in enumerate([5, 6, -1]):  # -1 has the same 64 bits
        assert torch.equal(images([seed])[0], together[index])
    assert torch.equal(images([6, 5]), together[[1, 0]])
    assert torch.equal(images(torch.tensor([5, 6])), together[:2])
    assert torch.equal(images(5)[0], together[0])
    numbered = images(5)
    assert not torch.equal(numbered[1], numbered[0])
    for max_batch in (1, 2, 3, 7):
        assert torch.equal(images(5, max_batch=max_batch), numbered)
    with fastdiff.backend("reference"):
        torch.testing.assert_close(images(5), numbered, rtol=1e-4, atol=1e-5)


def test_seeds_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    first = sample(half, DDPM(SCHEDULE, 3), SHAPE, seed=1, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(sample(half, DDPM(SCHEDULE, 3), SHAPE, seed=1, progress=False), first)


def test_starting_noise_is_scaled_to_what_the_sampler_begins_with(x_T):
    """Where the path does not keep the variance, as that of rectified flow halfway."""
    sampler = DDIM(schedules.flow(10), 1, prediction="flow", grid=[4], clip=None)
    alpha, sigma = sampler.table.levels[0].tolist()
    assert (alpha, sigma) == (0.5, 0.5)
    for given in (sampler, sampler.table, Table.from_json(sampler.table.to_json())):
        seen = []
        draw(lambda x, t, seen=seen: seen.append(x.clone()) or x, given, x_T)
        torch.testing.assert_close(seen[0], math.sqrt(0.5) * x_T)


@pytest.mark.parametrize("sampler", [DDIM(SCHEDULE, 5), DDIM(SCHEDULE, 5).table], ids=["s", "t"])
def test_a_run_goes_on_from_where_it_was(sampler, x_T):
    drawn, path = draw(half, sampler, x_T, return_trajectory=True)
    steps = []
    again = draw(half, sampler, path[2], start=2, callback=lambda step, t, x: steps.append(step))
    assert torch.equal(again, drawn)
    assert steps == [2, 3, 4]


def test_a_table_may_begin_where_it_reads_nothing_older(x_T):
    """Heun's second evaluation reads what the first one of the same step keeps."""
    assert torch.equal(draw(half, HEUN.table, x_T, start=2), draw(half, HEUN, x_T, start=2))


def test_image_to_image(x_T):
    """x = alpha image + sigma noise at the step's level (arXiv:2108.01073)."""
    sampler, image = DDIM(SCHEDULE, 5), torch.full(SHAPE, 0.5, dtype=torch.float64)
    alpha, sigma = sampler.table.levels[3].tolist()
    assert alpha**2 + sigma**2 == pytest.approx(1)
    wanted = draw(half, sampler, alpha * image + sigma * x_T, start=3)
    torch.testing.assert_close(draw(half, sampler, x_T, start=3, image=image), wanted)
    torch.testing.assert_close(draw(half, sampler, x_T, start=3, image=image[:1]), wanted)
    options = {"start": 3, "image": image, "progress": False}
    same = torch.Generator().manual_seed(2)
    noise = torch.randn(SHAPE, generator=same, dtype=torch.float64)
    drawn = sample(half, sampler, SHAPE, generator=torch.Generator().manual_seed(2), **options)
    assert torch.equal(drawn, draw(half, sampler, noise, start=3, image=image))
    noise = ops.philox_normal(torch.tensor([[2, 0], [2, 1], [2, 2]]), 2**32 - 1, SHAPE, x_T.dtype)
    drawn = sample(half, sampler, SHAPE, seed=2, **options)
    assert torch.equal(drawn, draw(half, sampler, noise, start=3, image=image))


@pytest.mark.parametrize("sampler", [DDIM(SCHEDULE, 4), HEUN, UNIPC], ids=lambda s: s.name)
@pytest.mark.parametrize("start", [0, 2])
def test_inpainting_noises_the_known_part_anew_at_each_step(sampler, start, x_T):
    image = torch.linspace(-1, 1, x_T.numel(), dtype=torch.float64).view(SHAPE)
    mask = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    mask[..., 2:4] = True
    generate, keep = mask.expand(SHAPE), ~mask.expand(SHAPE)
    options = {"image": image, "mask": mask, "start": start}
    options["generator"] = torch.Generator().manual_seed(8)
    drawn, path = draw(half, sampler, x_T, return_trajectory=True, **options)
    same = torch.Generator().manual_seed(8)
    assert torch.equal(drawn[keep], image[keep])
    assert bool((drawn[generate] != image[generate]).all())
    table = sampler.starting_at(start).table
    steps = table.steps.tolist()
    for step in range(table.num_steps - 1):
        alpha, sigma = table.levels[steps.index(step + 1)].tolist()
        known = alpha * image + sigma * torch.randn(SHAPE, generator=same, dtype=torch.float64)
        torch.testing.assert_close(path[step + 1][keep], known[keep])
        assert not torch.allclose(path[step + 1][generate], known[generate])
    assert torch.equal(options["generator"].get_state(), same.get_state())


def test_inpainting_leaves_the_middle_of_a_step_alone(x_T):
    image, given = torch.ones(SHAPE, dtype=torch.float64), []
    nothing, seed = torch.zeros(1, 1, 6, 6), 4
    draw(
        lambda x, t: given.append(x.clone()) or x / 2, HEUN, x_T, image=image, mask=nothing,
        seed=seed,
    )  # fmt: skip
    seeds = torch.tensor([[seed, image] for image in range(len(x_T))])
    for row, (alpha, sigma) in list(enumerate(HEUN.table.levels.tolist()))[1:-1]:
        first = HEUN.table.steps[row] != HEUN.table.steps[row - 1]
        z = ops.philox_normal(seeds, KNOWN_ROW + row - 1, SHAPE, torch.float64)
        assert torch.allclose(given[row], alpha * image + sigma * z) == first


def test_inpainting_ends_with_the_image_where_the_sampler_does_not(x_T):
    table = DDIM(SCHEDULE, 3).table
    levels = table.levels.clone()
    levels[-1] = torch.tensor([0.8, 0.6])
    image = torch.ones(SHAPE, dtype=torch.float64)
    drawn = draw(
        half, dataclasses.replace(table, levels=levels), x_T, image=image,
        mask=torch.zeros(SHAPE),
    )  # fmt: skip
    assert torch.equal(drawn, image)


def test_inpainting_of_everything_is_sampling_and_a_soft_mask_mixes(x_T):
    image = torch.zeros(SHAPE, dtype=torch.float64)
    plain = draw(half, DDIM(SCHEDULE, 3), x_T)
    everything = torch.ones(3, 2, 6, 6)
    assert torch.equal(draw(half, DDIM(SCHEDULE, 3), x_T, image=image, mask=everything), plain)
    one = DDIM(SCHEDULE, 1)
    soft = draw(half, one, x_T, image=image + 1, mask=everything[:, :1] / 4)
    torch.testing.assert_close(soft, 0.25 * draw(half, one, x_T) + 0.75)


def test_inpainting_in_bfloat16_ends_with_the_image():
    image, mask = torch.rand(SHAPE), torch.zeros(SHAPE)
    drawn = sample(
        half, DDIM(SCHEDULE, 3), SHAPE, image=image, mask=mask, seed=0, dtype=torch.bfloat16,
        progress=False,
    )  # fmt: skip
    assert torch.equal(drawn, image.bfloat16())


@pytest.mark.parametrize("max_batch", [1, 2, 3, 10])
def test_slices_give_the_images_of_one_pass(max_batch, x_T):
    seen = []

    def model(x, t, shift, scale):
        seen.append(len(x))
        return shifted(x, t, shift) * scale

    image, mask = torch.ones(SHAPE).double(), torch.rand(SHAPE).round()
    options = {
        "cond": {"shift": SHIFT, "scale": 0.9}, "uncond": {"shift": -SHIFT, "scale": 0.9},
        "guidance": 2.0,
        "image": image, "mask": mask, "start": 1, "seed": 3, "return_trajectory": True,
    }  # fmt: skip
    whole, path = draw(model, HEUN, x_T, **options)
    seen.clear()
    sliced, of_slices = draw(model, HEUN, x_T, max_batch=max_batch, **options)
    assert torch.equal(sliced, whole)
    assert torch.equal(of_slices, path)
    assert max(seen) == 2 * min(max_batch, 3)
    assert sum(seen) == 6 * 5  # of Heun's 7 evaluations, those of steps 1 to 3


def test_slices_share_starting_noise_from_a_generator():
    def images(**options):
        generator = torch.Generator().manual_seed(3)
        return sample(
            half, DDIM(SCHEDULE, 2), SHAPE, generator=generator, progress=False, **options
        )

    assert torch.equal(images(max_batch=2), images())


def test_slices_of_labels(tiny_unet):
    model, x_T = tiny_unet(num_classes=3), torch.randn(5, 1, 8, 8)
    cond, sampler = {"class_labels": torch.tensor([0, 1, 1, 2, 2])}, DDIM(SCHEDULE, 2)
    torch.testing.assert_close(
        draw(model, sampler, x_T, cond=cond, max_batch=2), draw(model, sampler, x_T, cond=cond),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_callback_sees_every_step_and_may_keep_it(x_T):
    seen = []
    drawn, path = draw(
        half, HEUN, x_T, callback=lambda *seen_now: seen.append(seen_now), return_trajectory=True
    )
    begins = [HEUN.table.steps.tolist().index(step) for step in range(4)]
    times = HEUN.table.timesteps[begins].tolist()
    assert [(step, t) for step, t, _ in seen] == list(enumerate(times))
    assert isinstance(seen[0][1], int)  # 99
    assert tuple(path.shape) == (5, *SHAPE)
    assert torch.equal(path[0], x_T)
    for step, _, x in seen:
        assert torch.equal(x, path[step + 1])
    assert torch.equal(path[4], drawn)
    seen[0][2].fill_(9)  # a copy


def test_every_few_steps_and_the_last(x_T):
    seen = []
    for start, every in ((0, 1), (0, 2), (0, 3), (0, 9), (2, 2)):
        steps = []
        draw(
            half, DDIM(SCHEDULE, 5), x_T, start=start, every=every,
            callback=lambda step, t, x, steps=steps: steps.append(step),
        )  # fmt: skip
        seen.append(steps)
    assert seen == [[0, 1, 2, 3, 4], [1, 3, 4], [2, 4], [4], [3, 4]]


def test_callback_sees_slices(x_T):
    seen = []
    draw(
        half, DDIM(SCHEDULE, 2), x_T, max_batch=2,
        callback=lambda step, t, x: seen.append((step, len(x))),
    )  # fmt: skip
    assert seen == [(0, 2), (1, 2), (0, 1), (1, 1)]


@pytest.mark.parametrize("threshold", [None, 0.9], ids=["clip", "dynamic threshold"])
@pytest.mark.parametrize("returned", [half, lambda x, t: x, lambda x, t: x.mT], ids=range(3))
def test_preview_is_the_estimate_of_x0(threshold, returned, x_T):
    sampler = DDIM(SCHEDULE, 4, prediction="v", dynamic_threshold=threshold)
    seen, given = [], []
    draw(
        lambda x, t: returned(given.append(x.clone()) or x, t), sampler, x_T,
        preview=lambda *now: seen.append(now), every=2,
    )  # fmt: skip
    assert [step for step, _, _ in seen] == [1, 3]
    for step, t, x0 in seen:
        assert t == sampler.timesteps[step]
        abar = SCHEDULE.alphas_cumprod[int(t)]
        x = given[step]
        wanted = abar.sqrt() * x - (1 - abar).sqrt() * returned(x, t)
        if threshold is None:
            wanted = wanted.clamp(-1, 1)
        else:
            limit = wanted.abs().flatten(1).quantile(threshold, 1).clamp(min=1).view(-1, 1, 1, 1)
            wanted = wanted.clamp(-limit, limit) / limit
        torch.testing.assert_close(x0, wanted)


def test_watching_changes_nothing(x_T):
    plain = draw(half, UNIPC, x_T)
    watched = draw(
        half, UNIPC, x_T, check_finite=True, return_trajectory=True,
        preview=lambda step, t, x0: x0.zero_(), callback=lambda step, t, x: x.zero_(),
    )  # fmt: skip
    assert torch.equal(watched[0], plain)


def test_outputs_that_are_not_finite_are_found(x_T):
    def broken(x, t):
        out = x / 2
        if t[0] == 50:
            out[-1, 0, :2, 0] = torch.nan
            out[-1, 1, 0, 0] = torch.inf
        return out

    sampler = DDIM(SCHEDULE, 4)
    draw(broken, sampler, x_T)  # not looked at
    text = r"step 1 \(t = 50\): of the model's 72 values an image .* not finite: 3 of image 2$"
    with pytest.raises(FloatingPointError, match=text):
        draw(broken, sampler, x_T, check_finite=True)
    with pytest.raises(FloatingPointError, match=text):  # images keep their numbers in slices
        draw(
            lambda x, t: broken(x, t) if len(x) == 1 else x / 2,
            sampler, x_T, check_finite=True, max_batch=2,
        )  # fmt: skip
    with pytest.raises(FloatingPointError, match=r"3 of image 2 with cond$"):
        draw(
            lambda x, t, shift: broken(x, t), sampler, x_T,
            cond={"shift": SHIFT}, uncond={"shift": -SHIFT}, guidance=2.0, check_finite=True,
        )  # fmt: skip
