"""The options of ``fastdiff train`` for the objective and the forward process."""

from __future__ import annotations

import argparse
from typing import Any

from fastdiff import schedules, sde
from fastdiff.cli.parsing import integers, named_value, positive
from fastdiff.common.errors import InputError
from fastdiff.losses import few_steps
from fastdiff.losses.continuous_times import DEFAULT_LEVELS
from fastdiff.objectives import Forward, Objective
from fastdiff.sde.processes.ve import LABELS as VE_LABELS
from fastdiff.training.distillation import consistency_training

# The options of each objective, with their defaults.
_DDPM = {"schedule": "cosine", "timesteps": 1000, "schedule_option": ()}
_EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
OPTIONS: dict[str, dict[str, Any]] = {
    "ddpm": {**_DDPM, "prediction": "v"},
    "hybrid": {**_DDPM, "prediction": "eps"},
    "vlb": {**_DDPM, "prediction": "eps"},
    "flow": {"timesteps": 1000, "prediction": "flow"},
    "dsm": {"sde": "vp", "prediction": "eps"},
    "ncsn": {"sde": "ve", "prediction": "ncsn", "levels": DEFAULT_LEVELS},
    "edm": {"prediction": "edm", **_EDM},
    "consistency": {"prediction": "edm", **_EDM, "intervals": few_steps.INTERVALS},
}
SDES: dict[str, tuple[type[sde.SDE], dict[str, Any]]] = {
    "vp": (sde.VP, {"beta_min": 0.1, "beta_max": 20.0, "trained_from": 1e-5}),
    "subvp": (sde.SubVP, {"beta_min": 0.1, "beta_max": 20.0, "trained_from": 1e-5}),
    "ve": (
        sde.VE,
        {"sigma_min": 0.01, "sigma_max": 50.0, "trained_from": 1e-5, "label_by": "time"},
    ),
    "linear-log-snr": (sde.LinearLogSNR, {"log_snr_max": 13.3, "log_snr_min": -5.0}),
    "learned-log-snr": (sde.LearnedLogSNR, {"log_snr_max": 13.3, "log_snr_min": -5.0}),
    "cosine-log-snr": (
        sde.CosineLogSNR,
        {"log_snr_max": 15.0, "log_snr_min": -15.0, "shift": 0.0},
    ),
}
FLAGS = (
    "schedule", "schedule_option", "timesteps", "sde", "beta_min", "beta_max", "sigma_min",
    "sigma_max", "sigma_data", "log_snr_max", "log_snr_min", "shift", "trained_from",
    "label_by", "levels", "intervals", "prediction",
)  # fmt: skip


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add --objective, and the options that belong to single objectives."""
    group = command.add_argument_group(
        "objective",
        "Each objective has its own process and options: ddpm, hybrid and vlb take --schedule, its "
        "options\nand --timesteps; flow takes --timesteps; dsm takes --sde and its options;\n"
        "ncsn takes the options of ve and --levels; edm takes --sigma-min, --sigma-max and "
        "--sigma-data;\nconsistency takes those of edm and --intervals.",
    )
    group.add_argument(
        "--objective",
        choices=tuple(OPTIONS),
        default="ddpm",
        metavar="NAME",
        help="what the model is trained for: ddpm (prediction of noise, of x0 or of v), hybrid or "
        "vlb (with a variance learned by the variational bound), flow (rectified flow), dsm (score "
        "matching of an SDE), ncsn (score matching at fixed noise levels), edm (the preconditioned "
        "denoiser), consistency (a jump to the image, for one step or two)",
    )
    group.add_argument(
        "--schedule",
        choices=tuple(schedules.NAMES),
        help="noise schedule (default: cosine); the betas of the others are scaled by 1000 / T, so "
        "that they end in noise for any number of timesteps T",
    )
    group.add_argument(
        "--schedule-option", action="append", type=named_value, metavar="NAME=VALUE",
        help="an option of the schedule, such as image_size=256 of shifted_cosine, tau=0.9 of "
        "sigmoid_abar or beta_end=0.01 of linear; rescale_timesteps=true tells the network "
        "1000 t / T; may be repeated",
    )  # fmt: skip
    group.add_argument(
        "--timesteps", type=positive, metavar="T", help="of the schedule (default: 1000)"
    )
    group.add_argument("--sde", choices=tuple(SDES), help="of dsm (default: vp)")
    for name, text in (
        ("--beta-min", "of vp and subvp (default: 0.1)"),
        ("--beta-max", "of vp and subvp (default: 20)"),
        ("--sigma-min", "smallest sigma of ve (default: 0.01) and edm (default: 0.002)"),
        ("--sigma-max", "largest sigma of ve (default: 50) and edm (default: 80)"),
        ("--sigma-data", "standard deviation of the images, for edm (default: 0.5)"),
        ("--log-snr-max", "log-SNR of the least noise (default: 15 of cosine-log-snr, else 13.3)"),
        ("--log-snr-min", "log-SNR of the most noise (default: -15 of cosine-log-snr, else -5)"),
        ("--shift", "added to the log-SNR of cosine-log-snr, such as 2 log(64 / side)"),
        ("--trained-from", "smallest time of training and likelihoods of --sde (default: 1e-5)"),
    ):
        group.add_argument(name, type=float, metavar="X", help=text)
    group.add_argument(
        "--label-by", choices=VE_LABELS,
        help="what a network of ve is told: the time, sigma or its logarithm (default: time)",
    )  # fmt: skip
    group.add_argument(
        "--levels", type=positive, metavar="L",
        help=f"number of noise levels of ncsn (default: {DEFAULT_LEVELS})",
    )  # fmt: skip
    add_intervals_argument(group, few_steps.INTERVALS)
    group.add_argument(
        "--prediction",
        choices=sde.PARAMETRISATIONS,
        metavar="KIND",
        help="what the model predicts: eps, x0, v, score or flow; ncsn or edm for the objective of "
        "that name (default: v for ddpm; eps for hybrid, vlb and dsm; else the objective's name)",
    )


def add_intervals_argument(group: argparse._ActionsContainer, default: tuple[int, int]) -> None:
    """Add --intervals, of consistency."""
    group.add_argument(
        "--intervals", type=integers, metavar="FIRST,LAST",
        help="of noise levels between which consistency is asked for, at the first and the last "
        f"step; they double on the way (default: {default[0]},{default[1]})",
    )  # fmt: skip


def settled(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments, with the objective's defaults for options that were not given.

    Raises:
        InputError: an option that does not belong to the objective or its SDE.
    """
    options, owner = dict(OPTIONS[args.objective]), f"--objective {args.objective}"
    if "sde" in options:
        chosen = args.sde or options["sde"]
        options |= SDES[chosen][1]
        owner += f" --sde {chosen}"
    values = {}
    for name in FLAGS:
        given = getattr(args, name)
        if given is not None and name not in options:
            raise InputError(f"--{name.replace('_', '-')} does not belong to {owner}")
        values[name] = options.get(name) if given is None else given
    return argparse.Namespace(**{**vars(args), **values})


