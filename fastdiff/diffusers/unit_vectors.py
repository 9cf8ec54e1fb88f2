"""The linear maps that a diffusers scheduler's ``step`` computes, found by giving it unit vectors.

Every ``step`` is a linear combination of the sample, the model's output, noise and tensors kept
from earlier steps, with at most one clipping of the predicted x0 in the middle. So the step itself,
run in float64 on a batch whose images are the coordinates, returns its own coefficients: the
sample is (1, 0, 0, ...), the model's output (0, 1, 0, ...), and so on. The scalars inside, and with
them every option, grid and version of diffusers, are those that the step would use.

A last image of the batch holds random numbers in place of a unit vector. A map that is not linear
gives it another value than the combination of the others, and is then refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

X, M, Z, X0 = range(4)  # coordinates: sample, model's output, noise, x0 after its clipping
INPUTS = 4  # the kept tensors' coordinates follow
_LINEAR = 1e-9  # relative deviation from linearity that float64 explains
_CASTS = {Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.type}
_CLAMPS = {torch.clamp, Tensor.clamp, torch.clip, Tensor.clip}


class NotLinearError(Exception):
    """A step that is not linear in its tensors, or not with one clipping of x0."""


@dataclass(frozen=True)
class Clipping:
    """How a step limits x0.

    Attributes:
        x0: coefficients of the sample and of the model's output in the free x0.
        low, high: its limits; of dynamic thresholding (arXiv:2205.11487) ``high`` limits s.
        quantile: of dynamic thresholding, 0 for fixed limits.
    """

    x0: tuple[float, float]
    low: float
    high: float
    quantile: float = 0.0


@dataclass
class StepMap:
    """One step as linear maps. A vector has an entry for each coordinate.

    Attributes:
        outputs: the vectors of the tensors that the step returns.
        kept: the vectors of the tensors that the scheduler keeps after the step.
        clipping: how x0 is limited, None if it is not.
        draws: whether the step draws noise.
        variance: (logvar, logvar_v) if the noise's amount depends on the model's variance channels.
        values: attributes of the scheduler, other than kept tensors, that the step changes.
        templates: for each attribute that holds kept tensors, its value with :class:`Kept` in their
            places.
        samples: the attributes that are the sample itself afterwards, not a copy.
    """

    outputs: list[np.ndarray]
    kept: list[np.ndarray]
    clipping: Clipping | None
    draws: bool
    variance: tuple[float, float] | None = None
    values: dict[str, Any] = field(default_factory=dict)
    templates: dict[str, Any] = field(default_factory=dict)
    samples: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Kept:
    """The place of a kept tensor in an attribute's value."""

    number: int


def is_place(value: Any) -> bool:
    """Whether ``value`` is the place of a kept tensor."""
    return isinstance(value, Kept)


def count_places(attributes: dict[str, Any]) -> int:
    """The number of kept tensors' places in attributes."""
    values = (value if isinstance(value, list) else [value] for value in attributes.values())
    return sum(is_place(one) for several in values for one in several)


def replaced(value: Any, is_kept: Callable[[Any], bool], new: Callable[[Any], Any]) -> Any:
    """``value`` with ``new(tensor)`` for each kept tensor: the value itself, or in a list."""
    if isinstance(value, list):
        return [new(one) if is_kept(one) else one for one in value]
    return new(value) if is_kept(value) else value


def holds(value: Any, is_kept: Callable[[Any], bool]) -> bool:
    """Whether an attribute's value is or contains a kept tensor."""
    return any(map(is_kept, value)) if isinstance(value, list) else is_kept(value)


