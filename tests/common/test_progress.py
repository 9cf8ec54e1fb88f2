"""Progress: a bar that is drawn anew on a terminal, whole lines in a file."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff import samplers, schedules, sde
from fastdiff.common import progress
from fastdiff.common.progress import progress_bar

SOURCES = Path(fastdiff.__file__).parent


@pytest.fixture
def clock(monkeypatch):
    """Seconds, as tqdm reads them; the test moves them on."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def lines(text):
    """The lines of a file, which none may have been drawn over."""
    assert "\r" not in text
    assert "\x1b" not in text
    return text.splitlines()


def test_a_file_has_the_first_and_the_last_line_and_one_a_minute(clock, capsys):
    with progress_bar(total=1000, desc="counting") as bar:
        for _ in range(1000):
            clock[0] += 0.5  # 500 seconds in all
            bar.update()
    told = lines(capsys.readouterr().err)
    assert [line.partition("%")[0].split()[1] for line in told] == (
        ["0", "12", "24", "36", "48", "60", "72", "84", "96", "100"]
    )
    assert told[-1].startswith("counting: 100%|")
    assert "1000/1000" in told[-1]


def test_a_bar_of_an_iterable_and_one_that_is_not_left(clock, capsys):
    for _ in progress_bar(range(300), desc="reading", leave=False):
        clock[0] += 0.1
    assert len(lines(capsys.readouterr().err)) == 2


def test_a_bar_that_is_not_shown_writes_nothing(capsys):
    for _ in progress_bar(range(3), shown=False):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_terminal_is_drawn_on(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with progress_bar(total=3, desc="counting", mininterval=0) as bar:
        for _ in range(3):
            bar.update()
    assert terminal.getvalue().count("\r") >= 4


def test_a_notebook_has_its_own_bar(monkeypatch, capsys):
    class Widget:
        def __init__(self, iterable, **options):
            assert "file" not in options

    monkeypatch.setattr(progress, "tqdm", Widget)
    assert isinstance(progress_bar(total=3), Widget)


@pytest.mark.parametrize("stream", ["full", "closed", "none"])
def test_standard_error_that_takes_nothing_is_no_error(stream, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    broken = {"full": Full(), "closed": io.StringIO(), "none": None}[stream]
    if stream == "closed":
        broken.close()
    monkeypatch.setattr("sys.stderr", broken)
    with progress_bar(total=3) as bar:
        bar.update(3)


def model(x, t):
    return torch.zeros_like(x)


def test_sampling_counts_every_step(capsys):
    """301 steps are counted three at a time, the last one too."""
    sampler = samplers.make("ddim", schedules.cosine(500), 301)
    fastdiff.sample(model, sampler, (1, 1, 2, 2), progress=True)
    assert "301/301" in lines(capsys.readouterr().err)[-1]


@pytest.mark.parametrize(
    ("method", "steps"),
    [("ancestral", 50), ("probability-flow", 50), ("ode", None), ("adaptive", None)],
)
def test_solvers_write_two_lines(method, steps, capsys):
    solver = sde.Solver(sde.VP(), method, steps)
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    solver.sample(lambda x, t: -x, x, generator=torch.Generator().manual_seed(0), progress=True)
    assert len(lines(capsys.readouterr().err)) == 2


def test_commands_write_few_lines_into_a_file(tmp_path):
    """Training, whose bar is drawn again and again on a terminal."""
    words = (
        "train --data digits --out run --steps 60 --channels 8,8 --attention none --batch-size 4"
    )
    command = [
        sys.executable,
        "-m",
        "fastdiff",
        *words.split(),
        "--image-size",
        "8",
        "--threads",
        "1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(SOURCES.parent)}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    told = lines(ran.stderr.decode())
    assert ran.returncode == 0, told
    assert sum(line.startswith("training: ") for line in told) == 2
    assert "60/60" in told[-2]
    assert "loss=" in told[-2]


def test_every_bar_of_the_library_is_made_here():
    own = SOURCES / "common" / "progress.py"
    users = [p for p in SOURCES.rglob("*.py") if "tqdm(" in p.read_text(encoding="utf-8")]
    assert users == [own]
