"""The command line as a whole: help, exit codes, and one line for every kind of bad input."""

from __future__ import annotations

import json
import random
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cli_calls import TINY
from PIL import Image
from safetensors.torch import load_file, save_file

import fastdiff
from fastdiff import cli, schedules
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.nn.image_unet import make_unet

COMMANDS = ("train", "sample", "eval", "train-classifier", "export", "doctor")


def test_help_lists_the_commands(start: Callable) -> None:
    process = start("--help")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    for command in COMMANDS:
        assert re.search(rf"\n    {command}\s", out)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_explains_it(run: Callable, command: str) -> None:
    ran = run(command, "--help")
    assert ran.code == 0
    assert (cli.COMMANDS[command].__doc__ or "").strip() in ran.out


def test_version(run: Callable) -> None:
    assert run("--version").out == f"fastdiff {fastdiff.__version__}\n"


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "fastdiff: interrupted"),
        (OSError(28, "No space left on device"), 2, "fastdiff: error: [Errno 28] No space left"),
        (fastdiff.common.errors.InputError("two\nlines"), 2, "fastdiff: error: two lines"),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate "
                "8589934592 bytes. Error code 12 (Cannot allocate memory)"
            ),
            2,
            "fastdiff: error: not enough memory: 8589934592 bytes (8.0 GiB) were wanted at once\n",
        ),
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 3.\n"
            ),
            2,
            "fastdiff: error: not enough memory: CUDA out of memory. Tried to allocate 20.00 GiB.",
        ),
        (
            MemoryError("Unable to allocate 7.28 TiB for an array with shape (1000000000000,)"),
            2,
            "fastdiff: error: not enough memory: Unable to allocate 7.28 TiB for an array",
        ),
        (MemoryError(), 2, "fastdiff: error: not enough memory: Python has none left\n"),
        (
            RuntimeError("Storage size calculation overflowed with sizes=[9, 9]"),
            2,
            "fastdiff: error: not enough memory: Storage size calculation overflowed with sizes",
        ),
    ],
    ids=["ctrl-c", "machine", "input", "torch", "cuda", "numpy", "python", "64 bits"],
)
def test_exit_code_of(
    run: Callable,
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    code: int,
    text: str,
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "doctor", command_that_raises(raised))
    ran = run("doctor")
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.startswith(text)
    assert ran.err.count("\n") == 1


