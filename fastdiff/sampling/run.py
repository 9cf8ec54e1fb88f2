"""``sample``: its arguments, slices of large batches, and the modes.

This module sees to the arguments and cuts large batches; ``loop`` and ``device_loop`` compute a
row, ``capture`` makes a CUDA graph of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.common.checks import wide_dtype
from fastdiff.common.conditions import Conditions
from fastdiff.common.inputs import (
    as_arguments,
    check_generator,
    check_images,
    check_max_batch,
    checked_seeds,
    memory_format,
)
from fastdiff.common.model import Model
from fastdiff.common.progress import progress_bar
from fastdiff.ops import profiling
from fastdiff.samplers import COLUMNS, Sampler, Table
from fastdiff.samplers.table import OnDevice
from fastdiff.sampling import capture
from fastdiff.sampling.arguments import (
    begin_at,
    check_beginning,
    check_callbacks,
    check_mask,
    check_mode,
    check_resampling,
    target,
)
from fastdiff.sampling.classifier_free import is_guided, per_step
from fastdiff.sampling.device_loop import Buffers, compiled
from fastdiff.sampling.inpainting import JUMP_ROW, KNOWN_ROW, Known, Plan, noised, resampled
from fastdiff.sampling.loop import Advance, State, eager, model_arguments
from fastdiff.sampling.terminal import warn_of_image_at_the_beginning
from fastdiff.sampling.watching import Callback, Watch

START_ROW = 2**32 - 1  # of the counter-based noise: what x begins with


@torch.no_grad()
def sample(
    model: Model,
    sampler: Sampler | Table,
    shape: Sequence[int],
    *,
    x_T: Tensor | None = None,
    start: int = 0,
    image: Tensor | None = None,
    mask: Tensor | None = None,
    resamplings: int = 1,
    jump_length: int = 10,
    cond: Mapping[str, Any] | None = None,
    uncond: Mapping[str, Any] | None = None,
    guidance: float | Sequence[float] = 1.0,
    guidance_rescale: float = 0.0,
    seed: int | Sequence[int] | Tensor | None = None,
    generator: torch.Generator | None = None,
    mode: str = "auto",
    max_batch: int | None = None,
    progress: bool | str = True,
    callback: Callback | None = None,
    preview: Callback | None = None,
    every: int = 1,
    return_trajectory: bool = False,
    check_finite: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Draw images by running the reverse process.

    Args:
        model: any callable (x, t, **cond) -> prediction. x is [N, C, ...] ([2 N, C, ...] under
            guidance) in memory that the next step overwrites; t is [N], int64 if all of the
            sampler's times are whole numbers, else float32 (float64 for float64 images). The
            prediction is a tensor, an object with a ``sample`` tensor, or a tuple whose first entry
            is it; in another dtype (under autocast) it is cast to x's. The model is called as it
            is: put a module into eval mode yourself.
        sampler: which steps to take, from ``fastdiff.samplers``, or a bare table of them.
        shape: shape of the images, [N, C, ...]; N may be 0.
        x_T: standard normal noise of that shape, which is scaled to the first level of the sampler;
            None draws it, with a UserWarning if the schedule or the grid begins where x still
            holds much of an image. With ``start`` and no image, the images to go on from, as they
            are.
        start: the step to begin with. A sampler with a memory begins it anew there; a bare table
            that would need what earlier steps kept is refused.
        image: [N or 1, C, ...]. With ``start``, sampling begins with the image, noised to
            that step's level (image to image, SDEdit, arXiv:2108.01073).
        mask: where to generate (1) and where to keep the image (0), [N or 1, 1 or C, ...], bool or
            in [0, 1] (inpainting). After each step the known part is set to the image at that
            step's level of noise (RePaint, arXiv:2201.09865, eq. 8), the noise drawn anew, and
            after the last to the image.
        resamplings: with a mask, how often the steps are taken, so that what is generated fits
            what is known (RePaint, algorithm 1; the authors take 10). Every ``jump_length`` steps
            x is noised again by as many and sampled on from there, until each such stretch has been
            sampled so often. Callbacks, progress and trajectories count each repeated step. For
            samplers that keep nothing between steps: ddpm, ddim, euler, heun and others.
        jump_length: steps of such a stretch, fewer than the sampler has.
        cond: keyword arguments for the model, such as {"class_labels": labels}; tensors or nested
            lists, tuples and dicts of them. Of tensors with one row an image a part of the images
            is given its rows; other values stay whole. ``fastdiff.PerImage(value)`` and
            ``fastdiff.Shared(value)`` say which is which. Without such a mark a tensor of N rows is
            per image if its argument is class_labels, labels, y, encoder_hidden_states or
            encoder_attention_mask; any other is refused where ``max_batch`` would cut it or
            guidance would join it with an equal one, since that could not be told.
        uncond: the same without the condition. The model then gets 2 N images at once, first those
            for ``uncond``: tensors with one row an image are concatenated, other values must be
            equal. Tensors of N rows that differ are taken as per image.
        guidance: scale of classifier-free guidance (arXiv:2207.12598), uncond + guidance * (cond -
            uncond); a number or one for each of the sampler's steps. 1 everywhere costs nothing.
            A sampler's ``clip`` bounds the x0 of the guided prediction, not of the two it is of.
        guidance_rescale: how far guided predictions are brought back to the standard deviation of
            the conditional ones, in [0, 1] (arXiv:2305.08891, section 3.4).
        seed: of a counter-based generator inside the step; to rounding, the images are the same in
            any mode, on any backend, and with any ``max_batch``. With N seeds an image depends on
            its own alone, whatever batch it is in.
        generator: else, source of all noise, None for PyTorch's global one: first x_T, then one
            draw for each row that uses noise, as plain code would, and with a mask one after each
            step but the last, and one for each way back. A CPU generator draws there for images
            anywhere; each draw then waits for the copy.
        mode: "eager" calls the model; "compile" compiles it with the step (Inductor), once for
            each shape; "cudagraph" captures the two in a CUDA graph, once for each shape and as
            long as the weights stay in place, and replays it. "auto" is "cudagraph" for an
            nn.Module and CUDA images, and "eager" else. What cannot be captured runs eagerly,
            after a warning. Compiled or captured, ``model`` is not called again, so its Python
            code must not do anything that changes from step to step.
        max_batch: most images at a time; ``generator`` then still draws x_T for all at once.
        progress: show a progress bar on standard error; a string describes it.
        callback: called as callback(step, t, x) after each step, with a copy of x. Steps count from
            ``start``, and t is the time at the step's beginning. With ``max_batch``, it sees one
            part of the images after the other.
        preview: called likewise with the current estimate of the clean images.
        every: after how many steps callback and preview are called; after the last they always are.
        return_trajectory: return x at the start and after each step, too.
        check_finite: look at each output of the model, which waits for the device.
        device: where to sample; None takes x_T's, or the model's parameters', or image's, or
            torch's default device.
        dtype: the images' dtype; None takes x_T's, or the model's, or image's, or float32.

    Returns:
        Images of the given shape, contiguous in x_T's memory format. With ``return_trajectory``, a
        pair of them and a tensor [S + 1, N, C, ...].

    Raises:
        TypeError: an argument or what the model returns is of the wrong kind.
        ValueError: an argument is out of its range or does not fit the others, or the model's
            output does not fit the sampler.
        FloatingPointError: with ``check_finite``, the model's output is not finite.
    """
    table, sigma = begin_at(sampler, start)
    shape, device, dtype = target(model, shape, device, dtype, (x_T, image))
    wide, images = wide_dtype(dtype), shape[0]
    check_mode(mode, device)
    check_generator(generator, device)
    check_max_batch(max_batch)
    check_callbacks(callback, preview, every)
    cond = {} if cond is None else as_arguments(cond, "cond")
    uncond = None if uncond is None else as_arguments(uncond, "uncond")
    size = max(max_batch or images, 1)
    scales = per_step(guidance, start + table.num_steps)
    guided = is_guided(scales, guidance_rescale, uncond is not None)
    conditions = Conditions(cond, uncond, images, joined=guided, cut=size < images)
    seeds = None if seed is None else checked_seeds(seed, generator, images).to(device)
    check_beginning(start, x_T, image, mask)
    check_resampling(resamplings, jump_length, mask)
    plan = resampled(table, resamplings, jump_length)
    table = plan.table
    if x_T is not None:
        check_images(x_T, "x_T", [shape])
    if image is not None:
        check_images(image, "image", [shape, (1, *shape[1:])])
        image = image.to(device, wide)
    if mask is not None:
        check_mask(mask, shape)
        mask = mask.to(device, wide)

    if x_T is None and not start:
        warn_of_image_at_the_beginning(sampler)
    if x_T is not None:
        layout = memory_format(x_T)
        x = torch.empty(shape, device=device, dtype=dtype, memory_format=layout).copy_(x_T)
    elif seeds is not None:
        x = ops.philox_normal(seeds, START_ROW, shape, dtype)
    else:
        x = _draw(torch.empty(shape, device=device, dtype=dtype), generator)
    known = None
    if image is not None and mask is not None:
        known = Known(image, mask)
    if image is not None and start:
        x.copy_(noised(image, x.to(wide), *table.levels[0].tolist()))
    if not start and sigma != 1:
        x.mul_(sigma)

    on_device = table.on(device, wide)
    if guided:
        of_rows = [scales[start + step] for step in plan.steps]
        values = on_device.values.clone()
        values[:, COLUMNS.index("guidance")] = values.new_tensor(of_rows)
        values[:, COLUMNS.index("rescale")] = guidance_rescale
        on_device = on_device._replace(values=values)
    run = _Run(
        model=model,
        mode=mode,
        plan=plan,
        on_device=on_device,
        x=x,
        seeds=seeds,
        generator=generator,
        conditions=conditions,
        known=known,
    )
    trajectory = x.new_empty(table.num_steps + 1, *shape) if return_trajectory else None
    watched = bool(callback or preview or return_trajectory or check_finite)
    parts = [slice(at, min(at + size, images)) for at in range(0, max(images, 1), size)]
    steps = len(parts) * table.num_steps
    with profiling.span("sample"), _progress(progress, steps) as tick:
        for part in parts:
            watch = None
            if watched:
                watch = Watch(
                    table,
                    on_device,
                    first_step=start,
                    first_image=part.start,
                    callback=callback,
                    preview=preview,
                    every=every,
                    trajectory=None if trajectory is None else trajectory[:, part],
                    check_finite=check_finite,
                )
            run.sample(part, watch, tick)
    return x if trajectory is None else (x, trajectory)


