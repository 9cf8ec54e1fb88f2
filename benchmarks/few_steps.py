"""Models trained for a few steps beside their teachers, on the 8x8 digits.

    python -m benchmarks.few_steps --out benchmarks/results --runs runs/few-steps

trains two teachers and students of each method through the command line, and measures 714 digits in
1, 2 and 4 steps. It writes few_steps.json, with the results of ``fastdiff eval`` by its command
("found") and the rows of the table ("rows"), and few_steps.png, with digits drawn in one step and
in four. Existing figures and trained models are kept, and an interrupted training is resumed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import rows, tables
from benchmarks.evaluations import Figures, command
from fastdiff import cli
from fastdiff.checkpoints import checkpoint
from fastdiff.cli.sampler_options import make_sampler
from fastdiff.data.image_grid import grid, save

TRAIN = "train --data digits --image-size 8 --channels 32,64 --attention none"
STUDENT = "--lr 5e-4"
STEPS, MANY = (1, 2, 4), 50
# Of each model the command that trains it, without its steps; {NAME} is the folder of another.
MODELS = {
    "ddpm": (f"{TRAIN} --objective ddpm", 2),
    "flow": (f"{TRAIN} --objective flow", 2),
    "progressive-8": (
        f"distill {{ddpm}} --method progressive --few-steps 8 --data digits {STUDENT}", 1,
    ),
    **{
        f"progressive-{n}": (
            f"distill {{progressive-{2 * n}}} --method progressive --data digits {STUDENT}", 1,
        )
        for n in (4, 2, 1)
    },
    "reflow": (f"distill {{flow}} --method reflow {STUDENT}", 2),
    "consistency": (f"{TRAIN} --objective consistency --sigma-max 40", 2),
    "distilled": (f"distill {{ddpm}} --method consistency --data digits {STUDENT}", 2),
}  # fmt: skip
# Of each row of the table: the model that draws in each number of steps, and its sampler.
TRAILING = "--option grid=trailing"
ROWS = {
    "ddpm by ddim": (dict.fromkeys((*STEPS, MANY), "ddpm"), f"--sampler ddim {TRAILING}"),
    "ddpm by unipc-2": (dict.fromkeys((2, 4), "ddpm"), "--sampler unipc-2"),
    "flow by euler": (dict.fromkeys((*STEPS, MANY), "flow"), f"--sampler euler {TRAILING}"),
    "progressive distillation of ddpm": ({n: f"progressive-{n}" for n in STEPS}, ""),
    "reflow of flow": (dict.fromkeys(STEPS, "reflow"), ""),
    "consistency training": (dict.fromkeys(STEPS, "consistency"), ""),
    "consistency distillation of ddpm": (dict.fromkeys(STEPS, "distilled"), ""),
}
SHOWN = (1, 4)  # numbers of steps in the picture


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, required=True, help="folder of the two files")
    options.add_argument("--runs", type=Path, required=True, help="folder of the trained models")
    options.add_argument(
        "--thousand", type=int, default=1000, metavar="N",
        help="training steps in place of each thousand, of which a model has one or two",
    )  # fmt: skip
    options.add_argument("--images", type=int, default=714, help="generated digits for a figure")
    args = options.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    folders: dict[str, Path] = {}
    for name in MODELS:
        folders[name] = trained(name, folders, args)
    figures = Figures(args.out / "few_steps.json")
    lines, pictures, labels = [], [], []
    for name, (models, way) in ROWS.items():
        asked = {}
        for steps, model in models.items():
            words = f"--checkpoint {folders[model]} {way} --steps {steps}"
            asked[str(steps)] = figures.of(f"{words} --samples {args.images}")
            if steps in SHOWN:
                pictures.append(drawn(folders[model], f"{way} --steps {steps}"))
                labels.append(f"{name}, {steps}")
        lines.append({"name": name, "commands": asked})
    figures.results["rows"] = lines
    figures.save()
    print(tables.markdown(rows.few_steps(figures.results)))
    save(grid(torch.cat(pictures), 10, labels=labels), args.out / "few_steps.png")
    tables.publish(args.out)


def trained(name: str, folders: dict[str, Path], args: argparse.Namespace) -> Path:
    """The last checkpoint of a model, whose training is begun or resumed if necessary."""
    words, thousands = MODELS[name]
    steps, run = thousands * args.thousand, args.runs / name
    last = checkpoint.step_folder(run, steps)
    if not last.exists():
        print(f"training {name}", flush=True)
        begun = checkpoint.newest(run) is not None
        asked = words.format(**folders).split()
        asked = [asked[0], "--resume"] if begun else [*asked, "--steps", str(steps), "--seed", "0"]
        command([*asked, "--sample-every", "0", "--out", str(run)])
    return last


def drawn(folder: Path, way: str) -> torch.Tensor:
    """One digit of each class, [10, 1, S, S]."""
    model = checkpoint.load(folder)
    sampler = make_sampler(cli.parser().parse_args(["eval", *way.split()]), model)
    generator = torch.Generator().manual_seed(0)
    return model.sample(sampler, labels=range(10), generator=generator, progress=False)


if __name__ == "__main__":
    main()
