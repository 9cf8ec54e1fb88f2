"""Classifier-free guidance in the sampling loop."""

from __future__ import annotations

import pytest
import torch

from fastdiff import sample, samplers, schedules
from fastdiff.samplers import DDIM, DDPM

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = schedules.cosine(100)
SHAPE = (3, 2, 6, 6)
HEUN = samplers.make("heun", SCHEDULE, 4)
UNIPC = samplers.make("unipc-2", SCHEDULE, 4)


def per_image(*values):
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def shifted(x, t, shift):
    return x / 2 + shift


def draw(model, sampler, x_T, **options):
    return sample(model, sampler, x_T.shape, x_T=x_T, **{"progress": False, **options})


@pytest.fixture(name="x_T")
def starting_noise(generator):
    return torch.randn(SHAPE, generator=generator, dtype=torch.float64)


COND = {"shift": per_image(0.1, 0.2, 0.3)}
UNCOND = {"shift": per_image(0.0, -0.1, -0.4)}


def combined(scale):
    """The guided prediction of ``shifted`` under COND and UNCOND, as a model of its own."""

    def model(x, t):
        m_u, m_c = (shifted(x, t, **arguments) for arguments in (UNCOND, COND))
        return m_u + scale(t) * (m_c - m_u)

    return model


@pytest.mark.parametrize("sampler", [DDIM(SCHEDULE, 4), HEUN, UNIPC], ids=lambda s: s.name)
def test_guidance(sampler, x_T):
    seen = []

    def model(x, t, shift):
        seen.append((tuple(x.shape), tuple(t.shape), torch.equal(x[:3], x[3:]), shift))
        return shifted(x, t, shift)

    guided = draw(model, sampler, x_T, cond=COND, uncond=UNCOND, guidance=3.0)
    torch.testing.assert_close(guided, draw(combined(lambda t: 3.0), sampler, x_T))
    assert len(seen) == sampler.table.rows
    shift = torch.cat([UNCOND["shift"], COND["shift"]])
    for shape, of_t, same, given in seen:
        assert (shape, of_t, same) == ((6, *SHAPE[1:]), (6,), True)
        assert torch.equal(given, shift)


def test_guidance_of_each_step(x_T):
    """A step of two evaluations has one guidance."""
    scales = [1.0, 5.0, 0.0, 2.5]
    of_rows = [scales[step] for step in HEUN.table.steps.tolist()]
    rows = iter(of_rows)
    guided = draw(shifted, HEUN, x_T, cond=COND, uncond=UNCOND, guidance=scales)
    assert len(of_rows) == 7
    torch.testing.assert_close(guided, draw(combined(lambda t: next(rows)), HEUN, x_T))
    rows = iter(of_rows[4:])
    later = draw(shifted, HEUN, x_T, cond=COND, uncond=UNCOND, guidance=scales, start=2)
    torch.testing.assert_close(later, draw(combined(lambda t: next(rows)), HEUN, x_T, start=2))


def test_guidance_rescale(x_T):
    """arXiv:2305.08891, eq. 15 and 16."""

    def model(x, t):
        m_c, m = shifted(x, t, **COND), combined(lambda t: 4.0)(x, t)
        ratio = m_c.flatten(1).std(1) / m.flatten(1).std(1)
        return 0.7 * m * ratio.view(-1, 1, 1, 1) + 0.3 * m

    options = {"cond": COND, "uncond": UNCOND, "guidance": 4.0, "guidance_rescale": 0.7}
    guided = draw(shifted, DDIM(SCHEDULE, 3), x_T, **options)
    torch.testing.assert_close(guided, draw(model, DDIM(SCHEDULE, 3), x_T))


def test_guidance_of_a_learned_variance_takes_the_conditional_one(x_T):
    sampler = DDPM(SCHEDULE, 3, variance="learned_range")

    def model(x, t, shift):
        return torch.cat([shifted(x, t, shift), shift.expand_as(x)], 1)

    def conditional(x, t):
        variance = COND["shift"].expand_as(x)
        return torch.cat([combined(lambda t: 2.0)(x, t), variance], 1)

    options = {"cond": COND, "uncond": UNCOND, "guidance": 2.0}
    torch.testing.assert_close(
        draw(model, sampler, x_T, seed=4, **options), draw(conditional, sampler, x_T, seed=4)
    )


def test_guidance_of_1_asks_the_model_for_one_half(x_T):
    batches = []

    def model(x, t, shift):
        batches.append(len(x))
        return shifted(x, t, shift)

    plain = draw(shifted, DDIM(SCHEDULE, 2), x_T, cond=COND)
    assert torch.equal(draw(model, DDIM(SCHEDULE, 2), x_T, cond=COND, uncond=UNCOND), plain)
    assert batches == [3, 3]


def test_guided_arguments_may_be_nested_and_shared(x_T):
    """Tensors of N rows are concatenated at any depth; what is equal stays as it is."""
    seen = []

    def model(x, t, added, scale, table):
        seen.append((added["pair"][0].flatten().tolist(), scale, tuple(table.shape)))
        return x * scale + added["pair"][0]

    def arguments(values):
        table = torch.arange(4.0)
        return {"added": {"pair": [per_image(*values), None]}, "scale": 0.5, "table": table}

    draw(
        model, DDIM(SCHEDULE, 1), x_T,
        cond=arguments([4, 5, 6]), uncond=arguments([1, 2, 3]), guidance=2,
    )  # fmt: skip
    assert seen == [([1, 2, 3, 4, 5, 6], 0.5, (4,))]


@pytest.mark.parametrize("uncond", [[3, 3], [3, 1]], ids=["null label", "mixed"])
def test_guidance_of_a_unet(tiny_unet, uncond):
    model, x_T = tiny_unet(num_classes=4), torch.randn(2, 1, 8, 8)
    labels = {"cond": {"class_labels": torch.tensor([0, 2])},
              "uncond": {"class_labels": torch.tensor(uncond)}}  # fmt: skip
    sampler = DDIM(SCHEDULE, 3, prediction="v")
    ready = draw(model, sampler, x_T, guidance=2.0, **labels)
    plain = draw(lambda x, t, **cond: model(x, t, **cond), sampler, x_T, guidance=2.0, **labels)
    torch.testing.assert_close(ready, plain, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ready, draw(model, sampler, x_T, cond=labels["cond"]))


def test_preview_of_guided_learned_variance(x_T):
    sampler = DDPM(SCHEDULE, 2, variance="learned", prediction="x0", clip=None)
    seen, given = [], []

    def model(x, t, shift):
        given.append(x[:3].clone())
        return torch.cat([shifted(x, t, shift), x], 1)

    draw(
        model, sampler, x_T, cond=COND, uncond=UNCOND, guidance=3.0, seed=0,
        preview=lambda step, t, x0: seen.append(x0),
    )  # fmt: skip
    for x, x0 in zip(given, seen, strict=True):
        torch.testing.assert_close(x0, combined(lambda t: 3.0)(x, 0))


def test_slices_cut_what_has_rows_for_the_whole_batch_alone(x_T):
    """Not what happens to have as many rows as a slice has images."""
    seen = []

    def model(x, t, shift, table):
        seen.append((len(shift), table.tolist()))
        return shifted(x, t, shift)

    shared = {"table": torch.tensor([1, 2])}
    draw(
        model, DDIM(SCHEDULE, 1), x_T, cond=COND | shared, uncond=UNCOND | shared, guidance=2.0,
        max_batch=2,
    )  # fmt: skip
    assert seen == [(4, [1, 2]), (2, [1, 2])]
