"""Train a student that draws in a few steps what its teacher draws in many.

consistency: the student jumps to the image from any level of noise, in a step or two. progressive:
each of its steps does two of its teacher's, so that a chain of students halves the steps. reflow:
it learns straight lines from noise to the images that its teacher makes of that noise. The teacher
is a checkpoint, a run or a shipped model; the student has its network, process and classes. All
else is as for fastdiff train.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastdiff.checkpoints import checkpoint
from fastdiff.cli import data_options, objective_options
from fastdiff.cli.parsing import positive
from fastdiff.cli.train import Kind, run_as
from fastdiff.cli.train_options import add_run_arguments, add_training_arguments
from fastdiff.common.errors import InputError
from fastdiff.common.world import present
from fastdiff.data.training_images import TrainingImages
from fastdiff.losses import few_steps
from fastdiff.objectives import Objective
from fastdiff.training import pairs
from fastdiff.training.distillation import Teacher, distillation
from fastdiff.training.run_lock import run_lock
from fastdiff.training.trainer import Trainer, TrainingOptions

PAIRS, PAIR_STEPS = 10_000, 50  # defaults of --pairs and --pair-steps
LABEL_DROPOUT = 0.1  # where the teacher has a class for hidden labels


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of ``fastdiff distill``."""
    add_run_arguments(command)
    group = command.add_argument_group("distillation")
    group.add_argument(
        "teacher", nargs="?", metavar="TEACHER",
        help="a checkpoint folder, the folder of a run or the name of a shipped model; with "
        "--resume, where it is now, if it has moved",
    )  # fmt: skip
    group.add_argument("--method", choices=few_steps.NAMES, help="must be given")
    group.add_argument(
        "--few-steps", type=positive, metavar="N",
        help="steps that the student is to draw in: for progressive half of the teacher's, else "
        f"what fastdiff sample takes by itself (default: {few_steps.FEW_STEPS['consistency']} for "
        f"consistency, {few_steps.FEW_STEPS['reflow']} for reflow)",
    )  # fmt: skip
    objective_options.add_intervals_argument(group, few_steps.TAUGHT_INTERVALS)
    group.add_argument(
        "--teacher-guidance", type=float, default=1.0, metavar="SCALE",
        help="of classifier-free guidance, which the student then has built in",
    )  # fmt: skip
    group.add_argument(
        "--pairs", type=positive, metavar="N",
        help=f"of noise and image that the teacher makes for reflow (default: {PAIRS})",
    )  # fmt: skip
    group.add_argument(
        "--pair-steps", type=positive, metavar="N",
        help=f"of the solver that makes them (default: {PAIR_STEPS})",
    )  # fmt: skip
    # Of the teacher's images; --validation reads by them.
    command.set_defaults(image_size=None, grayscale=False, unconditional=False)
    data = command.add_argument_group("data")
    data.add_argument("--data", help=f"{data_options.HELP}; reflow needs none")
    data.add_argument("--flip", action="store_true", help="mirror half of the images")
    data_options.add_source_arguments(data)
    data_options.add_arguments(data)
    add_training_arguments(command)


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Train a student, and return the exit code."""
    return run_as(_Distill(), args, argv)


class _Distill(Kind):
    """The command ``fastdiff distill``; a new run's images come with its teacher and objective."""

    name = "distill"
    teacher: Teacher
    objective: Objective

    def add_arguments(self, command: argparse.ArgumentParser) -> None:
        add_arguments(command)

    def settled(self, args: argparse.Namespace) -> argparse.Namespace:
        for name, value in (("TEACHER", args.teacher), ("--method", args.method)):
            if value is None:
                raise InputError(f"say what to distill: {name} is missing")
        reflow = args.method == "reflow"
        wrong = ("data", "flip", "validation") if reflow else ("pairs", "pair_steps")
        for name in wrong:
            if getattr(args, name):
                other = "the methods that train on images" if reflow else "reflow"
                raise InputError(f"--{name.replace('_', '-')} is for {other}, not {args.method}")
        if not reflow and args.data is None:
            raise InputError("say what to train on: --data digits or --data FOLDER")
        if args.teacher not in checkpoint.shipped():
            args.teacher = str(checkpoint.resolve(args.teacher))
        taught = checkpoint.load(args.teacher)
        args.image_size, args.grayscale = taught.image_size, taught.channels == 1
        args.unconditional = not taught.classes
        if taught.null_class:
            args.label_dropout = args.label_dropout or LABEL_DROPOUT
        if reflow:
            args.pairs, args.pair_steps = args.pairs or PAIRS, args.pair_steps or PAIR_STEPS
        return args

    def images(
        self, args: argparse.Namespace, options: TrainingOptions, device: torch.device
    ) -> TrainingImages:
        if args.teacher not in checkpoint.shipped():
            args.teacher = str(Path(args.teacher).absolute())
        reflow, kept = args.method == "reflow", args.out / pairs.NAME
        if args.resume:  # the trainer reads the teacher, if it still needs it
            return pairs.read(kept) if reflow else self.read(args, self._found(args))
        teacher = Teacher.read(args.teacher, guidance=args.teacher_guidance, device=device)
        self.teacher, self.objective = (
            teacher,
            distillation(
                args.method,
                teacher,
                steps=options.steps,
                few_steps=args.few_steps,
                intervals=objective_options.interval_counts(args.intervals),
                pairs=(args.seed, args.pairs) if reflow else None,
            ),
        )
        if reflow:
            return self._pairs(args, kept)
        images, classes = self.read(args, self._found(args)), teacher.trained.classes
        if images.classes != classes:
            raise InputError(f"the teacher has the classes {classes}, the data {images.classes}")
        return images

    def _found(self, args: argparse.Namespace) -> data_options.Found:
        return data_options.find(args, args.image_size, grayscale=args.grayscale)

    def _pairs(self, args: argparse.Namespace, path: Path) -> TrainingImages:
        """The images of the run's pairs, made unless an interrupted start has made them."""
        world, teacher = present(), self.teacher
        made = {"count": args.pairs, "seed": args.seed, "steps": args.pair_steps, **teacher.record}
        del made["path"]  # the checksum tells the teacher
        if not world.largest(path.exists()):
            images = pairs.make(
                teacher, args.pairs, seed=args.seed, steps=args.pair_steps, world=world,
                progress="making pairs" if world.first else False,
            )  # fmt: skip

            def write() -> None:
                with run_lock(args.out):
                    pairs.write(images, path, made)

            world.by_first(write)
        return pairs.read(path, made)

    def trainer(
        self,
        args: argparse.Namespace,
        options: TrainingOptions,
        images: TrainingImages,
        device: torch.device,
        **common: Any,
    ) -> Trainer:
        return Trainer(
            self.teacher.student(args.method, options.seed),
            self.objective.forward,
            images,
            options,
            prediction=self.objective.prediction,
            objective=self.objective,
            out=args.out,
            **common,
        )
