"""Progress: a bar on a terminal, a line a minute in a file."""

from __future__ import annotations

import io
import time

import pytest

from fastdiff import _progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def shown(monkeypatch):
    """Run 300 steps of a second each, and return what standard error holds then."""

    def run(file, **options):
        now = [1000.0]
        monkeypatch.setattr("sys.stderr", file)
        monkeypatch.setattr(time, "time", lambda: now[0])
        with _progress.bar(total=300, desc="work", **options) as bar:
            bar._time = time.time  # tqdm looked it up when it was imported
            bar.start_t = bar.last_print_t = now[0]
            for _ in range(300):
                now[0] += 1
                bar.update()
        return file.getvalue()

    return run


def test_a_line_a_minute_in_a_file(shown):
    text = shown(io.StringIO())
    assert "\r" not in text
    counts = [line.split("|")[2].split()[0] for line in text.splitlines()]
    assert counts == ["0/300", "60/300", "120/300", "180/300", "240/300", "300/300", "300/300"]


def test_the_last_state_of_a_bar_that_does_not_stay_is_left_out(shown):
    lines = shown(io.StringIO(), leave=False).splitlines()
    counts = [line.split("|")[2].split()[0] for line in lines]
    assert counts == ["0/300", "60/300", "120/300", "180/300", "240/300", "300/300"]


def test_quick_work_is_one_line(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr("sys.stderr", file)
    assert list(_progress.bar(range(1000), leave=False)) == list(range(1000))
    assert file.getvalue().count("\n") == 1


def test_a_bar_on_a_terminal(shown):
    text = shown(Terminal())
    assert text.count("\r") > 100


@pytest.mark.parametrize("file", [None, io.StringIO()], ids=["no standard error", "not shown"])
def test_nothing(file, monkeypatch):
    monkeypatch.setattr("sys.stderr", file)
    assert list(_progress.bar(range(3), shown=file is None)) == [0, 1, 2]
    assert file is None or file.getvalue() == ""
