"""The options of ``fastdiff train``, in the groups that ``run.toml`` has as tables."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastdiff.cli import data_options, machine_options, objective_options, watch_options
from fastdiff.cli.parsing import add_network_arguments, numbers, positive
from fastdiff.training.training_options import (
    LR_SCHEDULES,
    ON_BAD_LOSS,
    ON_OOM,
    OPTIMIZERS,
    SNAPSHOT_DTYPES,
    TIMESTEP_SAMPLERS,
    WEIGHTINGS,
    TrainingOptions,
)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of ``fastdiff train``."""
    add_run_arguments(command)
    data = command.add_argument_group("data")
    data.add_argument(
        "--data",
        help=f"{data_options.HELP}; with --resume, the run's images at their present place, if "
        "they have moved",
    )
    data.add_argument("--image-size", type=positive, default=16, help="height and width")
    data.add_argument("--grayscale", action="store_true", help="read images as grey")
    data.add_argument("--flip", action="store_true", help="mirror half of the images")
    data_options.add_source_arguments(data)
    data_options.add_arguments(data)
    data.add_argument("--unconditional", action="store_true", help="train without the classes")

    model = command.add_argument_group("model")
    model.add_argument(
        "--model",
        choices=("unet", "karras"),
        default="unet",
        help="unet is DDPM's network, karras that of EDM2, whose layers preserve magnitudes",
    )
    add_network_arguments(model)
    model.add_argument("--dropout", type=float, default=0.0, help="dropout in every block")

    objective_options.add_arguments(command)
    add_training_arguments(command)


def add_run_arguments(command: argparse.ArgumentParser) -> None:
    """Which run it is, and what it keeps in its folder."""
    defaults = TrainingOptions()
    which = command.add_argument_group("which run")
    which.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="take options from a TOML file, such as the run.toml of another run; what is on the "
        "command line comes before it",
    )
    which.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.KEY=VALUE",
        help="set an option by its key in the file, for example model.channels=32,64; comes before "
        "--config",
    )
    which.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out from its newest checkpoint, with its options",
    )
    which.add_argument(
        "--resume-if-any",
        action="store_true",
        help="as --resume if --out has a checkpoint, else begin: for programs that start the same "
        "command again, such as torchrun --max-restarts",
    )

    run = command.add_argument_group("run")
    run.add_argument("--out", type=Path, help="folder of the run; must be given")
    run.add_argument(
        "--save-every", type=int, default=defaults.save_every, help="steps between checkpoints"
    )
    run.add_argument("--keep", type=int, default=defaults.keep, help="newest checkpoints to keep")
    run.add_argument(
        "--sample-every",
        type=int,
        default=defaults.sample_every,
        help="steps between sample grids; 0 for none",
    )


