"""Every objective trained on the 8x8 digits: quality of samples, bits per value, guidance.

    python -m benchmarks.objectives --out benchmarks/results --runs runs/objectives

trains, samples and measures through the command line, so that anybody can repeat every figure by
one command. It writes, prints as tables, and renders in the documentation

    objectives.json, .png   each objective by several samplers: Frechet distance, class accuracy,
                            bits per value of held-out digits; the .png has a row of samples of each
    guidance.json, .png     distance and accuracy against the scale of guidance, by a classifier
                            and classifier-free

A .json holds the results of ``fastdiff eval`` by its command ("found"), and the rows of the table,
which name those commands ("rows"). It is written after every figure. Existing figures and trained
models are kept, and an interrupted training is resumed; delete a file to have it made anew.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import rows, tables
from benchmarks.evaluations import Figures, command
from fastdiff import cli
from fastdiff.checkpoints import checkpoint, classifier_checkpoint
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.cli.sampler_options import make_sampler, sampler_facts
from fastdiff.data.datasets import digits
from fastdiff.data.image_grid import grid, save
from fastdiff.samplers import Sampler
from fastdiff.sde import Solver
from fastdiff.training.classifier_trainer import ClassifierOptions, ClassifierTrainer

SIZE = 8
TRAIN = f"train --data digits --image-size {SIZE} --label-dropout 0.1 --seed 0"
ADAPTIVE = "--sampler adaptive"
TO_A_TOLERANCE = "--sampler ode --option rtol=1e-3 --option atol=1e-3"
# For each model the options of its training, and options of the samplers to measure; "" is the
# default sampler. No two of the 8x8 digits are further apart than 16, so sigma_max = 16 is enough
# noise (Song & Ermon 2020, technique 1).
OBJECTIVES: dict[str, tuple[str, tuple[str, ...]]] = {
    "ddpm": ("--objective ddpm", ("", "--sampler unipc-2 --steps 20", TO_A_TOLERANCE)),
    "hybrid": ("--objective hybrid", ("", "--sampler ddim --steps 50")),
    "vlb": ("--objective vlb", ("", "--sampler ddim --steps 50")),
    "dsm-vp": ("--objective dsm --sde vp", (ADAPTIVE, "--sampler ddim --steps 50")),
    "dsm-subvp": (
        "--objective dsm --sde subvp",
        (ADAPTIVE, "--sampler euler-maruyama --steps 50"),
    ),
    "dsm-ve": (
        "--objective dsm --sde ve --sigma-max 16",
        (ADAPTIVE, "--sampler reverse-diffusion --steps 100 --option corrector=langevin"),
    ),
    "ncsn": ("--objective ncsn --sigma-max 16", ("", ADAPTIVE)),
    "edm": ("--objective edm --sigma-max 40", ("", "--sampler dpmpp-2m-sde --steps 20")),
    "flow": ("--objective flow", ("", "--sampler euler --steps 50", TO_A_TOLERANCE)),
}
GUIDED = {"ddpm": "--sampler ddim --steps 50", "dsm-vp": ADAPTIVE}
KINDS = {
    "classifier": "--guidance 0 --classifier {classifier} --classifier-scale {scale:g}",
    "classifier-free": "--guidance {scale:g}",
}
OWN_STEPS = ("--sampler ode", "--sampler adaptive")


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, required=True, help="folder of the four files")
    options.add_argument("--runs", type=Path, required=True, help="folder of the trained models")
    options.add_argument("--steps", type=int, default=2000, help="training steps of a model")
    options.add_argument(
        "--classifier-steps", type=int, default=1000, help="training steps of a classifier"
    )
    options.add_argument(
        "--images", type=int, default=714, help="generated digits for each figure, at least 100"
    )
    options.add_argument("--bits", type=int, default=100, help="held-out digits to code")
    options.add_argument("--scales", type=float, nargs="+", default=(0, 1, 2, 4), metavar="S")
    options.add_argument(
        "--sampling-steps", type=int, metavar="N",
        help="for every sampler that has steps; multiples of 5 of at least 10 suit all samplers",
    )  # fmt: skip
    options.add_argument(
        "--only", nargs="+", choices=OBJECTIVES, metavar="NAME", help="measure these models alone"
    )
    args = options.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    models = {name: trained(name, args) for name in args.only or OBJECTIVES}
    compare_objectives(models, args)
    compare_guidance({name: models[name] for name in GUIDED if name in models}, args)
    tables.publish(args.out)


def trained(name: str, args: argparse.Namespace) -> Path:
    """The last checkpoint of an objective's training, which is started or resumed if necessary."""
    run = args.runs / name
    last, newest = checkpoint.step_folder(run, args.steps), checkpoint.newest(run)
    if last.exists():
        return last
    words = f"{TRAIN} {OBJECTIVES[name][0]} --steps {args.steps}".split()
    if newest is not None:
        steps = checkpoint.read_facts(newest)["options"]["steps"]
        if steps != args.steps:
            sys.exit(f"{run} is a run of {steps} steps, not {args.steps}: choose another --runs")
        words = ["train", "--resume"]
    print(f"training {name}", flush=True)
    command([*words, "--out", str(run)])
    return last