class _UnitVectors(TorchFunctionMode):
    """While active: noise is a unit vector, casts leave vectors alone, and clips are noted."""

    def __init__(self, kept: int, variance: float | None) -> None:
        super().__init__()
        generator = torch.Generator(device="cpu").manual_seed(20)
        self.size = INPUTS + kept
        self.check = torch.randn(self.size, generator=generator, dtype=torch.float64, device="cpu")
        self.variance = variance
        self.free: Tensor | None = None  # x0 before it is clipped
        self.clipping: Clipping | None = None
        self.draws = 0

    def unit(self, coordinate: int) -> Tensor:
        """A unit vector [B, 1, 1, 1], with its random number as the last entry."""
        vector = torch.zeros(self.size + 1, dtype=torch.float64, device="cpu")
        vector[coordinate], vector[-1] = 1, self.check[coordinate]
        return vector.view(-1, 1, 1, 1)

    def model_output(self) -> Tensor:
        """The model's output, with a channel of variance if the model has one."""
        output = self.unit(M)
        if self.variance is None:
            return output
        return torch.cat((output, torch.full_like(output, self.variance)), dim=1)

    def is_vector(self, value: Any) -> bool:
        return (
            isinstance(value, Tensor)
            and value.dtype == torch.float64
            and value.ndim == 4
            and len(value) == self.size + 1
        )

    def coefficients(self, vector: Tensor) -> np.ndarray:
        """The entries of a vector, float64.

        Raises:
            NotLinearError: they are not those of a linear map, or not finite.
        """
        if not self.is_vector(vector) or vector.numel() != len(vector):
            raise NotLinearError(f"a tensor of shape {tuple(vector.shape)} is no combination")
        entries = vector.flatten().numpy()
        found, check = entries[:-1], self.check.numpy()
        scale = np.abs(found * check).sum()
        if not np.isfinite(entries).all() or abs(found @ check - entries[-1]) > _LINEAR * scale:
            raise NotLinearError("the step is not a linear combination of its tensors")
        return found

    def limit(self, free: Tensor, low: Any, high: Any, quantile: float = 0.0) -> Tensor:
        """Note that x0 is ``free`` and is limited here."""
        vector = self.coefficients(free)
        if not 0 <= quantile <= 1:
            raise NotLinearError(f"{quantile} is no quantile")
        if self.clipping is not None or vector[[Z, X0]].any() or vector[INPUTS:].any():
            raise NotLinearError("x0 is limited twice, or depends on more than sample and output")
        limits = (-np.inf if low is None else float(low), np.inf if high is None else float(high))
        self.clipping = Clipping((float(vector[X]), float(vector[M])), *limits, quantile)
        return self.unit(X0)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn:
            self.draws += 1
            return self.unit(Z)
        if args and self.is_vector(args[0]):
            if func in _CASTS:
                return args[0]
            if func in _CLAMPS:
                limits = {**dict(zip(("min", "max"), args[1:], strict=False)), **kwargs}
                return self.limit(args[0], limits.get("min"), limits.get("max"))
        return func(*args, **kwargs)


Step = Callable[[Any, Tensor, Any, Tensor], tuple[Any, ...]]  # scheduler, output, time, sample


def on_host(scheduler: Any, attributes: dict[str, Any], is_kept: Callable[[Any], bool]) -> Any:
    """A copy of a scheduler with other attributes, in which ``Kept`` stands for each kept tensor.

    Args:
        scheduler: the scheduler.
        attributes: those that the copy is to have, tensors on the CPU.
        is_kept: whether a value is a tensor that the scheduler keeps between steps.
    """
    numbers = itertools.count()
    probe = object.__new__(type(scheduler))
    for name, value in attributes.items():
        probe.__dict__[name] = replaced(_shallow(value), is_kept, lambda _: Kept(next(numbers)))
    return probe


def twin(probe: Any) -> Any:
    """A second copy, so that a step of one leaves the other as it is."""
    made = object.__new__(type(probe))
    made.__dict__.update({name: _shallow(value) for name, value in probe.__dict__.items()})
    return made


