"""A mixin that runs a diffusers scheduler's ``step`` on a coefficient table.

On the first step of a run the scheduler's own step is traced (``unit_vectors``) and turned into
rows of a table (``realisation``). Further steps call ``ops.sampler_step`` and nothing else. What
cannot run on the table runs on the scheduler's own step: other dtypes, inputs that need gradients,
times outside the grid, and every call that raises an error or a warning. A run ends when an
attribute is read that it holds in its history, or when any attribute is set; the scheduler then has
the attributes that it would have without a table.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.compiler import is_dynamo_compiling

from fastdiff.diffusers.graph_step import fits_graph, graph_step, register
from fastdiff.diffusers.step_plan import Plan, Request, first_dtypes, make_plan
from fastdiff.diffusers.step_run import Grid, Host, Run
from fastdiff.diffusers.unit_vectors import holds, on_host, replaced

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PLANS = 32  # plans that a scheduler remembers: one for each grid, start, dtype and options
# What no step depends on, and copies and pickles of a scheduler do without.
_CACHES = ("_run", "_plans", "_hosts", "_refused", "_noise_tables")


class TableStepping:
    """A scheduler whose steps run on a table. It goes before diffusers' class among the bases.

    ``strict_compat=False`` (an argument of the class and of ``from_config``) takes better values
    than diffusers' where a class documents them, and repairs grids. Spacing ``trailing`` has then
    as many times as were asked for: diffusers adds one of -1 where a sum is rounded, as for 3 of
    1000. Spacing ``leading`` ends at the last training time, where diffusers' offset leads past it.
    """

    _step_name = "step"  # diffusers' method that the table replaces
    _options: tuple[str, ...] = ()  # its arguments that the coefficients depend on
    _counter: str | None = "_step_index"  # the attribute that counts steps; None: the time tells
    _time_matters = False  # whether a counted step also depends on the time that it is given
    _one_time_a_step = False  # whether a grid has one time for each step, and may be repaired
    _stock: Any  # diffusers' class
    config: Any
    timesteps: Any
    _run: Run | None = None
    _plans: dict[Any, Plan | None] | None = None
    _hosts: dict[str, Host] | None = None
    _refused: tuple[Any, ...] = ()  # the configuration, grid, dtype and options that had no plan
    strict_compat = True

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A scheduler that graphs can find, copies and those of pickles too."""
        made = super().__new__(cls)
        register(made)
        return made

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if TableStepping in cls.__bases__:
            cls._stock = cls.__bases__[-1]
            cls.__init__ = _with_strict_compat(cls._stock)  # type: ignore[method-assign]
            cls.set_timesteps = _with_grid(cls.set_timesteps)  # type: ignore[attr-defined]
            if hasattr(cls, "index_for_timestep"):
                cls.index_for_timestep = _without_waiting(cls.index_for_timestep)

    def __setattr__(self, name: str, value: Any) -> None:
        # Pipelines scale the model's input before each step, which sets this flag.
        if self._run is not None and not (name == "is_scale_input_called" and value):
            self._end_run()
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        run = self._run
        if run is not None and name in run.plan.held:
            self._end_run()
            return self.__dict__[name]
        return super().__getattr__(name)  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        self._end_run()
        return {name: value for name, value in self.__dict__.items() if name not in _CACHES}

    def _table_step(
        self,
        output: Tensor,
        time: Any,
        sample: Tensor,
        options: tuple[Any, ...] = (),
        generator: Any = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, ...] | None:
        """Take a step on the table.

        Args:
            output: the model's output.
            time: the step's time.
            sample: the sample.
            options: the values of ``_options``.
            generator: a generator, or one an image, for noise.
            noise: noise to use instead.

        Returns:
            What the step returns, or None if diffusers' step has to be taken.
        """
        if is_dynamo_compiling():  # a step's number would be a constant of the graph
            if fits_graph(output, time, sample, generator, noise):
                return graph_step(self, output, time, sample, options, noise)
            return self._outside_graphs(output, time, sample, options, generator, noise)
        run = self._run
        if run is None or not run.fits(output, sample, options):
            run = self._begin_run(output, time, sample, options)
            if run is None:
                return None
        program = run.program(time)
        if program is None or (noise is not None and (generator or not _like(noise, sample))):
            self._end_run()
            return None
        own_noise = program.draws and noise is None
        if own_noise:
            noise = _draw(sample, generator, run.plan.noise_dtype)
        results = run.apply(program, output, sample, noise, own_noise)
        if run.counts:
            run.last = program
            run.place += 1
            self.__dict__.update(program.values)
            if program.lists:  # which the scheduler may change in place
                self.__dict__.update({name: [*value] for name, value in program.lists.items()})
        return results

    _outside_graphs = _disable_dynamo(_table_step)  # torch.compiler.disable would import Dynamo

    def _diffusers_step(self, *arguments: Any, **options: Any) -> Any:
        """The step without a table."""
        return getattr(self._stock, self._step_name)(self, *arguments, **options)

    def _opaque_step(
        self,
        output: Tensor,
        time: Any,
        sample: Tensor,
        options: tuple[Any, ...],
        noise: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """A step that shares no memory with its tensors, in which a graph may write afterwards."""
        made = self._table_step(output, time, sample, options, noise=noise)
        if made is not None:
            if self._run is not None and self._run.reference is sample:
                self._run.reference = sample.clone()
            return made
        given = dict(zip(self._options, options, strict=True))
        if noise is not None:
            given["variance_noise"] = noise.clone()
        made = self._diffusers_step(
            output.clone(), time, sample.clone(), **given, return_dict=False
        )
        return tuple(one.clone() for one in made)

    def _result_dtypes(
        self, dtype: torch.dtype, channels: tuple[int, int], options: tuple[Any, ...]
    ) -> list[torch.dtype]:
        """The dtypes of a step's results, for a sample and an output of a dtype."""
        attributes = {name: value for name, value in self.__dict__.items() if name not in _CACHES}
        if self._run is not None:
            attributes.update(self._run.attributes())
        attributes = {
            name: value.detach().cpu() if isinstance(value, Tensor) else value
            for name, value in attributes.items()
        }
        if self._counter is not None:
            attributes[self._counter] = 0
        step = functools.partial(_diffusers_step, dict(zip(self._options, options, strict=True)))
        probe = on_host(
            self, attributes, lambda value: isinstance(value, Tensor) and value.ndim > 1
        )
        return first_dtypes(probe, step, self._grid().host[0], dtype, channels)[0]

    def _end_run(self) -> None:
        """Give the scheduler the attributes that its run holds."""
        run = self._run
        if run is not None:
            self.__dict__["_run"] = None
            self.__dict__.update(run.attributes())

    def _begin_run(
        self, output: Any, time: Any, sample: Any, options: tuple[Any, ...]
    ) -> Run | None:
        """Begin a run with this step, unless diffusers' own has to be taken."""
        self._end_run()
        if not self._suits(output, sample, options):
            return None
        if not self.__dict__.get("is_scale_input_called", True):  # diffusers' step warns
            return None
        if not isinstance(self.__dict__.get("timesteps"), Tensor):
            return None
        wanted = (self.config, self.timesteps, sample.dtype, options)
        refused = self._refused
        if refused and all(map(operator.is_, wanted[:3], refused)) and options == refused[3]:
            return None  # not to be traced again in every step
        if self._counter is None and self._grid().place(time) is None:
            return None
        if self._counter == "_step_index" and self.__dict__["_step_index"] is None:
            self._init_step_index(time)
        start = None if self._counter is None else self.__dict__[self._counter]
        is_kept = functools.partial(_is_image_like, sample)
        if start is not None and start < 0:
            return None
        if torch.is_grad_enabled() and _any_needs_gradient(self.__dict__):
            return None
        plan = self._plan(output, sample, options, start, is_kept)
        if plan is None:
            self.__dict__["_refused"] = wanted
            return None
        run = Run(plan, sample, output, options)
        if start is None or self._time_matters:
            run.grid = self._grid()
        run.counts, run.place = start is not None, start or 0
        run.watched = tuple(
            (one, one._version)
            for one in map(self.__dict__.get, ("timesteps", "sigmas"))
            if isinstance(one, Tensor) and not one.is_inference()
        )
        # in the order in which ``_plan`` numbers the kept tensors
        run.initial = {n: self.__dict__.pop(n) for n in sorted(self.__dict__) if n in plan.held}
        if run.history is not None:
            with torch.no_grad():
                slots = iter(run.history)
                for value in run.initial.values():
                    replaced(value, is_kept, lambda one: next(slots).copy_(one))
        self.__dict__["_run"] = run
        return run

    def _suits(self, output: Any, sample: Any, options: tuple[Any, ...]) -> bool:
        """Whether a table can step from these tensors."""
        return (
            type(sample) is Tensor
            and type(output) is Tensor
            and sample.dtype in _DTYPES
            and output.dtype is sample.dtype
            and sample.device == output.device
            and sample.device.type in ("cpu", "cuda")
            and sample.layout is output.layout is torch.strided
            and sample.ndim >= 2
            and sample.numel() > 0
            and (output.shape == sample.shape or self._has_variance(output, sample))
            and not (torch.is_grad_enabled() and (sample.requires_grad or output.requires_grad))
            and all(one is None or isinstance(one, (bool, int, float)) for one in options)
        )

    def _has_variance(self, output: Tensor, sample: Tensor) -> bool:
        """Whether the model's output has channels of variance that this scheduler knows."""
        return False

    def _plan(
        self,
        output: Tensor,
        sample: Tensor,
        options: tuple[Any, ...],
        start: int | None,
        is_kept: Callable[[Any], bool],
    ) -> Plan | None:
        """The plan of the steps from ``start``, which is made once for what it depends on."""
        hosts = self._hosts
        if hosts is None:
            hosts = self.__dict__["_hosts"] = {}
        attributes = {}
        parts: list[Any] = [sample.dtype, sample.shape[1], output.shape[1], start, options]
        for name, value in sorted(self.__dict__.items()):
            if name in _CACHES:
                continue
            if holds(value, is_kept):
                attributes[name] = value
                value = replaced(value, is_kept, lambda _: "kept")
            host = hosts.get(name)
            if host is None or not host.is_of(value):
                host = hosts[name] = Host(value)
            attributes.setdefault(name, host.value)
            parts.append((name, host.key))
        key = tuple(parts)
        try:
            hash(key)
        except TypeError:  # an attribute that is more than numbers, such as UniPC's other solver
            return None
        plans = self._plans
        if plans is None:
            plans = self.__dict__["_plans"] = {}
        if key not in plans:
            while len(plans) >= _PLANS:
                del plans[next(iter(plans))]
            probe = on_host(self, attributes, is_kept)
            given = dict(zip(self._options, options, strict=True))
            step = functools.partial(_diffusers_step, given)
            config = self.config
            request = Request(
                dtype=sample.dtype,
                channels=(sample.shape[1], output.shape[1]),
                times=self._grid().host.unbind(),
                start=start,
                quantile=config.get("dynamic_thresholding_ratio"),
                learned=output.shape != sample.shape and self._learns_variance,
            )
            plans[key] = make_plan(probe, step, request)
        return plans[key]

    def _repair_grid(self, steps: int) -> None:
        """Give the grid the times that its spacing describes, see the class."""
        config, times = self.config, self.timesteps
        sigmas = self.__dict__.get("sigmas")
        if config.timestep_spacing == "trailing" and len(times) == steps + 1:
            self.timesteps = times[:-1] if times[0] > times[-1] else times[1:]
            if sigmas is not None:
                self.sigmas = torch.cat((sigmas[:steps], sigmas[-1:]))
            self.num_inference_steps = steps
        if config.timestep_spacing == "leading" and sigmas is None:
            self.timesteps = times - max(0, int(times.max()) - config.num_train_timesteps + 1)

    _learns_variance = False  # whether the variance channels change a step

    def _grid(self) -> Grid:
        hosts = self._hosts
        if hosts is None:
            hosts = self.__dict__["_hosts"] = {}
        times = self.__dict__["timesteps"]
        host = hosts.get("timesteps")
        if host is None or not host.is_of(times):
            host = hosts["timesteps"] = Host(times)
        if host.grid is None:
            host.grid = Grid(times, host.value)
        return host.grid


def _diffusers_step(options: dict[str, Any], probe: Any, *tensors: Any) -> tuple[Any, ...]:
    return probe._diffusers_step(*tensors, **options, return_dict=False)


def _is_image_like(sample: Tensor, value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape == sample.shape


def _any_needs_gradient(attributes: dict[str, Any]) -> bool:
    """Whether a tensor among attributes, or in a list among them, needs a gradient."""
    values = (value if isinstance(value, list) else [value] for value in attributes.values())
    return any(isinstance(one, Tensor) and one.requires_grad for some in values for one in some)


def _like(noise: Tensor, sample: Tensor) -> bool:
    return (
        noise.shape == sample.shape
        and noise.dtype is sample.dtype
        and noise.device == sample.device
        and not noise.requires_grad
    )


def _draw(sample: Tensor, generator: Any, dtype: torch.dtype | None) -> Tensor:
    """Noise for a sample, from the numbers that diffusers' step would take."""
    if generator is None:
        noise = torch.randn(sample.shape, dtype=dtype, device=sample.device)
    else:
        noise = randn_tensor(sample.shape, generator, sample.device, dtype)
    return noise if dtype is sample.dtype else noise.to(sample.dtype)


def _with_strict_compat(stock: Any) -> Any:
    """The constructor of a scheduler, with ``strict_compat`` as one more argument."""
    inner = stock.__init__
    signature = inspect.signature(inner)
    more = inspect.Parameter("strict_compat", inspect.Parameter.KEYWORD_ONLY, default=True)
    parameters = [*signature.parameters.values()]
    rest = parameters.pop() if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else None

    @functools.wraps(inner)
    def __init__(  # noqa: N807
        self: Any, *args: Any, strict_compat: bool = True, **kwargs: Any
    ) -> None:
        # A pipeline that is saved names its components' modules: these files are for diffusers too.
        self.__dict__["__module__"] = stock.__module__
        self.__dict__["strict_compat"] = strict_compat
        inner(self, *args, **kwargs)
        if not strict_compat:
            self.register_to_config(strict_compat=False)

    __init__.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*parameters, more, *([rest] if rest else [])]
    )
    return __init__


