"""Public objects can be copied and pickled, also for a machine that lacks their device."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import fastdiff
from fastdiff import guidance, losses, nn, objectives, samplers, schedules, sde
from fastdiff.checkpoints.classifier_checkpoint import Accuracy, Architecture, Classifier
from fastdiff.training.trainer import TrainingOptions

ARCHITECTURE = Architecture(8, 1, widths=(8, 16), layers_per_block=1, attention=(1,))
HOW = {"deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value))}
SDES = (sde.VP, sde.SubVP, sde.VE, sde.EDM, sde.Straight)


def unit_score(x, t):
    return -x


def energy(x, t):
    return -x.square().flatten(1).sum(1)


@pytest.fixture(params=HOW.values(), ids=HOW)
def copied(request):
    """What makes a copy."""
    return request.param


def paths():
    yield schedules.cosine(100)
    yield schedules.make("linear", 100, zero_terminal_snr=True)
    yield schedules.flow(100, 3.0)
    yield sde.discretize(sde.VP(), 100)


def same(first, second):
    """Whether two objects are the same in their type and in all that they were given."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    return type(first) is type(second) and repr(first) == repr(second)


@pytest.mark.parametrize("path", list(paths()), ids=repr)
def test_schedules(path, copied):
    twin = copied(path)
    assert repr(twin) == repr(path)
    assert torch.equal(twin.alpha_t, path.alpha_t)
    assert torch.equal(twin.snr, path.snr)


@pytest.mark.parametrize("name", samplers.names())
def test_samplers_and_their_tables(name, copied):
    sampler = samplers.make(name, schedules.cosine(100), 4)
    twin = copied(sampler)
    assert torch.equal(twin.table.values, sampler.table.values)
    assert torch.equal(copied(sampler.table).values, sampler.table.values)


@pytest.mark.parametrize("kind", SDES)
def test_processes_and_solvers(kind, copied):
    process, t = kind(), torch.tensor([0.5], dtype=torch.float64)
    for twin, level in zip(copied(process).levels(t), process.levels(t), strict=True):
        assert torch.equal(twin, level)
    for name in ("ode", "euler-maruyama"):
        solver = sde.Solver(process, name)
        assert repr(copied(solver)) == repr(solver)


def test_the_view_of_a_schedule_in_continuous_time(copied):
    view, t = sde.Interpolated(schedules.cosine(100)), torch.tensor([0.5], dtype=torch.float64)
    view._on(torch.device("meta"))
    assert torch.equal(copied(view).levels(t)[0], view.levels(t)[0])


def test_what_was_made_for_a_device_stays_behind(copied):
    device = torch.device("meta"), torch.float32
    schedule = schedules.cosine(100)
    schedule.coefficients(*device)
    table = samplers.make("ddim", schedule, 4).table
    table.on(*device)
    path = sde.discretize(sde.VP(), 100)
    path.time(torch.zeros(1, device="meta"))
    for kept in (schedule._coefficients, table._copies, path._lambdas):
        assert len(kept) == 1
    for twin in (copied(schedule)._coefficients, copied(table)._copies, copied(path)._lambdas):
        assert len(twin) == 0


def test_scores_and_guided_scores(tiny_unet, copied):
    x, t = torch.randn(2, 1, 8, 8), torch.full((2,), 0.5, dtype=torch.float64)
    network = tiny_unet()
    score = sde.score_fn(network, "eps", sde.VP())
    raw = sde.score_fn(network, "edm", sde.EDM())
    guided = guidance.guided_score(unit_score, energy, 2.0)
    for found in (score, raw, guided, sde.prediction_fn(unit_score, "x0", sde.VP())):
        assert torch.equal(copied(found)(x, t), found(x, t))
    model = guidance.classifier_guided(unit_score, energy, schedules.cosine(100), kind="score")
    times = torch.tensor([3, 60])
    assert torch.equal(copied(model)(x, times), model(x, times))
    classifier = ARCHITECTURE.make(3).eval()
    log_prob = guidance.log_prob_of(classifier)
    labels = torch.tensor([0, 2])
    assert torch.equal(copied(log_prob)(x, t, labels), log_prob(x, t, labels))


OBJECTIVES = {
    "ddpm": (schedules.cosine, "eps"), "hybrid": (schedules.cosine, "eps"),
    "vlb": (schedules.cosine, "eps"), "flow": (schedules.flow, "flow"), "dsm": (sde.VP, "eps"),
    "ncsn": (sde.VE, "ncsn"), "edm": (sde.EDM, "edm"),
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(name, copied, tiny_unet):
    forward, prediction = OBJECTIVES[name]
    objective = objectives.make(name, forward(), prediction)
    twin = copied(objective)
    model = tiny_unet(learned_variance=objective.learned)
    x0, noise = torch.randn(2, 2, 1, 8, 8)
    t, _ = objective.draw(2, torch.Generator().manual_seed(0))
    assert torch.equal(twin.losses(model, x0, t, noise), objective.losses(model, x0, t, noise))


def test_networks_and_what_holds_them(tiny_unet, copied):
    model, x = tiny_unet(), torch.randn(1, 1, 8, 8)
    twin = copied(fastdiff.Diffusion(model, schedules.cosine(100), prediction="v"))
    assert twin.model is not model
    assert torch.equal(twin.model(x, 3), model(x, 3))
    on_path, _ = sde.on_path(model, "eps", sde.discretize(sde.VP(), 100))
    t = torch.tensor([3.0])
    assert torch.equal(copied(on_path)(x, t), on_path(x, t))
    assert same(copied(model.config), model.config)
    with torch.no_grad():
        found = copied(
            tiny_unet(num_classes=3).precompute(torch.arange(4), torch.tensor([1, 2]), 2)
        )
    assert found.rows.shape[:2] == (4, 2)


def test_a_classifier(copied):
    model = ARCHITECTURE.make(3).eval()
    found = Classifier(model, ARCHITECTURE, schedules.cosine(100), ("a", "b", "c"))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 5])
    assert torch.equal(copied(found).model(x, t), model(x, t))
    assert same(copied(ARCHITECTURE), ARCHITECTURE)


def test_a_compiled_model(copied, tiny_unet):
    """The copy's weights are its own."""
    model, x = tiny_unet(), torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        compiled = torch.compile(model, backend="fastdiff")
        y = compiled(x, 3)
        twin = copied(compiled)
        torch.testing.assert_close(twin(x, 3), y)
        for weight in twin.parameters():
            weight.mul_(1.5)
        torch.testing.assert_close(twin(x, 3), twin._orig_mod(x, 3), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(compiled(x, 3), y)


OTHERS = {
    "options of a run": TrainingOptions(),
    "accuracy": Accuracy(0.8, 0.6, 0.9),
    "uniform times": losses.Uniform(10),
    "times by their losses": losses.LossSecondMoment(10),
    "norm": nn.GroupNormSiLU(2, 4, 1e-5),
}


@pytest.mark.parametrize("value", OTHERS.values(), ids=OTHERS)
def test_options_and_the_like(value, copied):
    twin = copied(value)
    assert type(twin) is type(value)
    assert twin.__dict__.keys() == value.__dict__.keys()
