"""Which timesteps training for a few steps draws, and losses of networks that are already right."""

from __future__ import annotations

import pytest
import torch

from fastdiff import objectives, samplers, schedules, sde
from fastdiff.common.errors import InputError
from fastdiff.losses import (
    consistency_loss,
    ddim_jump,
    discretized_log_normal,
    few_steps,
    prediction_form,
)
from fastdiff.losses.few_steps import Consistency, FewSteps, Intervals, Progressive

COSINE, EDM = schedules.cosine(64), sde.EDM(sigma_max=20.0)
PROCESSES = {"cosine": (COSINE, "v"), "flow": (schedules.flow(64), "flow"), "edm": (EDM, "edm")}


def to_a_point(forward, prediction, point):
    """A network whose predicted x_0 is ``point`` at every level of noise."""
    if prediction == "edm":  # c_in, c_skip and c_out of arXiv:2206.00364, table 1

        def edm(x, label):
            sigma = torch.exp(4 * label.double()).view(-1, 1, 1, 1)
            c_in = (sigma**2 + 0.25).rsqrt()
            skip, out = 0.25 * c_in**2, 0.5 * sigma * c_in
            return ((point - skip * x / c_in) / out).to(x.dtype)

        return edm
    tables = forward.alpha_t, forward.sigma_t

    def network(x, label):
        t = label.long() if prediction == "v" else label.round().long() - 1
        alpha, sigma = (table[t].view(-1, 1, 1, 1) for table in tables)
        eps = (x - alpha * point) / sigma
        return alpha * eps - sigma * point if prediction == "v" else eps - point

    return network


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("taught", [False, True])
def test_a_network_that_jumps_to_the_only_image_has_no_loss(name, taught, generator):
    forward, prediction = PROCESSES[name]
    x0 = torch.full((6, 1, 2, 2), 0.3, dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    right, wrong = (to_a_point(forward, prediction, at) for at in (0.3, 0.1))
    plans = {"consistency": FewSteps(intervals=(8, 8), teacher=right if taught else None)}
    if taught:
        plans["progressive"] = FewSteps(4, right)
    for objective, plan in plans.items():
        made = objectives.make(objective, forward, prediction, plan=plan)
        t, weights = made.draw(6, generator)
        assert weights.tolist() == [1.0] * 6
        assert made.losses(right, x0, t, noise).abs().max() < 1e-5
        if objective == "progressive":  # SNR weights of at least 1
            assert (made.losses(wrong, x0, t, noise) > 0.03).all()
        else:  # it agrees with itself, unless an end is the image
            assert made.losses(wrong, x0, t, noise).isfinite().all()


def test_a_target_has_no_gradient(generator):
    scale = torch.tensor(0.5, requires_grad=True)
    graphs = []

    def model(x, label):
        graphs.append(torch.is_grad_enabled())
        return scale * x

    made = objectives.make("consistency", COSINE, "v", plan=FewSteps(intervals=(8, 8)))
    t, _ = made.draw(3, generator)
    noise = torch.randn(3, 1, 2, 2, generator=generator)
    made.losses(model, torch.zeros(3, 1, 2, 2), t, noise).sum().backward()
    assert graphs == [False, True]
    assert scale.grad.isfinite()


def test_intervals_are_drawn_by_their_probabilities(generator):
    grid = torch.tensor([0, 3, 10, 40])
    found = Intervals(grid, torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    pairs, _ = found.draw(40_000, generator)
    for pair, share in zip([[3, 0], [10, 3], [40, 10]], (0.125, 0.25, 0.625), strict=True):
        drawn = (pairs == torch.tensor(pair)).all(1).double().mean()
        assert abs(drawn - share) < 0.01  # four standard deviations
    at = found.quantiles(torch.tensor([0.0, 0.1, 0.2, 0.3, 0.5, 1.0], dtype=torch.float64))
    assert at[:, 0].tolist() == [3, 3, 10, 10, 40, 40]


def test_intervals_double_over_the_training():
    found = Consistency(COSINE, "v", FewSteps(steps=40, intervals=(4, 32)))
    assert [found.count(step) for step in (0, 9, 10, 20, 30, 39, 100)] == [4, 4, 8, 16, 32, 32, 32]
    assert found.count(None) == 32
    assert found.at(0).pairs.flatten().unique().tolist() == [0, 16, 32, 47, 63]


def test_edm_draws_log_normal_levels_and_divides_by_lengths(generator):
    found = Consistency(EDM, "edm", FewSteps(intervals=(8, 8)))
    grid = torch.cat([found.at(None).pairs[:1, 1], found.at(None).pairs[:, 0]])
    shares = found.at(None).edges.diff(prepend=torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(shares, discretized_log_normal(found.path, grid))
    x0, noise = (torch.randn(8, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in "ab")
    t = found.at(None).pairs
    taught = Consistency(EDM, "edm", FewSteps(intervals=(8, 8), teacher=lambda x, label: 0 * x))
    for one in (found, taught):
        one._teacher = None  # the same target, so that the weight alone differs
    model = lambda x, label: torch.tanh(x)  # noqa: E731
    ratio = found.path.sigma_t / found.path.alpha_t
    lengths = ratio[t[:, 0]] - ratio[t[:, 1]]
    _, of_output = prediction_form(found.path, found.kind)
    expected = taught.losses(model, x0, t, noise) * of_output[t[:, 0]].abs() / lengths
    torch.testing.assert_close(found.losses(model, x0, t, noise), expected)


@pytest.mark.parametrize("taught", [True, False])
def test_losses_count_in_units_of_the_network_s_output(taught, generator):
    """x0 = alpha x - sigma v: where there is little noise, an error of v hardly shows in x0."""
    x0, noise = (torch.randn(8, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in "ab")
    teacher = (lambda x, label: 0.1 * x) if taught else None
    student = lambda x, label: torch.tanh(x)  # noqa: E731
    made = Consistency(COSINE, "v", FewSteps(intervals=(8, 8), teacher=teacher))
    t, form = made.at(None).pairs, prediction_form(COSINE, "v")

    def step(x, t, s):
        return ddim_jump(COSINE, teacher, "v", x, t, s)

    plain = consistency_loss(
        COSINE, student, student, x0, *t.unbind(1), noise, form=form,
        teacher=step if taught else None,
    )  # fmt: skip
    expected = plain / COSINE.sigma_t[t[:, 0]]
    torch.testing.assert_close(made.losses(student, x0, t, noise), expected)


@pytest.mark.parametrize("total", [64, 50])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_steps_of_a_student_are_the_sampler_s_and_halve_into_its_teacher_s(total, steps):
    path = schedules.cosine(total)
    jumps = Progressive(path, "v", FewSteps(steps)).jumps.flip(0)

    def visited(count):
        sampler = samplers.make("ddim", path, count, prediction="v", grid="trailing")
        return [int(point.t) for point in sampler.points]

    assert [*jumps[:, 0].tolist(), int(jumps[-1, 2])] == visited(steps)
    assert sorted(jumps[:, :2].flatten().tolist(), reverse=True) == visited(2 * steps)[:-1]


def test_a_short_path_has_as_many_intervals_as_it_can():
    found = Consistency(COSINE, "v", FewSteps())
    assert (found.first, found.last) == (10, 40)
    found = Consistency(schedules.cosine(8), "v", FewSteps())
    assert (found.first, found.last) == (5, 5)


def test_what_does_not_fit_is_refused():
    def made(name, *plan, forward=COSINE, **options):
        return objectives.make(name, forward, "v", plan=FewSteps(*plan), **options)

    with pytest.raises(InputError, match="first times a power of two, got 4 and 12"):
        objectives.make("consistency", COSINE, "v", plan=FewSteps(intervals=(4, 12)))
    with pytest.raises(InputError, match="64 timesteps have fewer than 64 intervals"):
        objectives.make("consistency", COSINE, "v", plan=FewSteps(intervals=(64, 64)))
    with pytest.raises(InputError, match=r"in 1\.\.32, got 33"):
        made("progressive", 33)
    with pytest.raises(InputError, match="progressive has weights of its own, got 'snr'"):
        made("progressive", 4, weighting="snr")
    with pytest.raises(InputError, match="consistency has times of its own, got 'uniform'"):
        made("consistency", timesteps="uniform", forward=schedules.cosine())
    with pytest.raises(InputError, match="does not train a learned variance"):
        made("progressive", 4, variance="learned")
    with pytest.raises(InputError, match="the objective flow needs the process FlowSchedule"):
        made("reflow")
    taughtless = made("progressive", 4)
    t, _ = taughtless.draw(2)
    with pytest.raises(ValueError, match="needs a teacher"):
        taughtless.losses(lambda x, t: x, torch.zeros(2, 1, 2, 2), t, torch.zeros(2, 1, 2, 2))
    assert set(few_steps.FEW_STEPS) == set(few_steps.NAMES)
