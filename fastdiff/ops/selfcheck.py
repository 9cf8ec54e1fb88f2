"""A quick check of every operation on the backend that is set, for ``fastdiff doctor``.

Each operation computes one case, whose odd sizes cover vector tails and groups that end within a
vector. The result is compared with the reference's in float64 for the same rounded inputs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.ops import gpu
from fastdiff.ops.backend import backend, describe, on_cuda

Values = dict[str, Tensor]

GROUPS = 4
SHAPE = (2, 40, 17, 13)  # N, C, H, W
TIMESTEPS = 7  # length of the tables
REPEATS = 5  # number of timed calls, of which the fastest is reported
ALLOWED = 8  # largest error, in units in the last place of the largest value
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
DTYPES = (torch.float32, torch.bfloat16)
TABLES = (
    "signal",
    "sigma",
    "grad_of_loss",
    "table",
    "history",
    "weight_of_ema",
)  # always in float32 or wider
DIFFERENTIATED = ("x", "weight", "bias", "add", "scale", "shift", "residual")


@dataclass(frozen=True)
class Record:
    """The result of checking one operation.

    Attributes:
        operation: its name in ``fastdiff.ops``, with ``_backward`` appended for its gradient.
        layout: NCHW or NHWC.
        dtype: float32 or bfloat16.
        backend: the backend that computed the operation.
        max_error: largest absolute difference from float64 over all outputs, each divided by its
            largest value; None if the operation raised or gave values that are not finite.
        tolerance: the largest ``max_error`` allowed.
        ok: whether the operation kept the tolerance.
        microseconds: time of the fastest call; None if the operation raised.
        reason: the text of the error that the operation raised, or empty.
    """

    operation: str
    layout: str
    dtype: str
    backend: str
    max_error: float | None
    tolerance: float
    ok: bool
    microseconds: float | None
    reason: str = ""


def run(device: str = "cpu") -> list[Record]:
    """Check every operation in every layout and dtype on the backend that is set.

    Args:
        device: ``cpu`` or ``cuda``, where the operations compute.
    """
    wide = {key: value.to(device) for key, value in _values().items()}
    return [
        _check(name, call, wide, layout, dtype)
        for name, call in CASES.items()
        for layout in LAYOUTS
        for dtype in DTYPES
    ]


def _check(
    name: str,
    call: Callable[[Values], Sequence[Tensor]],
    wide: Values,
    layout: str,
    dtype: torch.dtype,
) -> Record:
    values = {key: _narrow(key, value, layout, dtype) for key, value in wide.items()}
    doubles = {key: v.double() if v.is_floating_point() else v for key, v in values.items()}
    with backend("reference"):
        wanted = call(doubles)
    error, seconds, reason = math.inf, math.inf, ""
    try:
        error = max(map(_distance, call(values), wanted))
        _wait_for(values["x"])
        for _ in range(REPEATS):
            begin = time.perf_counter()
            call(values)
            _wait_for(values["x"])
            seconds = min(seconds, time.perf_counter() - begin)
    except Exception as raised:  # any error is reported together with the other results
        reason = f"{type(raised).__name__}: {raised}"
    tolerance = ALLOWED * torch.finfo(dtype).eps
    return Record(
        operation=name,
        layout=layout,
        dtype=str(dtype).removeprefix("torch."),
        backend=_what_computes(name, values["x"]),
        max_error=error if math.isfinite(error) else None,
        tolerance=tolerance,
        ok=error <= tolerance and not reason,
        microseconds=None if reason else seconds * 1e6,
        reason=reason,
    )


def _what_computes(name: str, x: Tensor) -> str:
    if not x.is_cuda:
        return describe()["backend"]
    return on_cuda() or "reference" if name in gpu.operations else "reference"


def _wait_for(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _values() -> Values:
    """The inputs of all operations; all except timesteps, steps and seeds are float64."""
    cpu = torch.device("cpu")  # so that values are the same for every device
    generator = torch.Generator(cpu).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=cpu)

    n, c = SHAPE[:2]
    abar = torch.linspace(0.95, 0.05, TIMESTEPS, dtype=torch.float64, device=cpu)
    # Two rows with guidance, its rescaling, a learned variance and a history: the first clips, the
    # second thresholds.
    guidance, x0, out, noise = [2.0, 0.6], [0.9, -0.4], [0.3, 0.6, 0.1], [1.0, -2.0, 0.5]
    keep, factors = [0.2, 0.5, -0.3, 0.4, 1.0], [0.0, 0.7]
    rows = [
        [*guidance, *x0, *limits, *out, *noise, *keep, *factors]
        for limits in ([-1.0, 1.0, 0.0], [0.0, 3.0, 0.9])
    ]
    return {
        "x": normal(*SHAPE) + 1,  # with a mean other than 0, so that a naive variance loses digits
        "weight": normal(c),
        "bias": normal(c),
        "add": normal(n, c),
        "scale": normal(n, c),
        "shift": normal(n, c),
        "residual": normal(*SHAPE),
        "grad": normal(*SHAPE),
        "grad_of_loss": normal(n),
        "noise": normal(*SHAPE),
        "model_out": normal(2 * n, 2 * c, *SHAPE[2:]),
        "history": normal(2, *SHAPE),
        "t": torch.tensor([0, TIMESTEPS - 1], device=cpu),
        "signal": abar.sqrt(),
        "sigma": (1 - abar).sqrt(),
        "table": torch.tensor(rows, dtype=torch.float64, device=cpu),
        "clipping": torch.tensor(0, device=cpu),
        "thresholding": torch.tensor(1, device=cpu),
        "seed": torch.tensor([[2**40 + 1, 0], [-7, 2**33]], device=cpu),
        "row": torch.tensor(TIMESTEPS, device=cpu),
        "weight_of_ema": torch.tensor(0.125, device=cpu),
        "filters": normal(c, c, 3, 3) / math.sqrt(9 * c),
    }


def _narrow(key: str, value: Tensor, layout: str, dtype: torch.dtype) -> Tensor:
    if not value.is_floating_point():
        return value
    value = value.to(torch.float32 if key in TABLES else dtype)
    return value.contiguous(memory_format=LAYOUTS[layout]) if value.ndim == 4 else value


def _distance(got: Tensor, wanted: Tensor) -> float:
    """Largest difference as a share of the largest wanted value; inf for a result not finite."""
    if got.shape != wanted.shape or not bool(torch.isfinite(got).all()):
        return math.inf
    got, wanted = got.detach().double(), wanted.detach()
    return float((got - wanted).abs().max() / wanted.abs().max())


def _group_norm_silu(v: Values) -> Sequence[Tensor]:
    options: dict[str, Any] = {key: v[key] for key in ("add", "scale", "shift", "residual")}
    y = ops.group_norm_silu(v["x"], GROUPS, v["weight"], v["bias"], **options)
    x, skip = v["x"].split((13, SHAPE[1] - 13), dim=1)
    return y, ops.group_norm_silu(x, GROUPS, v["weight"], v["bias"], **options, skip=skip)


def _group_norm_silu_backward(v: Values) -> Sequence[Tensor]:
    leaves = {key: v[key].detach().requires_grad_() for key in DIFFERENTIATED}
    y = _group_norm_silu(leaves)
    return torch.autograd.grad(y, list(leaves.values()), [v["grad"], v["noise"]])


def _add_time_embedding(v: Values) -> Sequence[Tensor]:
    return (ops.add_time_embedding(v["x"], v["add"]),)


def _q_sample(v: Values) -> Sequence[Tensor]:
    return (ops.q_sample(v["x"], v["t"], v["noise"], v["signal"], v["sigma"]),)


def _q_sample_from_seed(v: Values) -> Sequence[Tensor]:
    return (ops.q_sample_from_seed(v["x"], v["t"], v["seed"], v["row"], v["signal"], v["sigma"]),)


def _denoising_loss(v: Values) -> Sequence[Tensor]:
    prediction = v["residual"].detach().requires_grad_()
    of_target = v["t"], v["signal"], v["sigma"], v["signal"]
    loss = ops.denoising_loss(prediction, v["x"], v["noise"], *of_target)
    return loss.detach(), *torch.autograd.grad(loss, prediction, v["grad_of_loss"])


def _denoising_loss_from_seed(v: Values) -> Sequence[Tensor]:
    prediction = v["residual"].detach().requires_grad_()
    of_target = v["t"], v["signal"], v["sigma"], v["signal"]
    loss = ops.denoising_loss_from_seed(prediction, v["x"], v["seed"], v["row"], *of_target)
    return loss.detach(), *torch.autograd.grad(loss, prediction, v["grad_of_loss"])


def _philox_normal(v: Values) -> Sequence[Tensor]:
    return (ops.philox_normal(v["seed"], TIMESTEPS, v["x"].shape, v["x"].dtype),)


def _conv_epilogue(v: Values) -> Sequence[Tensor]:
    y, statistics = ops.conv_epilogue(v["x"], v["bias"], v["add"], v["residual"], statistics=True)
    assert statistics is not None
    # Column 1 is the mean in float32 and column 2 its rounding error, so their sum is compared.
    return y, statistics[:, :, 1] + statistics[:, :, 2], statistics[:, :, 3]


def _upsample_nearest2x(v: Values) -> Sequence[Tensor]:
    x = v["x"].detach().requires_grad_()
    y = ops.upsample_nearest2x(x)
    return y, *torch.autograd.grad(y.square().sum(), x)


def _ema_update(v: Values) -> Sequence[Tensor]:
    averages = [v["x"].clone(), v["bias"].clone()]
    ops.ema_update(averages, [v["noise"], v["weight"]], v["weight_of_ema"].float())
    return averages


def _adamw_update(v: Values) -> Sequence[Tensor]:
    names = ("x", "noise", "residual", "grad", "x")
    wide = torch.promote_types(v["x"].dtype, torch.float32)  # the optimizer's tensors
    p, g, m, second, average = (v[name].to(wide, copy=True) for name in names)
    second.square_()
    ops.adamw_update(
        [p], [g], [m], [second], [average],
        lr=0.1, step=3, gradient_factor=0.5, average_weight=0.125,
    )  # fmt: skip
    return p, m, second, average


def _gradient_norm(v: Values) -> Sequence[Tensor]:
    return (ops.gradient_norm([v["x"], v["weight"]]),)


def _sampler_step(v: Values) -> Sequence[Tensor]:
    x, out, table = v["x"], v["model_out"], v["table"]
    history = ops.new_history(x, len(v["history"])).copy_(v["history"])
    first = ops.sampler_step(x, out, history, v["noise"], table, v["clipping"])
    second = ops.sampler_step(x, out, history, None, table, v["thresholding"], seed=v["seed"])
    return first, second, history


def _channel_statistics(v: Values) -> Sequence[Tensor]:
    return ops.channel_statistics(v["x"]).unbind(2)


def _group_norm_coefficients(v: Values) -> Sequence[Tensor]:
    statistics = [ops.channel_statistics(x) for x in v["x"].split((13, SHAPE[1] - 13), dim=1)]
    options: dict[str, Any] = {key: v[key] for key in ("scale", "shift")}
    return ops.group_norm_coefficients(
        statistics, GROUPS, v["weight"], v["bias"], **options
    ).unbind(1)


def _norm_backward(v: Values) -> Sequence[Tensor]:
    x, skip = v["x"].split((13, SHAPE[1] - 13), dim=1)
    statistics = [ops.channel_statistics(part) for part in (x, skip)]
    options: dict[str, Any] = {key: v[key] for key in ("scale", "shift")}
    found = ops.norm_backward(
        v["grad"], x, statistics, GROUPS, v["weight"], v["bias"], skip=skip, **options
    )
    return [value for value in found if value is not None]


def _conv2d(v: Values) -> Sequence[Tensor]:
    """Convolution by two algorithms; Winograd F(4x4) has another error bound and is left out."""
    statistics = [ops.channel_statistics(v["x"])]
    options: dict[str, Any] = {
        "padding": (1, 1, 1, 1), "silu": True, "emb": v["add"], "residual": v["residual"],
        "norm": ops.group_norm_coefficients(statistics, GROUPS),
    }  # fmt: skip
    return [
        ops.conv2d(v["x"], v["filters"], v["bias"], **options, algorithm=algorithm)[0]
        for algorithm in ("direct", "winograd2")
    ]


def _conv2d_weight_gradient(v: Values) -> Sequence[Tensor]:
    statistics = [ops.channel_statistics(v["x"])]
    return ops.conv2d_weight_gradient(
        v["residual"], v["x"], (3, 3), padding=(1, 1, 1, 1), silu=True,
        norm=ops.group_norm_coefficients(statistics, GROUPS),
    )  # fmt: skip


def _heads(v: Values) -> Sequence[Tensor]:
    n, c = SHAPE[:2]
    return [
        v[name].reshape(n, GROUPS, c // GROUPS, -1).transpose(2, 3)
        for name in ("residual", "grad", "noise")
    ]


def _attention(v: Values) -> Sequence[Tensor]:
    q, k, values = _heads(v)
    return (ops.attention(q, k, values),)


def _attention_backward(v: Values) -> Sequence[Tensor]:
    q, k, values = leaves = [head.detach().requires_grad_() for head in _heads(v)]
    return torch.autograd.grad(ops.attention(q, k, values), leaves, q.detach())


def _geglu(v: Values) -> Sequence[Tensor]:
    return (ops.geglu(v["x"].movedim(1, -1)),)


def _geglu_backward(v: Values) -> Sequence[Tensor]:
    leaf = v["x"].movedim(1, -1).detach().requires_grad_()
    grad = v["noise"].movedim(1, -1)[..., : SHAPE[1] // 2]
    return torch.autograd.grad(ops.geglu(leaf), leaf, grad)


CASES: dict[str, Callable[[Values], Sequence[Tensor]]] = {
    "group_norm_silu": _group_norm_silu,
    "group_norm_silu_backward": _group_norm_silu_backward,
    "add_time_embedding": _add_time_embedding,
    "q_sample": _q_sample,
    "q_sample_from_seed": _q_sample_from_seed,
    "denoising_loss": _denoising_loss,
    "denoising_loss_from_seed": _denoising_loss_from_seed,
    "conv_epilogue": _conv_epilogue,
    "upsample_nearest2x": _upsample_nearest2x,
    "ema_update": _ema_update,
    "adamw_update": _adamw_update,
    "gradient_norm": _gradient_norm,
    "philox_normal": _philox_normal,
    "sampler_step": _sampler_step,
    "channel_statistics": _channel_statistics,
    "group_norm_coefficients": _group_norm_coefficients,
    "norm_backward": _norm_backward,
    "conv2d": _conv2d,
    "conv2d_weight_gradient": _conv2d_weight_gradient,
    "attention": _attention,
    "attention_backward": _attention_backward,
    "geglu": _geglu,
    "geglu_backward": _geglu_backward,
}
