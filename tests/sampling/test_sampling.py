"""The sampling loop: what it calls, in which order, with what, and what it returns."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import fastdiff
from fastdiff import ops, sample, samplers, schedules
from fastdiff.nn import TimestepEmbedding, UNet2DModel
from fastdiff.samplers import DDIM, DDPM

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = schedules.cosine(100)
SHAPE = (2, 1, 8, 8)


def half(x, t):
    """A model without weights: it predicts half of its input."""
    return x / 2


def by_hand(model, sampler, x, noises=None):
    """The same run in the plainest code, in float64."""
    table = sampler.table
    history = ops.new_history(x, table.depth) if table.depth else None
    for i, t in enumerate(table.timesteps):
        out = model(x, t.expand(len(x)))
        noise = None if noises is None else noises[i]
        x = ops.sampler_step(x, out, history, noise, table.values, torch.tensor(i))
    return x


@pytest.fixture(name="x_T")
def starting_noise(generator):
    return torch.randn(SHAPE, generator=generator)


def test_it_is_one_model_call_and_one_step_an_iteration(x_T):
    seen = []

    def model(x, t):
        seen.append((tuple(x.shape), t.dtype, t.tolist()))
        return x / 2

    sampler = DDIM(SCHEDULE, 5)
    drawn = sample(model, sampler, SHAPE, x_T=x_T.double(), progress=False)
    assert seen == [(SHAPE, torch.int64, [t, t]) for t in (80, 60, 40, 20, 0)]
    assert drawn.dtype == torch.float64
    torch.testing.assert_close(drawn, by_hand(half, sampler, x_T.double()), rtol=0, atol=0)


def test_noise_comes_from_the_generator_in_order():
    """x_T first, then one draw for each step that adds noise: not for the last."""
    sampler = DDPM(SCHEDULE, 4)
    used, same = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    drawn = sample(half, sampler, SHAPE, generator=used, dtype=torch.float64, progress=False)
    draws = [torch.randn(SHAPE, generator=same, dtype=torch.float64) for _ in range(4)]
    wanted = by_hand(half, sampler, draws[0], [*draws[1:], None])
    torch.testing.assert_close(drawn, wanted, rtol=0, atol=0)
    assert torch.equal(used.get_state(), same.get_state())


def test_the_same_generator_gives_the_same_images(tiny_unet):
    model, sampler = tiny_unet(), DDPM(SCHEDULE, 3, prediction="v")

    def draw(seed):
        seeded = torch.Generator().manual_seed(seed)
        return sample(model, sampler, SHAPE, generator=seeded, progress=False)

    first = draw(1)
    torch.manual_seed(99)  # the global generator has no part in it
    assert torch.equal(draw(1), first)
    assert not torch.equal(draw(2), first)


def test_without_a_generator_the_global_one_is_used():
    def draw():
        return sample(half, DDPM(SCHEDULE, 3), SHAPE, progress=False)

    torch.manual_seed(4)
    first = draw()
    assert not torch.equal(draw(), first)
    torch.manual_seed(4)
    assert torch.equal(draw(), first)


@pytest.mark.parametrize("make", [DDIM, DDPM], ids=["ddim", "ddpm"])
def test_starting_noise_is_used_and_left_alone(make, x_T):
    kept = x_T.clone()
    sampler = make(SCHEDULE, 3)

    def draw(start):
        seeded = torch.Generator().manual_seed(0)
        return sample(half, sampler, SHAPE, x_T=start, generator=seeded, progress=False)

    drawn = draw(x_T)
    assert torch.equal(x_T, kept)
    assert drawn.data_ptr() != x_T.data_ptr()
    assert not torch.equal(draw(x_T + 1), drawn)


@pytest.mark.parametrize("images", [0, 1, 3], ids="N={}".format)
@pytest.mark.parametrize("conditional", [False, True], ids=["unconditional", "conditional"])
@pytest.mark.parametrize("make", [DDIM, DDPM], ids=["ddim", "ddpm"])
def test_batch_sizes(images, conditional, make, tiny_unet, generator):
    model = tiny_unet(num_classes=3 if conditional else 0)
    labels = torch.arange(images) % 3
    drawn = sample(
        model,
        make(SCHEDULE, 3, prediction="v"),
        (images, 1, 8, 8),
        cond={"class_labels": labels} if conditional else None,
        generator=generator,
        progress=False,
    )
    assert drawn.shape == (images, 1, 8, 8)
    assert bool(drawn.isfinite().all())


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda out: out, id="tensor"),
        pytest.param(lambda out: (out, "other"), id="tuple"),
        pytest.param(lambda out: SimpleNamespace(sample=out), id="object"),
        pytest.param(lambda out: out.to(torch.bfloat16), id="bfloat16"),
    ],
)
def test_what_a_model_may_return(wrap):
    x_T = torch.full(SHAPE, 0.5)

    def quarter(x, t):
        return torch.full_like(x, 0.25)

    sampler = DDIM(SCHEDULE, 3)
    drawn = sample(lambda x, t: wrap(quarter(x, t)), sampler, SHAPE, x_T=x_T, progress=False)
    wanted = sample(quarter, sampler, SHAPE, x_T=x_T, progress=False)
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn, wanted)


def test_a_diffusers_model_runs_as_it_is(tiny_unet, x_T):
    """Its output is an object; the images are those of fastdiff's model of the same weights."""
    import diffusers

    ours = tiny_unet()
    theirs = diffusers.UNet2DModel(**ours.config.to_dict()).eval()
    theirs.load_state_dict(ours.state_dict())
    sampler = DDIM(SCHEDULE, 4, prediction="v")
    torch.testing.assert_close(
        sample(theirs, sampler, SHAPE, x_T=x_T, progress=False),
        sample(ours, sampler, SHAPE, x_T=x_T, progress=False),
        rtol=1e-4,
        atol=1e-5,
    )


