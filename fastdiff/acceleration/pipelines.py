"""``accelerate``, ``restore`` and ``report``: make a pipeline of diffusers, or a model, fast."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from fastdiff.acceleration import scheduler_swap
from fastdiff.acceleration.acceleration_report import Report, Row
from fastdiff.acceleration.compiled_parts import compile_in_place, undo
from fastdiff.acceleration.components import SUPPORTED, Part, components_of, parts_of
from fastdiff.compiler.choose.algorithms import PRECISIONS

Target = TypeVar("Target")
CACHE = "FASTDIFF_CACHE"


@dataclass
class _Accelerated:
    """What ``accelerate`` did to one pipeline or model.

    Attributes:
        report: its report.
        modules: the modules that it compiled.
        cache: the directory of measurements that it set, and what was set before; None for neither.
    """

    report: Report
    modules: list[weakref.ref[nn.Module]] = field(default_factory=list)
    cache: tuple[str, str | None] | None = None


_accelerated: WeakKeyDictionary[Any, _Accelerated] = WeakKeyDictionary()


def accelerate(
    pipe_or_model: Target,
    *,
    precision: str | None = None,
    scheduler: bool = True,
    cache: str | os.PathLike[str] | None = None,
) -> Target:
    """Make a pipeline of diffusers, or a model, fast in place; print what was done, and what not.

    U-Net, ControlNets, and encoder and decoder of the autoencoder are compiled in place by the
    backend ``fastdiff``, at their first calls: their classes, configurations, hooks and parameters
    stay. The scheduler is replaced by fastdiff's class of the same name, with the same
    configuration and state. Text and image encoders in float16 on a CPU are compiled too, so that
    they compute in float32. All else stays as it is, and the report says why. A second call changes
    the settings; ``restore`` undoes everything.

    Args:
        pipe_or_model: a pipeline of diffusers with a U-Net; or one U-Net, ControlNet or autoencoder
            of diffusers; or a module with convolutions that is of no class of diffusers, such as a
            U-Net of one's own.
        precision: of compiled modules: "fast" (Winograd convolutions; None means this too),
            "strict" (direct arithmetic alone) or "bf16" (activations in bfloat16), as
            ``fastdiff.compiler.backend`` describes them.
        scheduler: whether a pipeline's scheduler is replaced.
        cache: the directory of the measurements by which algorithms are chosen, for the whole
            process, as the environment variable FASTDIFF_CACHE sets it; made where there is none.
            None leaves it as the environment has it.

    Returns:
        ``pipe_or_model`` itself. ``fastdiff.acceleration.report`` gives the printed report again.

    Raises:
        TypeError: there is nothing to accelerate: the pipeline has no U-Net (its denoising network
            is a transformer, say), the model's class is not known, or the argument is neither. Or
            an argument is of a wrong type.
        ValueError: ``precision`` is unknown, or "bf16" for a model on a GPU; or what could be
            accelerated is compiled by others, quantised, moved by hooks, or on a device for which
            there is nothing. Nothing has been changed then.
        NotADirectoryError: ``cache`` is a file.
    """
    precision = _checked(precision, scheduler)
    components = components_of(pipe_or_model)
    parts = parts_of(components, precision)
    _require_something(pipe_or_model, components, parts)
    folder = None if cache is None else _folder(cache)

    before = _accelerated.pop(pipe_or_model, None)
    if before is not None:
        _reset_cache(before)
    done = _Accelerated(Report(type(pipe_or_model).__name__, precision, ()))
    _accelerated[pipe_or_model] = done
    if folder is not None:
        done.cache = folder, os.environ.get(CACHE)
        os.environ[CACHE] = folder
    kept = set()
    for part in parts:
        if part.module is not None:
            compile_in_place(part.module, dict(part.options or {}))
            done.modules.append(weakref.ref(part.module))
            kept.add(part.module)
    for module in before.modules if before is not None else ():
        if (held := module()) is not None and held not in kept:
            undo(held)
    rows = [_row(part) for part in parts]
    if scheduler_swap.NAME in components:
        rows.append(_set_scheduler(pipe_or_model, swap=scheduler))
    done.report = Report(type(pipe_or_model).__name__, precision, tuple(rows))
    print(done.report)
    _warn_of_unets(pipe_or_model, parts)
    return pipe_or_model


def restore(pipe_or_model: Target) -> Target:
    """Undo ``accelerate``: the same objects compute as before it, to the last bit.

    Packed weights are freed. Modules that a second pipeline shares are restored for both. What has
    been replaced since (a scheduler of another class, say) stays.

    Args:
        pipe_or_model: what ``accelerate`` was called with.

    Returns:
        ``pipe_or_model`` itself.

    Raises:
        ValueError: it is not accelerated.
    """
    done = _known(pipe_or_model)
    for module in done.modules:
        if (held := module()) is not None:
            undo(held)
    if scheduler_swap.NAME in components_of(pipe_or_model):
        _set_scheduler(pipe_or_model, swap=False)
    _reset_cache(done)
    del _accelerated[pipe_or_model]
    return pipe_or_model


def report(pipe_or_model: Any) -> Report:
    """The report of the last ``accelerate``; ValueError for what is not accelerated."""
    return _known(pipe_or_model).report


def _known(target: Any) -> _Accelerated:
    try:
        done = _accelerated.get(target)
    except TypeError:  # no hash, or no weak references
        done = None
    if done is None:
        raise ValueError(f"{type(target).__name__} is not accelerated by fastdiff.accelerate")
    return done


def _checked(precision: Any, scheduler: Any) -> str:
    if precision is not None and precision not in tuple(PRECISIONS):
        names = ", ".join(PRECISIONS)
        raise ValueError(f"precision must be None or one of {names}, got {precision!r}")
    if not isinstance(scheduler, bool):
        raise TypeError(f"scheduler must be True or False, got {scheduler!r}")
    return precision or "fast"


def _folder(cache: str | os.PathLike[str]) -> str:
    folder = Path(cache).expanduser().resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(f"cache must be a directory, got the file {folder}") from None
    return str(folder)


def _reset_cache(done: _Accelerated) -> None:
    """Set the directory of measurements as it was, unless somebody has set it since."""
    if done.cache is not None and os.environ.get(CACHE) == done.cache[0]:
        if done.cache[1] is None:
            del os.environ[CACHE]
        else:
            os.environ[CACHE] = done.cache[1]


def _require_something(target: Any, components: Mapping[str, Any], parts: list[Part]) -> None:
    """Raise unless there is a network that can be compiled, and in a pipeline a U-Net."""
    name = type(target).__name__
    found = ", ".join(f"{p.name} is a {p.kind}" for p in parts) or "no torch.nn.Module"
    if isinstance(target, nn.Module):
        if not any(part.is_network for part in parts):
            raise TypeError(
                f"{name} cannot be accelerated: wanted one of {SUPPORTED}, or a module with 2-D "
                "convolutions that is not of diffusers or transformers"
            )
    elif not any(part.is_unet for part in parts):
        raise TypeError(
            f"{name} cannot be accelerated, since it has no U-Net: {found}. A model of it may "
            f"be given by itself, if it is one of {SUPPORTED}"
        )
    if not any(part.is_network and part.module is not None for part in parts):
        why = "; ".join(f"{p.name} ({p.kind}): {p.text}" for p in parts)
        raise ValueError(f"nothing in {name} can be accelerated: {why}")


def _row(part: Part) -> Row:
    if part.module is None:
        return Row(part.name, part.kind, left=part.text)
    return Row(part.name, part.kind, done=part.text)


def _set_scheduler(pipe: Any, *, swap: bool) -> Row:
    """Give a pipeline our scheduler, or the one that ours has taken the place of."""
    given = getattr(pipe, scheduler_swap.NAME)
    if swap:
        new, row = scheduler_swap.swapped(given)
    else:
        new = scheduler_swap.original(given)
        row = Row(scheduler_swap.NAME, type(new).__name__, left="as scheduler=False asks")
    if new is not given:
        setattr(pipe, scheduler_swap.NAME, new)
    return row


def _warn_of_unets(target: Any, parts: list[Part]) -> None:
    """A U-Net takes most of a call's time: where it is left as it is, the report may be missed."""
    for part in parts:
        if part.is_unet and part.module is None:
            warnings.warn(
                f"{type(target).__name__}: {part.name}, a {part.kind}, is left as it is: "
                f"{part.text}",
                stacklevel=3,
            )
