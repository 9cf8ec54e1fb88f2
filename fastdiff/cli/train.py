"""Train a model on images.

The defaults are those of the digits model that is shipped with fastdiff. Ctrl-C finishes the
running step and writes a checkpoint; --resume then continues to the same result as without
interruption.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from fastdiff.checkpoints import checkpoint, resumable
from fastdiff.checkpoints.resumable import Resumable
from fastdiff.cli import (
    data_options,
    objective_options,
    run_file,
    watch_options,
)
from fastdiff.cli.data_options import DIGITS, Found
from fastdiff.cli.machine_options import machine
from fastdiff.cli.output import note
from fastdiff.cli.run_file import CONTROLS
from fastdiff.cli.train_options import add_arguments
from fastdiff.common.errors import CheckpointError, InputError, check_memory
from fastdiff.common.seeds import seeded
from fastdiff.common.world import is_first, process_group
from fastdiff.data.file_names import as_path, as_text
from fastdiff.data.image_grid import check_writable
from fastdiff.data.training_images import TrainingImages
from fastdiff.nn import ImageNetwork
from fastdiff.nn.image_unet import SCALE_OF_TIMESTEPS, make_karras_unet, make_unet
from fastdiff.nn.pretrained import NoInitialisation
from fastdiff.training.observers import Observer
from fastdiff.training.run_lock import run_lock
from fastdiff.training.trainer import (
    Trainer,
    TrainingOptions,
    make_diffusion,
    recorded_options,
)
from fastdiff.training.training_options import (
    SEVERAL,
    WITHOUT_RECORD,
)

PATHS = ("data", "validation", "out", "teacher")  # arguments that are paths

# Arguments that a resumed run may change; the others are those of its checkpoint. ``data`` may
# change since a folder of images may have moved; the trainer compares its content. The digits
# cannot move, so if either value is DIGITS, ``data`` may not change. ``validation`` may not change
# if either value is a share of the images, since that decides what is trained on. ``teacher`` may
# have moved; its weights are compared.
CHANGEABLE = frozenset(
    {
        "data", "cache", "workers", "validation", "steps", "cooldown", "save_every",
        "sample_every", "validate_every", "log", "keep", "out", "accumulate", "on_oom",
        "shard", "on_bad_loss", "spike", "max_skips", "backend", "threads", "device", "teacher",
        *CONTROLS,
    }
)  # fmt: skip


class Kind:
    """What a command that trains has of its own; this is ``fastdiff train``."""

    name = "train"

    def add_arguments(self, command: argparse.ArgumentParser) -> None:
        """Its options, in groups."""
        add_arguments(command)

    def settled(self, args: argparse.Namespace) -> argparse.Namespace:
        """The arguments of a new run, with defaults that depend on others; InputError if wrong."""
        if args.data is None:
            raise InputError("say what to train on: --data digits or --data FOLDER")
        return objective_options.settled(args)

    def images(
        self, args: argparse.Namespace, options: TrainingOptions, device: torch.device
    ) -> TrainingImages:
        """The images to train on; InputError if they do not go with the arguments of a new run."""
        found = data_options.find(args, args.image_size, grayscale=args.grayscale)
        if not args.resume:
            self.check(args, options, found)
        return self.read(args, found)

    def read(self, args: argparse.Namespace, found: Found) -> TrainingImages:
        """The images of --data."""
        images = found.read(flip=args.flip)
        return images.without_labels() if args.unconditional else images

    def check(self, args: argparse.Namespace, options: TrainingOptions, found: Found) -> None:
        """Check, before images are read, all that does not depend on them.

        Raises:
            InputError: arguments that do not fit together.
            RuntimeError: torch has no memory for a batch.
        """
        found.check_flip(args.flip)
        classes = 0 if args.unconditional else len(found.classes)
        if options.null_class and not classes:
            raise InputError("label_dropout hides labels, but the data has none")
        channels = found.channels
        with torch.device("meta"), NoInitialisation():
            network = _network(args, channels, classes + options.null_class)
        forward = objective_options.forward(args)
        objective = objective_options.objective(args, forward, options.steps)
        make_diffusion(network, forward, options, args.prediction, objective, None, args.levels)
        check_memory(options.batch_size, channels, args.image_size, args.image_size)

    def trainer(
        self,
        args: argparse.Namespace,
        options: TrainingOptions,
        images: TrainingImages,
        device: torch.device,
        **common: Any,
    ) -> Trainer:
        """The trainer of a new run."""
        with seeded(options.seed, torch.get_default_device()):
            model = _network(args, images.channels, len(images.classes) + options.null_class)
        forward = objective_options.forward(args)
        return Trainer(
            model.to(device),
            forward,
            images,
            options,
            prediction=args.prediction,
            objective=objective_options.objective(args, forward, options.steps),
            levels=args.levels,
            out=args.out,
            **common,
        )


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Train, and return the exit code."""
    return run_as(Kind(), args, argv)


