"""Whether a network learns the same through fastdiff's compiler as in eager mode.

    python -m benchmarks.learning --out benchmarks/results

trains the digits model from the same initial weights, on the same batches, times and noise, once in
eager mode and once compiled, for each of several seeds. It writes learning.json (every loss, and
what ``fastdiff.evaluation`` says of samples of the averaged weights) and the picture learning.png,
prints the table, and renders it in the documentation. The runs of a seed differ in rounding alone,
so that the spread over the seeds says how much a difference means. The file is written after every
run, and runs that it has are not repeated: delete it to have all made anew.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine, rows, tables
from benchmarks.turns.run import say
from fastdiff import data, samplers, schedules
from fastdiff.evaluation import evaluate
from fastdiff.training import Trainer, TrainingOptions, make_unet

PREDICTION = "v"
SAMPLER, SAMPLER_STEPS = "ddim", 50
WAYS = {"eager": "eager mode", "fastdiff": "compiled by fastdiff"}
WINDOW = 25  # steps over which the curves are averaged
PICTURE = "learning.png"


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, required=True, help="folder of both files")
    options.add_argument("--steps", type=int, default=500, help="of each training")
    options.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), metavar="N")
    options.add_argument(
        "--images", type=int, default=714, help="generated digits of each model, at least 100"
    )
    options.add_argument("--size", type=int, default=16, help="height and width of the digits")
    args = options.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "learning.json"
    asked = {"steps": args.steps, "images": args.images, "size": args.size}
    results: dict[str, Any] = {"machines": [], "runs": []} | asked
    if file.exists():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if {name: kept[name] for name in asked} == asked:
            results = kept
    for seed in args.seeds:
        for way in WAYS:
            if any((run["seed"], run["way"]) == (seed, way) for run in results["runs"]):
                say(f"seed {seed}, {WAYS[way]}: already in {file}")
                continue
            say(f"seed {seed}, {WAYS[way]}: {args.steps} steps")
            results["runs"].append(trained(way, seed, args.steps, args.images, args.size))
            threads = torch.get_num_threads()
            results["machines"] = machine.with_this_one(results["machines"], threads)
            file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results, tables.picture_folder(args.out) / PICTURE)
    print(tables.markdown(rows.learning(results)))
    tables.publish(args.out)


def trained(way: str, seed: int, steps: int, images: int, size: int) -> dict[str, Any]:
    """Train the digits model and measure its samples.

    Args:
        way: a key of ``WAYS``.
        seed: of the initial weights and of all that is drawn.
        steps: of the training.
        images: number of generated digits, at least 100.
        size: height and width of the digits.

    Returns:
        Way and seed, the loss of each step, and the evaluation's figures.
    """
    digits = data.digits("train", size)
    torch.manual_seed(seed)
    model = make_unet(digits.size, digits.channels, len(digits.classes))
    trainer = Trainer(
        model,
        schedules.cosine(),
        digits,
        TrainingOptions(steps=steps, seed=seed, compile=way == "fastdiff"),
        prediction=PREDICTION,
    )
    losses = [round(trainer.step(), 6) for _ in range(steps)]
    trained = trainer.checkpoint()
    sampler = samplers.make(SAMPLER, trained.forward, SAMPLER_STEPS, prediction=PREDICTION)
    measured = evaluate(trained, sampler, samples=images, seed=seed, progress=False)
    return {"seed": seed, "way": way, "losses": losses} | measured.as_dict()


def smoothed(losses: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and the mean loss of the ``WINDOW`` steps that end there."""
    window = min(WINDOW, len(losses))
    means = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    return np.arange(window, len(losses) + 1), means


def draw(results: dict[str, Any], path: Path) -> None:
    """The losses of all runs, and the Frechet distance of their samples, by seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, distances) = pyplot.subplots(
        1, 2, figsize=(9.6, 4.2), width_ratios=(2, 1), layout="constrained", dpi=110
    )
    seeds = list(dict.fromkeys(run["seed"] for run in results["runs"]))
    # Eager's curve is wide and pale, so that it shows where the other one covers it.
    looks = {
        "eager": {"linewidth": 4.0, "alpha": 0.35},
        "fastdiff": {"linewidth": 1.2, "linestyle": "--"},
    }
    marks = {"eager": "o", "fastdiff": "x"}
    for run in results["runs"]:
        color = f"C{seeds.index(run['seed'])}"
        label = f"seed {run['seed']}, {WAYS[run['way']]}"
        curves.plot(*smoothed(run["losses"]), color=color, label=label, **looks[run["way"]])
        distances.plot(str(run["seed"]), run["frechet"], marks[run["way"]], color=color)
    distances.axhline(results["runs"][0]["frechet_real"], color="black", linestyle=":")
    curves.set(yscale="log", xlabel="step", title=f"loss, mean of {WINDOW} steps")
    curves.legend(fontsize=8)
    distances.set(
        xlabel="seed", ylim=(0, None),
        title="Fréchet distance\no eager, x fastdiff, dotted: held-out",
    )  # fmt: skip
    for panel in (curves, distances):
        panel.grid(alpha=0.3)
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