def trained_classifier(name: str, model: Path, args: argparse.Namespace) -> Path:
    """The classifier that guides a model, trained if necessary.

    If its training is interrupted, it is not kept.
    """
    folder: Path = args.runs / f"{name}-classifier" / f"step-{args.classifier_steps:08d}"
    if not folder.exists():
        print(f"training the classifier of {name}", flush=True)
        trainer = ClassifierTrainer(
            checkpoint.load(model),
            digits("train", SIZE),
            options=ClassifierOptions(steps=args.classifier_steps),
        )
        ended_by = trainer.run()
        if ended_by is not None:
            sys.exit(128 + ended_by)
        classifier_checkpoint.save(trainer.classifier(digits("test", SIZE)), folder)
    return folder


def with_steps(way: str, steps: int | None) -> str:
    """The sampler options ``way``, with a number of steps unless the sampler chooses its steps."""
    return way if steps is None or way.startswith(OWN_STEPS) else f"{way} --steps {steps}"


def compare_objectives(models: dict[str, Path], args: argparse.Namespace) -> None:
    """Measure each model's samples and bits, and write objectives.json and .png."""
    figures, lines, pictures = Figures(args.out / "objectives.json"), [], []
    for name, model in models.items():
        trained_model, bits = (
            checkpoint.load(model),
            f"--bits {args.bits}",
        )  # once, with the default
        for way in OBJECTIVES[name][1]:
            way = with_steps(way, args.sampling_steps)
            asked = cli.parser().parse_args(["eval", *way.split()])
            sampler = make_sampler(asked, trained_model)
            words = f"--checkpoint {model} --samples {args.images} {bits} {way}"
            lines.append(
                {
                    "objective": name,
                    "sampler": sampler_text(sampler),
                    "command": figures.of(words),
                }
            )
            if bits:
                pictures.append(one_of_each(trained_model, sampler))
            bits = ""
    figures.results["rows"] = lines
    figures.save()
    print(tables.markdown(rows.objectives(figures.results)))
    real = digits("test", SIZE)
    assert real.labels is not None
    pictures.append(real.images[[int((real.labels == i).nonzero()[0]) for i in range(10)]])
    labels = [*models, "held-out"]
    save(grid(torch.cat(pictures), 10, labels=labels), args.out / "objectives.png")


def one_of_each(model: Checkpoint, sampler: Sampler | Solver) -> torch.Tensor:
    """One generated image of each digit, [10, 1, S, S]."""
    return model.sample(
        sampler, labels=range(10), generator=torch.Generator().manual_seed(0), progress=False
    )


def sampler_text(sampler: Sampler | Solver) -> str:
    """A sampler's name and steps, and a solver's options."""
    name, steps = sampler_facts(sampler).values()
    options = sampler.options if isinstance(sampler, Solver) else {}
    told = [f"{option}={value}" for option, value in options.items()]
    return ", ".join([name, *([] if steps is None else [f"{steps} steps"]), *told])


def compare_guidance(models: dict[str, Path], args: argparse.Namespace) -> None:
    """Measure samples against the scale of guidance, and write guidance.json and .png."""
    figures = Figures(args.out / "guidance.json")
    commands: dict[str, list[str]] = {}
    for name, model in models.items():
        guide, way = trained_classifier(name, model, args), GUIDED[name]
        for kind, options in KINDS.items():
            asked = [
                f"--checkpoint {model} --samples {args.images} "
                f"{with_steps(way, args.sampling_steps)} "
                + options.format(classifier=guide, scale=scale)
                for scale in args.scales
            ]
            commands[f"{name}, {kind}"] = [figures.of(words) for words in asked]
    if commands:
        lines = [{"name": name, "commands": asked} for name, asked in commands.items()]
        figures.results |= {"scales": list(args.scales), "rows": lines}
        figures.save()
        print(tables.markdown(rows.guidance(figures.results)))
        guided = {
            name: [figures.results["found"][asked] for asked in every]
            for name, every in commands.items()
        }
        plot_guidance(guided, args.scales, args.out / "guidance.png")


def plot_guidance(
    lines: dict[str, list[dict[str, Any]]], scales: Sequence[float], path: Path
) -> None:
    """Frechet distance and accuracy against the scale, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9.6, 4.2), dpi=110)
    places = range(len(scales))
    for panel, key, title in zip(
        panels,
        ("frechet", "accuracy"),
        ("Fréchet distance to the training digits", "taken for the right digit"),
        strict=True,
    ):
        for (name, figures), mark in zip(lines.items(), "osD^", strict=False):
            panel.plot(places, [facts[key] for facts in figures], marker=mark, label=name)
        panel.axhline(
            figures[0][f"{key}_real"], color="black", linestyle="--", label="held-out real"
        )
        panel.set(title=title, xlabel="scale of guidance")
        panel.set_xticks(places, [f"{scale:g}" for scale in scales])
        panel.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[1].set_ylim(0, 1.02)
    panels[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
