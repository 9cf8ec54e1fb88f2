"""fastdiff convert: other programs' checkpoints as folders of safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from openai_model import OpenAIUNet, randomized

import fastdiff
from fastdiff import schedules
from fastdiff.checkpoints import checkpoint
from fastdiff.nn import UNet2DModel

FACTS = ("--option", "num_heads=1", "--option", "image_size=8")
PROCESS = ("--schedule", "linear", "--prediction", "eps")


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A file as improved-diffusion writes it, with a learned variance and labels."""
    model = randomized(OpenAIUNet(out_channels=6, classes=4, scale_shift=True))
    torch.save(model.state_dict(), tmp_path / "theirs.pt")
    return tmp_path / "theirs.pt"


def test_writes_a_folder_that_everything_reads(run: Callable, theirs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = run("convert", theirs, out, *FACTS, *PROCESS)
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0] == f"{theirs}: improved-diffusion or guided-diffusion"
    assert (
        "32, 64 channels; 1 residual blocks a level; attention at levels 1; 4 classes" in lines[1]
    )
    assert lines[2].startswith(f"{out}: float32, ")
    assert lines[3].startswith("trained on NoiseSchedule('linear', num_timesteps=1000")
    assert lines[3].endswith("predicts eps")
    assert sorted(file.name for file in out.iterdir()) == [
        checkpoint.CONFIG, checkpoint.WEIGHTS, checkpoint.META,
    ]  # fmt: skip
    wanted = fastdiff.load(theirs, num_heads=1).state_dict()
    got = checkpoint.load(out)
    assert all(torch.equal(value, wanted[k]) for k, value in got.model.state_dict().items())
    assert got.diffusion().objective.name == "hybrid"
    assert got.classes == ("0", "1", "2", "3")
    words = ("--classes", "1,2", "--steps", 2, "--out", tmp_path / "new.png")
    assert run("sample", "--checkpoint", out, *words).code == 0


def test_without_the_process_only_the_model_is_written(
    run: Callable, theirs: Path, tmp_path: Path
) -> None:
    ran = run("convert", theirs, tmp_path / "out", *FACTS, "--dtype", "bfloat16")
    assert ran.code == 0, ran.err
    last = ran.out.splitlines()[-1]
    assert last == (
        "no fastdiff.json, which fastdiff sample needs: say --schedule; say --prediction"
    )
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        checkpoint.CONFIG, checkpoint.WEIGHTS,
    ]  # fmt: skip
    assert UNet2DModel.from_pretrained(tmp_path / "out").config.num_class_embeds == 4


def test_options_of_the_schedule(run: Callable, theirs: Path, tmp_path: Path) -> None:
    words = ("--timesteps", 100, "--schedule-option", "rescaled=true")
    words = (*words, "--schedule-option", "rescale_timesteps=true")
    assert run("convert", theirs, tmp_path / "out", *FACTS, *PROCESS, *words).code == 0
    got = checkpoint.load(tmp_path / "out").forward
    assert torch.equal(got.betas, schedules.linear(100, rescaled=True).betas)
    assert got.rescale_timesteps


@pytest.mark.parametrize("ema", [False, True])
def test_average(ema: bool, run: Callable, tmp_path: Path) -> None:
    own = randomized(OpenAIUNet()).state_dict()
    average = {name: value + 0.25 for name, value in own.items()}
    torch.save({"model": own, "ema": average}, tmp_path / "both.pt")
    words = ("--option", "num_heads=1", *(["--ema"] if ema else []))
    ran = run("convert", tmp_path / "both.pt", tmp_path / "out", *words)
    assert ran.code == 0, ran.err
    assert ("averaged weights\n" in ran.out) == ema
    assert ("the file also has averaged weights (ema)" in ran.out) != ema
    got = fastdiff.load(tmp_path / "out").conv_out.bias
    assert torch.equal(got, (average if ema else own)["out.2.bias"])


SCHEDULER: dict[str, Any] = {
    "_class_name": "DDPMScheduler", "num_train_timesteps": 50, "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
}  # fmt: skip


