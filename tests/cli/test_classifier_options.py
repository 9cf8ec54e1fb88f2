"""--classifier and --classifier-scale of fastdiff sample and eval."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_calls import TINY, call
from PIL import Image

from fastdiff.checkpoints import checkpoint, classifier_checkpoint
from fastdiff.checkpoints.classifier_checkpoint import Architecture, Classifier
from fastdiff.data.image_grid import grid
from fastdiff.evaluation import evaluate

METHODS = ("ddim", "probability-flow")  # a table of coefficients, and continuous time


def guide_of(run: Path, classes: tuple[str, ...], out: Path) -> Path:
    """A classifier for a run, of random weights, in a folder."""
    found = checkpoint.load(run)
    shape = Architecture(8, found.channels, widths=(8, 16), layers_per_block=1, attention=())
    torch.manual_seed(0)
    model = shape.make(len(classes)).eval()
    torch.nn.init.normal_(model.head.weight)
    classifier_checkpoint.save(Classifier(model, found.forward, shape, classes), out)
    return out


@pytest.fixture(scope="module")
def dsm_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the SDE VP, trained with label dropout."""
    out = tmp_path_factory.mktemp("runs") / "dsm"
    words = (*TINY, "--objective", "dsm", "--label-dropout", 0.5, "--steps", 2)
    assert call("train", "--data", "digits", "--out", out, *words) == 0
    return out


@pytest.fixture(scope="module")
def guide(dsm_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return guide_of(dsm_run, tuple("0123456789"), tmp_path_factory.mktemp("guides") / "dsm")


@pytest.mark.parametrize("method", METHODS)
def test_the_grid_is_what_the_library_draws(
    run: Callable, dsm_run: Path, guide: Path, tmp_path: Path, method: str
) -> None:
    out, found = tmp_path / "grid.png", checkpoint.load(dsm_run)
    sampler = found.diffusion().sampler(method, 3)
    words = (
        "sample", "--checkpoint", dsm_run, "--out", out, "--classes", "7,1", "--per-class", 2,
        "--sampler", method, "--steps", 3, "--threads", 1, "--json",
    )  # fmt: skip
    pictures = []
    for guidance, scale in ((1.0, 0.0), (1.0, 30.0), (0.0, 30.0)):
        asked = ("--classifier", guide, "--classifier-scale", scale, "--guidance", guidance)
        facts = run(*words, *asked).json
        assert (facts["guidance"], facts["classifier_scale"]) == (guidance, scale)
        assert facts["classifier"] == str(guide)
        drawn = found.sample(
            sampler, labels=[7, 7, 1, 1], guidance=guidance,
            classifier=classifier_checkpoint.load(guide),
            classifier_scale=scale, generator=torch.Generator().manual_seed(0), progress=False,
        )  # fmt: skip
        pictures.append(Image.open(out).tobytes())
        assert pictures[-1] == grid(drawn, 2, labels=["7", "1"]).tobytes()
    facts = run(*words).json
    assert (facts["classifier"], facts["classifier_scale"]) == (None, None)
    assert Image.open(out).tobytes() == pictures[0]
    assert len(set(pictures)) == 3
    assert run(*words, "--classifier", guide).json["classifier_scale"] == 1


@pytest.mark.parametrize("method", METHODS)
def test_figures_are_those_of_guided_digits(
    run: Callable, dsm_run: Path, guide: Path, method: str
) -> None:
    asked = ("--classifier", guide, "--classifier-scale", 5, "--guidance", 0)
    facts = run(
        "eval", "--checkpoint", dsm_run, "--samples", 100, "--sampler", method, "--steps", 2,
        "--threads", 1, "--json", *asked,
    ).json  # fmt: skip
    assert (facts["guidance"], facts["classifier"]) == (0, str(guide))
    assert facts["classifier_scale"] == 5
    found = checkpoint.load(dsm_run)
    sampler = found.diffusion().sampler(method, 2)
    shared = {"samples": 100, "guidance": 0.0, "progress": False}
    guided = evaluate(
        found, sampler, classifier=classifier_checkpoint.load(guide), classifier_scale=5.0, **shared
    )
    assert facts["frechet"] == pytest.approx(guided.frechet, rel=1e-5)
    assert guided.frechet != pytest.approx(evaluate(found, sampler, **shared).frechet, rel=1e-2)


def test_a_model_without_classes_has_those_of_its_classifier(
    run: Callable, plain_run: Path, tmp_path: Path
) -> None:
    guide = guide_of(plain_run, ("cat", "dog"), tmp_path / "guide")
    out = tmp_path / "grid.png"
    words = ("sample", "--checkpoint", plain_run, "--out", out, "--steps", 2, "--threads", 1)
    asked = ("--classifier", guide, "--per-class", 3, "--json")
    facts = run(*words, *asked).json
    assert (facts["images"], facts["classes"]) == (6, [0, 1])
    ran = run(*words, *asked, "--classes", "1,2")
    assert (ran.code, "class 2 does not exist: the model has 0..1" in ran.last) == (2, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--classifier-scale 2", "--classifier-scale is for a --classifier, there is none"),
        ("--classifier {guide} --classifier-scale nan", "--classifier-scale must be finite"),
        ("--classifier {run}", "no classifier at {run}: it has no classifier.json"),
        ("--classifier {other}", "the classifier was trained on NoiseSchedule('cosine'"),
    ],
)
@pytest.mark.parametrize("command", ["sample", "eval"])
def test_refusals(
    run: Callable, dsm_run: Path, digits_run: Path, guide: Path, tmp_path: Path, command: str,
    words: str, message: str,
) -> None:  # fmt: skip
    places = {"run": dsm_run, "guide": guide, "other": tmp_path / "other"}
    guide_of(digits_run, tuple("0123456789"), places["other"])
    where = ("--out", tmp_path / "grid.png") if command == "sample" else ()
    ran = run(command, "--checkpoint", dsm_run, *where, *words.format(**places).split())
    assert ran.code == 2
    assert message.format(**places) in ran.last
