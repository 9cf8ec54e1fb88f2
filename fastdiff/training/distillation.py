"""Teachers and students: training for a few steps, and its way back after an interruption.

A teacher is a trained model in a folder. What a run must know of it is recorded in its checkpoints:
where the teacher is, and the checksum of its weights, so that a resumed run learns from the same.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff import objectives, schedules
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.folder import checksums, field, optional_field
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.common.errors import CheckpointError, InputError
from fastdiff.common.inputs import check_choice, checked_seeds
from fastdiff.common.model import Model
from fastdiff.common.seeds import seeded
from fastdiff.losses import few_steps as few
from fastdiff.losses.few_steps import FewSteps
from fastdiff.losses.prediction import predict
from fastdiff.nn import ImageNetwork
from fastdiff.objectives import Forward, Objective
from fastdiff.sampling.quick import quick
from fastdiff.schedules import FlowSchedule

MANY = (None, *(name for name in objectives.NAMES if name not in few.NAMES), "reflow")


@dataclass(frozen=True)
class Teacher:
    """A trained model to learn from.

    Attributes:
        path: the name of a shipped model, or the checkpoint's folder, absolute.
        checksum: SHA-256 of its file of weights.
        trained: the model with its process.
        guidance: scale of classifier-free guidance with which it teaches; 1 is none.
    """

    path: str
    checksum: str
    trained: Checkpoint
    guidance: float = 1.0

    @classmethod
    def read(
        cls, path: str | Path, *, guidance: float = 1.0, device: str | torch.device = "cpu"
    ) -> Teacher:
        """Read a teacher.

        Args:
            path: as of ``checkpoint.load``.
            guidance: scale of classifier-free guidance.
            device: where it is to compute.

        Raises:
            CheckpointError: there is no such checkpoint, or it is damaged.
            InputError: it also predicts its variance or is self-conditioned, or guidance of a model
                without null class.
        """
        folder, trained = checkpoint.resolve(path).absolute(), checkpoint.load(path)
        if trained.diffusion().objective.learned:
            raise InputError(
                f"the teacher {path} also predicts its variance, which steps without noise do not "
                "use; take one of a fixed variance"
            )
        if getattr(trained.model.config, "self_condition", False):
            raise InputError(
                f"the teacher {path} is self-conditioned: it is no function of x and t"
            )
        if guidance != 1 and not trained.null_class:
            raise InputError(f"guidance {guidance} needs a teacher trained with label dropout")
        trained.model.to(device)
        named = str(path) if str(path) in checkpoint.shipped() else str(folder)
        return cls(named, checksums(folder)[checkpoint.WEIGHTS], trained, guidance)

    @property
    def record(self) -> dict[str, Any]:
        """By what :func:`restored` finds the teacher again, for JSON."""
        return {"path": self.path, "sha256": self.checksum, "guidance": self.guidance}

    def network(self) -> Model:
        """The network that teaches, (x_t, label[, class_labels]) -> prediction."""
        network = quick(self.trained.model.eval().requires_grad_(False))
        if self.guidance == 1:
            return network
        null, scale = len(self.trained.classes), self.guidance

        def guided(x_t: Tensor, t: Tensor, class_labels: Tensor) -> Any:
            labels = torch.cat([torch.full_like(class_labels, null), class_labels])
            both = torch.cat([x_t, x_t]), torch.cat([t, t]), {"class_labels": labels}
            without, wanted = predict(network, *both)[0].chunk(2)
            return without + scale * (wanted - without)

        return guided

    def process(self, method: str) -> tuple[Forward, str]:
        """The forward process and the prediction of a student."""
        own = self.trained.forward, self.trained.prediction
        straight = isinstance(own[0], FlowSchedule) and own[1] == "flow"
        return (schedules.flow(), "flow") if method == "reflow" and not straight else own

    def student(self, method: str, seed: int = 0) -> ImageNetwork:
        """A network to train: the teacher's copy, or where that predicts something else a new one.

        Args:
            method: one of ``losses.few_steps.NAMES``.
            seed: of a new network's weights.
        """
        model = self.trained.model
        if self.process(method) == (self.trained.forward, self.trained.prediction):
            return copy.deepcopy(model).requires_grad_(True)
        with seeded(seed, torch.get_default_device()):
            student = type(model)(**model.config.to_dict())
        student.to(next(model.parameters()).device)
        return student


def distillation(
    method: str,
    teacher: Teacher,
    *,
    steps: int,
    few_steps: int | None = None,
    intervals: tuple[int, int] | None = None,
    pairs: tuple[int, int] | None = None,
) -> Objective:
    """The objective of a student, for ``Trainer(objective=)``.

    Args:
        method: one of ``losses.few_steps.NAMES``.
        teacher: what it learns from.
        steps: of the training.
        few_steps: steps that the student is to be sampled in. For progressive it is half of the
            teacher's, if that is a student too, and must be given otherwise.
        intervals: of consistency, their number at first and at last; None for 40 throughout.
        pairs: of reflow, the seed and the number of the pairs, see ``fastdiff.training.pairs``.

    Raises:
        InputError: a method that does not go with the teacher or the options.
    """
    try:
        check_choice("method", method, few.NAMES)
    except ValueError as error:
        raise InputError(str(error)) from None
    if intervals is not None and method != "consistency":
        raise InputError(f"intervals are for consistency, not for {method}")
    if (pairs is None) == (method == "reflow"):
        raise InputError("reflow trains on pairs, and no other method does")
    taught = teacher.trained
    if method == "progressive":
        few_steps = _halved(taught, few_steps)
    elif taught.objective not in MANY:
        raise InputError(
            f"{method} follows a teacher along its ODE, which one of {taught.objective} has left; "
            "take the model that it was made of"
        )
    if method == "consistency":
        intervals = intervals or few.TAUGHT_INTERVALS
    record = {
        "name": method, "few_steps": few_steps, "intervals": intervals, "steps": steps,
        "teacher": teacher.record, "pairs": pairs,
    }  # fmt: skip
    return _made(record, *teacher.process(method), teacher)


def consistency_training(
    forward: Forward, prediction: str, steps: int, intervals: tuple[int, int] | None = None
) -> Objective:
    """The objective of consistency training without a teacher.

    Args:
        forward: the forward process, a schedule or an SDE.
        prediction: what the model predicts.
        steps: of the training, over which the intervals double.
        intervals: their number at first and at last; None for the defaults.

    Raises:
        InputError: options that do not fit the process or each other.
    """
    record = {"name": "consistency", "steps": steps, "intervals": intervals or few.INTERVALS}
    return _made(record, forward, prediction, None)


def restored(
    facts: Mapping[str, Any],
    saved: Checkpoint,
    path: Path,
    device: str | torch.device,
    moved: str | Path | None = None,
) -> Objective | str | None:
    """The objective of a run to resume: its name, unless it is one of a few steps.

    Args:
        facts: JSON values of the training state.
        saved: the checkpoint.
        path: the file of ``facts``, for the text of errors.
        device: where the teacher is to compute.
        moved: where the teacher is now; None for where it was.

    Raises:
        CheckpointError: the teacher is missing or has other weights, or the record is damaged.
        InputError: ``moved`` for a run that has no teacher.
    """
    record = optional_field(facts, "objective", dict, path)
    known = optional_field(record or {}, "teacher", dict, path)
    if moved is not None and known is None:
        raise InputError("the run has no teacher")
    if record is None:
        return saved.objective
    teacher = None
    if known is not None and record.get("name") != "reflow":  # which has its pairs
        where = moved or field(known, "path", str, path)
        try:
            teacher = Teacher.read(
                where, guidance=field(known, "guidance", float, path), device=device
            )
        except CheckpointError as error:
            raise CheckpointError(
                f"the run's teacher is not at {where}: {error}; say where it is now"
            ) from None
        if teacher.checksum != known.get("sha256"):
            raise CheckpointError(
                f"the run learns from another teacher than {where}: the SHA-256 of its weights is "
                f"{known.get('sha256')}, that of these {teacher.checksum}"
            )
    try:
        return _made(record, saved.forward, saved.prediction, teacher)
    except (InputError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: unusable objective {record!r}: {error}") from None


def _made(
    record: Mapping[str, Any], forward: Forward, prediction: str, teacher: Teacher | None
) -> Objective:
    """The objective of a record."""
    intervals, pairs = record["intervals"], record.get("pairs")
    plan = FewSteps(
        few_steps=record.get("few_steps"),
        teacher=None if teacher is None else teacher.network(),
        steps=record["steps"],
        intervals=None if intervals is None else (intervals[0], intervals[1]),
        seeds=None if pairs is None else checked_seeds(pairs[0], None, pairs[1]),
        record=record,
    )
    return objectives.make(record["name"], forward, prediction, plan=plan)


def _halved(taught: Checkpoint, few_steps: int | None) -> int:
    """The steps of a student of progressive distillation; InputError unless they fit its teacher.

    A teacher of many steps may take any number.
    """
    if taught.objective not in (*MANY, "progressive"):
        raise InputError(f"progressive wants a teacher of an ODE, got one of {taught.objective}")
    if taught.objective == "progressive":
        assert taught.few_steps is not None
        if taught.few_steps % 2 or few_steps not in (None, taught.few_steps // 2):
            raise InputError(
                f"the teacher has {taught.few_steps} steps, and its student half of them, got "
                f"{few_steps}"
            )
        return taught.few_steps // 2
    if few_steps is None:
        raise InputError("say in how many steps the student is to draw: few_steps")
    return few_steps
