"""What each of several processes does in ``test_distributed.py``; run as a program.

``distributed_run.py FOLDER`` writes what each process found to FOLDER/found-RANK.pt.
``distributed_run.py FOLDER killed`` is ``fastdiff train``, whose second process is killed once.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastdiff.cli
from fastdiff import schedules
from fastdiff.checkpoints import checkpoint
from fastdiff.common.errors import CheckpointError, InputError, TrainingError
from fastdiff.common.world import World, present, process_group
from fastdiff.data.datasets import ImageSet
from fastdiff.evaluation import drawing
from fastdiff.evaluation.pictures import Pictures
from fastdiff.training import Trainer, TrainingOptions, make_unet
from fastdiff.training.validation import ValidationLoss

# Seven images in a batch: no number of processes or micro-batches divides them.
OPTIONS = TrainingOptions(
    steps=3, batch_size=7, lr=1e-2, warmup=2, save_every=100, sample_every=0, seed=1,
    label_dropout=0.3,
)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate": 2},
    "eager": {"compile": False, "channels_last": False, "accumulate": 2},
    "second moment": {"objective": "hybrid", "timestep_sampler": "loss-second-moment"},
}
COMMAND = [
    "train", "--resume-if-any", "--data", "digits", "--image-size", "8", "--channels", "8,16",
    "--layers-per-block", "1", "--attention", "1", "--dropout", "0.2", "--steps", "8",
    "--batch-size", "5", "--save-every", "3", "--sample-every", "4", "--out",
]  # fmt: skip
STOP = 2  # the step in which the first process is signalled


def images() -> ImageSet:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(256, (11, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(11) % 2, ("left", "right"), "arrows", flip=True)


def make_trainer(
    *, wrap: Any = None, out: Path | None = None, objective: str | None = None, **changes: Any
) -> Trainer:
    torch.manual_seed(present().rank)  # the first process's weights count
    model = make_unet(
        8, 1, 3, widths=(8, 16), layers_per_block=1, attention=(1,),
        learned_variance=objective == "hybrid",
    )  # fmt: skip
    nn.init.normal_(model.conv_out.weight, std=0.1)  # not zero, so that every layer has a gradient
    model = model if wrap is None else wrap(model)
    return Trainer(
        model, schedules.cosine(4), images(), dataclasses.replace(OPTIONS, **changes),
        prediction="eps" if objective else "v", objective=objective, out=out,
    )  # fmt: skip


def results(trainer: Trainer) -> dict[str, Any]:
    """Losses of three steps, then every tensor that the run would go on from."""
    losses = [trainer.step() for _ in range(OPTIONS.steps)]
    tensors, facts = trainer._state()
    averages = {f"average.{name}": value for name, value in trainer.ema.state_dict().items()}
    return {
        "losses": losses,
        "tensors": {name: value.detach().clone() for name, value in (tensors | averages).items()},
        "times": facts["timesteps"],
    }


def wrapped(model: nn.Module) -> nn.Module:
    model.to(memory_format=torch.channels_last)
    return nn.parallel.DistributedDataParallel(model)


def failing_write(folder: Path) -> str:
    """The error of every process if the first cannot write."""
    trainer = make_trainer(out=folder)
    trainer.step()
    if trainer.world.first:
        folder.mkdir()
        (folder / "checkpoints").write_text("in the way")
    try:
        trainer.save()
    except CheckpointError as error:
        return str(error)
    return "none"


def validated(fails: int | None = None) -> Any:
    """The validation losses that processes share, or the error if process ``fails`` has one."""
    trainer = make_trainer()
    shared = ValidationLoss(trainer.diffusion.objective, images(), batch_size=7)
    if trainer.world.rank == fails:
        shared._of_share = refuse  # type: ignore[method-assign]
    try:
        return shared.losses(trainer.network)
    except (MemoryError, ValueError) as error:
        return str(error)


def featured(world: World | None) -> dict[int, Any]:
    """Features that processes share, of fewer batches than processes and of more."""

    def sums(pixels: torch.Tensor) -> Any:
        calls.append(len(pixels))
        return pixels.double().flatten(1).cumsum(1).numpy()

    found, calls = {}, []
    for count in (1, 5):
        pixels = torch.arange(count * 3 * 4, dtype=torch.uint8).view(count * 3, 1, 2, 2)
        batches = pixels.split([3] * (count - 1) + [2, 1])
        features = Pictures.of(batches, sums, progress=False, world=world).features
        found[count] = {"features": torch.from_numpy(features), "calls": len(calls)}
    return found


def refuse(*arguments: Any) -> Any:
    raise MemoryError("no memory")


def not_finite() -> str:
    """The error of every process if the last image's loss is not finite."""
    trainer = make_trainer()
    losses, world = trainer.losses, trainer.world
    trainer.losses = lambda batch: (  # type: ignore[method-assign]
        losses(batch) * (torch.nan if world.rank == world.count - 1 else 1)
    )
    try:
        trainer.step()
    except TrainingError as error:
        return str(error)
    return "none"