def test_learned_variance(x_T):
    """The second half of the channels is the variance, for a sampler that wants one."""

    def model(x, t):
        return torch.cat([x / 2, torch.ones_like(x)], dim=1)

    def draw(model, variance):
        return sample(
            model,
            DDPM(SCHEDULE, 3, variance=variance),
            SHAPE,
            x_T=x_T,
            generator=torch.Generator().manual_seed(0),
            progress=False,
        )

    torch.testing.assert_close(draw(model, "learned_range"), draw(half, "fixed_large"))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="unconditional"),
        pytest.param({"num_class_embeds": 3}, id="classes"),
        pytest.param({"time_embedding_type": "fourier"}, id="fourier"),
    ],
)
@pytest.mark.parametrize("labels", [[2, 0], [1, 1]], ids=["mixed labels", "one label"])
def test_time_embeddings_are_computed_once_before_the_loop(options, labels, x_T, monkeypatch):
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        **options,
    ).eval()
    cond = {"class_labels": torch.tensor(labels)} if "num_class_embeds" in options else {}
    sampler = DDIM(schedules.cosine(100), 5, prediction="v", offset=1)
    calls, embed = [], TimestepEmbedding.forward
    monkeypatch.setattr(
        TimestepEmbedding, "forward", lambda self, x: calls.append(1) or embed(self, x)
    )
    drawn = sample(model, sampler, SHAPE, x_T=x_T, cond=cond, progress=False)
    assert len(calls) == 1
    plain = sample(
        lambda x, t, **cond: model(x, t, **cond), sampler, SHAPE, x_T=x_T, cond=cond, progress=False
    )
    assert len(calls) == 6
    torch.testing.assert_close(drawn, plain, rtol=1e-4, atol=1e-6)


def test_other_conditions_reach_the_model(x_T):
    def model(x, t, scale, shift):
        return x * scale + shift

    drawn = sample(
        model, DDIM(SCHEDULE, 3), SHAPE, x_T=x_T, cond={"scale": 0.5, "shift": 0.0}, progress=False
    )
    assert torch.equal(drawn, sample(half, DDIM(SCHEDULE, 3), SHAPE, x_T=x_T, progress=False))


def test_dtype_is_that_of_the_noise_or_the_model_or_the_argument(tiny_unet, x_T):
    sampler = DDIM(SCHEDULE, 2, prediction="v")

    def dtype(model, **options):
        return sample(model, sampler, SHAPE, progress=False, **options).dtype

    assert dtype(half) == torch.float32
    assert dtype(half, dtype=torch.bfloat16) == torch.bfloat16
    assert dtype(half, x_T=x_T.double()) == torch.float64
    assert dtype(half, x_T=x_T, dtype=torch.float64) == torch.float64
    assert dtype(tiny_unet().double()) == torch.float64
    assert dtype(tiny_unet().bfloat16()) == torch.bfloat16


def test_everything_is_made_on_the_device_that_was_asked_for(monkeypatch, tiny_unet):
    """The meta device stands for a GPU."""
    seen = set()

    def step(*values):
        seen.update(value.device.type for value in values if value is not None)

    def model(x, t):
        seen.update((x.device.type, t.device.type))
        return x

    monkeypatch.setattr(ops, "sampler_step_for", lambda x: step)
    noisy = DDPM(SCHEDULE, 2)
    cpu = torch.Generator()
    drawn = sample(model, noisy, SHAPE, device="meta", generator=cpu, progress=False)
    assert drawn.device.type == "meta"
    assert seen == {"meta"}
    seen.clear()
    sample(
        model, noisy, SHAPE, x_T=torch.empty(SHAPE, device="meta"), generator=cpu, progress=False
    )
    assert seen == {"meta"}
    seen.clear()
    assert sample(tiny_unet(), noisy, SHAPE, progress=False).device.type == "cpu"
    assert seen == {"cpu"}


@pytest.mark.gpu
def test_a_gpu_gives_the_images_of_the_cpu(tiny_unet):
    """The noise is the CPU generator's on both."""
    images = [
        sample(
            tiny_unet().to(device),
            DDPM(SCHEDULE, 5, prediction="v"),
            SHAPE,
            generator=torch.Generator().manual_seed(0),
            progress=False,
        )
        for device in ("cuda", "cpu")
    ]
    assert images[0].device.type == "cuda"
    torch.testing.assert_close(images[0].cpu(), images[1], rtol=1e-3, atol=1e-3)


