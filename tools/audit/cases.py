"""What is audited: the operations at the shapes of production, and the bytes that each may move.

A case makes its arguments on any device: on ``meta`` to see what would be compiled, on the CPU to
count bytes. The shapes are those of the U-Nets of DDPM (CIFAR-10) and Stable Diffusion, and of
their images and latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.samplers.table import COLUMNS

STEPS = 1000  # of a schedule
SPAN = 256  # pixels of a span of conv_epilogue's statistics
Kind = tuple[torch.dtype, bool]  # of the activations: dtype, channels-last


class Case(NamedTuple):
    """A call of an operation.

    Attributes:
        operation: its name.
        name: shape, dtype, layout and options.
        make: its arguments, given a source of tensors.
        activation: elements of the smallest activation. Smaller tensors are parameters.
        ideal: bytes of activations that it may read and write.
        unit: S, bytes of one activation.
        split: bytes more that it may move where it takes more than two launches.
        addresses: it puts the addresses of its tensors into a table, so they are never on meta.
        interleaved: arguments whose elements lie too far apart for wide accesses.
    """

    operation: str
    name: str
    make: Callable[[Source], Sequence[Any]]
    activation: int
    ideal: int
    unit: int
    split: int = 0
    addresses: bool = False
    interleaved: tuple[str, ...] = ()


class Source:
    """Makes tensors of one dtype and layout, for one case."""

    def __init__(self, device: str, dtype: torch.dtype, channels_last: bool):
        self.device = device
        self.dtype = dtype
        self.channels_last = channels_last

    def image(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An activation [N, C, H, W]."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        made = torch.randn(shape, device=self.device).to(dtype or self.dtype)
        return made.contiguous(memory_format=layout)

    def values(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Parameters, contiguous."""
        return torch.randn(shape, device=self.device).to(dtype or self.dtype)

    def numbers(self, *shape: int, value: int = 3) -> Tensor:
        """int64, all the same."""
        return torch.full(shape, value, dtype=torch.int64, device=self.device)


class Shapes(NamedTuple):
    """What an audit goes through: feature maps and images [N, C, H, W], and dtypes."""

    features: Sequence[tuple[int, int, int, int]]
    images: Sequence[tuple[int, int, int, int]]
    dtypes: Sequence[torch.dtype]


THOROUGH = Shapes(
    features=(
        (8, 128, 32, 32),
        (16, 256, 16, 16),
        (4, 320, 64, 64),
        (2, 640, 32, 32),
        (2, 1280, 16, 16),
        (1, 320, 64, 64),
        (1, 128, 256, 256),
        (2, 1280, 8, 8),
    ),
    images=((64, 3, 32, 32), (4, 4, 64, 64), (8, 3, 256, 256)),
    dtypes=(torch.float32, torch.bfloat16),
)
COMPILED = Shapes(  # a choice of them: groups that are kept on the chip, and larger ones
    features=((8, 128, 32, 32), (4, 320, 64, 64)),
    images=((4, 4, 64, 64), (8, 3, 256, 256)),
    dtypes=(torch.float32, torch.bfloat16),
)
COUNTED = Shapes(  # smaller, for they are run without a GPU
    features=((1, 640, 8, 8), (2, 128, 16, 16), (1, 64, 64, 64)),
    images=((4, 4, 32, 32), (1, 3, 64, 64)),
    dtypes=(torch.bfloat16,),
)


def cases(
    shapes: Shapes, operations: Sequence[str] | None = None, device: str = "meta"
) -> Iterator[tuple[Case, Source]]:
    """Every case, and what makes its tensors, of the operations named or of all."""
    for name, of_operation in OPERATIONS.items():
        if operations is None or name in operations:
            for dtype in shapes.dtypes:
                for channels_last in (False, True):
                    source = Source(device, dtype, channels_last)
                    for case in of_operation(shapes, (dtype, channels_last)):
                        yield case, source


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested sequences."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


