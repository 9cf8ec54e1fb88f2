"""Names with spaces and letters beyond ASCII, in every locale; output that nothing takes."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_calls import TINY

import fastdiff
from fastdiff import training
from fastdiff.checkpoints import checkpoint
from fastdiff.data.file_names import as_path, as_text

ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k not in ("PYTHONUTF8", "PYTHONUNBUFFERED")},
    "PYTHONPATH": str(Path(fastdiff.__file__).parents[1]),
}
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
EXPORT = ("export", "--checkpoint", "digits", "--out")


def alone(
    *words: object, cwd: Path, stdout: int | None = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "fastdiff", *map(str, words)]
    return subprocess.run(
        command, cwd=cwd, env={**ENVIRONMENT, **environment}, stdout=stdout,
        stderr=subprocess.PIPE, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture
def letters(pictures: Path, tmp_path: Path) -> Path:
    """The images of ``pictures`` in folders of such names."""
    root = tmp_path / "ü  [b] データ"
    for old, new in (("cat", "café é"), ("dog", "日本 語")):
        shutil.copytree(pictures / old, root / new)
    return root


def test_text_is_the_same_in_every_locale() -> None:
    assert as_text("café") == "café"
    odd = os.fsdecode(b"\xff\xc3\xa9")
    assert as_path(as_text(odd)) == odd


def test_a_run_goes_on_in_another_locale(run: Callable, letters: Path, tmp_path: Path) -> None:
    out = tmp_path / "r  ñ"
    words = ("train", "--data", letters, "--out", out, *TINY, "--steps")
    ran = alone(*words, 1, "--sample-every", 1, cwd=tmp_path, **ASCII)
    assert ran.returncode == 0, ran.stderr
    found = checkpoint.load(out)
    assert (found.classes, found.dataset) == (("café é", "日本 語"), letters.name)
    again = run("train", "--resume", "--out", out, "--steps", 2)
    assert again.code == 0, again.err
    ran = alone("train", "--resume", "--out", out, "--steps", 3, cwd=tmp_path, **ASCII)
    assert ran.returncode == 0, ran.stderr
    folder = tmp_path / "c é"
    words = ("train-classifier", "--checkpoint", out, "--data", letters, "--out", folder)
    ran = alone(
        *words, "--steps", 1, "--channels", "8,16", "--attention", "none", cwd=tmp_path, **ASCII
    )
    assert ran.returncode == 0, ran.stderr
    picture = tmp_path / "s é.png"
    sampled = run(
        "sample", "--checkpoint", out, "--classifier", folder, "--steps", 2, "--out", picture
    )
    assert sampled.code == 0, sampled.err
    assert picture.is_file()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_standard_output_cannot_show_is_escaped(tmp_path: Path, encoding: str) -> None:
    ran = alone(*EXPORT, "日本", cwd=tmp_path, PYTHONIOENCODING=encoding)
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert ran.stdout.startswith(rb"\u65e5\u672c: step ")
    assert (tmp_path / "日本").is_dir()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
def test_output_that_a_full_disk_does_not_take_is_one_line(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        ran = alone(*EXPORT, "shared", cwd=tmp_path, stdout=full.fileno())
    assert ran.returncode == 2
    assert ran.stderr == b"fastdiff: error: [Errno 28] No space left on device\n"
    assert (tmp_path / "shared").is_dir()


def test_errors_show_names_as_they_are(run: Callable, tmp_path: Path) -> None:
    assert (
        f"no checkpoint at {tmp_path}/a  b: no such"
        in run("sample", "--checkpoint", tmp_path / "a  b", "--out", tmp_path / "x.png").last
    )


def test_the_way_to_go_on_can_be_copied(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = training.Trainer.step

    def interrupted(trainer: training.Trainer) -> float:
        signal.raise_signal(signal.SIGTERM)
        return step(trainer)

    monkeypatch.setattr(training.Trainer, "step", interrupted)
    ran = run("train", "--data", "digits", *TINY, "--out", tmp_path / "it's ñ", "--steps", 3)
    monkeypatch.undo()
    words = shlex.split(ran.last.removeprefix("continue with: fastdiff "))
    assert words[-1] == f"{tmp_path}/it's ñ"
    assert run(*words).code == 0
