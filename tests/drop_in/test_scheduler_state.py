"""What a scheduler keeps and refuses is diffusers' own, also in the middle of a run on a table."""

from __future__ import annotations

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from diffusers.utils import logging
from scheduler_runs import SHAPE, assert_same, assert_same_attributes, pair, run
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff.diffusers
from fastdiff.diffusers import table_stepping
from fastdiff.diffusers.unit_vectors import holds

SCHEDULERS = [name for name in fastdiff.diffusers.__all__ if name.endswith("Scheduler")]
WITH_STATE = (
    "PNDMScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
    "DPMSolverSinglestepScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
    "DEISMultistepScheduler", "EDMDPMSolverMultistepScheduler",
)  # fmt: skip


def is_image(value) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == SHAPE


class Walk:
    """Steps of ours and of diffusers' scheduler with the same tensors."""

    def __init__(self, name, steps=10, **config) -> None:
        self.both = pair(name, **config)
        self.step_name = "step_pred" if name == "ScoreSdeVeScheduler" else "step"
        self.numbers = torch.Generator().manual_seed(3)
        for one in self.both:
            one.set_timesteps(steps)
            if name == "ScoreSdeVeScheduler":
                one.set_sigmas(steps)
        self.times = list(self.both[0].timesteps)
        self.taken = 0

    def random(self, *shape, dtype=torch.float32):
        return torch.randn(shape or SHAPE, generator=self.numbers, dtype=dtype)

    def step(self, x=None, output=None, **options):
        """One step of both from new random tensors; its results are equal."""
        x = self.random() if x is None else x
        output = self.random() if output is None else output
        made = []
        for one in self.both:
            t = one.timesteps[self.taken]
            if hasattr(one, "scale_model_input"):
                one.scale_model_input(x, t)
            torch.manual_seed(0)
            step = getattr(one, self.step_name)
            made.append(step(output, t, x, return_dict=False, **options))
        self.taken += 1
        for mine, theirs in zip(*made, strict=True):
            assert mine.dtype == theirs.dtype
            tolerance = 128 * torch.finfo(mine.dtype).eps  # x0 is a difference of large values
            assert mine.requires_grad == theirs.requires_grad
            size = max(float(theirs.detach().abs().max()), 1)
            torch.testing.assert_close(mine, theirs, atol=tolerance * size, rtol=0)
        return made[0][0]

    def same_attributes(self) -> None:
        assert_same_attributes(*self.both, bound=1e-3)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_kept_tensors_can_be_read_after_every_step(name) -> None:
    walk = Walk(name)
    for _ in range(6):
        walk.step()
        walk.same_attributes()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_samples_may_come_from_elsewhere(name) -> None:
    """As in inpainting, where the known part of the sample is put back after each step."""
    walk = Walk(name)
    for _ in range(10):
        walk.step()
    walk.same_attributes()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_other_inputs_in_the_middle_of_a_run(name) -> None:
    """A strided view, and a step with gradients; the run goes on after them."""
    walk = Walk(name)
    for _ in range(3):
        walk.step()
    walk.step(walk.random(*SHAPE).transpose(2, 3).contiguous().transpose(2, 3))
    walk.step()
    walk.step(walk.random().requires_grad_(), walk.random().requires_grad_())
    with torch.no_grad():
        walk.step()
        walk.step()
        walk.same_attributes()


@pytest.mark.parametrize("name", WITH_STATE)
def test_assigning_what_is_kept(name) -> None:
    walk = Walk(name)
    for _ in range(4):
        walk.step()
    kept = [name for name, value in walk.both[1].__dict__.items() if holds(value, is_image)]
    for attribute in kept:
        old = getattr(walk.both[1], attribute)
        new = (
            [None if v is None else walk.random() for v in old]
            if isinstance(old, list)
            else walk.random()
        )
        for one in walk.both:
            setattr(one, attribute, copy.copy(new))
    for _ in range(4):
        walk.step()
    walk.same_attributes()


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_kept_tensors_that_are_given_at_the_start(steps) -> None:
    """Also those that no step reads, because the run is shorter."""
    for name in ("DEISMultistepScheduler", "UniPCMultistepScheduler", "PNDMScheduler"):
        walk = (
            Walk(name, steps=steps + 3, solver_order=3) if name[0] != "P" else Walk(name, steps=7)
        )
        for one in walk.both:
            attribute = "ets" if name[0] == "P" else "model_outputs"
            setattr(one, attribute, [torch.full(SHAPE, value) for value in (0.1, 0.2, 0.3)])
        for _ in range(steps):
            walk.step()
        walk.same_attributes()