def refused(trainer: Trainer, most: int, rank: int) -> dict[str, Any]:
    """The results of a trainer that has memory for ``most`` images in one process, and for any
    number in the others."""
    losses = trainer.losses

    def bounded(batch: Any) -> Any:
        if len(batch.x0) > most and trainer.world.rank == rank:
            raise torch.OutOfMemoryError("Tried to allocate 8 GiB")
        return losses(batch)

    trainer.losses = bounded  # type: ignore[method-assign]
    return results(trainer)


def signalled(folder: Path) -> dict[str, Any]:
    """A run whose last process alone is sent SIGTERM in its second step."""
    trainer = make_trainer(out=folder, steps=50, save_every=50)
    draw, world = trainer.draw, trainer.world

    def signalling(step: int) -> Any:
        if step + 1 == STOP and world.rank == world.count - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(step)

    trainer.draw = signalling  # type: ignore[method-assign]
    ended_by = trainer.run(progress=False)
    return {"signal": int(ended_by or 0), "step": trainer.finished_steps}


def drawn(world: World | None) -> dict[str, Any]:
    """Images that processes generated together, 3 at once and 5 in batches of 2."""
    digits = checkpoint.load("digits")
    ddim = digits.diffusion().sampler("ddim", 2)
    together = digits.generate(
        ddim, labels=[3, 1, 2], generator=torch.Generator().manual_seed(4), progress=False,
        world=world,
    )  # fmt: skip
    drawing.BATCH = 2
    batches = drawing.draw_in_batches(digits, ddim, labels=[5, 6, 7, 8, 9], world=world)
    error = "none"
    try:
        digits.generate(digits.diffusion().sampler("ddpm", 2), labels=[3], world=world)
    except InputError as refused:
        error = str(refused)
    return {
        "together": together.images,
        "evaluations": together.evaluations,
        "batches": torch.cat([samples.images for samples in batches]),
        "refused": error,
    }


def main(folder: Path) -> None:
    with process_group() as world:
        cases = CASES if world.count == 2 else {"plain": {}}  # three cost most of the time
        found: dict[str, Any] = {
            name: results(make_trainer(**case)) for name, case in cases.items()
        }
        if world.count == 2:
            found["wrapped"] = results(make_trainer(wrap=wrapped))
            found["failing write"] = failing_write(folder / "failing")
            found["not finite"] = not_finite()
            found["halved"] = refused(make_trainer(on_oom="halve"), most=1, rank=1)
            found["command"] = fastdiff.cli.main([*COMMAND, str(folder / "command")])
        found["drawn"] = drawn(world)
        found["featured"] = featured(world)
        found["validated"], found["not validated"] = validated(), validated(fails=1)
        found["signalled"] = signalled(folder / "signalled")
        trainer = Trainer.resume(folder / "signalled", images())
        trainer.step()
        found["resumed"] = {name: p.detach() for name, p in trainer.network.named_parameters()}
        found["joined"] = world.joined(torch.arange(*world.share(8)), 8)
        found["folders"] = sorted(path.name for path in (folder / "signalled").rglob("step-*"))
        found["whole"] = checkpoint.load(folder / "signalled").step
        torch.save(found, folder / f"found-{world.rank}.pt")


def killed(folder: Path) -> int:
    """``fastdiff train``; at the first start the second process is killed in its fifth step."""
    losses = Trainer.losses

    def dying(trainer: Trainer, batch: Any) -> Any:
        if trainer.finished_steps == 4 and trainer.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return losses(trainer, batch)

    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        Trainer.losses = dying  # type: ignore[method-assign]
    return fastdiff.cli.main([*COMMAND, str(folder / "command")])


if __name__ == "__main__":
    if sys.argv[2:] == ["killed"]:
        sys.exit(killed(Path(sys.argv[1])))
    main(Path(sys.argv[1]))