def add_training_arguments(command: argparse.ArgumentParser) -> None:
    """How it is trained: steps, optimizer, averages, what is watched, the machine."""
    defaults = TrainingOptions()
    switch = argparse.BooleanOptionalAction
    how = command.add_argument_group("training")
    how.add_argument("--steps", type=int, default=defaults.steps, help="optimizer steps")
    how.add_argument("--batch-size", type=int, default=defaults.batch_size, help="images per step")
    how.add_argument(
        "--accumulate",
        type=int,
        default=defaults.accumulate,
        help="micro-batches of a step, one after another, in the memory of one",
    )
    how.add_argument(
        "--on-oom",
        choices=ON_OOM,
        default=defaults.on_oom,
        help="a step for which there is no memory ends the run, or is repeated in micro-batches of "
        "half the size, in which the run goes on",
    )
    how.add_argument(
        "--shard",
        action=switch,
        default=defaults.shard,
        help="divide weights, moments and averages among the processes that torchrun starts, for "
        "networks that do not fit into the memory of one",
    )
    how.add_argument("--seed", type=int, default=defaults.seed, help="of everything random")
    how.add_argument(
        "--label-dropout",
        type=float,
        default=defaults.label_dropout,
        help="share of the labels to hide, for example 0.1, so that sampling can be guided",
    )
    how.add_argument(
        "--self-condition",
        action="store_true",
        help="the network is given its last estimate of x0 beside x_t; half of the images get that "
        "of a first pass, so a step takes about 1.3 times as long",
    )
    how.add_argument(
        "--weighting",
        choices=WEIGHTINGS,
        default=defaults.weighting,
        metavar="NAME",
        help="of the loss over time: snr, min_snr, p2, edm or vlb for ddpm, hybrid and flow; sigma "
        "or likelihood for dsm",
    )
    how.add_argument(
        "--timestep-sampler",
        choices=TIMESTEP_SAMPLERS,
        default=defaults.timestep_sampler,
        metavar="NAME",
        help="how the times of a batch are sampled: uniform, low-discrepancy, logit-normal or "
        "loss-second-moment (the default of vlb) with a schedule; uniform or low-discrepancy for "
        "dsm; log-normal for edm; laplace or cosh with all but ncsn",
    )
    how.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    how.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="compute activations again in the backward pass, by PyTorch's own operations: less "
        "memory, more time",
    )
    how.add_argument(
        "--channels-last", action=switch, default=True, help="channels_last memory format"
    )
    how.add_argument(
        "--compile",
        action=switch,
        default=defaults.compile,
        help="fused operations with gradients on a CPU; without them a step takes longer",
    )
    how.add_argument(
        "--on-bad-loss",
        choices=ON_BAD_LOSS,
        default=defaults.on_bad_loss,
        help="a step whose loss or gradient is not finite, or whose loss is too high by --spike, "
        "ends the run, or is left out",
    )
    how.add_argument(
        "--spike",
        type=float,
        default=defaults.spike,
        metavar="FACTOR",
        help="a loss above FACTOR times the median of the last 100 is too high; 0 for no limit",
    )
    how.add_argument(
        "--max-skips",
        type=int,
        default=defaults.max_skips,
        help="so many steps in a row are not left out: they end the run",
    )

    optimizer = command.add_argument_group("optimizer")
    optimizer.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default=defaults.optimizer,
        help="muon is for the weights of hidden layers, with adamw for the others",
    )
    optimizer.add_argument("--lr", type=float, default=defaults.lr, help="highest learning rate")
    optimizer.add_argument(
        "--lr-schedule",
        choices=LR_SCHEDULES,
        default=defaults.lr_schedule,
        help="after warm-up: cosine and linear fall to 0 at the last step, constant stays, rsqrt "
        "falls with the inverse square root of the step",
    )
    optimizer.add_argument("--warmup", type=int, default=defaults.warmup, help="steps of warm-up")
    optimizer.add_argument(
        "--lr-reference",
        type=int,
        default=defaults.lr_reference,
        metavar="STEP",
        help="after which rsqrt falls; 0 for the end of the warm-up",
    )
    optimizer.add_argument(
        "--cooldown",
        type=int,
        default=defaults.cooldown,
        metavar="STEPS",
        help="last steps in which the rate of constant and rsqrt falls to 0",
    )
    optimizer.add_argument(
        "--betas",
        type=numbers,
        default=",".join(map(str, defaults.betas)),
        help="decays of the moments of adamw and adam",
    )
    optimizer.add_argument(
        "--eps", type=float, default=defaults.eps, help="added to the root of the second moment"
    )
    optimizer.add_argument(
        "--momentum", type=float, help="of sgd (default: 0.9) and muon (default: 0.95)"
    )
    optimizer.add_argument("--nesterov", action="store_true", help="Nesterov's momentum, for sgd")
    optimizer.add_argument(
        "--weight-decay",
        type=float,
        default=defaults.weight_decay,
        help="decoupled for adamw and muon, part of the gradient for adam and sgd",
    )
    optimizer.add_argument(
        "--grad-clip", type=float, default=defaults.grad_clip, help="gradient norm; 0 for no limit"
    )

    averages = command.add_argument_group(
        "averages",
        "of the weights. The first is the run's model; the others are kept beside it, and "
        "fastdiff sample --weights names one, such as ema-0.9999 or std-0.05.",
    )
    averages.add_argument(
        "--ema",
        type=numbers,
        default=",".join(map(str, defaults.decays)),
        metavar="DECAYS",
        help="decays of exponential moving averages, such as 0.999,0.9999, or none",
    )
    averages.add_argument(
        "--ema-std",
        type=numbers,
        default="none",
        metavar="STDS",
        help="relative standard deviations of averages by a power function, such as 0.05,0.10, of "
        "which fastdiff average makes others after the run",
    )
    averages.add_argument(
        "--snapshots",
        type=positive,
        default=defaults.snapshots,
        help="times, evenly over the run, that the averages of --ema-std are kept for that",
    )
    averages.add_argument(
        "--snapshot-dtype",
        choices=SNAPSHOT_DTYPES,
        default=defaults.snapshot_dtype,
        help="of their files",
    )

    watch_options.add_arguments(command)
    machine_options.add_arguments(command.add_argument_group("machine"))
