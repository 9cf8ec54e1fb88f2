"""Self-conditioning: the estimate of x0 that a network is given in training and in sampling."""

from __future__ import annotations

import dataclasses

import diffusers
import pytest
import torch

import fastdiff
from fastdiff import guidance, objectives, process, samplers, schedules, sde
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.common.checks import beside
from fastdiff.common.errors import InputError
from fastdiff.compiler.network import FusedNetwork
from fastdiff.data.image_set import ImageSet
from fastdiff.nn import UNet2DConfig
from fastdiff.sampling.quick import quick
from fastdiff.training.trainer import Trainer, TrainingOptions

OPTIONS = TrainingOptions(
    steps=3, batch_size=6, warmup=0, self_condition=True, sample_every=0, save_every=2, ema=0.5
)
PROCESSES = {
    **{kind: (schedules.cosine(40), kind) for kind in process.KINDS},
    "zero-snr": (schedules.make("cosine", 40, zero_terminal_snr=True), "v"),
    "flow-schedule": (schedules.flow(40), "flow"),
    "vp": (sde.VP(), "eps"),
    "log-snr": (sde.CosineLogSNR(), "v"),
    "ve": (sde.VE(label_by="sigma"), "score"),
    "ncsn": (sde.VE(), "ncsn"),
    "edm": (sde.EDM(), "edm"),
}


class Recorder:
    """A network whose output depends on its estimate, and that keeps what it was given."""

    def __init__(self):
        self.estimates, self.outputs = [], []

    def __call__(self, x, t, estimate, class_labels=None):
        self.estimates.append(estimate.clone())
        shift = 0 if class_labels is None else 0.1 * beside(class_labels.to(x.dtype), x)
        self.outputs.append((0.6 * x).tanh() / 2 + 0.3 * estimate + shift)
        return self.outputs[-1]


