"""``add_noise``, ``get_velocity``, ``scale_noise`` and ``scale_model_input`` beside diffusers'."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

diffusers = pytest.importorskip("diffusers")

from fastdiff import diffusers as ours  # noqa: E402

ALPHAS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "LCMScheduler", "TCDScheduler")
SIGMAS = (
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler", "LMSDiscreteScheduler", "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
)  # fmt: skip
ANGLES = (
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
)  # fmt: skip
FLOW = "FlowMatchEulerDiscreteScheduler"
LEVELS = (*SIGMAS, *ANGLES, FLOW)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


def pair(name, **options):
    """The scheduler of fastdiff and that of diffusers."""
    return getattr(ours, name)(**options), getattr(diffusers, name)(**options)


def images(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(shape))
    x, noise = torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return x, noise


def noised(scheduler, x, noise, t):
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(x, t, noise)
    return scheduler.add_noise(x, noise, t)


def outcome(scheduler, *arguments):
    """The noised images, or the error."""
    try:
        return noised(scheduler, *arguments)
    except Exception as error:
        return error


def largest(x):
    """The largest magnitude, NaN if there is one, 0 of an empty tensor."""
    return torch.cat([x.double().abs().flatten(), torch.zeros(1, dtype=torch.float64)]).max().item()


def assert_same(result, wanted, scale=1.0):
    """Equal but for the rounding of each factor, product and sum."""
    assert (result.dtype, result.shape) == (wanted.dtype, wanted.shape)
    bound = 4 * EPS.get(wanted.dtype, 0.0) * scale * max(1.0, largest(wanted))
    assert largest(result.double() - wanted.double()) <= bound


class Calls(TorchDispatchMode):
    """Counts the operations that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **kwargs or {})


def calls(function, *args):
    with Calls() as counted:
        function(*args)
    return counted.names


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALPHAS)
def test_rows_of_alphas_cumprod(name, dtype) -> None:
    mine, stock = pair(name, num_train_timesteps=100)
    x, noise = images(4, 3, 5, 7, dtype=dtype)
    t = torch.tensor([0, 1, 50, 99])
    assert_same(mine.add_noise(x, noise, t), stock.add_noise(x, noise, t))
    assert_same(mine.add_noise(x, noise, t[2:3]), stock.add_noise(x, noise, t[2:3]))
    if hasattr(stock, "get_velocity"):
        assert_same(mine.get_velocity(x, noise, t), stock.get_velocity(x, noise, t))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [None, 7], ids=["in training", "before a run"])