@pytest.mark.parametrize("name", WITH_STATE)
@pytest.mark.parametrize("through", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_go_on_with_the_run(name, through) -> None:
    walk = Walk(name)
    for _ in range(3):
        walk.step()
    walk.both = tuple(map(through, walk.both))
    for _ in range(4):
        walk.step()
    walk.same_attributes()


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_grid_that_changes_in_the_middle(name) -> None:
    walk = Walk(name)
    for _ in range(3):
        walk.step()
    for one in walk.both:
        one.sigmas[4] *= 1.1
    walk.step()
    for one in walk.both:
        one.sigmas = one.sigmas * 0.9
    walk.step()
    for one in walk.both:
        one.register_to_config(prediction_type="v_prediction")
    walk.step()


def test_a_time_outside_the_grid() -> None:
    for name in ("DDPMScheduler", "DDIMScheduler"):
        ours, stock = pair(name)
        x, output = torch.randn(SHAPE), torch.randn(SHAPE)
        for one in (ours, stock):
            one.set_timesteps(10)
        for t in (900, torch.tensor(900), 3 if name == "DDIMScheduler" else 0):
            made = []
            for one in (ours, stock):
                torch.manual_seed(0)
                made.append(one.step(output, t, x).prev_sample)
            torch.testing.assert_close(*made, atol=1e-5, rtol=0)


def test_a_predictor_of_another_class_runs_without_a_table() -> None:
    results = []
    for module in (fastdiff.diffusers, diffusers):
        scheduler = module.UniPCMultistepScheduler(solver_p=module.DPMSolverMultistepScheduler())
        results.append(run(scheduler, steps=5))
    for mine, theirs in zip(*(one.steps for one in results), strict=True):
        torch.testing.assert_close(mine[0], theirs[0], atol=1e-4, rtol=1e-4)
    assert not results[0].scheduler._plans


@pytest.mark.parametrize("name", SCHEDULERS)
def test_plans_are_made_once(name, monkeypatch) -> None:
    made = []
    original = table_stepping.make_plan
    monkeypatch.setattr(
        table_stepping, "make_plan", lambda *given: made.append(original(*given)) or made[-1]
    )
    ours, _ = pair(name)
    for _ in range(4):
        run(ours, steps=5)
    assert len(made) <= 2  # some classes have an attribute more after their first run
    assert None not in made


def test_what_has_no_plan_is_traced_once(monkeypatch) -> None:
    made = []
    monkeypatch.setattr(table_stepping, "make_plan", lambda *given: made.append(given))
    ours, _ = pair("DEISMultistepScheduler")
    for _ in range(2):
        run(ours, steps=6)
    assert len(made) == 1


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_step_is_at_most_four_calls(name) -> None:
    walk = Walk(name, steps=16)
    ours = walk.both[0]
    for count, t in enumerate(ours.timesteps[:16]):
        x, output = walk.random(), walk.random()
        if hasattr(ours, "scale_model_input"):
            ours.scale_model_input(x, t)
        with _Calls() as calls:
            getattr(ours, walk.step_name)(output, t, x, return_dict=False)
        if count:
            assert len(calls.names) <= 4, calls.names
            assert not any("local_scalar" in call for call in calls.names)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_signatures_are_those_of_diffusers(name) -> None:
    ours, stock = getattr(fastdiff.diffusers, name), getattr(diffusers, name)
    for method in ("step", "step_pred", "step_correct", "set_timesteps", "scale_model_input"):
        if hasattr(stock, method):
            mine = inspect.signature(getattr(ours, method)).parameters.values()
            theirs = inspect.signature(getattr(stock, method)).parameters.values()
            assert [(p.name, p.default, p.kind) for p in mine] == [
                (p.name, p.default, p.kind) for p in theirs
            ]
    parameters = dict(inspect.signature(ours.__init__).parameters)
    assert parameters.pop("strict_compat").default is True
    assert parameters == dict(inspect.signature(stock.__init__).parameters)


def values(scheduler):
    """A configuration without the notes that files do not have, or have alone."""
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_configurations_go_both_ways(name, tmp_path) -> None:
    ours, stock = getattr(fastdiff.diffusers, name), getattr(diffusers, name)
    assert issubclass(ours, stock)
    made = ours()
    assert dict(made.config) == dict(stock().config)
    made.save_pretrained(tmp_path)
    assert values(stock.from_pretrained(tmp_path)) == values(made)
    stock().save_pretrained(tmp_path)
    assert values(ours.from_pretrained(tmp_path)) == values(made)
    assert type(stock.from_config(made.config)) is stock
    assert set(made.compatibles) == set(stock().compatibles)
    better = ours(strict_compat=False)
    assert ours.from_config(better.config).strict_compat is False
    better.save_pretrained(tmp_path)
    assert ours.from_pretrained(tmp_path).strict_compat is False
    assert ours.from_config(better.config, strict_compat=True).strict_compat is True
    stock.from_pretrained(tmp_path)


def test_a_saved_pipeline_is_one_of_diffusers(tmp_path) -> None:
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 8), norm_num_groups=4,
        layers_per_block=1, down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    # not an argument: this pipeline makes a scheduler of its own from the one that it is given
    pipe.scheduler = fastdiff.diffusers.DDIMScheduler()
    pipe.save_pretrained(tmp_path)
    assert '"diffusers",\n    "DDIMScheduler"' in (tmp_path / "model_index.json").read_text()
    loaded = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is diffusers.DDIMScheduler
    ours = fastdiff.diffusers.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path, scheduler=ours)
    assert again.scheduler is ours
    again = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    again.scheduler = ours
    images = [
        p(
            generator=torch.Generator().manual_seed(0), num_inference_steps=4, output_type="np"
        ).images
        for p in (loaded, again)
    ]
    np.testing.assert_allclose(*images, atol=1e-5)


