"""Train a tiny model of scikit-learn's digits, interrupt it, resume it: the same bits come out.

python examples/train_and_resume.py --steps 200 --out digits.png
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from fastdiff import data, schedules
from fastdiff.data.image_grid import save
from fastdiff.training import Trainer, TrainingOptions, make_unet

SIZE = {"widths": (32, 64), "layers_per_block": 1, "attention": (1,)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, default=200, help="of the optimizer")
    options.add_argument("--batch-size", type=int, default=32, help="images a step")
    options.add_argument(
        "--out", type=Path, default=Path("digits.png"), help="a picture of samples"
    )
    args = options.parse_args()

    digits = data.digits("train", 8)
    recipe = TrainingOptions(
        steps=args.steps, batch_size=args.batch_size, warmup=10, ema=0.98, sample_every=0
    )

    def new(out: Path | None) -> Trainer:
        torch.manual_seed(0)  # of the weights; everything else is seeded by the recipe
        unet = make_unet(digits.size, digits.channels, len(digits.classes), **SIZE)
        return Trainer(unet, schedules.cosine(), digits, recipe, prediction="v", out=out)

    whole = new(None)
    whole.run(progress=False)
    with tempfile.TemporaryDirectory() as folder:
        first = new(Path(folder))
        for _ in range(args.steps // 2):
            first.step()
        first.save()
        second = Trainer.resume(folder, digits, recipe)
        second.run(progress=False)
    pairs = zip(whole.network.parameters(), second.network.parameters(), strict=True)
    same = all(torch.equal(one, other) for one, other in pairs)
    print(
        f"resumed after {args.steps // 2} of {args.steps} steps: weights equal bit for bit: {same}"
    )
    save(second.preview(), args.out)
    print(args.out)


if __name__ == "__main__":
    main()
