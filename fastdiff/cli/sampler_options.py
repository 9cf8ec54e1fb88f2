"""The options that say how images are generated: the sampler and its guidance."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastdiff import samplers
from fastdiff.checkpoints import classifier_checkpoint
from fastdiff.checkpoints.checkpoint import load
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.cli.parsing import named_value
from fastdiff.common.errors import InputError
from fastdiff.compiler.choose.algorithms import PRECISIONS
from fastdiff.diffusion import FEW_STEP_METHODS, METHODS, SOLVERS, Diffusion
from fastdiff.ops.backend import kernel_runs
from fastdiff.samplers import Sampler
from fastdiff.sde import Solver
from fastdiff.sde.solvers.by_name import LANGEVIN_STEPS_EACH

STEPS = 50  # default of samplers with timesteps
# For each objective except ncsn the default sampler and its steps, which models that are trained
# for a few steps have of their own.
DEFAULTS: dict[str, tuple[str, int | None]] = {
    "ddpm": ("ddim", STEPS),
    "hybrid": ("ddpm", STEPS),
    "vlb": ("ddpm", STEPS),
    "flow": ("unipc-2", STEPS),
    "dsm": ("adaptive", None),
    "edm": ("heun", STEPS // 2),
    **{name: (method, None) for name, method in FEW_STEP_METHODS.items()},
}


def add_sampler_arguments(
    command: argparse.ArgumentParser, default: str = "the default of the model's objective"
) -> None:
    """--sampler, --steps, --grid and --option; ``default`` names the sampler if none is given."""
    command.add_argument(
        "--sampler",
        choices=METHODS,
        metavar="NAME",
        help=f"on a fixed grid of timesteps: {', '.join(samplers.names())}; in continuous time: "
        f"{', '.join(SOLVERS)}; if not given, {default}",
    )
    command.add_argument(
        "--steps", type=int, help="sampling steps; ode and adaptive choose their own"
    )
    command.add_argument(
        "--grid",
        choices=samplers.grids.NAMES,
        help="which noise levels are visited; the sampler's default if not given",
    )
    command.add_argument(
        "--option",
        action="append",
        default=[],
        type=named_value,
        metavar="NAME=VALUE",
        help="an option of the sampler, such as eta=0.5, clip=null, rtol=1e-4 or "
        "corrector=langevin; may be repeated",
    )


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Those of the sampler, --guidance, --classifier, --classifier-scale and --precision."""
    add_sampler_arguments(command)
    command.add_argument(
        "--precision",
        choices=tuple(PRECISIONS),
        default="fast",
        help="of the network on a CPU: fast has Winograd convolutions, strict direct ones alone, "
        "bf16 has activations in bfloat16 (default: fast)",
    )
    command.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        help="scale of classifier-free guidance, for models trained with --label-dropout; 0 leaves "
        "the classes to --classifier",
    )
    command.add_argument(
        "--classifier",
        type=Path,
        metavar="PATH",
        help="guide by this classifier, which fastdiff train-classifier made for the model",
    )
    command.add_argument(
        "--classifier-scale",
        type=float,
        metavar="S",
        help="factor of the classifier's gradient (default: 1)",
    )


def read_model(args: argparse.Namespace, device: torch.device) -> Checkpoint:
    """The checkpoint of --checkpoint and --weights on a device, computing in --precision.

    Raises:
        CheckpointError: it is missing or damaged.
        InputError: a precision for another device or backend than it has.
    """
    found = load(args.checkpoint, args.weights)
    found.model.to(device)
    if args.precision != "fast":  # which generating takes by itself
        if not kernel_runs(next(found.model.parameters())):
            raise InputError(
                f"--precision {args.precision} needs fastdiff's kernels on a CPU, got --device "
                f"{device} with --backend {args.backend}"
            )
        found.model.compile(backend="fastdiff", options={"precision": args.precision})
    return found


def make_sampler(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    default: tuple[str, int | None] | None = None,
    **preset: Any,
) -> Sampler | Solver:
    """The sampler that the arguments describe, for a checkpoint.

    Args:
        args: of the command line.
        checkpoint: the model.
        default: name and steps if --sampler is not given; None for those of the model's objective.
        preset: options of the sampler that --option may change.

    Raises:
        InputError: steps, a grid or options that do not fit the sampler or the model.
    """
    diffusion, options = checkpoint.diffusion(), {**preset, **dict(args.option)}
    method, steps = default or default_sampler(diffusion)
    if args.sampler is not None and args.sampler != method:
        method, steps = args.sampler, None if args.sampler in SOLVERS else STEPS
    if steps is not None and method not in SOLVERS:
        steps = min(steps, diffusion.path.num_timesteps)
    if args.grid is not None:
        if method in SOLVERS:
            raise InputError(f"--grid is for samplers with timesteps, {method} has none")
        options["grid"] = args.grid
    try:
        return diffusion.sampler(method, steps if args.steps is None else args.steps, **options)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from None


def default_sampler(diffusion: Diffusion) -> tuple[str, int | None]:
    """The default sampler of a model's objective, and its steps."""
    objective = diffusion.objective
    if objective.levels is not None:
        return "annealed-langevin", objective.levels * LANGEVIN_STEPS_EACH
    method, steps = DEFAULTS[objective.name]
    return method, objective.few_steps or steps


def guidance(
    args: argparse.Namespace, checkpoint: Checkpoint, device: torch.device
) -> dict[str, Any]:
    """The guidance that the arguments describe, as keywords of ``Checkpoint.generate``.

    Raises:
        InputError: a classifier that cannot be read or was made for another kind of model; or a
            --classifier-scale that is not finite or has no --classifier.
    """
    guide, scale = None, args.classifier_scale
    if args.classifier is not None:
        guide = classifier_checkpoint.load(args.classifier)
        classifier_checkpoint.check_fits(guide, checkpoint)
        guide.model.to(device)
    elif scale is not None:
        raise InputError("--classifier-scale is for a --classifier, there is none")
    scale = 1.0 if scale is None else scale
    if not math.isfinite(scale):
        raise InputError(f"--classifier-scale must be finite, got {scale}")
    return {"guidance": args.guidance, "classifier": guide, "classifier_scale": scale}


def guidance_facts(guided: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The result ``guided`` of :func:`guidance` for JSON, the classifier as its path.

    Without a classifier, the classifier and its scale are None.
    """
    if args.classifier is None:
        return {**guided, "classifier": None, "classifier_scale": None}
    return {**guided, "classifier": str(args.classifier)}


def sampler_facts(sampler: Sampler | Solver) -> dict[str, Any]:
    """The sampler's name and steps for JSON; steps are None if the sampler chooses them."""
    name = sampler.method if isinstance(sampler, Solver) else sampler.name
    return {"sampler": name, "steps": sampler.steps}


def cost_text(facts: Mapping[str, Any], what: str) -> str:
    """How many images (``what`` they are called) were generated, how, and in what time."""
    return (
        f"{{samples}} {what}, {steps_text(facts)}, seed {{seed}}, in {{seconds:.1f}} s on the "
        "{backend} backend ({isa}, {threads} threads)".format(**facts)
    )


def steps_text(facts: Mapping[str, Any]) -> str:
    """The entries of :func:`sampler_facts` and the entry ``evaluations``, in words."""
    steps = "steps of its own" if facts["steps"] is None else f"{facts['steps']} steps"
    return f"{facts['sampler']}, {steps}, {facts['evaluations']:g} evaluations an image"
