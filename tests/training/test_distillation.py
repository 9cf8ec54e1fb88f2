"""Students through the trainer: they learn, resume bit for bit, and find their teacher again."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

from fastdiff import ops, schedules, sde
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.common.errors import CheckpointError, DataError, InputError
from fastdiff.common.inputs import checked_seeds
from fastdiff.data.image_set import ImageSet
from fastdiff.losses.prediction import predict
from fastdiff.training import pairs
from fastdiff.training.distillation import Teacher, consistency_training, distillation
from fastdiff.training.trainer import Trainer, TrainingOptions

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = TrainingOptions(
    steps=6, batch_size=6, lr=1e-2, warmup=0, lr_schedule="constant", save_every=100,
    sample_every=0, ema=0.5, label_dropout=0.2,
)  # fmt: skip
PROCESSES = {
    "v": (schedules.cosine(32), "v"),
    "flow": (schedules.flow(32), "flow"),
    "edm": (sde.EDM(sigma_max=20.0), "edm"),
}
# Of each: the method, the teacher's process, options, and what draws from the student.
CASES = {
    "consistency of v": ("consistency", "v", {"intervals": (4, 8)}, ("consistency", 2)),
    "consistency of edm": ("consistency", "edm", {"intervals": (8, 8)}, ("consistency", 2)),
    "progressive": ("progressive", "v", {"few_steps": 4}, ("ddim", 4)),
    "progressive of flow": ("progressive", "flow", {"few_steps": 2}, ("ddim", 2)),
    "reflow": ("reflow", "flow", {"pairs": (5, 12)}, ("euler", 4)),
    "reflow of v": ("reflow", "v", {"pairs": (5, 12), "few_steps": 1}, ("euler", 1)),
}
CLASSES = ("a", "b", "c")


@pytest.fixture
def teacher(tiny_unet, tmp_path):
    """A function that writes an untrained teacher of a process, and reads it."""

    def make(process="v", folder="teacher", guidance=1.0, **changes):
        path = tmp_path / folder
        if not path.exists():
            forward, prediction = PROCESSES[process]
            source = Checkpoint(
                tiny_unet(num_classes=4), forward, prediction, classes=CLASSES, null_class=True,
                dataset="letters",
            )  # fmt: skip
            checkpoint.save(dataclasses.replace(source, **changes), path)
        return Teacher.read(path, guidance=guidance)

    return make


@pytest.fixture
def images(generator):
    pixels = torch.rand(9, 1, 8, 8, generator=generator) * 2 - 1
    return ImageSet(pixels, torch.arange(9) % 3, CLASSES, "letters")


@pytest.fixture
def make(teacher, images):
    """A function that makes a student's trainer by a name of ``CASES``."""

    def trainer(name, out=None, **changes):
        method, process, options, _ = CASES[name]
        taught = teacher(process)
        objective = distillation(method, taught, steps=6, **options)
        data = images
        if method == "reflow":
            data = pairs.make(taught, 12, seed=5, steps=4, progress=False)
        return Trainer(
            taught.student(method), objective.forward, data,
            dataclasses.replace(OPTIONS, **changes), prediction=objective.prediction,
            objective=objective, out=out,
        )  # fmt: skip

    return trainer


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_student_is_bit_for_bit_the_uninterrupted_one(name, make, tmp_path):
    whole = make(name)
    losses = [whole.step() for _ in range(6)]
    parts = make(name, tmp_path / "run")
    for _ in range(3):
        parts.step()
    parts.save()
    resumed = Trainer.resume(tmp_path / "run", parts.data)
    assert [resumed.step() for _ in range(3)] == losses[3:]
    ours, theirs = (x.model.state_dict() for x in (resumed, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", CASES)
def test_a_student_is_written_and_drawn_by_its_own_sampler(name, make, tmp_path):
    trainer = make(name, tmp_path / "run", steps=1, sample_every=1)
    trainer.run(progress=False)  # with a grid
    found = checkpoint.load(tmp_path / "run")
    method, _, _, (sampler, steps) = CASES[name]
    assert (found.objective, found.few_steps) == (method, steps)
    chosen = found.diffusion().sampler()
    assert (chosen.name, chosen.steps) == (sampler, steps)
    assert chosen.points[0].t == chosen.schedule.num_timesteps - 1
    drawn = found.generate(chosen, labels=[0, 2], progress=False)
    assert drawn.images.isfinite().all()
    assert drawn.evaluations.tolist() == [steps, steps]
    assert found.diffusion().sampler("ddim", 3).steps == 3  # others run, too


@pytest.mark.parametrize("name", ["consistency of v", "progressive", "reflow of v"])
def test_parts_of_a_batch_add_up_to_it(name, make):
    """The same pairs, noise and labels in micro-batches; bfloat16 runs."""
    whole, parts = make(name), make(name, accumulate=4)
    torch.testing.assert_close(parts.step(), whole.step(), rtol=1e-5, atol=1e-7)
    assert make(name, bf16=True).step() > 0


def test_a_student_begins_as_its_teacher_and_leaves_it_as_it_was(make, teacher):
    before = {k: v.clone() for k, v in teacher().trained.model.state_dict().items()}
    trainer = make("progressive")
    begun = trainer.network.state_dict()
    assert all(torch.equal(before[key], begun[key]) for key in before)
    trainer.step()
    taught = teacher().trained.model.state_dict()
    assert all(torch.equal(before[key], taught[key]) for key in before)
    assert not all(torch.equal(before[key], begun[key]) for key in before)


def test_a_student_comes_nearer_to_its_teacher(make):
    trainer = make("progressive", batch_size=16, lr=3e-3)
    found = [trainer.step() for _ in range(30)]
    assert sum(found[-6:]) < 0.7 * sum(found[:6])


def test_consistency_training_learns_and_doubles_its_intervals(tiny_unet, tmp_path):
    forward = PROCESSES["edm"][0]
    plain = ImageSet(torch.linspace(-0.8, 0.9, 64).view(1, 1, 8, 8), name="one")
    options = dataclasses.replace(OPTIONS, label_dropout=0.0, steps=280, batch_size=16, lr=3e-3)
    trainer = Trainer(
        tiny_unet(), forward, plain, options, prediction="edm", objective="consistency",
        out=tmp_path,
    )  # fmt: skip
    intervals = trainer.diffusion.objective.times
    assert [intervals.count(step) for step in (0, 39, 40, 279)] == [10, 10, 20, 640]
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def apart():
        """How far from the image one jump from noise leads, root mean square."""
        sampler = trainer.diffusion.sampler(None, 1)
        images = trainer.checkpoint().sample(sampler, count=4, noise=noise, progress=False)
        return float((images - plain.images).square().mean().sqrt())

    before = apart()
    for _ in range(39):
        trainer.step()
    assert apart() < 0.5 * before
    trainer.save()
    longer = dataclasses.replace(options, steps=560)  # the intervals stay as they were planned
    resumed = Trainer.resume(tmp_path, plain, longer)
    assert [resumed.step() for _ in "12"] == [trainer.step() for _ in "12"]
    assert resumed.diffusion.objective.times.count(41) == 20
    given = consistency_training(forward, "edm", 6, (2, 4))
    assert given.times.count(0) == 2
    weighted = dataclasses.replace(options, weighting="snr")
    with pytest.raises(InputError, match="takes no further options"):
        Trainer(tiny_unet(), forward, plain, weighted, prediction="edm", objective=given)
    with pytest.raises(InputError, match="the objective was made for edm of EDM"):
        Trainer(tiny_unet(), *(schedules.cosine(9), plain), objective=given)


def test_a_teacher_that_moved_is_found_where_it_is_said_to_be(make, teacher, tmp_path):
    trainer = make("progressive", tmp_path / "run")
    trainer.step()
    trainer.save()
    following = trainer.step()
    shutil.move(tmp_path / "teacher", tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"teacher is not at .*teacher: .*; say where it is"):
        Trainer.resume(tmp_path / "run", trainer.data)
    resumed = Trainer.resume(tmp_path / "run", trainer.data, teacher=tmp_path / "moved")
    assert resumed.step() == following
    teacher("v", "other", model=trainer.ema)
    with pytest.raises(CheckpointError, match=r"learns from another teacher than .*other: the SHA"):
        Trainer.resume(tmp_path / "run", trainer.data, teacher=tmp_path / "other")


def test_reflow_needs_its_teacher_no_more(make, tmp_path):
    trainer = make("reflow", tmp_path / "run")
    trainer.step()
    trainer.save()
    shutil.rmtree(tmp_path / "teacher")
    assert Trainer.resume(tmp_path / "run", trainer.data).step() == trainer.step()


def test_pairs_are_of_the_noise_that_the_loss_makes_again(make, teacher, tmp_path):
    """Image i is what the ODE makes of noise i, and the loss sees the line between them."""
    taught = teacher("flow")
    made = pairs.make(taught, 12, seed=5, steps=4, progress=False)
    seeds = checked_seeds(5, None, 12)
    noise = ops.philox_normal(seeds, 0, (12, 1, 8, 8))
    assert made.labels.tolist() == [0, 1, 2] * 4
    sampler = taught.trained.diffusion().sampler("unipc-2", 4)
    again = taught.trained.sample(sampler, labels=[1], noise=noise[7:8], progress=False)
    torch.testing.assert_close(again[0], made.images[7], rtol=1e-4, atol=1e-5)
    trainer = make("reflow")
    draws = trainer.draw(2)
    assert torch.equal(draws.seeds, seeds[draws.indices])
    batch, seen = trainer.batch(draws), []
    trainer.diffusion.objective.losses(
        lambda x, t: seen.append((x, t)) or x, batch.x0, batch.t, batch.noise
    )
    x_t, label = seen[0]
    share = label.double().view(-1, 1, 1, 1) / 32
    line = (1 - share) * batch.x0 + share * noise[draws.indices]
    torch.testing.assert_close(x_t, line.float(), rtol=1e-4, atol=1e-5)
    facts = {"count": 12}
    pairs.write(made, tmp_path / "pairs.safetensors", facts)
    found = pairs.read(tmp_path / "pairs.safetensors", facts)
    assert torch.equal(found.images, made.images)
    assert (found.classes, found.name) == (CLASSES, "letters")
    assert torch.equal(found.labels, made.labels)
    with pytest.raises(DataError, match=r"has pairs of {'count': 12}, wanted {'count': 13}"):
        pairs.read(tmp_path / "pairs.safetensors", {"count": 13})


def test_a_guided_teacher_teaches_what_guidance_gives(teacher, generator):
    plain, guided = teacher().network(), teacher(guidance=3.0).network()
    x = torch.randn(2, 1, 8, 8, generator=generator)
    t, labels = torch.tensor([5, 9]), torch.tensor([0, 2])
    without, wanted = (
        predict(plain, x, t, {"class_labels": kind})[0] for kind in (torch.tensor([3, 3]), labels)
    )
    expected = without + 3 * (wanted - without)
    torch.testing.assert_close(guided(x, t, labels), expected, rtol=1e-4, atol=1e-5)


def test_teachers_and_options_that_do_not_fit_are_refused(teacher, tiny_unet):
    taught = teacher()

    def made(method, taught=taught, **options):
        return distillation(method, taught, steps=5, **options)

    with pytest.raises(InputError, match="unknown method 'sd', wanted one of consistency"):
        made("sd")
    with pytest.raises(InputError, match="in how many steps the student is to draw"):
        made("progressive")
    with pytest.raises(InputError, match="intervals are for consistency, not for progressive"):
        made("progressive", few_steps=4, intervals=(4, 4))
    with pytest.raises(InputError, match="reflow trains on pairs, and no other"):
        made("reflow")
    with pytest.raises(InputError, match="reflow trains on pairs, and no other"):
        made("consistency", pairs=(0, 4))
    student = teacher(folder="student", objective="progressive", few_steps=8)
    assert made("progressive", student).few_steps == 4
    with pytest.raises(InputError, match="the teacher has 8 steps, and its student half of them"):
        made("progressive", student, few_steps=2)
    with pytest.raises(InputError, match="one of progressive has left"):
        made("consistency", student)
    jumps = teacher(folder="jumps", objective="consistency")
    with pytest.raises(InputError, match="wants a teacher of an ODE, got one of consistency"):
        made("progressive", jumps, few_steps=2)
    with pytest.raises(InputError, match="also predicts its variance"):
        teacher(
            folder="varied", model=tiny_unet(num_classes=4, learned_variance=True),
            prediction="eps", objective="hybrid",
        )  # fmt: skip
    with pytest.raises(InputError, match=r"guidance 2\.0 needs a teacher trained with label drop"):
        teacher(folder="plain", guidance=2.0, null_class=False, model=tiny_unet(num_classes=3))
