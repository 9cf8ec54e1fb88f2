"""fastdiff train --objective, and what sample and eval make of the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cli_calls import TINY

from fastdiff import schedules, sde
from fastdiff.checkpoints import checkpoint
from fastdiff.evaluation import measure_bits

# Of each, the words beside --objective, the process that they make, the prediction, and what draws
# from it by default: sampler, steps and evaluations. 20 timesteps have no 50 steps.
CASES = {
    "hybrid": (
        "--timesteps 20",
        "NoiseSchedule('cosine', num_timesteps=20",
        "eps",
        ("ddpm", 20, 20),
    ),
    "vlb": ("--schedule linear", "NoiseSchedule('linear'", "eps", ("ddpm", 50, 50)),
    "flow": (
        "--timestep-sampler logit-normal",
        "FlowSchedule(num_timesteps=1000",
        "flow",
        ("unipc-2", 50, 50),
    ),
    "dsm": (
        "--sde subvp --beta-max 15 --trained-from 1e-4",
        "SubVP(beta_min=0.1, beta_max=15.0, trained_from=0.0001)",
        "eps",
        ("adaptive", None, None),
    ),
    "ncsn": (
        "--sigma-max 20 --levels 4 --label-by sigma",
        "VE(sigma_min=0.01, sigma_max=20.0, label_by='sigma')",
        "ncsn",
        ("annealed-langevin", 20, 21),
    ),
    "edm": (
        "--sigma-data 0.6",
        "EDM(sigma_min=0.002, sigma_max=80.0, sigma_data=0.6)",
        "edm",
        ("heun", 25, 49),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_objective_is_trained_resumed_and_sampled(
    run: Callable, tmp_path: Path, name: str
) -> None:
    words, process, prediction, taken = CASES[name]
    out, picture = tmp_path / "run", tmp_path / "grid.png"
    start = ("train", "--data", "digits", "--out", out, *TINY, "--objective", name, *words.split())
    assert run(*start, "--steps", 1).code == 0
    found = checkpoint.load(out)
    assert repr(found.forward).startswith(process)
    assert (found.objective, found.prediction) == (name, prediction)
    again = ("train", "--resume", "--out", out, "--steps", 2)
    changed = run(*again, "--objective", "ddpm")
    assert changed.code == 2
    assert f"cannot change --objective: it has {name}, got ddpm" in changed.last
    assert run(*again, *words.split()).code == 0
    drawn = ("sample", "--checkpoint", out, "--out", picture, "--classes", "1,7", "--per-class", 1)
    facts = run(*drawn, "--json").json
    assert (facts["sampler"], facts["steps"]) == taken[:2]
    assert facts["evaluations"] == taken[2] or (taken[2] is None and facts["evaluations"] > 9)
    ran = run(*drawn, "--sampler", "adaptive", "--option", "eps_rel=0.5", "--json")
    assert ran.code == 0
    assert ran.json["steps"] is None
    assert ran.json["evaluations"] > 2


def test_the_help_names_every_objective_and_method(run: Callable) -> None:
    text = " ".join(run("train", "--help").out.split())
    for name in ("ddpm", "hybrid", "vlb", "flow", "dsm", "ncsn", "edm"):
        assert f"{name} (" in text or f"or {name} (" in text or f"{name} or" in text
    text = "".join(run("sample", "--help").out.split())
    for name in sde.solvers.by_name.METHODS:
        assert name in text


def test_bits_of_held_out_digits(run: Callable, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("train", "--data", "digits", "--out", out, *TINY, "--steps", 2, "--timesteps", 8)
    assert run(*words).code == 0
    measured = ("eval", "--checkpoint", out, "--samples", 100, "--steps", 2, "--bits", 3)
    *_, bound, ode, last = run(*measured).out.splitlines()
    assert bound.split()[:-1] == ["bits", "per", "value,", "by", "the", "bound"]
    assert ode.split()[:-1] == ["bits", "per", "value,", "by", "the", "ODE"]
    expected = measure_bits(checkpoint.load(out), 3, progress=False)
    assert expected.bits_digits == 3
    assert float(bound.split()[-1]) == pytest.approx(expected.bits_bound, rel=1e-4)
    assert float(ode.split()[-1]) == pytest.approx(expected.bits_ode, rel=1e-3)
    assert last.startswith("100 digits, ")


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "sigmoid", "cosine", "sigmoid_abar"])
def test_short_schedules_reach_noise(name: str, run: Callable, tmp_path: Path) -> None:
    """Their betas are scaled by 1000 / T, and a checkpoint says so."""
    out = tmp_path / "run"
    words = ("train", "--data", "digits", "--out", out, *TINY, "--steps", 1, "--schedule", name)
    assert run(*words, "--timesteps", 50).code == 0
    forward = checkpoint.load(out).forward
    assert forward.num_timesteps == 50
    assert forward.alphas_cumprod[-1] < 0.01
    if name in schedules.RESCALABLE:
        assert forward.options["rescaled"] is True


def test_a_schedule_has_options(run: Callable, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("train", "--data", "digits", "--out", out, *TINY, "--steps", 1, "--timesteps", 20)
    shifted = ("--schedule", "shifted_cosine", "--schedule-option", "image_size=128")
    assert run(*words, *shifted).code == 0
    assert checkpoint.load(out).forward.options["image_size"] == 128
    words = (*words[:4], tmp_path / "other", *words[5:-2])
    refused = run(*words, "--schedule", "cosine", "--schedule-option", "mood=1")
    assert (refused.code, "'mood'" in refused.last) == (2, True)
    refused = run(*words, "--objective", "flow", "--schedule-option", "tau=1")
    assert "--schedule-option does not belong to --objective flow" in refused.last


def test_a_process_is_given_by_its_log_snr(run: Callable, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("train", "--data", "digits", "--out", out, *TINY, "--steps", 1, "--objective", "dsm")
    process = ("--sde", "cosine-log-snr", "--shift", -1.5, "--timestep-sampler", "laplace")
    assert run(*words, *process).code == 0
    assert repr(checkpoint.load(out).forward) == "CosineLogSNR(15.0, -15.0, shift=-1.5)"
    drawn = ("sample", "--checkpoint", out, "--out", tmp_path / "grid.png", "--per-class", 1)
    assert run(*drawn, "--sampler", "dpmpp-2m", "--steps", 3).code == 0


def test_scores_are_drawn_adaptively(run: Callable, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("train", "--data", "digits", "--out", out, *TINY, "--steps", 1, "--unconditional")
    assert run(*words, "--objective", "dsm", "--sde", "ve").code == 0
    drawn = ("sample", "--checkpoint", out, "--out", tmp_path / "grid.png", "--count", 1, "--json")
    facts = run(*drawn, "--option", "eps_rel=1e6").json
    assert (facts["sampler"], facts["steps"]) == ("adaptive", None)
    assert facts["evaluations"] < 20  # the longest steps
    stuck = run(*drawn, "--option", "max_evaluations=5")
    *progress, error = stuck.err.splitlines()
    assert (stuck.code, [line for line in progress if "%|" not in line]) == (2, [])
    assert "used up max_evaluations" in error
    refused = run(*drawn, "--steps", 3)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "adaptive chooses its own steps, got steps=3" in refused.err
