"""The examples run, at small sizes, say what they promise, and use public names alone."""

from __future__ import annotations

import ast
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
LINES = 60


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run(name, *words): what an example prints, called with these arguments."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTDIFF_PLAN", "heuristic")

    def call(name: str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    yield call
    torch._dynamo.reset()


def test_compile_unet(run):
    out = run("compile_unet", "--size", 8, "--batch", 1, "--calls", 1)
    assert re.search(r"\d+ fused", out)
    assert float(re.search(r"largest difference (\S+) of", out)[1]) < 1e-4


def test_accelerate_pipeline(run):
    out = run("accelerate_pipeline", "--size", 32, "--steps", 2)
    assert re.search(r"unet +UNet2DConditionModel +compiled, computes in float32", out)
    assert float(re.search(r"largest difference (\S+)", out)[1]) < 1e-4
    assert re.search(r"before \S+ s, after \S+ s, ratio \S+", out)


def test_samplers(run):
    out = run("samplers", "--samplers", "ddim", "heun", "--steps", 2, "--out", "grid.png")
    assert out == "ddim, 2 evaluations\nheun, 3 evaluations\ngrid.png\n"
    assert Image.open("grid.png").width > Image.open("grid.png").height  # two rows of ten


def test_reflow(run):
    out = run("reflow", "--steps", 3, "--pairs", 8, "--out", "digits.png")
    assert re.search(r"teacher, 1 step: \d\.\d+ from .*\nstudent, 1 step: \d\.\d+ from", out)
    assert Image.open("digits.png").format == "PNG"


def test_train_and_resume(run):
    out = run("train_and_resume", "--steps", 4, "--batch-size", 4, "--out", "digits.png")
    assert "resumed after 2 of 4 steps: weights equal bit for bit: True" in out
    assert Image.open("digits.png").format == "PNG"


def test_known_score(run):
    out = run("known_score", "--dimensions", 4, "--points", 20)
    error = float(re.search(r"largest error (\S+) nats", out)[1])
    assert error < 1e-2
    spreads = [float(line.split()[-1]) for line in out.splitlines()[1:4]]
    assert spreads == pytest.approx([0.5099] * 3, abs=0.05)


def test_signals(run):
    out = run("signals", "--steps", 2, "--samples", 8)
    rows = dict(re.findall(r"^(data|samples) +(.*)$", out, re.MULTILINE))
    assert rows.keys() == {"data", "samples"}
    deviation, pure, *shares = map(float, rows["data"].split())
    assert deviation == pytest.approx(0.65, abs=0.05)  # sqrt(1/2) of a sine, sqrt(1/3) of the other
    assert pure > 0.55  # share of the strongest frequency: 1 of a sine, 6 / pi^2 of the other
    assert sum(shares) == pytest.approx(1, abs=0.02)


def test_accelerate_training(run):
    out = run("accelerate_training", "--steps", 3, "--out", "pipeline")
    losses = re.findall(r"loss (\S+)", out)
    assert len(losses) == 2
    assert all(0 < float(loss) < 10 for loss in losses)
    assert out.endswith("(8, 8)\n")
    assert json.loads(Path("pipeline/model_index.json").read_text("utf-8"))["unet"] == [
        "diffusers",
        "UNet2DModel",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_help(run, name, capsys):
    with pytest.raises(SystemExit) as left:
        run(name, "--help")
    assert left.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_short_and_public(name):
    text = (EXAMPLES / f"{name}.py").read_text("utf-8")
    assert len(text.splitlines()) <= LINES
    for node in ast.walk(ast.parse(text)):
        imported = getattr(node, "names", []) if isinstance(node, ast.ImportFrom) else []
        for word in (getattr(node, "attr", ""), *(alias.name for alias in imported)):
            assert not re.match(r"_(?!_)", word), word


def test_each_example_has_a_test():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert set(NAMES) <= tested
