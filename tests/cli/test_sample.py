"""fastdiff sample: the grid, what is printed, reproducibility, the comparison."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_calls import TINY
from PIL import Image

from fastdiff import samplers
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.cli import sample
from fastdiff.data.image_grid import grid
from fastdiff.generation import Samples
from fastdiff.ops.backend import cpu_missing, current

QUICK = ("--steps", 2, "--threads", 1)


def test_grid_is_what_the_library_draws(run: Callable, digits_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "grid.png"  # its folder is made
    words = ("--classes", "7,1", "--per-class", 3, "--seed", 5)
    assert run("sample", "--checkpoint", digits_run, "--out", out, *QUICK, *words).code == 0
    found = checkpoint.load(digits_run)
    drawn = found.sample(
        samplers.DDIM(found.forward, 2, prediction=found.prediction),
        labels=[7, 7, 7, 1, 1, 1],
        generator=torch.Generator().manual_seed(5),
        progress=False,
    )
    expected = grid(drawn, 3, labels=["7", "1"])
    assert Image.open(out).tobytes() == expected.tobytes()


def test_prints_what_ran_and_the_times(run: Callable, digits_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    ran = run("sample", "--checkpoint", digits_run, "--out", out, *QUICK, "--backend", "reference")
    first, where, setup, sampling = ran.out.splitlines()
    assert first == f"{out} 80 images, ddim, 2 steps, 2 evaluations an image, seed 0"
    assert where.startswith("ran on      reference backend, ")
    assert where.endswith(", 1 threads, eager mode")
    assert setup.startswith("set-up ")
    assert sampling.startswith("sampling ")
    assert sampling.endswith(" images/s")
    assert "sampling (reference)" in ran.err  # the progress bar


def test_json_is_all_there_is_on_standard_output(
    run: Callable, digits_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "grid.png"
    words = ("--classes", "0,9", "--sampler", "ddpm", "--grid", "trailing", "--seed", 4)
    facts = run("sample", "--checkpoint", digits_run, "--out", out, *QUICK, *words, "--json").json
    assert facts["out"] == str(out)
    assert facts["checkpoint"] == str(checkpoint.newest(digits_run))
    assert (facts["images"], facts["classes"]) == (16, [0, 9])
    assert (facts["sampler"], facts["steps"], facts["seed"]) == ("ddpm", 2, 4)
    assert facts["backend"] in ("reference", "cpu")
    assert facts["threads"] == 1
    assert facts["import_seconds"] == 0  # nothing was imported for this call
    parts = facts["loading_seconds"] + facts["first_step_seconds"]
    assert facts["setup_seconds"] == pytest.approx(parts)
    assert facts["images_per_second"] == pytest.approx(16 / facts["sampling_seconds"])
    assert facts["evaluations"] == 2
    assert facts["mode"] == ("compiled" if facts["backend"] == "cpu" else "eager mode")
    assert facts["reference_images_per_second"] is None
    assert facts["reference_layout"] is None
    assert facts["speedup"] is None


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "unipc-2", "dpmpp-sde"])
def test_a_seed_always_gives_the_same_images(
    run: Callable, digits_run: Path, tmp_path: Path, sampler: str
) -> None:
    def bytes_of(seed: int, name: str) -> bytes:
        out = tmp_path / name
        words = ("--sampler", sampler, "--seed", seed, "--per-class", 2)
        assert run("sample", "--checkpoint", digits_run, "--out", out, *QUICK, *words).code == 0
        return out.read_bytes()

    assert bytes_of(1, "a.png") == bytes_of(1, "b.png")
    assert bytes_of(1, "a.png") != bytes_of(2, "c.png")


@pytest.mark.skipif(cpu_missing is not None, reason="needs the C++ extension")
def test_a_precision_is_the_network_s(run: Callable, digits_run: Path, tmp_path: Path) -> None:
    drawn, words = {}, ("--classes", "7", "--per-class", 2, *QUICK)
    for precision in ("fast", "bf16"):
        out = tmp_path / f"{precision}.png"
        words = (*words, "--precision", precision)
        ran = run("sample", "--checkpoint", digits_run, "--out", out, *words)
        assert ran.code == 0
        assert ran.out.splitlines()[1].endswith(
            ", compiled" if precision == "fast" else ", compiled, precision bf16"
        )
        drawn[precision] = np.asarray(Image.open(out)).astype(float)
    difference = np.abs(drawn["fast"] - drawn["bf16"])
    assert 0 < difference.max() <= 16  # of 255
    for other in (["--backend", "reference"], ["--compare"]):
        ran = run(
            "sample", "--checkpoint", digits_run, "--out", tmp_path / "no.png", *words, *other
        )
        assert ran.code == 2
        assert "precision" in ran.err


def test_unconditional_model_draws_a_count(run: Callable, plain_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    words = ("sample", "--checkpoint", plain_run, "--out", out, *QUICK, "--json")
    facts = run(*words, "--count", 10).json
    assert (facts["images"], facts["classes"]) == (10, None)
    assert Image.open(out).size == (4 + 8 * 68, 4 + 2 * 68)  # eight in a row
    assert run(*words, "--count", 2).json["images"] == 2
    assert Image.open(out).size == (4 + 2 * 68, 4 + 68)
    assert run(*words).json["images"] == sample.COUNT


def test_a_model_trained_with_label_dropout_is_guided(run: Callable, tmp_path: Path) -> None:
    out, grids = tmp_path / "run", [tmp_path / f"{scale}.png" for scale in (1, 4)]
    words = (*TINY, "--label-dropout", 0.2, "--weighting", "min_snr", "--steps", 2)
    assert run("train", "--data", "digits", "--out", out, *words).code == 0
    found = checkpoint.load(out)
    assert found.null_class
    assert found.model.config.num_class_embeds == 11
    for scale, picture in zip((1, 4), grids, strict=True):
        ran = run(
            "sample", "--checkpoint", out, "--out", picture, "--steps", 2, "--per-class", 1,
            "--guidance", scale, "--json",
        )  # fmt: skip
        assert ran.json["guidance"] == scale
    assert grids[0].read_bytes() != grids[1].read_bytes()


def test_guidance_of_a_model_that_never_missed_a_label_is_refused(
    run: Callable, digits_run: Path, tmp_path: Path
) -> None:
    ran = run("sample", "--checkpoint", digits_run, "--out", tmp_path / "a.png", "--guidance", 2)
    assert ran.code == 2
    assert "guidance 2.0 needs a model with classes, trained with label dropout" in ran.last


def test_comparison_calls_both_backends_in_turns(
    run: Callable, digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    generate = Checkpoint.generate

    def recorded(self: Checkpoint, sampler: samplers.Sampler, **options: Any) -> Samples:
        assert options.get("mode") == ("eager" if current() == "reference" else None)
        calls.append((current(), sampler.steps, options.get("memory_format")))
        return generate(self, sampler, **options)

    monkeypatch.setattr(Checkpoint, "generate", recorded)
    fast = {"backend": "cpu", "isa": "AVX2", "threads": 1}  # also where there is no extension
    monkeypatch.setattr(sample, "machine_facts", lambda device: fast)
    words = ("sample", "--checkpoint", digits_run, "--out", tmp_path / "grid.png", *QUICK)
    facts = run(*words, "--compare", "--json").json
    # Ready first: our own step, and two of PyTorch's in each memory format. Then three turns.
    formats = [torch.channels_last, torch.channels_last, *[torch.contiguous_format] * 2]
    ready = [("auto", 1, None), *[("reference", 1, each) for each in formats]]
    best = dict(zip(("channels-last", "contiguous"), formats[1:3], strict=True))
    both = [("auto", 2, None), ("reference", 2, best[facts["reference_layout"]])]
    assert calls == ready + 3 * both
    assert current() == "auto"
    ratio = facts["images_per_second"] / facts["reference_images_per_second"]
    assert facts["speedup"] == pytest.approx(ratio)
    *_, last, other, own, rest = run(*words, "--compare").out.splitlines()
    assert last.startswith("PyTorch ")
    assert "images/s in eager mode, " in last
    assert "(ratio " in last
    assert "fastdiff sample --sampler" in other
    assert "fastdiff train --data" in own
    assert "docs/" in rest


def test_the_layout_that_suits_pytorch_best_is_compared_with() -> None:
    def generate(mode: str, memory_format: torch.memory_format) -> tuple[None, float]:
        calls.append(memory_format)
        return None, next(seconds)

    for times, wanted in (((9, 2, 1, 3), "channels-last"), ((1, 3, 9, 2), "contiguous")):
        calls: list[torch.memory_format] = []
        seconds = iter(times)  # the first call of each makes ready
        assert sample._best_layout(generate) == wanted
        assert len(calls) == 4


def test_comparing_the_reference_with_itself_is_said_and_left_out(
    run: Callable, digits_run: Path, tmp_path: Path
) -> None:
    words = ("sample", "--checkpoint", digits_run, "--out", tmp_path / "grid.png", *QUICK)
    ran = run(*words, "--backend", "reference", "--compare", "--json")
    assert ran.code == 0
    assert "nothing to compare" in ran.err
    assert ran.json["speedup"] is None


def test_a_process_of_its_own_counts_its_imports(
    start: Callable, digits_run: Path, tmp_path: Path
) -> None:
    process = start("sample", "--checkpoint", digits_run, *QUICK, "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    facts = json.loads(out)
    assert facts["out"] == "samples.png"
    assert Image.open(tmp_path / "samples.png").format == "PNG"
    assert 0.1 < facts["import_seconds"] < facts["setup_seconds"]


@pytest.mark.parametrize("words", ["--out grid.exe", "--seed -1"])
def test_cheap_checks_come_before_any_work(
    run: Callable, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.setattr(checkpoint, "load", lambda path: pytest.fail("it began to work"))
    assert run("sample", *words.split()).code == 2


def test_failing_call_leaves_the_old_picture(
    run: Callable, digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "grid.png"
    words = ("sample", "--checkpoint", digits_run, "--out", out, *QUICK)
    assert run(*words).code == 0
    before = out.read_bytes()
    generate = Checkpoint.generate

    def broken(*args: Any, **options: Any) -> Samples:
        samples = generate(*args, **options)
        return Samples(samples.images * torch.nan, samples.evaluations)

    monkeypatch.setattr(Checkpoint, "generate", broken)
    ran = run(*words)
    assert ran.code == 2
    assert ran.last.endswith("images must be finite, got NaN or infinity")
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]
