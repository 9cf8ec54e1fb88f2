"""One process at a time writes into the folder of a run.

The lock is the kernel's (flock), not the file: the kernel releases it when the process ends,
however it ends, so a lock is never left over. The file stays, since deleting it would let two
processes lock two files of one name; what is in it only serves the error of the next process.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fastdiff.checkpoints import checkpoint, resumable
from fastdiff.common.errors import InputError, LockedError

NAME = "run.lock"
# What file systems without locks answer.
WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}

_held: dict[tuple[Path, int], int] = {}  # folder and thread -> descriptor


@contextmanager
def run_lock(out: str | Path) -> Iterator[None]:
    """For a ``with`` block, keep other processes and threads from writing into a run's folder.

    Blocks of one thread may be nested. Readers need no lock: checkpoints appear whole. On a file
    system without locks the block runs with a warning.

    Args:
        out: the run's folder; created if it does not exist.

    Raises:
        LockedError: another process or thread is in such a block for the same folder.
        InputError: no file can be written in the folder.
    """
    folder = Path(out).resolve()
    key = folder, threading.get_ident()
    if key in _held:
        yield
        return
    _held[key] = descriptor = _locked(folder / NAME)
    try:
        yield
    finally:
        if _held.pop(key, None) is not None:  # else this is a forked process
            with suppress(OSError):
                os.ftruncate(descriptor, 0)  # while no other process can have put its name there
            os.close(descriptor)


@contextmanager
def claim(out: Path, finished_steps: int, keep: int) -> Iterator[None]:
    """For a ``with`` block, a run's folder is locked and ready to be written into.

    What a killed process has left of a checkpoint is deleted: it may be what fills the disk.

    Args:
        out: the run's folder.
        finished_steps: number of steps done by the trainer that will write.
        keep: number of the newest checkpoints to keep.

    Raises:
        LockedError: another process or thread writes there.
        InputError: no file can be written in the folder, or it has checkpoints of later steps.
    """
    with run_lock(out):
        newest = checkpoint.newest(out)
        if newest is not None and checkpoint.step_of(newest) > finished_steps:
            raise InputError(
                f"another process has taken the run in {out} to {newest.name}, this one is at step "
                f"{finished_steps}; resume the run again"
            )
        checkpoint.prune(out, keep)
        yield


def _locked(path: Path) -> int:
    """The descriptor of the file at ``path``, locked until it is closed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(descriptor)
        os.close(descriptor)
        raise LockedError(
            f"{path.parent} is in use: {holder} trains there. Wait until it is done, stop it, or "
            "choose another folder"
        ) from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            os.close(descriptor)
            raise InputError(f"cannot lock {path}: {error.strerror or error}") from None
        warnings.warn(
            f"fastdiff: the file system of {path.parent} has no locks ({error.strerror}); take "
            "care that no second process trains there",
            stacklevel=5,
        )
    with suppress(OSError):  # a full disk, on which the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(
            descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0
        )
    return descriptor


def _holder(descriptor: int) -> str:
    """The process that has locked the file, in words."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {found['pid']:d} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has not written its name yet
        return "another process"


def _leave_to_the_parent() -> None:
    """Close the locks in a forked process, which would hold them when its parent is dead.

    Data workers are forked, for example. Closing a copy of a descriptor releases no lock.
    """
    for descriptor in _held.values():
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_the_parent)


def set_aside(out: str | Path, damaged: Sequence[Path]) -> None:
    """Rename damaged checkpoints of a run, see ``resumable.set_aside``, when nobody else trains."""
    with run_lock(out):
        resumable.set_aside(damaged)