@pytest.fixture
def pipeline(tiny_unet: Callable, tmp_path: Path) -> Path:
    """A pipeline as diffusers writes it."""
    folder = tmp_path / "pipeline"
    tiny_unet().save_pretrained(folder / "unet")
    (folder / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return folder


def test_a_pipeline_tells_its_process(run: Callable, pipeline: Path, tmp_path: Path) -> None:
    ran = run("convert", pipeline, tmp_path / "out")
    assert ran.code == 0, ran.err
    got = checkpoint.load(tmp_path / "out")
    assert got.prediction == "v"
    assert torch.equal(got.forward.betas, schedules.cosine(50).betas)
    ran = run("convert", pipeline, tmp_path / "again", *PROCESS)
    assert ran.code == 2
    assert "--schedule is told by the source itself: NoiseSchedule('cosine'" in ran.last


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "ScoreSdeVeScheduler"}, "describes a ScoreSdeVeScheduler, which has no b"),
        ({"prediction_type": "flow"}, "unknown prediction_type 'flow'"),
        ({"beta_schedule": "laplace"}, "unknown beta_schedule 'laplace'"),
        ({"num_train_timesteps": 0}, "unusable schedule: num_timesteps must be at least 1"),
        ({"trained_betas": [0.1, "x"]}, "unusable schedule"),
    ],
)
def test_schedulers_that_say_nothing(
    change: dict[str, Any], message: str, run: Callable, pipeline: Path, tmp_path: Path
) -> None:
    path = pipeline / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**SCHEDULER, **change}))
    ran = run("convert", pipeline, tmp_path / "out")
    assert ran.code == 0, ran.err
    assert message in ran.out
    assert "no fastdiff.json, which fastdiff sample needs: say --schedule" in ran.out


@pytest.mark.parametrize(
    ("config", "betas"),
    [
        ({"beta_schedule": "linear"}, lambda: schedules.linear(50).betas),
        (
            {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.012},
            lambda: schedules.scaled_linear(50, 0.001, 0.012).betas,
        ),
        ({"beta_schedule": "sigmoid"}, lambda: schedules.sigmoid(50).betas),
        (
            {"rescale_betas_zero_snr": True},
            lambda: schedules.make("cosine", 50, zero_terminal_snr=True).betas,
        ),
        ({"trained_betas": [0.1, 0.2]}, lambda: torch.tensor([0.1, 0.2], dtype=torch.float64)),
    ],
    ids=["linear", "scaled_linear", "sigmoid", "zero snr", "trained_betas"],
)
def test_schedules_of_schedulers(
    config: dict[str, Any], betas: Callable, run: Callable, pipeline: Path, tmp_path: Path
) -> None:
    path = pipeline / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**SCHEDULER, **config}))
    assert run("convert", pipeline, tmp_path / "out").code == 0
    assert torch.equal(checkpoint.load(tmp_path / "out").forward.betas, betas())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--schedule", "linear"), "needs the number of heads"),
        ((*FACTS, "--option", "heads=3"), "takes no option 'heads'"),
        ((*FACTS, "--timesteps", "10"), "--timesteps and --schedule-option are of a --schedule"),
        ((*FACTS, *PROCESS, "--schedule-option", "beta=1"), "unexpected keyword argument 'beta'"),
        (
            (*FACTS, *PROCESS, "--schedule-option", "beta_end=2"),
            "wanted 0 < beta_start <= beta_end",
        ),
        ((*FACTS, "--ema"), "holds no averaged weights"),
    ],
)
def test_errors_leave_nothing(
    words: tuple[str, ...], message: str, run: Callable, theirs: Path, tmp_path: Path
) -> None:
    ran = run("convert", theirs, tmp_path / "out", *words)
    assert ran.code == 2
    assert message in ran.last
    assert sorted(tmp_path.iterdir()) == [theirs]


def test_an_existing_folder_is_left_alone(run: Callable, theirs: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    ran = run("convert", theirs, tmp_path / "out", *FACTS)
    assert ran.code == 2
    assert "exists already; it was left as it is" in ran.last
    assert list((tmp_path / "out").iterdir()) == []


def test_own_checkpoints_are_exported(run: Callable, tmp_path: Path) -> None:
    ran = run("convert", "digits", tmp_path / "out")
    assert ran.code == 2
    assert "digits is a checkpoint of fastdiff: fastdiff export copies it" in ran.last
