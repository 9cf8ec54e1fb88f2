"""Draw the digits by several samplers from the same noise, a row a sampler, in one picture.

python examples/samplers.py --samplers ddim dpmpp-2m unipc-2 heun --steps 5 --out samplers.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastdiff import samplers
from fastdiff.checkpoints import checkpoint
from fastdiff.data.image_grid import grid, save

GRID = {"grid": "logsnr", "sigma_max": 80.0}  # even steps in the logarithm of signal over noise


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument(
        "--samplers", nargs="+", choices=samplers.names(), metavar="NAME",
        default=["ddpm", "ddim", "dpmpp-2m", "unipc-2"], help=", ".join(samplers.names()),
    )  # fmt: skip
    options.add_argument("--steps", type=int, default=5, help="of each sampler")
    options.add_argument("--seed", type=int, default=0, help="of all noise")
    options.add_argument("--out", type=Path, default=Path("samplers.png"), help="the picture")
    args = options.parse_args()

    digits = checkpoint.load("digits")  # a model that comes with fastdiff
    labels = range(len(digits.classes))
    rows, texts = [], []
    for name in args.samplers:
        sampler = samplers.make(
            name, digits.forward, args.steps, prediction=digits.prediction, **GRID
        )
        generator = torch.Generator().manual_seed(args.seed)  # the same noise for every sampler
        rows.append(digits.sample(sampler, labels=labels, generator=generator, progress=False))
        texts.append(f"{name}, {sampler.table.rows} evaluations")
        print(texts[-1])
    save(grid(torch.cat(rows), len(labels), labels=texts), args.out)
    print(args.out)


if __name__ == "__main__":
    main()