def test_memory_format_is_kept(x_T, tiny_unet):
    last = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    model = tiny_unet(channels=3)
    drawn = sample(model, DDIM(SCHEDULE, 2, prediction="v"), last.shape, x_T=last, progress=False)
    assert drawn.is_contiguous(memory_format=torch.channels_last)
    plain = sample(
        model, DDIM(SCHEDULE, 2, prediction="v"), last.shape, x_T=last.contiguous(), progress=False
    )
    assert plain.is_contiguous()
    torch.testing.assert_close(drawn.contiguous(), plain, rtol=1e-4, atol=1e-5)


def test_one_channel_keeps_the_strides_that_networks_follow():
    """It is contiguous either way, but a convolution after it is channels-last only by these."""
    seen = []
    for given in (torch.randn(SHAPE), torch.randn(SHAPE).to(memory_format=torch.channels_last)):
        sample(
            lambda x, t: seen.append(x.stride()) or x / 2,
            DDIM(SCHEDULE, 1), SHAPE, x_T=given, progress=False,
        )  # fmt: skip
        assert seen[-1] == given.stride()
    assert seen[0] != seen[1]


def test_under_autocast(tiny_unet, x_T):
    model, sampler = tiny_unet(), DDIM(SCHEDULE, 3, prediction="v")
    exact = sample(model, sampler, SHAPE, x_T=x_T, progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = sample(model, sampler, SHAPE, x_T=x_T, progress=False)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, exact, rtol=0.05, atol=0.05)
    assert not torch.equal(mixed, exact)


def test_no_graph_is_kept(tiny_unet, x_T):
    x_T.requires_grad_()
    drawn = sample(tiny_unet(), DDIM(SCHEDULE, 2, prediction="v"), SHAPE, x_T=x_T, progress=False)
    assert not drawn.requires_grad


@pytest.mark.parametrize("name", ["ddim", "ddpm", "heun", "unipc-2", "dpmpp-2m-sde"])
def test_every_backend_gives_the_same_images(name, tiny_unet, x_T):
    model = tiny_unet()
    sampler = samplers.make(name, SCHEDULE, 5, prediction="v")

    def draw():
        seeded = torch.Generator().manual_seed(0)
        return sample(model, sampler, SHAPE, x_T=x_T, generator=seeded, progress=False)

    fastest = draw()
    with fastdiff.backend("reference"):
        reference = draw()
    torch.testing.assert_close(fastest, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("progress", "shown"),
    [
        pytest.param(True, "sampling", id="on"),
        pytest.param("drawing cats", "drawing cats", id="described"),
        pytest.param(False, None, id="off"),
    ],
)
def test_progress_goes_to_standard_error(progress, shown, x_T, capsys):
    sample(half, DDIM(SCHEDULE, 3), SHAPE, x_T=x_T, progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    assert shown in err if shown else err == ""


@pytest.mark.parametrize(
    ("model", "sampler", "options", "error", "message"),
    [
        pytest.param(
            half,
            DDIM(SCHEDULE, 2),
            {"x_T": torch.zeros(2, 1, 8, 4)},
            ValueError,
            r"shape \(2, 1, 8, 8\), got \(2, 1, 8, 4\)",
            id="x_T of another shape",
        ),
        pytest.param(
            lambda x, t: torch.cat([x, x], 1),
            DDIM(SCHEDULE, 2),
            {},
            ValueError,
            r"fixed variance .* \(2, 1, 8, 8\), got \(2, 2, 8, 8\)",
            id="too many channels",
        ),
        pytest.param(
            half,
            DDPM(SCHEDULE, 2, variance="learned_range"),
            {},
            ValueError,
            r"learned variance .* \(2, 2, 8, 8\), got \(2, 1, 8, 8\)",
            id="too few channels",
        ),
        pytest.param(
            lambda x, t: x[..., :4], DDIM(SCHEDULE, 2), {}, ValueError, "got", id="another size"
        ),
        pytest.param(
            lambda x, t: None, DDIM(SCHEDULE, 2), {}, TypeError, "got NoneType", id="no output"
        ),
        pytest.param(
            lambda x, t: (), DDIM(SCHEDULE, 2), {}, TypeError, "got tuple", id="empty tuple"
        ),
        pytest.param(
            half,
            DDIM(SCHEDULE, 2),
            {"dtype": torch.int64},
            TypeError,
            "floating point, got torch.int64",
            id="integer images",
        ),
    ],
)
def test_bad_arguments(model, sampler, options, error, message):
    with pytest.raises(error, match=message):
        sample(model, sampler, SHAPE, progress=False, **options)


@pytest.mark.parametrize("shape", [(4,), (), (2, -1, 8)], ids=str)
def test_bad_shapes(shape):
    with pytest.raises(ValueError, match="shape must be"):
        sample(half, DDIM(SCHEDULE, 2), shape, progress=False)
