"""The sampling loop: one model call and one fused step an iteration, whatever the sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastdiff import ops
from fastdiff.ops.checks import wide_dtype
from fastdiff.samplers import COLUMNS, Sampler

Model = Callable[..., Any]


@torch.no_grad()
def sample(
    model: Model,
    sampler: Sampler,
    shape: Sequence[int],
    *,
    x_T: Tensor | None = None,
    cond: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
    progress: bool | str = True,
    callback: Callable[[int, int, Tensor], None] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draw images by running the reverse process from noise.

    Args:
        model: any callable (x, t, **cond) -> prediction, with x [N, C, ...] and t int64 [N]; the
            prediction is a tensor, an object with a ``sample`` tensor, or a tuple whose first
            entry is it; in another dtype (under autocast) it is cast to x's. The model is called
            as it is: put a module into eval mode yourself.
        sampler: which steps to take, from ``fastdiff.samplers``.
        shape: shape of the images, [N, C, ...]; N may be 0.
        x_T: the noise to begin with, of that shape; None draws it.
        cond: keyword arguments for the model, such as {"class_labels": labels}.
        generator: source of all noise; on another device than the images' it draws there.
        progress: show a progress bar on standard error; a string describes it.
        callback: called after each step as callback(step, t, x), step from 0.
        device: where to sample; None takes x_T's, or the model's parameters', or the CPU.
        dtype: the images' dtype; None takes x_T's, or the model's, or float32.

    Returns:
        Images of the given shape, contiguous in x_T's memory format.

    Raises:
        TypeError: the model returns something else, or the dtype is not floating point.
        ValueError: ``shape`` is not [N, C, ...], x_T has another, or the model's output does not
            fit the sampler.
    """
    example = x_T if x_T is not None else next(_parameters(model), None)
    device = torch.device(device or (example.device if example is not None else "cpu"))
    dtype = dtype or (example.dtype if example is not None else torch.float32)
    shape = tuple(shape)
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"shape must be [N, C, ...], got {shape}")
    if not dtype.is_floating_point:
        raise TypeError(f"images must be floating point, got {dtype}")
    if x_T is None:
        x = _noise(shape, generator, device, dtype)
    elif x_T.shape != shape:
        raise ValueError(f"x_T must have shape {shape}, got {tuple(x_T.shape)}")
    else:
        x = x_T.to(device, dtype)
    table = sampler.table.to(device, wide_dtype(dtype))
    steps = torch.arange(sampler.steps, device=device).unbind()
    timesteps = sampler.timesteps.to(device)
    evaluate = _evaluator(model, timesteps, shape[0], dict(cond or {}))
    noisy = sampler.table[:, COLUMNS.index("noise")].ne(0).tolist()
    description = progress if isinstance(progress, str) else "sampling"
    for i in tqdm(range(sampler.steps), desc=description, disable=not progress, leave=False):
        out = evaluate(x, i).to(dtype)
        _check_output(out, x, sampler)
        noise = _noise(shape, generator, device, dtype) if noisy[i] else None
        x = ops.sampler_step(x, out, noise, table, steps[i])
        if callback is not None:
            callback(i, int(sampler.timesteps[i]), x)
    return x


def _evaluator(
    model: Any, timesteps: Tensor, batch: int, cond: dict[str, Any]
) -> Callable[[Tensor, int], Tensor]:
    """model(x, timesteps[i], **cond) as a function of (x, i).

    A model with ``embed_time`` and ``embed_class`` gets its embeddings of every step computed here,
    in one product, and not in the loop.
    """
    if hasattr(model, "embed_time") and set(cond) <= {"class_labels"}:
        embeddings = model.embed_time(timesteps)  # [S, D]
        per_class = model.embed_class(cond.get("class_labels"), batch)  # [N, D] or None

        def evaluate(x: Tensor, i: int) -> Tensor:
            emb = embeddings[i : i + 1]
            emb = emb if per_class is None else emb + per_class
            return _tensor(model(x, timesteps[i : i + 1], emb=emb))

        return evaluate
    per_step = timesteps.unsqueeze(1).expand(-1, batch).unbind()
    return lambda x, i: _tensor(model(x, per_step[i], **cond))


def _tensor(out: Any) -> Tensor:
    """The prediction in what a model returned."""
    if isinstance(out, Tensor):
        return out
    found = out[0] if isinstance(out, tuple) and out else getattr(out, "sample", None)
    if not isinstance(found, Tensor):
        raise TypeError(
            "the model must return a tensor, a tuple that begins with one, or an object with one "
            f"named sample, got {type(out).__name__}"
        )
    return found


def _check_output(out: Tensor, x: Tensor, sampler: Sampler) -> None:
    channels = x.shape[1] * (2 if sampler.learned_variance else 1)
    wanted = (x.shape[0], channels, *x.shape[2:])
    if out.shape != wanted:
        kind = "learned" if sampler.learned_variance else "fixed"
        raise ValueError(
            f"with {kind} variance and images of shape {tuple(x.shape)} the model must return "
            f"{wanted}, got {tuple(out.shape)}"
        )


def _noise(
    shape: Sequence[int],
    generator: torch.Generator | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    where = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=where, dtype=dtype).to(device)


def _parameters(model: Model) -> Any:
    return model.parameters() if isinstance(model, torch.nn.Module) else iter(())