@dataclass(eq=False)
class _Run:
    """The arguments of ``sample``, checked and on the device; x is what it began with."""

    model: Model
    mode: str
    plan: Plan
    on_device: OnDevice  # the plan's table, guidance set
    x: Tensor  # advanced in place
    seeds: Tensor | None
    generator: torch.Generator | None
    conditions: Conditions
    known: Known | None

    def sample(self, part: slice, watch: Watch | None, tick: Callable[[], None] | None) -> None:
        """Sample a part of the images."""
        state, ends = self._state(part), self.plan.table.ends_step
        draws = self.plan.table.noisy if state.noise is not None else [False] * len(ends)
        known = None if self.known is None else self.known.take(part)
        keep_output = watch is not None and watch.keeps_output
        with _prepared(self.mode, self.model, state, keep_output) as (x, noise, advance):
            if watch is not None:
                watch.begin(x)
            if profiling.depth:
                advance = _in_steps(advance)
            for row, ends_step in enumerate(ends):
                if draws[row] and noise is not None:
                    _draw(noise, self.generator)
                if watch is not None:
                    watch.before(row, x)
                output = advance(row)
                if ends_step:
                    if known is not None:
                        self._restore(known, x, row, state.seed)
                    if tick is not None:
                        tick()
                if watch is not None:
                    watch.after(row, x, output)

    def _restore(self, known: Known, x: Tensor, row: int, seed: Tensor | None) -> None:
        """Put in what is known after a row, and go back up where the plan says so."""
        last, wide = row + 1 == len(self.plan.ends), known.image.dtype
        noise = None if last else self._normal(x, wide, seed, KNOWN_ROW + row)
        known.restore(x, self.plan.ends[row], noise)
        jump = self.plan.jumps.get(row)
        if jump is not None:
            noise = self._normal(x, wide, seed, JUMP_ROW + row)
            x.copy_(noised(x.to(wide), noise, jump.share, jump.sigma))

    def _normal(self, x: Tensor, dtype: torch.dtype, seed: Tensor | None, row: int) -> Tensor:
        """Noise like x that no row of the table draws."""
        if seed is not None:
            return ops.philox_normal(seed, row, x.shape, dtype)
        return _draw(torch.empty(x.shape, device=x.device, dtype=dtype), self.generator)

    def _state(self, part: slice) -> State:
        x, guided = self.x[part], self.conditions.joined
        arguments, batch = self.conditions.part(part), x.shape[0] * (2 if guided else 1)
        per_row, arguments = model_arguments(self.model, self.on_device.timesteps, arguments, batch)
        noise = None
        if self.seeds is None and self.plan.table.needs_noise:
            noise = torch.zeros(x.shape, device=x.device, dtype=x.dtype)
        return State(
            x=x,
            table=self.on_device.values,
            numbers=self.on_device.numbers,
            seed=None if self.seeds is None else self.seeds[part],
            noise=noise,
            per_row=per_row,
            cond=arguments,
            guided=guided,
            learned_variance=self.plan.table.learned_variance,
        )


