"""Adaptive against fixed steps: on a trained model of the digits, and on a known distribution.

    python -m benchmarks.adaptive_steps --checkpoint runs/objectives/dsm-vp \\
        --out benchmarks/results

writes adaptive_steps.json and .png, prints the tables, and renders the tables of the documentation.
The .json is written after each figure of the digits; figures in it for the same number of images
are not measured again. Measured are

    Frechet distance against evaluations of the network, for the reverse-time SDE of a model of
    continuous time: Euler-Maruyama with steps of equal length, and the adaptive solver with its two
    schemes, all from one seed. The table says how many evaluations each scheme needs for the
    distance that Euler-Maruyama reaches with a number of steps.

    the error of the probability-flow ODE against its tolerance, and the error of the ODE and of
    samplers on fixed grids against evaluations, on a mixture of two Gaussians whose score is known,
    in float64.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, rows, tables
from fastdiff import samplers, sde
from fastdiff.checkpoints import checkpoint
from fastdiff.evaluation import evaluate
from fastdiff.generation import Network, generate

STEPS = (10, 15, 20, 25, 30, 40, 50, 100)
SCHEMES = {"exponential": (0.4, 0.3, 0.2, 0.1, 0.05), "improved-euler": (1.0, 0.5, 0.2, 0.1)}
EULER = "euler-maruyama"
PAIRS, TOLERANCES = ("heun21", "bosh3", "dopri5"), [10.0**-k for k in range(2, 9)]
FIXED, GRIDS = ("ddim", "heun"), (8, 16, 32, 64, 128, 256)
DIMENSIONS, POINTS, MEAN, STD = 16, 256, 0.5, 0.1


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--checkpoint", type=Path, required=True, help="a model of the digits and of an SDE"
    )
    options.add_argument("--out", type=Path, required=True, help="folder for both files")
    options.add_argument(
        "--images", type=int, default=1428, help="generated digits for each figure, at least 100"
    )
    options.add_argument("--steps", type=int, nargs="+", default=STEPS, help="of Euler-Maruyama")
    args = options.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / "adaptive_steps.json"
    results: dict[str, Any] = {"images": args.images, "digits": [], "mixture": errors_of_ode()}
    earlier: list[dict[str, Any]] = []
    if kept.exists() and (old := json.loads(kept.read_text("utf-8")))["images"] == args.images:
        results["digits"], earlier = old["digits"], old["machines"]
    results["machines"] = machine.with_this_one(earlier, torch.get_num_threads())
    for row in distances(args.checkpoint, args.steps, args.images, results["digits"]):
        results["digits"].append(row)
        kept.write_text(json.dumps(results, indent=1), encoding="utf-8")
    plot(results["digits"], results["mixture"], args.out / "adaptive_steps.png")
    for table in (rows.adaptive_steps(results), rows.ode_errors(results)):
        print(tables.markdown(table))
    tables.publish(args.out)


def distances(
    path: Path, steps: Sequence[int], images: int, known: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Frechet distance and evaluations of each solver of the reverse-time SDE.

    Solvers whose figures are in ``known`` are skipped.
    """
    trained = checkpoint.load(path)
    process = sde.continuous(trained.forward)
    ways: list[tuple[str, str, sde.Solver]] = [
        (EULER, f"{count} steps", sde.Solver(process, EULER, count)) for count in steps
    ]
    for scheme, tolerances in SCHEMES.items():
        ways += [
            (scheme, f"eps_rel {tolerance:g}",
             sde.Solver(process, "adaptive", scheme=scheme, eps_rel=tolerance))
            for tolerance in tolerances
        ]  # fmt: skip
    there = {(row["method"], row["setting"]) for row in known}
    for name, setting, solver in ways:
        if (name, setting) in there:
            continue
        measured = evaluate(trained, solver, samples=images, progress=False)
        kept = ("evaluations", "frechet", "frechet_real", "accuracy")
        figures = {key: measured.as_dict()[key] for key in kept}
        print(
            f"{name:<16} {setting:<12} {measured.evaluations:7.1f} {measured.frechet:8.3f} "
            f"{measured.accuracy:6.1%}",
            flush=True,
        )
        yield {"method": name, "setting": setting, **figures}