def test_bug_keeps_its_traceback(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "doctor", command_that_raises(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        run("doctor")


def test_commands_leave_the_callers_random_numbers_alone(
    run: Callable, digits_run: Path, tmp_path: Path
) -> None:
    """Torch's, numpy's and Python's, of a program that calls the command line as a function."""
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    for words in (
        f"train --data digits --out {tmp_path}/run --steps 2 {' '.join(TINY)} --sample-every 1",
        f"train --resume --out {tmp_path}/run --steps 3",
        f"sample --checkpoint {digits_run} --steps 2 --sampler ddpm --out {tmp_path}/a.png",
        f"eval --checkpoint {digits_run} --steps 2 --samples 100 --bits 1",
        f"train-classifier --checkpoint {digits_run} --data digits --out {tmp_path}/c --steps 1 "
        "--channels 8,16 --attention none",
    ):
        assert run(*words.split()).code == 0
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize("words", ["sample --per-class", "eval --samples"])
def test_more_images_than_memory_are_refused_at_once(
    run: Callable, digits_run: Path, tmp_path: Path, words: str
) -> None:
    """Under a limit on addresses, since some machines lend more memory than they have."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    most = 2**36 if before[1] == resource.RLIM_INFINITY else min(2**36, before[1])
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        ran = run(*words.split(), 2**31 - 1, "--checkpoint", digits_run)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert (ran.code, ran.out) == (2, "")
    assert re.search(r"error: not enough memory: \d+ bytes \(\d+\.0 GiB\) were wanted", ran.last)


def command_that_raises(error: BaseException) -> Any:
    def run(args: object, argv: object) -> int:
        raise error

    return SimpleNamespace(run=run, add_arguments=lambda command: None, __doc__="Raise.")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="session")
def bad(tmp_path_factory: pytest.TempPathFactory, digits_run: Path) -> Path:
    """A folder of things that went wrong; each checkpoint began as a good one."""
    root = tmp_path_factory.mktemp("bad")
    good = checkpoint.newest(digits_run)
    assert good is not None

    def copy(name: str) -> Path:
        return Path(shutil.copytree(good, root / name))

    weights = copy("truncated") / checkpoint.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])
    (copy("foreign") / checkpoint.META).unlink()
    (copy("weightless") / checkpoint.WEIGHTS).unlink()
    edit(copy("unknown-block") / checkpoint.CONFIG, down_block_types=["FancyBlock", "DownBlock2D"])
    edit(copy("pipeline") / checkpoint.CONFIG, _class_name="UNet3DConditionModel")
    edit(copy("future") / checkpoint.META, format=99)
    edit(copy("disagreeing-size") / checkpoint.META, image_size=16)
    edit(copy("disagreeing-classes") / checkpoint.META, classes=["a", "b"])
    edit(copy("unknown-prediction") / checkpoint.META, prediction="colour")
    edit(copy("unknown-schedule") / checkpoint.META, schedule={"name": "odd", "options": {}})
    (copy("no-json") / checkpoint.META).write_text("{")
    latent = make_unet(8, 4, widths=(8, 8), layers_per_block=1, attention=())
    checkpoint.save(Checkpoint(latent, schedules.cosine(9), "v"), root / "four")
    nan = copy("nan") / checkpoint.WEIGHTS
    tensors = load_file(nan)
    tensors["conv_in.bias"][0] = torch.nan
    save_file(tensors, nan)

    run = root / "state-damaged"
    (run / "checkpoints").mkdir(parents=True)
    state = shutil.copytree(good, run / "checkpoints" / good.name) / checkpoint.STATE
    state.write_bytes(b"short")
    run = root / "of-python"
    (run / "checkpoints").mkdir(parents=True)
    facts = shutil.copytree(good, run / "checkpoints" / good.name) / checkpoint.TRAINING
    edit(facts, record={})

    (root / "file").write_text("just a file")
    (root / "folder.png").mkdir()
    (root / "empty").mkdir()
    (root / "text").mkdir()
    (root / "text" / "readme.txt").write_text("no image")
    for name in ("a", "b"):
        (root / "scribble" / name).mkdir(parents=True)
        (root / "scribble" / name / "x.png").write_bytes(b"\x89PNG and then nothing")
    picture = Image.new("RGB", (8, 8))
    for name in ("broken", "mixed", "mixed/cat", "half/cat", "half/dog"):
        (root / name).mkdir(parents=True)
    (root / "broken" / "a.png").write_bytes(b"\x89PNG and then nothing")
    picture.save(root / "mixed" / "a.png")
    picture.save(root / "mixed" / "cat" / "a.png")
    picture.save(root / "half" / "cat" / "a.png")
    return root


TRAIN = f"train --data digits --out {{new}} --steps 1 {' '.join(TINY)}"
FOLDER = f"train --out {{new}} --steps 1 {' '.join(TINY)} --data"
SAMPLE = "sample --out {new}.png --steps 2 --checkpoint"
CLASSIFIER = "train-classifier --out {new} --steps 1 --checkpoint {run} --data"
EVAL = "eval --steps 2 --checkpoint"

# The words, and a part of the one line that answers them.
ROWS = [
    ("", "the following arguments are required: command"),
    ("paint", "invalid choice: 'paint'"),
    # arguments of train
    ("train --data digits", "say where the run is to be: --out FOLDER"),
    ("train --out {new}", "say what to train on: --data digits or --data FOLDER"),
    (f"{TRAIN} --steps 0", "steps must be at least 1, got 0"),
    (f"{TRAIN} --steps many", "argument --steps: invalid int value: 'many'"),
    (f"{TRAIN} --batch-size 0", "batch_size must be at least 1, got 0"),
    (f"{TRAIN} --lr -1", "lr must be positive, got -1.0"),
    (f"{TRAIN} --lr nan", "lr must be positive, got nan"),
    (f"{TRAIN} --ema 1", "ema must lie in [0, 1), got 1.0"),
    (f"{TRAIN} --seed -1", "seed must not be negative, got -1"),
    (f"{TRAIN} --warmup -1", "warmup must not be negative, got -1"),
    (f"{TRAIN} --keep 0", "keep must be at least 1, got 0"),
    (f"{TRAIN} --save-every 0", "save_every must be at least 1, got 0"),
    (f"{TRAIN} --grad-clip -1", "grad_clip must not be negative, got -1.0"),
    (f"{TRAIN} --lr-schedule step", "argument --lr-schedule: invalid choice: 'step'"),
    (f"{TRAIN} --dropout 1", "dropout must lie in [0, 1), got 1.0"),
    (f"{TRAIN} --channels 16,x", "argument --channels: invalid integers value: '16,x'"),
    (f"{TRAIN} --channels 16,0", "widths and layers must be positive, got (16, 0)"),
    (f"{TRAIN} --channels none", "widths and layers must be positive, got ()"),
    (f"{TRAIN} --attention 2", "attention level 2 does not exist: there are 0..1"),
    (f"{TRAIN} --image-size 0", "argument --image-size: must be at least 1, got 0"),
    (f"{TRAIN} --image-size 9", "its size must be divisible by 2, got 9"),
    (f"{TRAIN} --image-size {2**31}", "argument --image-size: must be below 2**31, got 2147483648"),
    (f"{TRAIN} --image-size {2**24}", f"not enough memory: {8 * 4 * 2**48} bytes (8388608.0 GiB)"),
    (f"{TRAIN} --batch-size {2**31}", "batch_size must be below 2**31, got 2147483648"),
    (f"{TRAIN} --batch-size {2**31 - 1} --image-size 65536", "not enough memory: "),
    (f"{TRAIN} --seed {2**63}", f"seed must be below 2**63, got {2**63}"),
    (f"{TRAIN} --unconditional --label-dropout 0.1", "hides labels, but the data has none"),
    # arguments that no images could put right are told before an image is read
    (f"{FOLDER} {{bad}}/broken --image-size 9", "its size must be divisible by 2, got 9"),
    (f"{FOLDER} {{bad}}/broken --attention 2", "attention level 2 does not exist"),
    (f"{FOLDER} {{bad}}/broken --dropout 1", "dropout must lie in [0, 1), got 1.0"),
    (f"{FOLDER} {{bad}}/broken --weighting sigma", "unknown weighting 'sigma', wanted one of"),
    (f"{FOLDER} {{bad}}/broken --timestep-sampler log-normal", "unknown timestep sampler"),
    (f"{FOLDER} {{bad}}/broken --objective dsm --beta-min 30", "0 < beta_min <= beta_max"),
    (f"{FOLDER} {{bad}}/broken --objective edm --prediction eps", "edm trains the prediction edm"),
    (f"{FOLDER} {{bad}}/broken --label-dropout 0.1", "hides labels, but the data has none"),
    (f"{FOLDER} {{bad}}/broken --image-size {2**24}", "not enough memory: "),
    (f"{FOLDER} {{bad}}/missing --label-dropout 0.1", "no {bad}/missing"),
    (f"{CLASSIFIER} {{bad}}/broken --attention 3", "attention level 3 does not exist"),
    (f"{CLASSIFIER} {{bad}}/broken --channels 8,8,8,8,8", "must be divisible by 16, got 8"),
    (f"{CLASSIFIER} {{bad}}/scribble", "knows the classes ('a', 'b'), the model has ('0', '1',"),
    (f"{CLASSIFIER} {{bad}}/missing", "no {bad}/missing"),
    (f"{TRAIN} --timesteps 0", "argument --timesteps: must be at least 1, got 0"),
    (f"{TRAIN} --schedule flat", "argument --schedule: invalid choice: 'flat'"),
    (f"{TRAIN} --objective gan", "argument --objective: invalid choice: 'gan'"),
    (f"{TRAIN} --sde vp", "--sde does not belong to --objective ddpm"),
    (f"{TRAIN} --levels 5", "--levels does not belong to --objective ddpm"),
    (
        f"{TRAIN} --objective flow --schedule cosine",
        "--schedule does not belong to --objective flo",
    ),
    (f"{TRAIN} --objective dsm --sigma-max 9", "not belong to --objective dsm --sde vp"),
    (f"{TRAIN} --objective dsm --sde ve --beta-min 1", "not belong to --objective dsm --sde ve"),
    (f"{TRAIN} --objective dsm --beta-min 30", "0 < beta_min <= beta_max, got 30.0 and 20.0"),
    (f"{TRAIN} --objective edm --sigma-data 0", "sigma_data must be positive, got 0.0"),
    (f"{TRAIN} --objective edm --prediction eps", "edm trains the prediction edm, got eps"),
    (f"{TRAIN} --objective ncsn --sde vp", "ncsn needs the process VE, got VP"),
    (f"{TRAIN} --objective ncsn --levels 1", "levels must be at least 2, got 1"),
    (f"{TRAIN} --objective vlb --weighting snr", "vlb has weights of its own"),
    (f"{TRAIN} --weighting sigma", "unknown weighting 'sigma', wanted one of snr, min_snr"),
    (f"{TRAIN} --timestep-sampler often", "argument --timestep-sampler: invalid choice: 'often'"),
    (f"{TRAIN} --timestep-sampler log-normal", "unknown timestep sampler 'log-normal', wanted one"),
    (f"{TRAIN} --prediction noise", "argument --prediction: invalid choice: 'noise'"),
    (f"{TRAIN} --threads 0", "argument --threads: must be at least 1, got 0"),
    (f"{TRAIN} --device teapot", "--device teapot cannot be used"),
    (f"{TRAIN} --backend gpu", "argument --backend: invalid choice: 'gpu'"),
    (f"{TRAIN} --flip", "--flip is not for digits: a mirrored digit is no digit"),
    (f"{TRAIN} --crop random", "--image-column and --label-column are not for digits"),
    (f"{FOLDER} {{pictures}} --label-column cls", "for tables, and {pictures} is none"),
    # data
    (f"{FOLDER} {{bad}}/missing", "no {bad}/missing"),
    (f"{FOLDER} {{bad}}/file", "{bad}/file is not a folder of images"),
    (f"{FOLDER} {{bad}}/empty", "{bad}/empty has no images"),
    (f"{FOLDER} {{bad}}/text", "{bad}/text has no images"),
    (f"{FOLDER} {{bad}}/broken", "cannot read the image {bad}/broken/a.png"),
    (f"{FOLDER} {{bad}}/mixed", "{bad}/mixed has images both in itself and in sub-folders"),
    (f"{FOLDER} {{bad}}/half", "the class folder {bad}/half/dog has no images"),
    # where a run is kept
    ("train --data digits --out {bad}/file", "cannot write {bad}/file/losses.jsonl: "),
    ("train --data digits --out {run}", "{run} holds checkpoints of an earlier run; continue it"),
    ("train --resume --out {new}", "no checkpoint to resume in {new}"),
    ("train --resume --out {bad}/state-damaged", "training_state.safetensors is damaged"),
    ("train --resume --out {bad}/of-python", "was not written by fastdiff train"),
    ("train --resume --out {run} --channels 8", "cannot change --channels: it has (16, 32), got"),
    ("train --resume --out {run} --seed 1", "cannot change --seed: it has 0, got 1"),
    ("train --resume --out {run} --data {pictures}", "cannot change --data: it has digits, got"),
    ("train --resume --out {run} --no-channels-last", "cannot change --channels-last: it has True"),
    # sampler and request
    (f"{SAMPLE} {{run}} --sampler dimm", "argument --sampler: invalid choice: 'dimm'"),
    (f"{SAMPLE} {{run}} --sampler dpm-3 --steps 2", "dpm-3 needs at least 3 steps, got 2"),
    (f"{SAMPLE} {{run}} --steps 1001", "steps must lie in 1..1000 (the schedule's T), got 1001"),
    (f"{SAMPLE} {{run}} --steps 0", "steps must lie in 1..1000 (the schedule's T), got 0"),
    (f"{SAMPLE} {{run}} --option eta=1.5", "eta must lie in [0, 1], got 1.5"),
    (f"{SAMPLE} {{run}} --option eta", "argument --option: must be NAME=VALUE, got 'eta'"),
    (f"{SAMPLE} {{run}} --sampler ddpm --option eta=1", "ddpm has no option 'eta'"),
    (f"{SAMPLE} {{run}} --sampler ode", "ode chooses its own steps, got steps=2"),
    (
        f"{SAMPLE} {{run}} --sampler ancestral --grid karras",
        "--grid is for samplers with timesteps",
    ),
    (f"{SAMPLE} {{run}} --sampler ancestral --option eta=1", "ancestral has no option 'eta'"),
    (f"{SAMPLE} {{run}} --sampler annealed-langevin", "needs the SDE VE or EDM, got Interpolated"),
    (f"{SAMPLE} {{run}} --sampler adaptive --option norm=l3", "unknown norm 'l3'"),
    (f"{SAMPLE} {{run}} --grid even", "argument --grid: invalid choice: 'even'"),
    (f"{SAMPLE} {{run}} --classes 3,10", "class 10 does not exist: the model has 0..9"),
    (f"{SAMPLE} {{run}} --classes -1", "class -1 does not exist: the model has 0..9"),
    (f"{SAMPLE} {{run}} --classes cat", "argument --classes: invalid integers value: 'cat'"),
    (f"{SAMPLE} {{run}} --classes none", "--classes names no class"),
    (f"{SAMPLE} {{run}} --per-class 0", "argument --per-class: must be at least 1, got 0"),
    (f"{SAMPLE} {{bad}}/four", "pictures have 1 or 3 channels, the model's have 4"),
    (f"{SAMPLE} {{run}} --count 4", "the model is class-conditional: use --per-class, not --count"),
    (f"{SAMPLE} {{plain}} --classes 0", "the model has no classes: use --count, not --classes"),
    (f"{SAMPLE} {{plain}} --per-class 2", "the model has no classes: use --count, not --classes"),
    (f"{SAMPLE} {{plain}} --count 0", "argument --count: must be at least 1, got 0"),
    (f"{SAMPLE} {{run}} --seed -1", "--seed must lie in 0..2**63 - 1, got -1"),
    (f"{SAMPLE} {{run}} --seed {2**63}", f"--seed must lie in 0..2**63 - 1, got {2**63}"),
    (f"{SAMPLE} {{run}} --device teapot", "--device teapot cannot be used"),
    # where a picture is written
    ("sample --checkpoint {run} --out {new}", "cannot tell the image format of '{new}'"),
    ("sample --checkpoint {run} --out {new}.exe", "cannot tell the image format of '{new}.exe'"),
    ("sample --checkpoint {run} --out {bad}/folder.png", "{bad}/folder.png: it is a folder"),
    ("sample --checkpoint {run} --out {bad}/file/a.png", "cannot write {bad}/file/a.png: "),
    ("sample --checkpoint {run} --out /proc/a.png", "cannot write /proc/a.png: "),
    # checkpoints
    (f"{SAMPLE} {{bad}}/missing", "no checkpoint at {bad}/missing: no such folder"),
    (
        f"{SAMPLE} {{bad}}/empty",
        "{bad}/empty is not a fastdiff checkpoint: it has no fastdiff.json",
    ),
    (f"{SAMPLE} {{bad}}/file", "{bad}/file is not a fastdiff checkpoint"),
    (f"{SAMPLE} {{bad}}/truncated", "model.safetensors is damaged or no safetensors file (1000 "),
    (f"{SAMPLE} {{bad}}/foreign", "{bad}/foreign is not a fastdiff checkpoint"),
    (f"{SAMPLE} {{bad}}/weightless", "it has no diffusion_pytorch_model.safetensors"),
    (f"{SAMPLE} {{bad}}/unknown-block", "FancyBlock"),
    (f"{SAMPLE} {{bad}}/pipeline", "describes a UNet3DConditionModel, wanted a UNet2DModel"),
    (f"{SAMPLE} {{bad}}/future", "has format 99; this fastdiff reads format 1"),
    (f"{SAMPLE} {{bad}}/disagreeing-size", "disagree: image_size is 16, sample_size is 8"),
    (f"{SAMPLE} {{bad}}/disagreeing-classes", "disagree: classes is 2, num_class_embeds is 10"),
    (f"{SAMPLE} {{bad}}/unknown-prediction", "unknown prediction kind 'colour'"),
    (f"{SAMPLE} {{bad}}/unknown-schedule", "{bad}/unknown-schedule/fastdiff.json: "),
    (f"{SAMPLE} {{bad}}/no-json", "{bad}/no-json/fastdiff.json is not JSON"),
    (f"{SAMPLE} {{bad}}/nan", "conv_in.bias has NaN or infinity"),
    # eval and export
    (f"{EVAL} {{run}} --samples 0", "argument --samples: must be at least 1, got 0"),
    (f"{EVAL} {{run}} --samples 99", "samples must be at least 100, got 99"),
    (f"{EVAL} {{run}} --bits 0", "argument --bits: must be at least 1, got 0"),
    (f"{EVAL} {{run}} --seed -1", "--seed must lie in 0..2**63 - 1, got -1"),
    (f"{EVAL} {{run}} --steps 1001", "steps must lie in 1..1000"),
    (f"{EVAL} {{plain}}", "evaluation needs a class-conditional model of the digits"),
    (f"{EVAL} {{bad}}/truncated", "is damaged or no safetensors file"),
    ("export --checkpoint {run}", "the following arguments are required: --out"),
    ("export --checkpoint {run} --out {bad}", "{bad} exists already; it was left as it is"),
    ("export --checkpoint {run} --out {bad}/file/a", "cannot write the checkpoint {bad}/file/a: "),
    ("export --checkpoint {run} --out {new} --dtype int8", "argument --dtype: invalid choice"),
    ("export --checkpoint {bad}/foreign --out {new}", "is not a fastdiff checkpoint"),
    ("doctor --loud", "unrecognized arguments: --loud"),
]


@pytest.mark.parametrize(("words", "part"), ROWS, ids=[row[0] or "nothing" for row in ROWS])
def test_bad_input(
    run: Callable,
    bad: Path,
    digits_run: Path,
    plain_run: Path,
    pictures: Path,
    tmp_path: Path,
    words: str,
    part: str,
) -> None:
    new = tmp_path / "new"
    places = {"bad": bad, "run": digits_run, "plain": plain_run, "pictures": pictures, "new": new}
    ran = run(*words.format(**places).split())
    assert ran.code == 2
    assert ran.out == ""
    assert ran.last.startswith("fastdiff: error: ")
    assert part.format(**places) in ran.last
    assert ran.err.count("fastdiff: ") == 1
    assert "Traceback" not in ran.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # nothing half done
    assert not list(bad.rglob("*.partial"))
