"""Write the U-Net of another program's checkpoint as a folder that fastdiff and diffusers read.

The program is recognised by the names of the tensors: improved-diffusion, guided-diffusion, latent
diffusion without text, DDPM in PyTorch, score_sde, diffusers. Facts that the tensors do not tell
are given by --option; an error names what is missing.

If schedule and prediction are known, from the checkpoint or from --schedule and --prediction, the
folder also has fastdiff.json, and the other commands take it as --checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastdiff import schedules
from fastdiff.checkpoints import checkpoint, loading
from fastdiff.checkpoints.loading import Loaded
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.cli.parsing import DTYPES, add_dtype_argument, named_value, positive
from fastdiff.common.errors import InputError
from fastdiff.process import KINDS
from fastdiff.schedules import NoiseSchedule


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of ``fastdiff convert``."""
    command.add_argument("source", help="a file of weights, or a folder of diffusers")
    command.add_argument("out", type=Path, help="the folder to create")
    command.add_argument("--ema", action="store_true", help="the averaged weights of the source")
    command.add_argument(
        "--option",
        action="append",
        default=[],
        type=named_value,
        metavar="NAME=VALUE",
        help="a fact that the tensors do not tell, such as num_head_channels=64, "
        "use_new_attention_order=true or image_size=64; may be repeated",
    )
    command.add_argument(
        "--schedule",
        choices=tuple(schedules.NAMES),
        help="noise schedule of the training, if the source does not tell",
    )
    command.add_argument(
        "--timesteps", type=positive, metavar="T", help="of --schedule (default: 1000)"
    )
    command.add_argument(
        "--schedule-option",
        action="append",
        default=[],
        type=named_value,
        metavar="NAME=VALUE",
        help="of --schedule: beta_start, beta_end, zero_terminal_snr; rescaled=true, which scales "
        "the betas by 1000 / T as OpenAI's code does; rescale_timesteps=true, for a network that "
        "is told 1000 t / T, as improved-diffusion's are; may be repeated",
    )
    command.add_argument(
        "--prediction",
        choices=KINDS,
        metavar="KIND",
        help=f"what the model predicts, if the source does not tell: {', '.join(KINDS)}",
    )
    add_dtype_argument(command)


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Convert, print what was recognised and written, and return the exit code."""
    if loading.is_own(args.source):
        raise InputError(f"{args.source} is a checkpoint of fastdiff: fastdiff export copies it")
    if args.schedule is None and (args.timesteps or args.schedule_option):
        raise InputError("--timesteps and --schedule-option are of a --schedule: give one")
    loaded = loading.read(args.source, ema=args.ema, options=dict(args.option))
    written, missing = _checkpoint(loaded, args)
    if written is None:
        checkpoint.save_model(loaded.model, args.out, dtype=DTYPES[args.dtype])
    else:
        checkpoint.export(written, args.out, DTYPES[args.dtype])
    _report(loaded, args)
    if written is None:
        print(f"no {checkpoint.META}, which fastdiff sample needs: {missing}")
    else:
        print(f"trained on {written.forward!r}, predicts {written.prediction}")
    return 0


def _checkpoint(loaded: Loaded, args: argparse.Namespace) -> tuple[Checkpoint | None, str]:
    """A checkpoint of fastdiff's, if everything is known that it says; else what is missing.

    Raises:
        InputError: an option contradicts the source.
    """
    forward: NoiseSchedule | None = loaded.forward
    if args.schedule is not None:
        try:
            options = dict(args.schedule_option)
            forward = schedules.make(args.schedule, args.timesteps or 1000, **options)
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from None
    for name, told in (("schedule", loaded.forward), ("prediction", loaded.prediction)):
        if getattr(args, name) is not None and told is not None:
            raise InputError(f"--{name} is told by the source itself: {told}")
    prediction = args.prediction or loaded.prediction
    config = loaded.model.config
    channels = (config.image_channels, 2 * config.image_channels)
    missing = []
    if forward is None:
        missing.append("say --schedule")
    if prediction is None:
        missing.append("say --prediction")
    if not isinstance(config.sample_size, int):
        missing.append("say --option image_size=... (sample_size for weights of diffusers)")
    if config.class_embed_type is not None:
        missing.append("its labels are not the numbers of classes")
    if config.out_channels not in channels:
        missing.append(
            f"a model of {config.image_channels} channels predicts {config.out_channels}"
        )
    if missing or forward is None or prediction is None:
        return None, "; ".join(missing)
    learned = config.out_channels == channels[1]
    classes = tuple(map(str, range(config.num_class_embeds or 0)))
    variance = (loaded.variance or "learned_range") if learned else None
    written = Checkpoint(loaded.model, forward, prediction, classes, variance=variance)
    written.diffusion()  # refuses facts that contradict each other
    return written, ""


def _report(loaded: Loaded, args: argparse.Namespace) -> None:
    """Print what was recognised and what was written."""
    config, parameters = loaded.model.config, sum(p.numel() for p in loaded.model.parameters())
    size = sum(file.stat().st_size for file in args.out.iterdir())
    widths = ", ".join(map(str, config.block_out_channels))
    levels = list(map(str, config.attention_levels))
    attention = f"at levels {', '.join(levels)}" if levels else "at no level"
    print(f"{args.source}: {loaded.source}{', averaged weights' if args.ema else ''}")
    print(
        f"a U-Net of {parameters} parameters: {widths} channels; {config.layers_per_block} "
        f"residual blocks a level; attention {attention}; {config.num_class_embeds or 'no'} "
        f"classes; {config.in_channels} channels in, {config.out_channels} out"
    )
    for remark in loaded.remarks:
        print(remark)
    print(f"{args.out}: {args.dtype}, {size / 1e6:.2f} MB")
