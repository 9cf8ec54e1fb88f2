"""What the tests of the schedulers share: runs of a class and of diffusers' own, side by side."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fastdiff.diffusers

SHAPE = (2, 4, 16, 12)
IN_FLOAT32 = (  # in which diffusers computes whatever dtype the images have
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "EDMEulerScheduler",
    "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler", "ScoreSdeVeScheduler",
)  # fmt: skip


class Result(NamedTuple):
    """What a run has made: each step's results, and what is then in the scheduler."""

    steps: list[tuple[Tensor, ...]]
    scheduler: Any
    drawn: Tensor  # the generator's state


def pair(name: str, **config: Any) -> tuple[Any, Any]:
    """Our scheduler and diffusers' own, of one configuration."""
    return getattr(fastdiff.diffusers, name)(**config), getattr(diffusers, name)(**config)


def run(
    scheduler: Any,
    *,
    steps: int = 7,
    dtype: torch.dtype = torch.float32,
    exactly: bool = False,
    shape: tuple[int, ...] = SHAPE,
    channels: int | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    timing: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    begin: int | None = None,
    start: int = 0,
    stop: int | None = None,
) -> Result:
    """Step from random images with the same random outputs of a model in every call.

    Args:
        scheduler: of either kind.
        steps: the number of steps.
        dtype, shape, memory_format: of the images.
        exactly: compute in float64, with the values that the inputs and noise have in ``dtype``.
        channels: of the model's output, if other than the images'.
        timing: arguments of ``set_timesteps`` in place of ``steps``.
        options: arguments of ``step``.
        begin: ``set_begin_index``, as pipelines do for images that are given.
        start, stop: the steps to take, all by default.
    """
    numbers = torch.Generator().manual_seed(1)
    noise = torch.Generator().manual_seed(2)
    options = dict(options or {})
    name = type(scheduler).__name__
    step = scheduler.step_pred if name == "ScoreSdeVeScheduler" else scheduler.step
    if "generator" in step.__code__.co_varnames:
        options.setdefault("generator", noise)
    scheduler.set_timesteps(**({"num_inference_steps": steps} if timing is None else timing))
    if name == "ScoreSdeVeScheduler":
        scheduler.set_sigmas(steps)
    if begin is not None:
        scheduler.set_begin_index(begin)
    x = torch.randn(shape, generator=numbers, dtype=torch.float64) * float(
        getattr(scheduler, "init_noise_sigma", 1.0)
    )
    wide = torch.float64 if exactly else dtype
    x = x.to(dtype, memory_format=memory_format).to(wide)
    out = list(shape)
    out[1] = channels or out[1]
    made = []
    for t in scheduler.timesteps[start:stop]:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        output = torch.randn(out, generator=numbers, dtype=torch.float64).to(
            dtype, memory_format=memory_format
        )
        with _Noise(dtype) if exactly else contextlib.nullcontext():
            made.append(step(output.to(wide), t, x, return_dict=False, **options))
        x = made[-1][0]
    return Result(made, scheduler, noise.get_state())


class _Noise(TorchFunctionMode):
    """Noise is drawn in a dtype and given in float64."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn and kwargs.get("dtype") is torch.float64:
            return func(*args, **{**kwargs, "dtype": self.dtype}).double()
        return func(*args, **kwargs)


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference; values that are not numbers have to be so in both."""
    one, other = one.double(), other.double()
    assert torch.equal(one.isnan(), other.isnan())
    return float((one - other).abs().nan_to_num().max())


def assert_same(ours: Result, stock: Result, exact: Result | None = None) -> None:
    """Results to the dtype's rounding, and afterwards equal schedulers and generators.

    Args:
        ours: our run.
        stock: that of diffusers' class.
        exact: that of diffusers' class on the same numbers in float64. Ours may be off by twice as
            much as ``stock``, and by a few roundings of the largest value. Without it ``ours`` and
            ``stock`` are in float64; most of diffusers' classes then compute in it.
    """
    assert len(ours.steps) == len(stock.steps)
    size = off = 0.0
    narrow = stock.steps[0][0].dtype
    if exact is None:
        in_float32 = type(stock.scheduler).__name__ in IN_FLOAT32
        rounding = 4 * torch.finfo(torch.float32).eps if in_float32 else 1e-12
    else:
        rounding = 4 * torch.finfo(narrow).eps
    for count, (mine, theirs) in enumerate(zip(ours.steps, stock.steps, strict=True)):
        assert len(mine) == len(theirs)
        wanted = theirs if exact is None else exact.steps[count]
        for one, other, true in zip(mine, theirs, wanted, strict=True):
            assert one.dtype == other.dtype, (one.dtype, other.dtype)
            assert one.shape == other.shape
            size = max(size, float(true.abs().nan_to_num().max()))
            off = max(off, distance(other, true))
            error = distance(one, true)
            bound = 2 * off + rounding * size * (1 + count / 8) ** 0.5  # roundings add up
            assert error <= bound, f"step {count}: {error:.2e} above {bound:.2e}"
    assert torch.equal(ours.drawn, stock.drawn)
    true = None if exact is None else exact.scheduler
    assert_same_attributes(ours.scheduler, stock.scheduler, 8 * rounding * size, true)


def assert_same_attributes(ours: Any, stock: Any, bound: float, exact: Any = None) -> None:
    """The attributes of both schedulers, kept tensors to a bound or twice the error of stock."""
    for name in stock.__dict__:
        values = [getattr(one, name) for one in (ours, stock, exact or stock)]
        mine, theirs, wanted = (one if isinstance(one, list) else [one] for one in values)
        assert len(mine) == len(theirs), name
        for one, other, true in zip(mine, theirs, wanted, strict=True):
            assert type(one) is type(other), name
            if isinstance(other, Tensor) and other.ndim >= 2:
                assert one.dtype == other.dtype, name
                size = float(other.abs().nan_to_num().max())
                allowed = 2 * distance(other, true) + 8 * torch.finfo(other.dtype).eps * size
                assert distance(one, true) <= bound + allowed, name
            elif isinstance(other, Tensor):
                assert torch.allclose(one, other, rtol=0, atol=0, equal_nan=True), name