def step_map(
    probe: Any, step: Step, time: Any, quantile: float | None, learned: bool = False
) -> StepMap:
    """The maps of the step that a scheduler takes next.

    Args:
        probe: the scheduler's copy from :func:`on_host`; it takes the step.
        step: its step as a function.
        time: the step's time.
        quantile: of dynamic thresholding, None if the scheduler has none.
        learned: the model's output has variance channels that the step uses.

    Raises:
        NotLinearError: the step is not such a map.
    """
    if not learned:
        return _step_map(probe, step, time, quantile, None)
    # std = exp((logvar + logvar_v * v) / 2): two values of v give both, a third is the check
    copies = [twin(probe) for _ in range(3)]
    maps = [
        _step_map(one, step, time, quantile, v)
        for one, v in zip(copies, (-1.0, 1.0, 0.5), strict=True)
    ]
    probe.__dict__.update(copies[0].__dict__)
    first = maps[0]
    if first.draws:
        stds = [one.outputs[0][Z] for one in maps]
        if min(stds) <= 0:
            raise NotLinearError("the learned variance is not the exponential of the output")
        low, high, between = (2 * float(np.log(std)) for std in stds)
        first.variance = ((low + high) / 2, (high - low) / 2)
        if abs(first.variance[0] + first.variance[1] / 2 - between) > _LINEAR * (1 + abs(low)):
            raise NotLinearError("the learned log-variance is not linear in the output")
        first.outputs[0][Z] = 1.0
    return first


def _step_map(
    probe: Any, step: Step, time: Any, quantile: float | None, variance: float | None
) -> StepMap:
    before = {name: _shallow(value) for name, value in probe.__dict__.items()}
    mode = _UnitVectors(count_places(before), variance)
    for name, value in before.items():
        if holds(value, is_place):
            probe.__dict__[name] = replaced(
                value, is_place, lambda one: mode.unit(INPUTS + one.number)
            )
        elif isinstance(value, list):
            probe.__dict__[name] = list(value)  # schedulers change lists in place
    if quantile:  # a table takes 0 for fixed limits, and diffusers for the smallest value
        # set on the copy alone: its method takes a quantile over each image
        probe.__dict__["_threshold_sample"] = lambda free: mode.limit(
            free, None, probe.config.sample_max_value, quantile
        )
    sample, output = mode.unit(X), mode.model_output()
    with mode, np.errstate(all="ignore"):
        results = step(probe, output, time, sample)
    probe.__dict__.pop("_threshold_sample", None)
    made = StepMap(
        outputs=[mode.coefficients(one) for one in results],
        kept=[],
        clipping=mode.clipping,
        draws=mode.draws > 0,
        samples=frozenset(name for name, value in probe.__dict__.items() if value is sample),
    )
    if mode.draws > 1:
        raise NotLinearError("the step draws noise twice")

    def numbered(vector: Tensor) -> Kept:
        made.kept.append(mode.coefficients(vector))
        return Kept(len(made.kept) - 1)

    for name, value in list(probe.__dict__.items()):
        if holds(value, mode.is_vector):
            probe.__dict__[name] = replaced(value, mode.is_vector, numbered)
            made.templates[name] = _shallow(probe.__dict__[name])
        elif name not in before or not _same(before[name], value):
            made.values[name] = _shallow(value)
    return made


def _shallow(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(one is other for one, other in zip(a, b, strict=True))
    return a is b


def result_dtypes(
    probe: Any, step: Step, time: Any, dtype: torch.dtype, channels: Sequence[int]
) -> tuple[list[torch.dtype], list[torch.dtype], dict[str, torch.dtype]]:
    """The dtypes that a step has in practice, from one step on single elements.

    Args:
        probe: a scheduler without kept tensors; it takes the step.
        step: its step as a function.
        time: the step's time.
        dtype: the sample's and the model's output's dtype.
        channels: of the sample, and of the model's output.

    Returns:
        The dtypes of the results, of the noise it draws, and of each attribute that holds tensors
        of the sample's shape afterwards.
    """
    mode = _Draws()
    sample, output = (torch.zeros(1, c, 1, 1, dtype=dtype, device="cpu") for c in channels)
    with mode, np.errstate(all="ignore"):
        results = step(probe, output, time, sample)
    kept = {}
    for name, value in probe.__dict__.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Tensor) and one.ndim == 4:
                kept[name] = one.dtype
    return [one.dtype for one in results], mode.dtypes, kept


class _Draws(TorchFunctionMode):
    """Notes the dtypes of noise and gives zeros for it, so that no generator advances."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn:
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            self.dtypes.append(dtype)
            return torch.zeros(args[0], dtype=dtype, device="cpu")
        return func(*args, **kwargs)