def mixture(process: sde.SDE, x: Tensor, t: Tensor) -> Tensor:
    """The score of two equal Gaussians at +-MEAN in every coordinate."""
    alpha, sigma = (level.view(-1, 1) for level in process.levels(t))
    variance = (alpha * STD) ** 2 + sigma**2
    side = torch.tanh((alpha * MEAN * x / variance).sum(1, keepdim=True))
    return (alpha * MEAN * side - x) / variance


def errors_of_ode() -> list[dict[str, Any]]:
    """Root mean square error of each solver of the ODE on a VP mixture, and its evaluations."""
    process = sde.VP()
    x = process.prior_sample(
        (POINTS, DIMENSIONS), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )

    def score(x: Tensor, t: Tensor) -> Tensor:
        return mixture(process, x, t)

    exact = sde.solve_ode(score, process, x, rtol=1e-12, atol=1e-12, progress=False).x
    rows: list[dict[str, Any]] = []

    def note(method: str, setting: float, images: Tensor, evaluations: Tensor) -> None:
        error = (images - exact).square().mean().sqrt().item()
        spent = evaluations.double().mean().item()
        rows.append({"method": method, "setting": setting, "error": error, "evaluations": spent})

    for pair in PAIRS:
        for tolerance in TOLERANCES:
            solver = sde.Solver(process, "ode", pair=pair, rtol=tolerance, atol=tolerance)
            solved = solver.sample(score, x, progress=False)
            note(pair, tolerance, solved.x, solved.evaluations)
    path = sde.discretize(process)
    network = Network(lambda x, t: score(x, t.double() / 999), process, "score", False)
    for name in FIXED:
        for steps in GRIDS:
            sampler = samplers.make(
                name, path, steps, prediction="score", grid="logsnr", final="sigma_min"
            )
            samples = generate(network, sampler, x.shape, x_T=x, progress=False)
            note(name, steps, samples.images, samples.evaluations)
    return rows


def plot(rows: list[dict[str, Any]], errors: list[dict[str, Any]], path: Path) -> None:
    """Three panels, all axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (digits, held, cost) = pyplot.subplots(1, 3, figsize=(13.5, 4.2), dpi=110)
    for name, mark in zip((EULER, *SCHEMES), "osD", strict=True):
        line = [(r["evaluations"], r["frechet"]) for r in rows if r["method"] == name]
        label = name if name == EULER else f"adaptive, {name}"
        digits.plot(*zip(*line, strict=True), marker=mark, markersize=5, label=label)
    digits.axhline(rows[0]["frechet_real"], color="black", linestyle="--", label="held-out real")
    digits.set(title="reverse SDE, digits", xlabel="evaluations of the network",
               ylabel="Fréchet distance")  # fmt: skip
    for name, mark in zip((*PAIRS, *FIXED), "osDv^", strict=True):
        line = [r for r in errors if r["method"] == name]
        error = [row["error"] for row in line]
        style = "-" if name in PAIRS else ":"
        if name in PAIRS:
            held.plot([row["setting"] for row in line], error, marker=mark, label=name)
        cost.plot([row["evaluations"] for row in line], error, style, marker=mark,
                  label=name if name in PAIRS else f"{name}, fixed grid")  # fmt: skip
    held.plot(TOLERANCES, TOLERANCES, color="gray", linestyle="--", label="error = tolerance")
    held.set(title="ODE, mixture: error and tolerance", xlabel="tolerance", ylabel="error")
    cost.set(title="ODE, mixture: error and cost", xlabel="evaluations")
    for panel in (digits, held, cost):
        panel.set(xscale="log", yscale="log")
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
