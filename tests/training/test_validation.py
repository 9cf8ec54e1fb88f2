"""The validation loss: the same at every call, spread over the times, and that of the objective."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from fastdiff import NoiseSchedule, objectives, schedules, sde
from fastdiff.common.errors import DataError, InputError
from fastdiff.compiler import network as fused
from fastdiff.data.datasets import ImageSet
from fastdiff.losses import LossSecondMoment
from fastdiff.training import Trainer, TrainingOptions
from fastdiff.training.validation import FEWEST, ValidationLoss, hold_out, spread

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = schedules.cosine(50)
OPTIONS = TrainingOptions(
    steps=4, batch_size=4, warmup=0, save_every=2, sample_every=0, validate_every=2, seed=1
)


@pytest.fixture
def images(generator) -> ImageSet:
    pixels = torch.randint(256, (12, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(12) % 2
    return ImageSet(pixels, labels, ("left", "right"), "arrows", flip=True)


@pytest.fixture
def make_trainer(tiny_unet, images):
    def make(out=None, validation=None, **changes):
        model = tiny_unet(num_classes=2, dropout=0.3)
        options = dataclasses.replace(OPTIONS, **changes)
        return Trainer(
            model, SCHEDULE, images, options, prediction="v", validation=validation, out=out
        )

    return make


def lines_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]


OBJECTIVES = {
    "uniform": (SCHEDULE, "v", {}),
    "low-discrepancy": (SCHEDULE, "v", {"timesteps": "low-discrepancy"}),
    "logit-normal": (schedules.flow(50), "flow", {"timesteps": "logit-normal"}),
    "laplace": (SCHEDULE, "v", {"timesteps": "laplace"}),
    "dsm, cosh": (sde.VP(), "eps", {"timesteps": "cosh"}),
    "edm, laplace": (sde.EDM(), "edm", {"timesteps": "laplace"}),
    "loss-second-moment": (SCHEDULE, "eps", {"name": "vlb"}),
    "dsm": (sde.VP(), "eps", {}),
    "edm": (sde.EDM(), "edm", {}),
    "ncsn": (sde.VE(), "ncsn", {"name": "ncsn", "levels": 7}),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_quantiles_are_those_of_the_draws(name, generator):
    """Each share of many weighted draws lies below its quantile."""
    forward, prediction, options = OBJECTIVES[name]
    objective = objectives.make(
        options.get("name"),
        forward,
        prediction,
        **{k: v for k, v in options.items() if k != "name"},
    )
    t, weights = objective.draw(40_000, generator)
    shares = torch.tensor([0.1, 0.35, 0.5, 0.8, 0.97], dtype=torch.float64)
    found = objective.quantiles(shares)
    assert found.dtype == t.dtype
    for share, quantile in zip(shares.tolist(), found, strict=True):
        below = float(weights[t < quantile].sum() / weights.sum())
        up_to = float(weights[t <= quantile].sum() / weights.sum())
        assert below - 0.02 < share < up_to + 0.02


def test_quantiles_do_not_depend_on_recorded_losses(generator):
    times = LossSecondMoment(4, history=1)
    shares = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    assert times.quantiles(shares).tolist() == [0, 1, 2, 3]
    times.update(torch.arange(4), torch.tensor([100.0, 1.0, 1.0, 1.0]))
    assert times.quantiles(shares).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [1, 2, 10, 997])
def test_times_are_spread(count):
    """Exactly over all, and well over any ten that follow one another."""
    shares = spread(count)
    middles = (torch.arange(count).double() + 0.5) / count
    torch.testing.assert_close(shares.sort().values, middles, rtol=0, atol=1e-12)
    for first in range(0, count - 9, 50):
        few = shares[first : first + 10].sort().values
        assert float(few.diff().max()) < 0.25
        assert float(few[0]) < 0.25
        assert float(few[-1]) > 0.75


def test_it_is_the_loss_of_the_objective(make_trainer, images, tiny_unet):
    """Beside the losses of one image at a time, by the network itself."""
    objective = make_trainer().diffusion.objective
    network = tiny_unet(num_classes=2)
    validation = ValidationLoss(objective, images, batch_size=100)
    found = validation.losses(network)
    assert len(found) == 516  # 43 times 12, the least number above FEWEST
    assert 504 < FEWEST <= 516
    for i in (0, 5, 13, 515):
        x0, labels = images.read(torch.tensor([i % 12]))
        seeds = validation._seeds[i : i + 1]
        with torch.no_grad():
            wanted = objective.losses(
                lambda x, t, labels=labels: network(x, t, labels), x0,
                validation._times[i : i + 1], seeds,
            )  # fmt: skip
        assert float(found[i]) == pytest.approx(float(wanted), rel=1e-4)
    mean, parts = validation(network)
    assert mean == float(found.mean())
    assert sum(parts) / 4 == pytest.approx(mean, rel=1e-12)
    assert len(set(parts)) == 4


def test_the_size_of_its_batches_changes_only_rounding(make_trainer, images, tiny_unet):
    objective, network = make_trainer().diffusion.objective, tiny_unet(num_classes=2)
    one, other = (
        ValidationLoss(objective, images, batch_size=size).losses(network) for size in (7, 512)
    )
    torch.testing.assert_close(one, other, rtol=1e-4, atol=0)


def test_it_leaves_no_trace_and_is_the_same_again(make_trainer, images):
    """Modes of modules, torch's generator, and the next step are as they were."""
    trainer, plain = make_trainer(validation=images), make_trainer()
    trainer.model.mid_block.eval()
    modes = [module.training for module in trainer.model.modules()]
    state = torch.get_rng_state()
    first, again = trainer.validation_losses(), trainer.validation_losses()
    assert first == again
    assert first["validation_loss"] == first["validation_loss_raw"]  # no step is done yet
    assert [module.training for module in trainer.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    trainer.model.mid_block.train()
    assert [trainer.step() for _ in range(2)] == [plain.step() for _ in range(2)]
    later = trainer.validation_losses()
    assert later["validation_loss"] != later["validation_loss_raw"]


def test_it_goes_through_fused_operations(make_trainer, images, monkeypatch):
    called = []
    forward = fused.FusedNetwork.forward

    def seen(self, *args, **kwargs):
        called.append(type(self))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(fused.FusedNetwork, "forward", seen)
    trainer = make_trainer(validation=images)
    trainer.validation(trainer.network)
    assert set(called) == {fused.FusedNetwork}


def test_it_is_measured_every_so_many_steps_and_resumes_the_same(make_trainer, images, tmp_path):
    whole = make_trainer(tmp_path / "whole", images)
    whole.run(progress=False)
    lines = lines_of(tmp_path / "whole")
    assert ["validation_loss" in line for line in lines] == [False, True, False, True]
    assert lines[3]["validation_loss"] == whole.validation_losses()["validation_loss"]
    assert len(lines[3]["validation_loss_parts"]) == 4

    stopped = make_trainer(tmp_path / "parts", images)
    options = stopped.options
    stopped.options = dataclasses.replace(options, steps=2)
    stopped.learning_rate = whole.learning_rate
    stopped.run(progress=False)
    resumed = Trainer.resume(tmp_path / "parts", images, options, validation=images)
    resumed.run(progress=False)
    assert lines_of(tmp_path / "parts") == lines


def test_without_images_or_without_steps_there_is_none(make_trainer, images, tmp_path):
    make_trainer(tmp_path / "a").run(progress=False)
    make_trainer(tmp_path / "b", images, validate_every=0).run(progress=False)
    assert not any("validation_loss" in line for out in "ab" for line in lines_of(tmp_path / out))
    with pytest.raises(ValueError, match="no images to validate with"):
        make_trainer().validation_losses()


def test_a_validation_without_memory_does_not_end_the_run(make_trainer, images):
    trainer = make_trainer(validation=images)

    def refused() -> dict[str, float]:
        raise MemoryError("Unable to allocate")

    trainer.validation_losses = refused
    with pytest.warns(UserWarning, match="no validation loss: not enough memory"):
        trainer.run(progress=False)
    assert trainer.finished_steps == 4


def test_images_must_be_like_the_data(make_trainer, images):
    with pytest.raises(InputError, match=r"must have the shape and classes .* got \(\(1"):
        make_trainer(validation=images.without_labels())


@pytest.mark.parametrize(("labelled", "fraction", "chosen"), [
    (True, 0.5, [2, 3, 6, 7, 10, 11]),  # each class's second, fourth and sixth
    (True, 0.3, [4, 5, 10, 11]),
    (False, 0.25, [3, 7, 11]),
])  # fmt: skip
def test_held_out_images(labelled, fraction, chosen, images):
    whole = images if labelled else images.without_labels()
    rest, held_out = hold_out(whole, fraction)
    assert torch.equal(held_out.images, whole.images[chosen])
    assert torch.equal(rest.images, whole.images[[i for i in range(12) if i not in chosen]])
    assert (held_out.labels is not None) == labelled
    assert held_out.classes == whole.classes


def test_a_share_that_cannot_be_held_out(images):
    for fraction in (0.0, 0.6, -1.0, float("nan")):
        with pytest.raises(InputError, match=r"must lie in \(0, 0.5\], got"):
            hold_out(images, fraction)
    with pytest.raises(DataError, match="to hold out one of 10, there are too few images in any"):
        hold_out(images, 0.1)
    with pytest.raises(DataError, match=r"one of 20, there are too few images$"):
        hold_out(images.without_labels(), 0.05)


def test_two_timesteps_are_enough(images, tiny_unet):
    """The least schedule that a run may have."""
    objective = objectives.make(None, NoiseSchedule(torch.tensor([0.5, 0.9])), "v")
    loss, _ = ValidationLoss(objective, images, batch_size=64)(tiny_unet(num_classes=2))
    assert loss > 0