def _with_grid(set_timesteps: Any) -> Any:
    """``set_timesteps``, which also notes the grid on the host, so that no step has to wait."""
    signature = inspect.signature(set_timesteps)

    @functools.wraps(set_timesteps)
    def noting(self: Any, *args: Any, **kwargs: Any) -> None:
        set_timesteps(self, *args, **kwargs)
        if self._one_time_a_step and not self.strict_compat:
            steps = signature.bind(self, *args, **kwargs).arguments.get("num_inference_steps")
            if steps is not None:
                self._repair_grid(steps)
        if isinstance(self.timesteps, Tensor) and not self.timesteps.is_cpu:
            self._grid()

    return noting


def _without_waiting(index_for_timestep: Any) -> Any:
    """``index_for_timestep`` of a time on a device, where it lies in the grid of that device."""

    @functools.wraps(index_for_timestep)
    def index(self: Any, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        if schedule_timesteps is None and isinstance(timestep, Tensor) and not timestep.is_cpu:
            grid = self._grid()
            place = grid.place(timestep)
            if place is not None:
                equal = [j for j, value in enumerate(grid.values) if value == grid.values[place]]
                return equal[min(1, len(equal) - 1)]  # the second of equal times, as diffusers
        return index_for_timestep(self, timestep, schedule_timesteps)

    return index