def _in_steps(advance: Advance) -> Advance:
    """The same with a profiler's range around each row."""

    def run(row: int) -> Tensor | None:
        with profiling.span(f"step {row}"):
            return advance(row)

    return run


class _Prepared(NamedTuple):
    """What computes rows, and the tensors that it computes them in."""

    x: Tensor
    noise: Tensor | None
    advance: Advance


@contextmanager
def _prepared(mode: str, model: Model, state: State, keep_output: bool) -> Iterator[_Prepared]:
    """A loop in the wanted mode; when the block ends, the images are in the state's x."""
    x, noise = state.x, state.noise
    if mode == "auto":
        capturable = capture.graphs.can_capture(x.device) and isinstance(model, nn.Module)
        mode = "cudagraph" if capturable else "eager"
    if mode == "eager" or not x.numel():
        yield _Prepared(x, noise, eager(model, state, keep_output=keep_output))
    elif mode == "compile":
        buffers, run = Buffers(state).begin(), compiled[model]
        yield _Prepared(x, noise, lambda row: run(model, buffers, keep_output))
    else:
        with capture.captured_loop(model, state) as captured:
            if captured is None:
                yield _Prepared(x, noise, eager(model, state, keep_output=keep_output))
            else:
                buffers, replay = captured.buffers, captured.replay
                yield _Prepared(buffers.x, buffers.noise, lambda row: replay())


def _draw(out: Tensor, generator: torch.Generator | None) -> Tensor:
    """Fill a contiguous tensor with what torch.randn would give."""
    if generator is None or generator.device == out.device:
        return out.normal_(generator=generator)
    where = generator.device
    return out.copy_(torch.randn(out.shape, generator=generator, device=where, dtype=out.dtype))


@contextmanager
def _progress(shown: bool | str, steps: int) -> Iterator[Callable[[], None] | None]:
    """What to call after each step; None if nothing is to be shown."""
    if not shown:
        yield None
        return
    done, stride = 0, max(1, steps // 100)  # an update costs as much as a small step
    description = shown if isinstance(shown, str) else "sampling"
    with progress_bar(total=steps, desc=description, leave=False) as bar:

        def tick() -> None:
            nonlocal done
            done += 1
            if done % stride == 0:
                bar.update(stride)

        yield tick
        bar.update(done % stride)