def _case(
    operation: str,
    shape: Sequence[int],
    kind: Kind,
    make: Callable[[Source], Sequence[Any]],
    ideal: float,
    *options: str,
    activation: int | None = None,
    split: float = 0,
    addresses: bool = False,
    interleaved: tuple[str, ...] = (),
) -> Case:
    """``ideal`` and ``split`` in S, an activation of ``shape``."""
    dtype, channels_last = kind
    elements = math.prod(shape)
    unit = elements * dtype.itemsize
    name = " ".join(
        [
            "x".join(map(str, shape)),
            "float32" if dtype == torch.float32 else "bfloat16",
            "nhwc" if channels_last else "nchw",
            *options,
        ]
    )
    return Case(
        operation=operation,
        name=name,
        make=make,
        activation=elements if activation is None else activation,
        ideal=round(ideal * unit),
        unit=unit,
        split=round(split * unit),
        addresses=addresses,
        interleaved=interleaved,
    )


def _group_norm_silu(shapes: Shapes, kind: Kind) -> Iterator[Case]:
    name = "group_norm_silu"
    for shape in shapes.features:

        def plain(s: Source, shape: Any = shape) -> Sequence[Any]:
            x, weight, bias = s.image(*shape), s.values(shape[1]), s.values(shape[1])
            return x, 32, weight, bias, 1e-5, None, None, None, None, True, None, None

        def full(s: Source, shape: Any = shape) -> Sequence[Any]:
            x, residual, (n, c) = s.image(*shape), s.image(*shape), shape[:2]
            weight, bias, more = s.values(c), s.values(c), [s.values(n, c) for _ in range(3)]
            return x, 32, weight, bias, 1e-5, *more, residual, True, None, None

        options = "add, scale, shift, residual"
        yield _case(name, shape, kind, plain, 2, split=1)
        yield _case(name, shape, kind, full, 3, options, split=1)

    for shape in shapes.features[-2:]:
        n, c, h, w = shape

        def skip(s: Source, n: int = n, c: int = c, h: int = h, w: int = w) -> Sequence[Any]:
            x, other = s.image(n, c // 2, h, w), s.image(n, c // 2, h, w)
            weight, bias = s.values(c), s.values(c)
            return x, 32, weight, bias, 1e-5, None, None, None, None, True, other, None

        def given(s: Source, n: int = n, c: int = c, h: int = h, w: int = w) -> Sequence[Any]:
            x, spans = s.image(n, c, h, w), math.ceil(h * w / SPAN)
            statistics = s.values(n, spans, 4, c, dtype=torch.float32)
            statistics[:, :, 0] = h * w / spans
            statistics[:, :, 3].abs_()
            weight, bias = s.values(c), s.values(c)
            return x, 32, weight, bias, 1e-5, None, None, None, None, True, None, statistics

        half = n * c * h * w // 2
        yield _case(name, shape, kind, skip, 2, "skip", activation=half, split=1)
        yield _case(name, shape, kind, given, 2, "statistics")


def _group_norm_silu_backward(shapes: Shapes, kind: Kind) -> Iterator[Case]:
    name, wide = "group_norm_silu_backward", torch.float64
    for shape in shapes.features:

        def plain(s: Source, shape: Any = shape) -> Sequence[Any]:
            (n, c), x, grad = shape[:2], s.image(*shape), s.image(*shape)
            mean, rstd = s.values(n, 32, dtype=wide), s.values(n, 32, dtype=wide)
            return grad, x, mean, rstd, 32, s.values(c), s.values(c), None, None, None, True, None

        def full(s: Source, shape: Any = shape) -> Sequence[Any]:
            grad, x, mean, rstd, _, weight, bias, *_ = plain(s, shape)
            more = [s.values(*shape[:2]) for _ in range(3)]
            return grad, x, mean, rstd, 32, weight, bias, *more, True, None

        yield _case(name, shape, kind, plain, 3, split=2)
        yield _case(name, shape, kind, full, 3, "add, scale, shift", split=2)

    for shape in shapes.features[-2:]:
        n, c, h, w = shape

        def skip(s: Source, n: int = n, c: int = c, h: int = h, w: int = w) -> Sequence[Any]:
            grad, x, other = s.image(n, c, h, w), *(s.image(n, c // 2, h, w) for _ in range(2))
            mean, rstd = s.values(n, 32, dtype=wide), s.values(n, 32, dtype=wide)
            weight, bias = s.values(c), s.values(c)
            return grad, x, mean, rstd, 32, weight, bias, None, None, None, True, other

        half = n * c * h * w // 2
        yield _case(name, shape, kind, skip, 3, "skip", activation=half, split=2)


def _add_time_embedding(shapes: Shapes, kind: Kind) -> Iterator[Case]:
    for shape in shapes.features:

        def make(s: Source, shape: Any = shape) -> Sequence[Any]:
            return s.image(*shape), s.values(*shape[:2])

        yield _case("add_time_embedding", shape, kind, make, 2)


def _schedule(s: Source) -> tuple[Tensor, Tensor]:
    return s.values(STEPS, dtype=torch.float32), s.values(STEPS, dtype=torch.float32)


def _q_sample(shapes: Shapes, kind: Kind) -> Iterator[Case]:
    for shape in shapes.images:

        def make(s: Source, shape: Any = shape) -> Sequence[Any]:
            return s.image(*shape), s.numbers(shape[0]), s.image(*shape), *_schedule(s)

        yield _case("q_sample", shape, kind, make, 3)


def _q_sample_from_seed(shapes: Shapes, kind: Kind) -> Iterator[Case]:
    for shape in shapes.images:

        def make(s: Source, shape: Any = shape) -> Sequence[Any]:
            n = shape[0]
            return s.image(*shape), s.numbers(n), s.numbers(n, 2), s.numbers(1), *_schedule(s)

        yield _case("q_sample_from_seed", shape, kind, make, 2)


def _denoising_loss(
    name: str, seeded: bool = False, backward: bool = False
) -> Callable[[Shapes, Kind], Iterator[Case]]:
    def make(shape: Sequence[int], x0: bool) -> Callable[[Source], Sequence[Any]]:
        n = shape[0]

        def arguments(s: Source) -> Sequence[Any]:
            grad = [s.values(n, dtype=torch.float32)] if backward else []
            images = s.image(*shape), s.image(*shape) if x0 else None
            noise = (s.numbers(n, 2), s.numbers(1)) if seeded else (s.image(*shape),)
            weight = s.values(STEPS, dtype=torch.float32)
            return *grad, *images, *noise, s.numbers(n), *_schedule(s), weight

        return arguments

    def of_operation(shapes: Shapes, kind: Kind) -> Iterator[Case]:
        moved = 3 - seeded + backward
        for shape in shapes.images:
            yield _case(name, shape, kind, make(shape, True), moved)
        shape = shapes.images[-2]
        yield _case(name, shape, kind, make(shape, False), moved - 1, "no x0")

    return of_operation


def _philox_normal(shapes: Shapes, kind: Kind) -> Iterator[Case]:
    for shape in shapes.images:

        def make(s: Source, shape: Any = shape) -> Sequence[Any]:
            return s.numbers(shape[0], 2), 7, s.image(*shape)

        yield _case("philox_normal", shape, kind, make, 1)


def _row(**columns: float) -> list[float]:
    """A row of a sampler's table: a DDIM step unless ``columns`` say otherwise."""
    given = {
        "guidance": 1.5, "x0_x": 1.1, "x0_m": -0.4, "clip_min": -1.0, "clip_max": 1.0,
        "out_x0": 0.9, "out_x": 0.1, "slot": -1.0,
    } | columns  # fmt: skip
    return [float(given.get(column, 0)) for column in COLUMNS]


def _sampler_step(shapes: Shapes, kind: Kind) -> Iterator[Case]:
    dtype: torch.dtype = kind[0]
    kept = 4 / dtype.itemsize  # S of a tensor of the history, which is float32

    def make(
        shape: Sequence[int],
        guided: bool = False,
        depth: int = 0,
        noise: bool = False,
        seed: bool = False,
        variance: bool = False,
    ) -> Callable[[Source], Sequence[Any]]:
        n, c, h, w = shape
        columns = {"noise": 0.3 * (noise or seed), "logvar_v": 0.1 * variance}
        row = _row(**columns, **({"keep_x0": 1.0, "slot": 0.0} if depth else {})) + [0.5] * depth

        def arguments(s: Source) -> Sequence[Any]:
            model_out = s.image(2 * n if guided else n, 2 * c if variance else c, h, w)
            history = None
            if depth:
                slots = s.image(depth * n, c, h, w, dtype=torch.float32)
                history = slots.unflatten(0, (depth, n))
            return (
                s.image(n, c, h, w),
                model_out,
                history,
                s.image(n, c, h, w) if noise else None,
                torch.tensor([row] * 4, dtype=torch.float32, device=s.device),
                s.numbers(1),
                s.numbers(n, 2) if seed else None,
                s.image(n, c, h, w),
            )

        return arguments

    for shape in shapes.images:
        yield _case("sampler_step", shape, kind, make(shape), 3)
    shape = shapes.images[-2]
    for ideal, options in (
        (4, {"guided": True}),
        (3 + 4 * kept, {"depth": 3}),
        (4, {"noise": True}),
        (3, {"seed": True}),
        (4, {"variance": True, "seed": True}),
        (4 + 4 * kept, {"guided": True, "depth": 3, "seed": True}),
    ):
        text = ", ".join(
            key if value is True else f"{key} {value}" for key, value in options.items()
        )
        # Channels-last, a pixel's variances lie behind its means: C values of each, few.
        interleaved = ("model_out",) if kind[1] and "variance" in options else ()
        step = make(shape, **options)
        yield _case("sampler_step", shape, kind, step, ideal, text, interleaved=interleaved)


def _ema_update(shapes: Shapes, kind: Kind) -> Iterator[Case]:
    dtype, channels_last = kind
    if channels_last:
        return
    parameters = ((320, 320, 3, 3), (320,), (1280, 320))
    elements = sum(map(math.prod, parameters))
    averages = [torch.float32] if dtype == torch.float32 else [torch.float32, dtype]
    for average in averages:

        def make(s: Source, average: torch.dtype = average) -> Sequence[Any]:
            s = Source("cpu", s.dtype, False)
            return (
                [s.values(*shape, dtype=average) for shape in parameters],
                [s.values(*shape) for shape in parameters],
                torch.full((1,), 0.01),
            )

        text = f"averages {str(average).removeprefix('torch.')}"
        ideal = (2 * average.itemsize + dtype.itemsize) / dtype.itemsize
        yield _case(
            "ema_update", (elements,), kind, make, ideal, text, activation=320, addresses=True
        )


def _upsample_nearest2x(shapes: Shapes, kind: Kind) -> Iterator[Case]:
    for shape in shapes.features:

        def make(s: Source, shape: Any = shape) -> Sequence[Any]:
            return (s.image(*shape),)

        yield _case("upsample_nearest2x", shape, kind, make, 5)


def _upsample_nearest2x_backward(shapes: Shapes, kind: Kind) -> Iterator[Case]:
    for n, c, h, w in shapes.features:

        def make(s: Source, shape: Any = (n, c, 2 * h, 2 * w)) -> Sequence[Any]:
            return (s.image(*shape),)

        yield _case("upsample_nearest2x_backward", (n, c, h, w), kind, make, 5)


def _conv_epilogue(shapes: Shapes, kind: Kind) -> Iterator[Case]:
    for shape in shapes.features:

        def bias(s: Source, shape: Any = shape) -> Sequence[Any]:
            return s.image(*shape), s.values(shape[1]), None, None, 0

        def full(s: Source, shape: Any = shape) -> Sequence[Any]:
            (n, c, h, w), x, residual = shape, s.image(*shape), s.image(*shape)
            return x, s.values(c), s.values(n, c), residual, math.ceil(h * w / SPAN)

        yield _case("conv_epilogue", shape, kind, bias, 2, "bias")
        options = "bias, emb, residual, statistics"
        yield _case("conv_epilogue", shape, kind, full, 3, options)


OPERATIONS: dict[str, Callable[..., Iterator[Case]]] = {
    "group_norm_silu": _group_norm_silu,
    "group_norm_silu_backward": _group_norm_silu_backward,
    "conv_epilogue": _conv_epilogue,
    "add_time_embedding": _add_time_embedding,
    "upsample_nearest2x": _upsample_nearest2x,
    "upsample_nearest2x_backward": _upsample_nearest2x_backward,
    "sampler_step": _sampler_step,
    "q_sample": _q_sample,
    "q_sample_from_seed": _q_sample_from_seed,
    **{
        name: _denoising_loss(name, "from_seed" in name, "backward" in name)
        for name in (
            "denoising_loss",
            "denoising_loss_backward",
            "denoising_loss_from_seed",
            "denoising_loss_from_seed_backward",
        )
    },
    "philox_normal": _philox_normal,
    "ema_update": _ema_update,
}