def test_errors_and_warnings_are_those_of_diffusers() -> None:
    x, output = torch.randn(SHAPE), torch.randn(SHAPE)
    euler = fastdiff.diffusers.EulerDiscreteScheduler()
    euler.set_timesteps(5)
    with pytest.raises(ValueError, match="integer indices"):
        euler.step(output, 3, x)
    with pytest.raises(ValueError, match="Number of inference steps is 'None'"):
        fastdiff.diffusers.DDIMScheduler().step(output, 3, x)
    for kind in SCHEDULERS:
        ours, stock = pair(kind)
        for one in (ours, stock):
            with pytest.raises((TypeError, AttributeError)):
                one.step_nonsense(output)
    heun, _ = pair("HeunDiscreteScheduler", prediction_type="nonsense")
    heun.set_timesteps(5)
    with pytest.raises(ValueError, match="nonsense"):
        heun.step(output, heun.timesteps[0], x)


def test_a_run_that_goes_past_its_end() -> None:
    ours, stock = pair("EulerDiscreteScheduler")
    for one in (ours, stock):
        result = run(one, steps=3)
        with pytest.raises(IndexError):
            one.step(torch.randn(SHAPE), one.timesteps[-1], torch.randn(SHAPE))
        assert len(result.steps) == 3


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_a_kept_sample_is_the_sample_itself(name) -> None:
    results = []
    for one in pair(name):
        one.set_timesteps(4)
        numbers = torch.Generator().manual_seed(0)
        for t in one.timesteps[:2]:
            x, output = (torch.randn(SHAPE, generator=numbers) for _ in range(2))
            one.scale_model_input(x, t)
            made = one.step(output, t, x).prev_sample
            x.mul_(1.5)  # seen by the second step too, which starts from it
        results.append(made)
        one.step(output, one.timesteps[2], x)
        assert one.sample is x
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_without_scaled_input_diffusers_warns(caplog) -> None:
    counts = []
    logging.enable_propagation()
    try:
        for one in pair("EulerDiscreteScheduler"):
            one.set_timesteps(4)
            caplog.clear()
            with caplog.at_level("WARNING"):
                for t in one.timesteps[:2]:
                    one.step(torch.randn(SHAPE), t, torch.randn(SHAPE))
            counts.append(caplog.text.count("scale_model_input"))
    finally:
        logging.disable_propagation()
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_a_generator_for_each_image(name) -> None:
    results = []
    for one in pair(name):
        generators = [torch.Generator().manual_seed(j) for j in range(SHAPE[0])]
        results.append(run(one, options={"generator": generators}))
    exact = [torch.Generator().manual_seed(j) for j in range(SHAPE[0])]
    stock = pair(name)[1]
    assert_same(*results, run(stock, exactly=True, options={"generator": exact}))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDIMScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_noise_that_is_given(name, config) -> None:
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    options = {"variance_noise": noise, "generator": None}
    if name == "DDIMScheduler":
        options["eta"] = 0.7
    exact = run(pair(name, **config)[1], exactly=True, options=options)
    assert_same(*(run(one, options=options) for one in pair(name, **config)), exact)
    if name == "DDIMScheduler":
        ours, _ = pair(name)
        with pytest.raises(ValueError, match="Cannot pass both generator and variance_noise"):
            run(ours, options={**options, "generator": torch.Generator()})


def test_no_step_compiles_again_with_a_generator() -> None:
    ours, stock = pair("EulerAncestralDiscreteScheduler")
    count = 0

    def counting(graph, inputs):
        nonlocal count
        count += 1
        return graph.forward

    results = []
    for one in (stock, ours):
        one.set_timesteps(12)
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))

        noise = torch.Generator().manual_seed(1)

        def step(x, t, one=one, noise=noise):
            return one.step(x.tanh(), t, x, noise, return_dict=False)[0].mul(0.5)

        if one is ours:
            step = torch.compile(step, backend=counting)
        for t in one.timesteps:
            one.is_scale_input_called = True
            x = step(x, t)
        results.append(x)
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
    assert count == 2  # before the step and after it
