"""What each of several processes does in ``test_shards.py``; run as a program.

``sharded_run.py FOLDER`` writes what each process found to FOLDER/found-RANK.pt.
``sharded_run.py FOLDER killed`` trains in shards until the second process is killed.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from fastdiff import schedules
from fastdiff.common.errors import InputError, TrainingError
from fastdiff.common.world import present, process_group
from fastdiff.data.datasets import ImageSet
from fastdiff.nn.image_unet import make_karras_unet
from fastdiff.training import Trainer, TrainingOptions, make_unet, validation
from fastdiff.training.observers import Observer

STEPS = 3
# Neither the images of a batch nor the rows of most weights can be divided evenly by 2 or 3.
OPTIONS = TrainingOptions(
    steps=4, batch_size=7, lr=1e-2, warmup=2, save_every=2, sample_every=4, validate_every=2,
    seed=1, label_dropout=0.3, ema=(0.9, 0.5), ema_std=(0.1,), snapshots=2, grad_clip=0.5,
    compile=False,
)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate": 2, "channels_last": False, "gradient_checkpointing": True},
    "sgd": {"optimizer": "sgd", "momentum": 0.5, "weight_decay": 0.01},
    "karras": {"karras": True, "label_dropout": 0.0},
}


def images() -> ImageSet:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(256, (11, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(11) % 2, ("left", "right"), "arrows", flip=True)


def make_trainer(
    *, out: Path | None = None, karras: bool = False, wrap: Any = None, **changes: Any
) -> Trainer:
    """A trainer in shards if there are several processes and nothing else is said."""
    torch.manual_seed(present().rank)  # the first process's weights count
    classes = 3 if changes.get("label_dropout", 1) else 2
    if karras:
        model: Any = make_karras_unet(
            8, 1, classes, widths=(8, 16), layers_per_block=1, attention=(1,)
        )
        nn.init.constant_(model.out_gain, 0.1)  # not zero, so that every layer has a gradient
    else:
        model = make_unet(8, 1, classes, widths=(9, 18), layers_per_block=1, attention=(1,))
        nn.init.normal_(model.conv_out.weight, std=0.1)
    changes = {"shard": present().count > 1, **changes}
    with patch.object(validation, "FEWEST", 32):  # losses that a mean is taken of, to save time
        return Trainer(
            model if wrap is None else wrap(model), schedules.cosine(4), images(),
            dataclasses.replace(OPTIONS, **changes), prediction="v", out=out, validation=images(),
        )  # fmt: skip


def results(trainer: Trainer) -> dict[str, Any]:
    """Losses of three steps, and in the first process every tensor that the run goes on from."""
    losses = [(trainer.step(), trainer.gradient_norm) for _ in range(STEPS)]
    tensors = trainer._state()[0]
    for profile in trainer.averages.profiles:
        state = trainer.averages.state(profile.name)
        tensors = tensors | {f"{profile.name}.{name}": value for name, value in state.items()}
    return {
        "losses": losses,
        "tensors": {name: value.detach().clone() for name, value in tensors.items()},
        "validation": trainer.validation_losses(),
    }


def kept(trainer: Trainer) -> list[int]:
    """How many numbers this process keeps of weights, moments and averages, and of how many."""
    trainer.step()
    weights = [p for _, p in trainer._named_parameters()]
    moments = [v for p in weights for k, v in trainer.optimizer.state[p].items() if k != "step"]
    averages = [v for values in trainer.averages.sets for v in values]
    # A view of a larger tensor would keep all of it.
    own = sum(t.untyped_storage().nbytes() // 4 for t in (*weights, *moments, *averages))
    whole = sum(p.numel() for p in trainer.parameters)
    return [own, whole * (1 + 2 + len(trainer.averages.sets))]


def error_of(action: Any) -> str:
    try:
        action()
    except (InputError, TrainingError) as error:
        return str(error)
    return "none"


def not_finite() -> str:
    """The error of every process if the last image's loss is not finite."""
    trainer = make_trainer()
    losses, world = trainer.losses, trainer.world
    trainer.losses = lambda batch: (  # type: ignore[method-assign]
        losses(batch) * (torch.nan if world.rank == world.count - 1 else 1)
    )
    return error_of(trainer.step)


class Grids(Observer):
    """Keeps the steps of the sample grids."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def grid(self, step: int, picture: Any) -> None:
        self.steps.append(step)


def runs(folder: Path) -> dict[str, Any]:
    """A run of four steps, one that is resumed after two, and two steps more without shards."""
    grids = Grids()
    whole = make_trainer(out=folder / "whole", keep=9)
    whole.run(progress=False, observers=[grids])
    if present().count == 2:
        half = make_trainer(out=folder / "half", keep=9)
        for _ in range(2):
            half.step()
        half.save()
        Trainer.resume(folder / "half", images()).run(progress=False)
    again = Trainer.resume(folder / "whole", images(), dataclasses.replace(OPTIONS, steps=6))
    return {"grids": grids.steps, "continued": [again.step() for _ in range(2)]}


def main(folder: Path) -> None:
    with process_group() as world, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        cases = CASES if world.count == 2 else {"plain": {}}
        found: dict[str, Any] = {
            name: results(make_trainer(**case)) for name, case in cases.items()
        }
        found["said"] = [str(warning.message) for warning in warned]
        found["kept"] = kept(make_trainer())
        found |= runs(folder)
        if world.count == 2:
            found["not finite"] = not_finite()
            found["wrapped"] = error_of(lambda: make_trainer(wrap=torch.nn.DataParallel))
        torch.save(found, folder / f"found-{world.rank}.pt")


def killed(folder: Path) -> None:
    """The second process is killed in its second step; the error of the first is written."""
    with process_group() as world:
        trainer = make_trainer()
        trainer.step()
        losses = trainer.losses

        def dying(batch: Any) -> Any:
            if world.rank:
                os.kill(os.getpid(), signal.SIGKILL)
            return losses(batch)

        trainer.losses = dying  # type: ignore[method-assign]
        (folder / "said").write_text(error_of(trainer.step))
        os._exit(3)


if __name__ == "__main__":
    (killed if sys.argv[2:] == ["killed"] else main)(Path(sys.argv[1]))
