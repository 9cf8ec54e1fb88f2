"""One process at a time trains in a folder, and a dead one keeps nobody out."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import fastdiff
from fastdiff.common.errors import InputError, LockedError
from fastdiff.training.run_lock import NAME, run_lock

HOLD = """
import os, sys, time
from fastdiff.training.run_lock import run_lock
with run_lock(sys.argv[1]):
    child = os.fork() if sys.argv[2] == "fork" else 1
    if child:
        print(child, flush=True)
    time.sleep(100)
"""


@pytest.fixture
def hold(tmp_path):
    """A function that starts a process which holds the lock of ``tmp_path``."""
    started = []

    def start(how="alone"):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path), how], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(Path(fastdiff.__file__).parents[1])},
        )  # fmt: skip
        started.append(process)
        return process, int(process.stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_process_is_refused_until_the_first_is_dead(hold, tmp_path):
    """The error names the first; kill -9 leaves no lock, even if a forked worker lives on."""
    first, worker = hold("fork")
    try:
        wanted = rf"{tmp_path} is in use: process {first.pid} on .* trains there\. Wait until"
        with pytest.raises(LockedError, match=wanted), run_lock(tmp_path):
            pass
        first.kill()
        first.wait()
        os.kill(worker, 0)  # is alive
        with run_lock(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_blocks_of_a_thread_nest_and_other_threads_are_refused(tmp_path):
    refused = []

    def try_it():
        try:
            with run_lock(tmp_path):
                pass
        except LockedError as error:
            refused.append(str(error))

    def in_a_thread():
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
        return len(refused)

    with run_lock(tmp_path / "new" / "run"):
        assert in_a_thread() == 0  # another folder
    with run_lock(tmp_path), run_lock(os.path.relpath(tmp_path)):
        assert in_a_thread() == 1
    assert f"process {os.getpid()} on" in refused[0]
    assert in_a_thread() == 1
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path):
        _ = 1 / 0
    assert in_a_thread() == 1
    assert (tmp_path / NAME).read_text() == ""


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", flock)
    told = pytest.warns(UserWarning, match="has no locks .Operation not supported.*take care")
    with told, run_lock(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_lock_that_fails_is_an_error(number, tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    told = pytest.raises(InputError, match=f"cannot lock .*{NAME}: {os.strerror(number)}")
    with told, run_lock(tmp_path):
        pass


def test_a_full_disk_does_not_matter_to_a_lock(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with run_lock(tmp_path):
        pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    told = pytest.raises(InputError, match=f"cannot write .*{NAME}: File exists")
    with told, run_lock(tmp_path / "file"):
        pass
