"""Straighten a tiny flow model of scikit-learn's digits by reflow, and draw both in one step.

python examples/reflow.py --steps 300 --pairs 500 --out digits.png
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from fastdiff import data, schedules
from fastdiff.data.image_grid import grid, save
from fastdiff.training import Trainer, TrainingOptions, make_unet, pairs
from fastdiff.training.distillation import Teacher, distillation


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, default=300, help="of each training")
    options.add_argument("--pairs", type=int, default=500, help="of noise and image")
    options.add_argument("--out", type=Path, default=Path("digits.png"), help="a picture")
    args = options.parse_args()

    digits = data.digits("train", 8)
    recipe = TrainingOptions(steps=args.steps, batch_size=32, warmup=10, ema=0.98, sample_every=0)
    torch.manual_seed(0)
    unet = make_unet(8, 1, 10, widths=(32, 64), layers_per_block=1, attention=())
    with tempfile.TemporaryDirectory() as folder:
        first = Trainer(unet, schedules.flow(), digits, recipe, prediction="flow", out=folder)
        first.run(progress=False)
        teacher = Teacher.read(folder)
    made = pairs.make(teacher, args.pairs, seed=1, steps=20, progress=False)
    objective = distillation("reflow", teacher, steps=args.steps, pairs=(1, args.pairs))
    student = Trainer(
        teacher.student("reflow"), objective.forward, made, recipe,
        prediction="flow", objective=objective,
    )  # fmt: skip
    student.run(progress=False)

    noise = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = {}
    for name, model, steps in (
        ("teacher, 50 steps", teacher.trained, 50),
        ("teacher, 1 step", teacher.trained, 1),
        ("student, 1 step", student.checkpoint(), 1),
    ):
        sampler = model.diffusion().sampler("euler", steps, grid="trailing")
        rows[name] = model.sample(sampler, labels=range(10), noise=noise, progress=False)
    best = rows["teacher, 50 steps"]
    for name, images in list(rows.items())[1:]:
        print(f"{name}: {(images - best).square().mean().sqrt():.3f} from the teacher's 50")
    save(grid(torch.cat([*rows.values()]), 10, labels=list(rows)), args.out)
    print(args.out)


if __name__ == "__main__":
    main()