def run_as(kind: Kind, args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Train as a command of this kind does, and return the exit code."""
    given = _given(kind, args, argv)
    args = argparse.Namespace(**{**vars(args), **given})
    if args.out is None:
        raise InputError("say where the run is to be: --out FOLDER")
    # An existing folder is locked before checkpoints are read that another process may delete.
    with _lock(args.out) if args.out.is_dir() else nullcontext():
        return _run(kind, args, given)


def _run(kind: Kind, args: argparse.Namespace, given: dict[str, Any]) -> int:
    args.resume |= args.resume_if_any and checkpoint.newest(args.out) is not None
    resumed = resumable.find(args.out) if args.resume else None  # before images are read
    if resumed is not None:
        args = _with_recorded(kind, args, given, resumed)
    elif checkpoint.newest(args.out) is not None:
        raise InputError(
            f"{args.out} holds checkpoints of an earlier run; "
            "continue it with --resume, or choose another --out"
        )
    else:
        args = kind.settled(args)
    if args.data is not None:
        args.data = data_options.settled(args.data)
    watch_options.settle(args)
    options = TrainingOptions(
        **{name: getattr(args, name) for name in TrainingOptions.__dataclass_fields__}
    )
    with machine(args) as device, process_group(device):
        images = kind.images(args, options, device)
        loggers = watch_options.loggers(args) if is_first() else []
        check_writable(args.out / "losses.jsonl")
        trainer = _trainer(kind, args, options, images, device, resumed)
        resumed = None  # its tensors are copied; training needs their memory
        with _lock(args.out):  # which makes the folder, so all that can be wrong comes before
            if trainer.world.first:
                run_file.write(_options(kind), args, args.out / run_file.NAME, kind.name)
            return _train(kind, trainer, loggers)


def _lock(out: Path) -> AbstractContextManager[None]:
    """The lock of a run's folder, which the first of several processes holds for all."""
    return run_lock(out) if is_first() else nullcontext()


def _trainer(
    kind: Kind,
    args: argparse.Namespace,
    options: TrainingOptions,
    images: TrainingImages,
    device: torch.device,
    resumed: Resumable | None,
) -> Trainer:
    """A new trainer, or one that continues from a checkpoint of the run."""
    images, validation = watch_options.divided(args, images)
    record = {"arguments": {k: _plain(k, v) for k, v in vars(args).items() if k not in CONTROLS}}
    if resumed is not None:
        return Trainer.resume(
            args.out, images, options, validation=validation, device=device, record=record,
            found=resumed, teacher=getattr(args, "teacher", None),
        )  # fmt: skip
    return kind.trainer(args, options, images, device, validation=validation, record=record)


def _network(args: argparse.Namespace, channels: int, classes: int) -> ImageNetwork:
    """The network that the arguments describe, initialised from torch's generators."""
    sizes: dict[str, Any] = {
        "widths": args.channels,
        "layers_per_block": args.layers_per_block,
        "attention": args.attention,
        "dropout": args.dropout,
    }
    learned = args.objective in ("hybrid", "vlb")
    if args.model == "unet":
        return make_unet(
            args.image_size, channels, classes, learned_variance=learned,
            self_condition=args.self_condition, **sizes,
        )  # fmt: skip
    if args.self_condition:
        raise InputError("--model karras has no input for --self-condition; --model unet has")
    if learned:
        raise InputError(f"--model karras has no learned variance, which {args.objective} trains")
    scale = 1.0 if args.objective == "edm" else SCALE_OF_TIMESTEPS
    return make_karras_unet(args.image_size, channels, classes, time_scale=scale, **sizes)


def _train(kind: Kind, trainer: Trainer, loggers: Sequence[Observer]) -> int:
    """Run the training, with notes on standard error, and return the exit code."""
    images, steps = trainer.data, trainer.options.steps
    count = sum(p.numel() for p in trainer.parameters)
    classes = f"{len(images.classes)} classes" if images.classes else "unconditional"
    tell = note if trainer.world.first else _silent
    processes = f"; {trainer.world.count} processes" if trainer.world.count > 1 else ""
    tell(
        f"{len(images)} images of {images.channels}x{images.size}x{images.size}, {classes}; "
        f"{count / 1e6:.2f} M parameters; steps {trainer.finished_steps}..{steps}{processes}"
    )
    ended_by = trainer.run(observers=loggers)
    assert trainer.out is not None
    folder = checkpoint.step_folder(trainer.out, trainer.finished_steps)
    if ended_by is None:
        tell(f"done: {folder}")
        return 0
    tell(f"{ended_by.name}: stopped after step {trainer.finished_steps}; checkpoint {folder}")
    tell(f"continue with: fastdiff {kind.name} --resume --out {shlex.quote(str(trainer.out))}")
    return 128 + ended_by


def _silent(text: str) -> None:
    """In place of ``note`` in processes that leave it to the first."""


def _with_recorded(
    kind: Kind, args: argparse.Namespace, given: dict[str, Any], found: Resumable
) -> argparse.Namespace:
    """The recorded arguments of the run to resume, updated by the arguments given now.

    Args:
        args: all arguments, with the defaults of those that were not given.
        given: the arguments that were given.
        found: the run's newest whole checkpoint.

    Raises:
        CheckpointError: the run was not started by this command.
        InputError: an argument given now differs from the run's and may not change, or the images
            are gone.
    """
    folder, facts = found.folder, found.facts
    recorded_options(facts, folder)
    arguments = facts.get("record", {}).get("arguments")
    if not isinstance(arguments, dict) or not set(arguments) <= set(vars(args)):
        raise CheckpointError(
            f"{folder} was not written by fastdiff {kind.name}; resume it in Python"
        )
    recorded, given = (_with_tuples(values) for values in (arguments, given))
    recorded = {**WITHOUT_RECORD, **recorded}
    recorded |= {k: as_path(recorded[k]) for k in PATHS if isinstance(recorded.get(k), str)}
    fixed = {"data"} if DIGITS in (given.get("data"), recorded.get("data")) else set()
    if any(watch_options.share(values.get("validation")) for values in (given, recorded)):
        fixed.add("validation")
    for name, value in given.items():
        if name not in CHANGEABLE - fixed and value != recorded.get(name):
            raise InputError(
                f"a resumed run cannot change --{name.replace('_', '-')}: "
                f"it has {recorded.get(name)}, got {value}"
            )
    images = recorded.get("data")
    if "data" not in given and isinstance(images, str) and data_options.is_gone(images):
        raise InputError(f"the run's images are no longer in {images}; give --data FOLDER")
    return argparse.Namespace(**{**vars(args), **recorded, **given})


def _given(kind: Kind, args: argparse.Namespace, argv: Sequence[str] | None) -> dict[str, Any]:
    """The arguments that the user gave, without the defaults of the others.

    What is on the command line comes before --set, and that before the file of --config.

    Raises:
        InputError: a key of --set or of the file that is no option, or a value that does not suit.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    command, unset = _options(kind), object()
    command.set_defaults(**dict.fromkeys(vars(args), unset))
    # An option that may be repeated would append to the mark; of None it makes a list.
    repeated = {a.dest for a in command._actions if isinstance(a, argparse._AppendAction)}
    command.set_defaults(**dict.fromkeys(repeated, None))
    parsed = vars(command.parse_args(words[1:]))  # without the sub-command's name
    given = {} if args.config is None else run_file.read(command, args.config)
    given |= run_file.assigned(command, args.set)
    absent = {name: None if name in repeated else unset for name in parsed}
    return given | {name: value for name, value in parsed.items() if value is not absent[name]}


def _options(kind: Kind) -> argparse.ArgumentParser:
    """A parser of the options alone."""
    command = argparse.ArgumentParser()
    kind.add_arguments(command)
    return command


def _with_tuples(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments with tuples in place of lists, which JSON and argparse give for several values, and
    of the one number that earlier versions recorded.
    """
    found = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    return found | {k: (found[k],) for k in SEVERAL if isinstance(found.get(k), float)}


def _plain(name: str, value: Any) -> Any:
    """The value of an argument for JSON; a path as text that is the same in every locale."""
    return as_text(str(value)) if name in PATHS and value is not None else value