def interval_counts(given: tuple[int, ...] | None) -> tuple[int, int] | None:
    """The two numbers of --intervals; InputError for another count of them."""
    if given is None or len(given) == 2:
        return given
    raise InputError(f"--intervals takes two numbers, FIRST,LAST, got {','.join(map(str, given))}")


def objective(args: argparse.Namespace, process: Forward, steps: int) -> str | Objective:
    """The objective of :func:`settled` arguments: its name, or with intervals the object."""
    name: str = args.objective
    if name != "consistency":
        return name
    intervals = interval_counts(args.intervals)
    return consistency_training(process, args.prediction, steps, intervals)


def forward(args: argparse.Namespace) -> Forward:
    """The forward process of :func:`settled` arguments; InputError for values out of range."""
    try:
        if args.objective == "flow":
            return schedules.flow(args.timesteps)
        if args.objective in ("edm", "consistency"):
            return sde.EDM(args.sigma_min, args.sigma_max, args.sigma_data)
        if args.sde is not None:
            kind, named = SDES[args.sde]
            return kind(**{name: getattr(args, name) for name in named})
        # Betas scaled by 1000 / T, so that short schedules end in noise, too.
        scaled = {"rescaled": True} if args.schedule in schedules.RESCALABLE else {}
        given: dict[str, Any] = {**scaled, **dict(args.schedule_option)}
        return schedules.make(args.schedule, args.timesteps, **given)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from None