@pytest.fixture
def images(generator):
    pixels = torch.randint(256, (12, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(12) % 3
    return ImageSet(pixels, labels, ("a", "b", "c"), "noise")


def test_each_evaluation_gets_the_x0_of_the_one_before(generator):
    """DDIM by hand, in the manner of algorithm 2 of the paper."""
    path, network = schedules.cosine(50), Recorder()
    model = guidance.self_conditioned(network, path, kind="v")
    sampler = samplers.make("ddim", path, 5, prediction="v", clip=None)
    x_T = torch.randn(3, 1, 4, 4, generator=generator)
    found = [
        fastdiff.sample(model, sampler, x_T.shape, x_T=x_T, progress=False, max_batch=size)
        for size in (None, 2)
    ]
    x, estimate = x_T.clone(), torch.zeros_like(x_T)
    for point, after in zip(sampler.points[:-1], sampler.points[1:], strict=True):
        v = (0.6 * x).tanh() / 2 + 0.3 * estimate
        x0, eps = point.alpha * x - point.sigma * v, point.sigma * x + point.alpha * v
        estimate = x0.clamp(-1, 1)
        x = after.alpha * x0 + after.sigma * eps
    for images in found:  # every run, and every part of a batch, begins with zeros
        torch.testing.assert_close(images, x, rtol=1e-4, atol=1e-5)
    assert not network.estimates[0].any()
    assert all(estimate.any() for estimate in network.estimates[1:5])


def test_the_halves_of_guidance_have_estimates_of_their_own(generator):
    path = schedules.cosine(50)
    labels, none = torch.tensor([1, 2]), torch.tensor([3, 3])
    sampler = samplers.make("heun", path, 4, prediction="v", clip=None)
    x_T = torch.randn(2, 1, 4, 4, generator=generator)
    network = Recorder()
    fastdiff.sample(
        guidance.self_conditioned(network, path, kind="v"), sampler, x_T.shape, x_T=x_T,
        cond={"class_labels": labels}, uncond={"class_labels": none}, guidance=2.0, progress=False,
    )  # fmt: skip
    for last, estimate in zip(network.outputs, network.estimates[1:], strict=False):
        assert estimate.shape == last.shape == (4, 1, 4, 4)
        assert not torch.allclose(estimate[:2], estimate[2:])


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("method", ["ode", "adaptive", "euler-maruyama", "ddim", "unipc-2"])
def test_an_image_has_its_own_estimate_whatever_else_is_in_the_batch(method, guidance, generator):
    """Solvers that choose their own steps finish images at different evaluations."""
    diffusion = fastdiff.Diffusion(Recorder(), sde.VP(), "v", self_condition=True)
    options = {"ode": {"rtol": 1e-3, "atol": 1e-4}, "adaptive": {"eps_rel": 0.5}}
    steps = None if method in options else 6
    sampler = diffusion.sampler(method, steps, **options.get(method, {}))
    x_T = torch.randn(3, 1, 2, 2, generator=generator) * torch.tensor([0.1, 1, 2]).view(3, 1, 1, 1)

    def drawn(x_T):
        labels = torch.full((len(x_T),), 2)
        uncond = None if guidance == 1 else {"class_labels": labels * 0}
        return diffusion.generate(
            sampler, x_T.shape, x_T=x_T, cond={"class_labels": labels}, uncond=uncond,
            guidance=guidance, progress=False, generator=torch.Generator().manual_seed(1),
        )  # fmt: skip

    together = drawn(x_T)
    network = diffusion.model
    assert not network.estimates[0].any()
    assert network.estimates[1].any()
    if guidance != 1:
        halves = network.estimates[1].chunk(2)
        assert not torch.allclose(*halves)
    # Noise at the steps would be other noise in another batch.
    if method in ("ode", "ddim", "unipc-2"):
        alone = [drawn(x_T[i : i + 1]) for i in range(3)]
        torch.testing.assert_close(together.images, torch.cat([one.images for one in alone]))
        assert together.evaluations.tolist() == [int(one.evaluations) for one in alone]
    if method == "ode":
        assert len(set(together.evaluations.tolist())) > 1


@pytest.mark.parametrize("name", PROCESSES)
def test_training_gives_some_images_the_x0_of_a_first_pass(name, generator):
    forward, prediction = PROCESSES[name]
    objective = objectives.make(None if name != "ncsn" else "ncsn", forward, prediction)
    x0 = torch.rand(4, 1, 2, 2, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    t, _ = objective.draw(4, generator)
    if isinstance(forward, schedules.GaussianPath):
        alpha, sigma = (beside(value[t], x0) for value in (forward.alpha_t, forward.sigma_t))
    else:
        alpha, sigma = (beside(value, x0) for value in forward.levels(t))
    exact = {
        "eps": noise, "x0": x0, "v": alpha * noise - sigma * x0, "score": -noise / sigma,
        "flow": noise - x0, "ncsn": -noise,
    }  # fmt: skip
    if prediction == "edm":
        skip, out, _ = (beside(value, x0) for value in forward.preconditioning(t))
        exact["edm"] = (x0 - skip * (x0 + sigma * noise)) / out
    given, weight = [], torch.ones((), dtype=torch.float64, requires_grad=True)

    def network(x, label, *, estimate):
        given.append(estimate)
        whole = estimate.shape[0] == 4
        return weight * (exact[prediction] if whole else exact[prediction][[0, 2]])

    estimated = torch.tensor([True, False, True, False])
    losses = objective.losses(objective.aided(network, t, estimated), x0, t, noise)
    assert losses.max() < 1e-12
    first, second = given
    assert not first.any()
    assert not second[[1, 3]].any()
    torch.testing.assert_close(second[[0, 2]], x0[[0, 2]], rtol=0, atol=1e-7)
    assert not second.requires_grad


def test_a_batch_without_estimates_has_a_first_pass_all_the_same():
    objective, given = objectives.make(None, schedules.cosine(10)), []

    def network(x, label, *, estimate):
        given.append(estimate)
        return x

    x0, t = torch.ones(3, 1, 2, 2), torch.tensor([2, 3, 4])
    none = torch.zeros(3, dtype=torch.bool)
    objective.losses(objective.aided(network, t, none), x0, t, x0)
    assert [len(estimate) for estimate in given] == [1, 3]
    assert not given[1].any()


def test_training_does_not_depend_on_micro_batches_and_resumes(images, tiny_unet, tmp_path):
    def trainer(out=None, **changes):
        model = tiny_unet(num_classes=3, self_condition=True)
        options = dataclasses.replace(OPTIONS, **changes)
        return Trainer(model, schedules.cosine(50), images, options, prediction="v", out=out)

    whole, parts = trainer(tmp_path / "run"), trainer(accumulate=3)
    losses = [(whole.step(), parts.step()) for _ in range(2)]
    for one, other in losses:
        assert one == pytest.approx(other, rel=1e-5)
    whole.save()
    resumed = Trainer.resume(tmp_path / "run", images)
    assert resumed.options.self_condition
    assert resumed.step() == whole.step()
    for one, other in zip(resumed.parameters, whole.parameters, strict=True):
        assert torch.equal(one, other)
    found = checkpoint.load(tmp_path / "run")
    assert found.channels == 1
    sampler = found.diffusion().sampler("ddim", 2)
    assert found.sample(sampler, labels=[0, 1], progress=False).shape == (2, 1, 8, 8)


def test_a_model_without_classes_trains(images, tiny_unet):
    model = tiny_unet(self_condition=True)
    trainer = Trainer(model, schedules.cosine(50), images.without_labels(), OPTIONS)
    assert trainer.step() > 0


def test_the_draws_say_which_images_get_an_estimate(images, tiny_unet):
    model = tiny_unet(num_classes=3, self_condition=True)
    options = dataclasses.replace(OPTIONS, batch_size=200)
    draws = Trainer(model, schedules.cosine(50), images, options).draw(0)
    assert 60 < int(draws.estimated.sum()) < 140
    assert torch.equal(draws.part(10, 30).estimated, draws.estimated[10:30])
    plain = dataclasses.replace(options, self_condition=False)
    other = Trainer(tiny_unet(num_classes=3), schedules.cosine(50), images, plain).draw(0)
    assert other.estimated is None
    assert torch.equal(other.t, draws.t)
    assert torch.equal(other.indices, draws.indices)


def test_validation_gives_every_other_image_an_estimate(images, tiny_unet):
    model = tiny_unet(num_classes=3, self_condition=True)
    trainer = Trainer(model, schedules.cosine(50), images, OPTIONS, validation=images)
    found = trainer.validation_losses()["validation_loss"]
    assert found == trainer.validation_losses()["validation_loss"]
    assert 0 < found < 10


@pytest.mark.parametrize("wanted", [True, False])
def test_model_and_options_must_agree(wanted, images, tiny_unet):
    model = tiny_unet(num_classes=3, self_condition=not wanted)
    options = dataclasses.replace(OPTIONS, self_condition=wanted)
    with pytest.raises(InputError, match=f"self_condition is {wanted}, but the model"):
        Trainer(model, schedules.cosine(50), images, options)


def test_the_network_takes_its_estimate_compiled_or_not(tiny_unet, generator):
    model = tiny_unet(self_condition=True)
    x, estimate = torch.randn(2, 2, 1, 8, 8, generator=generator)
    with torch.no_grad():
        plain, fused = model(x, 3, estimate=estimate), quick(model)(x, 3, estimate=estimate)
        assert isinstance(quick(model), FusedNetwork)
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(plain, model(x, 3, estimate=torch.zeros_like(x)), atol=1e-3)
        with pytest.raises(ValueError, match="the model is self-conditioned: estimate must be"):
            model(x, 3)
        with pytest.raises(ValueError, match="the model is not self-conditioned"):
            tiny_unet()(x, 3, estimate=estimate)
    with pytest.raises(ValueError, match="half of in_channels are the estimate's, got 3"):
        UNet2DConfig(self_condition=True)


def test_diffusers_reads_the_network_as_one_of_more_channels(tiny_unet, tmp_path, generator):
    model = tiny_unet(self_condition=True)
    model.save_pretrained(tmp_path)
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path).eval()
    x, estimate = torch.randn(2, 2, 1, 8, 8, generator=generator)
    with torch.no_grad():
        found = theirs(torch.cat([x, estimate], dim=1), 3).sample
        torch.testing.assert_close(found, model(x, 3, estimate=estimate), rtol=1e-4, atol=1e-5)


def test_likelihoods_are_those_without_an_estimate(tiny_unet, generator):
    written = Checkpoint(tiny_unet(self_condition=True), schedules.cosine(20), "v")
    diffusion, x = written.diffusion(), torch.randn(2, 1, 8, 8, generator=generator).clamp(-1, 1)
    model = diffusion.model

    def unaided(x, t):
        return model(x, t, estimate=torch.zeros_like(x))

    plain = fastdiff.Diffusion(unaided, diffusion.forward, "v")
    for method in ("bound", "ode"):
        found, wanted = (
            one.bits_per_dim(
                (x * 127).round() / 127, method=method, progress=False,
                generator=torch.Generator().manual_seed(0),
                **({"seed": 1} if method == "bound" else {"probes": 1}),
            )
            for one in (diffusion, plain)
        )  # fmt: skip
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="cannot turn images into noise"):
        diffusion.encode(x)


def test_a_graph_cannot_carry_estimates(tiny_unet):
    path = schedules.cosine(20)
    model = guidance.self_conditioned(tiny_unet(self_condition=True), path)
    # Inside another model, too.
    model = guidance.denoised(model, lambda x0: x0.clamp(-1, 1), path)
    sampler = samplers.make("ddim", path, 2)
    with pytest.raises(ValueError, match="the model keeps values from step to step"):
        fastdiff.sample(model, sampler, (1, 1, 8, 8), mode="compile")
