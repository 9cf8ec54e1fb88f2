"""``sample``: its arguments, slices of large batches, and the modes.

This module checks the arguments and splits large batches. ``loop`` and ``device_loop`` compute a
row, and ``capture`` makes a CUDA graph of it.
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
from fastdiff.common.model import Model, keeping
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
from fastdiff.sampling.quick import quick
from fastdiff.sampling.terminal_snr import warn_of_image_at_the_beginning
from fastdiff.sampling.watching import Callback, Watch

START_ROW = 2**32 - 1  # the row of the counter-based noise that x_T takes


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
    """Generate images by running the reverse process.

    Args:
        model: any callable (x, t, **cond) -> prediction. x is [N, C, ...] ([2 N, C, ...] under
            guidance) in memory that the next step overwrites; t is [N], int64 if all of the
            sampler's times are whole numbers, else float32 (float64 for float64 images). The
            prediction is a tensor, an object with a ``sample`` tensor, or a tuple whose first entry
            is the tensor; another dtype (under autocast) is cast to x's. Put a module into eval
            mode before the call.
        sampler: a sampler from ``fastdiff.samplers``, or a bare table of its rows.
        shape: shape of the images, [N, C, ...]; N may be 0.
        x_T: standard normal noise of that shape, which is scaled to the first level of the sampler;
            None samples it, with a UserWarning if x still holds much of an image where the schedule
            or the grid begins. With ``start`` and no image, x_T is the noised images of that step,
            which are not scaled.
        start: the step to begin with. A multistep sampler restarts its history there; a bare table
            whose steps need values kept before ``start`` is refused.
        image: [N or 1, C, ...]. With ``start``, sampling begins with the image, noised to
            that step's level (image to image, SDEdit, arXiv:2108.01073).
        mask: where to generate (1) and where to keep the image (0), [N or 1, 1 or C, ...], bool or
            in [0, 1] (inpainting). After each step the known part is set to the image at that
            step's level of noise (RePaint, arXiv:2201.09865, eq. 8), with new noise each time, and
            after the last step to the image.
        resamplings: with a mask, how often each group of ``jump_length`` steps is taken, so that
            the generated part fits the known part (RePaint, algorithm 1; the authors take 10).
            After such a group x is noised again by as many steps, and sampled again, until the
            group has been taken so often. Callbacks, progress and trajectories count each repeated
            step. For samplers that keep nothing between steps: ddpm, ddim, euler, heun and others.
        jump_length: steps in such a group, fewer than the sampler has.
        cond: keyword arguments for the model, such as {"class_labels": labels}; tensors or nested
            lists, tuples and dicts of them. Tensors with one row per image are split with the
            batch; other values are passed whole. ``fastdiff.PerImage(value)`` and
            ``fastdiff.Shared(value)`` mark the two kinds. An unmarked tensor of N rows is per image
            if its argument is class_labels, labels, y, encoder_hidden_states or
            encoder_attention_mask. Any other unmarked tensor of N rows is refused if it matters:
            if ``max_batch`` would split it, or if ``uncond`` has an equal tensor.
        uncond: the same arguments without the condition. The model then gets 2 N images at once,
            first those for ``uncond``: tensors with one row per image are concatenated, other
            values must be equal. Tensors of N rows that differ are taken as per image.
        guidance: scale of classifier-free guidance (arXiv:2207.12598), uncond + guidance * (cond -
            uncond); a number or one for each of the sampler's steps. 1 everywhere costs nothing.
            A sampler's ``clip`` clips the x0 of the guided prediction.
        guidance_rescale: how far the standard deviation of guided predictions is brought back to
            that of the conditional predictions, in [0, 1] (arXiv:2305.08891, section 3.4).
        seed: seed of a counter-based generator inside the step. Up to rounding the images are the
            same in any mode, on any backend, and with any ``max_batch``. With N seeds, an image
            depends on its own seed alone, whatever batch it is in.
        generator: source of all noise if ``seed`` is None; None for PyTorch's global generator. It
            is used first for x_T, then for each row with noise, and with a mask after each step
            but the last and for each noising again. Noise of a CPU generator is made on the CPU and
            copied to the images' device, which waits for the copy.
        mode: "eager" calls the model; "compile" compiles it with the step (Inductor), once for
            each shape; "cudagraph" captures the two in a CUDA graph, once for each shape and as
            long as the weights stay in place, and replays it. "auto" is "cudagraph" for an
            nn.Module and CUDA images. On a CPU it calls a ``fastdiff.nn.UNet2DModel`` in eval mode,
            in float32 or bfloat16, through a fused graph of its layers: about twice as fast, ready
            within a second, to the accuracy of the compiler (1e-4 of the output's scale in
            float32), and the same bits in every process. That holds for a model that is unchanged:
            without hooks, subclasses or other modules. New values of its weights are seen at every
            step, other changes in the next call. Everywhere else "auto" is "eager"; a model from
            elsewhere is compiled by torch.compile(model, backend="fastdiff"). What cannot be
            captured runs eagerly, after a warning. Compiled by Inductor or captured, ``model`` is
            not called again, so its Python code must not do anything that changes from step to
            step.
        max_batch: the largest number of images in a model call; x_T is still sampled from
            ``generator`` for all images at once.
        progress: show a progress bar on standard error; a string is its label.
        callback: called as callback(step, t, x) after each step, with a copy of x. Steps count from
            ``start``, and t is the time at the step's beginning. With ``max_batch``, the slices of
            the batch are sampled one after the other, each with its own calls.
        preview: called as preview(step, t, x0) with the current estimate of the clean images.
        every: call callback and preview after every so many steps, and after the last step.
        return_trajectory: also return x at the start and after each step.
        check_finite: check each output of the model, which waits for the device.
        device: the device to sample on; None takes x_T's, else the model's, else the image's, else
            torch's default device.
        dtype: the images' dtype; None takes x_T's, else the model's, else the image's, else
            float32.

    Returns:
        Images of the given shape, contiguous in x_T's memory format. With ``return_trajectory``, a
        pair of the images and a tensor [S + 1, N, C, ...].

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
    if keeping(model):
        if mode not in ("auto", "eager"):
            raise ValueError(
                "the model keeps values from step to step, which only its own calls update: "
                f"mode must be auto or eager, got {mode!r}"
            )
        mode = "eager"
    if mode == "auto":
        model = quick(model)
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
        x = _fill_normal(torch.empty(shape, device=device, dtype=dtype), generator)
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
    """The arguments of ``sample``, checked and on the device."""

    model: Model
    mode: str
    plan: Plan
    on_device: OnDevice  # the plan's table with guidance
    x: Tensor  # the initial images of the whole batch; rows change them in place
    seeds: Tensor | None
    generator: torch.Generator | None
    conditions: Conditions
    known: Known | None

    def sample(self, part: slice, watch: Watch | None, tick: Callable[[], None] | None) -> None:
        """Sample a slice of the batch."""
        for part_of_model in keeping(self.model):
            part_of_model.begin_sampling()
        state, ends = self._state(part), self.plan.table.ends_step
        needs_noise = self.plan.table.noisy if state.noise is not None else [False] * len(ends)
        known = None if self.known is None else self.known.take(part)
        keep_output = watch is not None and watch.keeps_output
        with _prepared(self.mode, self.model, state, keep_output) as (x, noise, advance):
            if watch is not None:
                watch.begin(x)
            if profiling.depth:
                advance = _in_steps(advance)
            for row, ends_step in enumerate(ends):
                if needs_noise[row] and noise is not None:
                    _fill_normal(noise, self.generator)
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
        """Restore the known part after a row, and noise x again if the plan has a jump here."""
        last, wide = row + 1 == len(self.plan.ends), known.image.dtype
        noise = None if last else self._normal(x, wide, seed, KNOWN_ROW + row)
        known.restore(x, self.plan.ends[row], noise)
        jump = self.plan.jumps.get(row)
        if jump is not None:
            noise = self._normal(x, wide, seed, JUMP_ROW + row)
            x.copy_(noised(x.to(wide), noise, jump.share, jump.sigma))

    def _normal(self, x: Tensor, dtype: torch.dtype, seed: Tensor | None, row: int) -> Tensor:
        """Noise of x's shape for inpainting; ``row`` selects it if there are seeds."""
        if seed is not None:
            return ops.philox_normal(seed, row, x.shape, dtype)
        return _fill_normal(torch.empty(x.shape, device=x.device, dtype=dtype), self.generator)

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
    """``advance`` with a profiler's range around each row."""

    def run(row: int) -> Tensor | None:
        with profiling.span(f"step {row}"):
            return advance(row)

    return run


class _Prepared(NamedTuple):
    """A function that computes rows, and the tensors x and noise that it works on."""

    x: Tensor
    noise: Tensor | None
    advance: Advance


@contextmanager
def _prepared(mode: str, model: Model, state: State, keep_output: bool) -> Iterator[_Prepared]:
    """Prepare a loop in the wanted mode; when the block ends, the images are in the state's x."""
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


def _fill_normal(out: Tensor, generator: torch.Generator | None) -> Tensor:
    """Fill a contiguous tensor with the noise of torch.randn, and return it."""
    if generator is None or generator.device == out.device:
        return out.normal_(generator=generator)
    where = generator.device
    return out.copy_(torch.randn(out.shape, generator=generator, device=where, dtype=out.dtype))


@contextmanager
def _progress(shown: bool | str, steps: int) -> Iterator[Callable[[], None] | None]:
    """A function to call after each step, which updates a progress bar; None if not shown."""
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