@pytest.mark.parametrize("name", LEVELS)
def test_timesteps_looked_up_in_the_schedule(name, steps, dtype) -> None:
    mine, stock = pair(name, num_train_timesteps=100)
    if steps is not None:
        mine.set_timesteps(steps)
        stock.set_timesteps(steps)
    x, noise = images(3, 2, 4, 4, dtype=dtype)
    t = stock.timesteps[[0, -1, 3]]
    wanted = noised(stock, x, noise, t)
    scale = stock.sigmas.max().item() if name in SIGMAS else 1.0
    assert_same(noised(mine, x, noise, t), wanted, scale=min(scale, 100))
    assert_same(noised(mine, x, noise, t[:1]), noised(stock, x, noise, t[:1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LEVELS)
def test_one_level_for_all_images_in_a_run(name, dtype) -> None:
    mine, stock = pair(name, num_train_timesteps=100)
    x, noise = images(3, 2, 4, 4, dtype=dtype)
    for scheduler in (mine, stock):
        scheduler.set_timesteps(10)
        scheduler.set_begin_index(3)
    t = stock.timesteps[3:4]
    assert_same(noised(mine, x, noise, t), noised(stock, x, noise, t))
    assert_same(noised(mine, x, noise, t.expand(3)), noised(stock, x, noise, t.expand(3)))
    for scheduler in (mine, stock):
        scheduler._step_index = 5
    assert_same(noised(mine, x, noise, t), noised(stock, x, noise, t))


def test_variance_exploding_timesteps() -> None:
    mine, stock = pair("ScoreSdeVeScheduler", num_train_timesteps=50)
    x, noise = images(3, 2, 4, 4)
    t = torch.tensor([0, 20, 49])
    assert_same(mine.add_noise(x, noise, t), stock.add_noise(x, noise, t))
    torch.manual_seed(0)
    drawn = mine.add_noise(x, None, t)
    torch.manual_seed(0)
    assert_same(drawn, stock.add_noise(x, None, t))
    half = x.bfloat16(), noise.bfloat16(), t  # the levels are float32, and so is the result
    assert_same(mine.add_noise(*half), stock.add_noise(*half))


def test_velocity_of_the_euler_scheduler() -> None:
    mine, stock = pair("EulerDiscreteScheduler", num_train_timesteps=100)
    x, noise = images(3, 2, 4, 4)
    t = stock.timesteps[[0, 50, 99]]
    assert_same(mine.get_velocity(x, noise, t), stock.get_velocity(x, noise, t))
    with pytest.raises(ValueError, match="integer indices"):
        mine.get_velocity(x, noise, torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerDiscreteScheduler", FLOW])
def test_images_of_other_dimensions_and_layouts(name) -> None:
    mine, stock = pair(name, num_train_timesteps=100)
    for shape in ((3,), (3, 5), (3, 2, 2, 4, 4), (0, 2, 4, 4)):
        x, noise = images(*shape)
        t = stock.timesteps[:3] if x.shape[0] else stock.timesteps[:0]
        if x.shape[0] or name == "DDPMScheduler":  # diffusers cannot index by an empty list
            assert_same(noised(mine, x, noise, t), noised(stock, x, noise, t))
    x, noise = images(2, 3, 8, 8)
    x = x.to(memory_format=torch.channels_last)
    result = noised(mine, x, noise, stock.timesteps[:2])
    assert_same(result, noised(stock, x, noise, stock.timesteps[:2]))
    assert result.stride() == noised(stock, x, noise, stock.timesteps[:2]).stride()


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerDiscreteScheduler", FLOW])
def test_odd_arguments_do_what_they_did(name) -> None:
    """Other dtypes, batches that broadcast, timesteps without a dimension or from the end."""
    mine, stock = pair(name, num_train_timesteps=100)
    x, noise = images(3, 2, 4, 4)
    t = stock.timesteps[:3]
    odd = [
        (x, noise.double(), t), (x.half(), noise, t), (x[:1], noise[:1], t), (x, noise[:1], t),
        (x, noise, t[:2]), (x, noise, t[0]), (x, noise, t.int()), (x, noise, t + 1000),
        (x, noise, -t), (x, noise, t.float() + 0.5), (x, noise, 5), (x.long(), noise.long(), t),
        (x, noise, t[:, None]), (x.numpy(), noise, t),
    ]  # fmt: skip
    for arguments in odd:
        mine_did, stock_did = outcome(mine, *arguments), outcome(stock, *arguments)
        if isinstance(stock_did, Exception):
            assert (type(mine_did), str(mine_did)) == (type(stock_did), str(stock_did))
        else:
            assert_same(mine_did, stock_did)


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerDiscreteScheduler", FLOW])
def test_gradients(name) -> None:
    mine, stock = pair(name, num_train_timesteps=100)
    t = stock.timesteps[[20, 40]]
    gradients = []
    for scheduler in (mine, stock):
        x, noise = (value.requires_grad_() for value in images(2, 3, 4, 4))
        noised(scheduler, x, noise, t).square().sum().backward()
        gradients.append((x.grad, noise.grad))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_half_precision_without_strict_compatibility() -> None:
    """diffusers' bfloat16 rounds alphas_cumprod first: the least noise is then none at all."""
    stock = diffusers.DDPMScheduler()
    mine = ours.DDPMScheduler(strict_compat=False)
    x, noise = images(10, 1, 4, 4, dtype=torch.bfloat16)
    t = torch.arange(10)
    exact = stock.add_noise(x.double(), noise.double(), t)
    better = (mine.add_noise(x, noise, t).double() - exact).abs().max()
    assert better <= EPS[torch.bfloat16] * exact.abs().max()
    assert torch.equal(stock.add_noise(x, noise, t[:1]), x)
    assert not torch.equal(mine.add_noise(x, noise, t[:1]), x)


@pytest.mark.parametrize("name", [*ALPHAS, *LEVELS])
def test_a_new_schedule_or_a_changed_one_is_seen(name) -> None:
    mine, stock = pair(name, num_train_timesteps=100)
    x, noise = images(2, 1, 4, 4)
    t = torch.tensor([10, 30]) if name in ALPHAS else stock.timesteps[[10, 30]]
    noised(mine, x, noise, t)
    for scheduler in (mine, stock):
        if name in ALPHAS:
            scheduler.alphas_cumprod *= 0.5
        else:
            scheduler.sigmas *= 0.5
    assert_same(noised(mine, x, noise, t), noised(stock, x, noise, t))
    for scheduler in (mine, stock):
        scheduler.set_timesteps(5)
    t = stock.timesteps[[1, 3]]
    assert_same(noised(mine, x, noise, t), noised(stock, x, noise, t))
    for same in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert_same(noised(same, x, noise, t), noised(stock, x, noise, t))


@pytest.mark.parametrize("name", SIGMAS)
def test_scaled_inputs_over_a_run(name) -> None:
    mine, stock = pair(name, num_train_timesteps=100)
    x, output = images(2, 3, 4, 4)
    for scheduler in (mine, stock):
        scheduler.set_timesteps(4)
    for t in stock.timesteps:
        scaled = mine.scale_model_input(x, t), stock.scale_model_input(x, t)
        assert torch.equal(*scaled)
        if (single := calls(mine.scale_model_input, x, t)) != ["div.Tensor"]:
            assert single == ["mul.Tensor"]
        mine.step(output, t, x)
        stock.step(output, t, x)


def test_few_operations_and_no_reading_of_the_timesteps() -> None:
    """Reading a value on the host would wait for an accelerator."""
    x, noise = images(4, 3, 8, 8)
    for name in (*ALPHAS, *LEVELS):
        scheduler = getattr(ours, name)(num_train_timesteps=100)
        t = torch.arange(4) if name in ALPHAS else scheduler.timesteps[:4]
        noised(scheduler, x, noise, t)  # makes the tables
        names = calls(noised, scheduler, x, noise, t)
        assert len(names) <= (4 if name in ALPHAS else 10), names
        if name not in ALPHAS:
            scheduler.set_begin_index(2)
            noised(scheduler, x, noise, t[:1])
            names = calls(noised, scheduler, x, noise, t[:1])
            assert len(names) <= 3, names
            assert "_local_scalar_dense.default" not in names


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerDiscreteScheduler"])
def test_under_torch_compile(name) -> None:
    mine, stock = pair(name, num_train_timesteps=100)
    x, noise = images(2, 3, 4, 4)
    t = stock.timesteps[[3, 7]]
    compiled = torch.compile(lambda *args: noised(mine, *args), backend="eager")
    torch.testing.assert_close(compiled(x, noise, t), noised(stock, x, noise, t))
    if name == "EulerDiscreteScheduler":
        mine.set_timesteps(5)
        scaled = torch.compile(mine.scale_model_input, backend="eager")(x, mine.timesteps[0])
        stock.set_timesteps(5)
        torch.testing.assert_close(scaled, stock.scale_model_input(x, stock.timesteps[0]))
