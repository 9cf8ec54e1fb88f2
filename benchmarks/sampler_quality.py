"""Frechet distance against evaluations of the model, for every sampler, on a shipped model.

    python -m benchmarks.sampler_quality --out benchmarks/results
    python -m benchmarks.sampler_quality --checkpoint emoji --against data/emoji --out build/emoji

writes sampler_quality.json (every figure) and .png (the plot), prints the table, and renders the
tables of the documentation. All samplers get the same seeds, the same grid and the same number of
images. A sampler with several evaluations per step takes as many steps as the budget of evaluations
allows. The baseline is the best of DDIM on three grids at 50 evaluations. With the defaults this
takes about 40 minutes on two cores. A model of other images than the digits is measured in sets as
large as the held-out set.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, rows, tables
from benchmarks.evaluations import evaluation
from fastdiff import samplers
from fastdiff.checkpoints import checkpoint

BUDGETS = (5, 10, 20, 50)
LEFT_OUT = ("ddim-inverse",)  # samplers that lead from images to noise
GRID = {"grid": "logsnr", "sigma_max": 80.0}
TO_BEAT = {f"ddim, {grid}": {"grid": grid} for grid in ("leading", "trailing")}
TO_BEAT_EVALUATIONS = 50
LIMIT = 10  # upper end of the plot; larger distances, of images that are noise, are in the table


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, required=True, help="folder for both files")
    options.add_argument(
        "--images", type=int, default=714, help="generated digits for each figure, at least 100"
    )
    options.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, help="evaluations")
    options.add_argument("--samplers", nargs="+", choices=samplers.names(), metavar="NAME")
    options.add_argument("--checkpoint", default="digits", help="the model")
    options.add_argument(
        "--against", type=Path, metavar="FOLDER",
        help="real images for another model than the digits': data/emoji, which make data/emoji "
        "writes; those held out are in data/emoji-held-out",
    )  # fmt: skip
    args = options.parse_args()
    names = args.samplers or [name for name in samplers.names() if name not in LEFT_OUT]
    args.out.mkdir(parents=True, exist_ok=True)
    model = checkpoint.load(args.checkpoint)
    runs = [(name, budget, name, GRID) for name in names for budget in args.budgets]
    runs += [(label, TO_BEAT_EVALUATIONS, "ddim", grid) for label, grid in TO_BEAT.items()]
    results: dict[str, Any] = {
        "machines": [machine.facts(torch.get_num_threads())],
        "images": args.images,
        "model": args.checkpoint,
        "grid": GRID,
        "rows": [],
    }
    for label, budget, name, grid in runs:
        sampler = within(budget, name, model, grid)
        if sampler is None:
            continue
        measured = measure(args, name, sampler.steps, grid)
        results["rows"].append(
            {
                **measured,
                "sampler": label,
                "budget": budget,
                "steps": sampler.steps,
                "evaluations": sampler.table.rows,
            }
        )
        print(f"{label:<16} {sampler.table.rows:>3} {measured['frechet']:8.3f}", flush=True)
        text = json.dumps(results, indent=1)
        (args.out / "sampler_quality.json").write_text(text, encoding="utf-8")
    plot(results, args.out / "sampler_quality.png")
    print(tables.markdown(rows.sampler_quality(results)))
    tables.publish(args.out)


def measure(
    args: argparse.Namespace, name: str, steps: int, grid: dict[str, Any]
) -> dict[str, Any]:
    """What ``fastdiff eval`` says of a sampler, in sets as large as the held-out set."""
    words = f"--checkpoint {args.checkpoint} --samples {args.images}"
    words += f" --sampler {name} --steps {steps}"
    words += "".join(f" --option {option}={value}" for option, value in grid.items())
    if args.against is not None:
        words += f" --against {args.against} --held-out {args.against}-held-out"
    facts = evaluation(words.split())
    if args.against is not None:
        facts["frechet"] = facts["frechet_matched"]
    return facts


def within(budget: int, name: str, model: Any, grid: dict[str, Any]) -> samplers.Sampler | None:
    """The sampler with the most steps that evaluates the model at most ``budget`` times."""
    for steps in range(budget, 0, -1):
        try:
            sampler = samplers.make(name, model.forward, steps, prediction=model.prediction, **grid)
        except ValueError:  # fewer steps than its order
            return None
        if sampler.table.rows <= budget:
            return sampler
    return None


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot distance against evaluations, both logarithmic, with a panel per family of samplers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    rows, model = results["rows"], results["model"]
    families = {
        "first order": ("ddpm", "ddim", "euler", "euler-ancestral", "dpm-1", "dpmpp-1s"),
        "singlestep": (
            "heun", "kdpm-2", "dpm-2", "dpm-3", "dpm-2-ancestral", "dpm-fast", "dpmpp-2s",
            "dpmpp-2s-ancestral", "dpmpp-sde",
        ),
        "multistep": (
            "plms", "lms", "deis-2", "deis-3", "dpmpp-2m", "dpmpp-3m", "dpmpp-2m-sde",
            "dpmpp-3m-sde",
        ),
        "predictor-corrector": ("unipc-1", "unipc-2", "unipc-3"),
    }  # fmt: skip
    shown = [name for name in families if any(r["sampler"] in families[name] for r in rows)]
    figure, panels = pyplot.subplots(
        1, len(shown), figsize=(4.2 * len(shown), 4.2), sharey=True, squeeze=False, dpi=110
    )
    ddim = [r["frechet"] for r in rows if r["sampler"].startswith("ddim")
            and r["budget"] == TO_BEAT_EVALUATIONS]  # fmt: skip
    budgets = sorted({row["budget"] for row in rows})
    for panel, family in zip(panels[0], shown, strict=True):
        for name, mark in zip(families[family], "osD^vP*X<", strict=False):
            line = [(r["evaluations"], r["frechet"]) for r in rows if r["sampler"] == name]
            if line:
                panel.plot(*zip(*line, strict=True), marker=mark, markersize=5, label=name)
        if ddim:
            best = f"best of ddim, {TO_BEAT_EVALUATIONS} evaluations"
            panel.axhline(min(ddim), color="gray", linestyle=":", label=best)
        panel.axhline(
            rows[0]["frechet_real"], color="black", linestyle="--", label=f"held-out real {model}"
        )
        panel.set(title=family, xlabel="evaluations of the model", xscale="log", yscale="log")
        panel.set_ylim(0.9 * rows[0]["frechet_real"], LIMIT)
        panel.set_xticks(budgets, [str(budget) for budget in budgets])
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        panel.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
        panel.tick_params(axis="y", which="minor", labelsize=7)
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=8)
    panels[0][0].set_ylabel(f"Fréchet distance to the training {model}")
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
