"""The processes of a run: those that ``torchrun`` started, as one group, or this one alone.

A single process needs nothing of ``torch.distributed``. Numbers and flags that processes tell each
other are on the CPU wherever the group has a backend for it; gradients travel through PyTorch's
DistributedDataParallel, on the device on which they are.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastdiff.common.errors import InputError, TrainingError

# The longest wait for another process, which may be writing a checkpoint or drawing samples. A
# process that ends closes its connections, which the others notice at once; this bound is for
# machines that vanish from the network.
TIMEOUT = timedelta(minutes=30)
TRAVELLING = 2**20  # values that are sent at a time
GRACE = 2.0  # seconds for the system to notice that a process has ended
# Parts of the messages of gloo, whose errors have no class of their own.
LOST = ("gloo", "Connection closed", "Connection reset", "Broken pipe", "Timed out")


class Peer(NamedTuple):
    """Where a process runs."""

    host: str
    pid: int


@dataclass(frozen=True)
class World:
    """The processes of a run, and the place of this one among them.

    All methods but :meth:`share` must be called by all processes, in the same order.

    Attributes:
        rank: number of this process, from 0.
        count: of the processes.
        peers: where each of them runs; empty for a single process.
    """

    rank: int = 0
    count: int = 1
    peers: tuple[Peer, ...] = ()

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    def share(self, total: int) -> tuple[int, int]:
        """Start and stop of this process's consecutive share of ``total`` things.

        The shares of all processes are disjoint and complete; their sizes differ by at most 1.
        """
        return total * self.rank // self.count, total * (self.rank + 1) // self.count

    def joined(self, share: Tensor, total: int) -> Tensor:
        """The shares of all processes, one behind the other.

        Args:
            share: a row for each of this process's :meth:`share` of ``total``, [n, ...].
            total: number of rows of all processes.

        Returns:
            [total, ...] on the CPU.

        Raises:
            TrainingError: another process has ended.
        """
        if self.count == 1:
            return share.cpu()
        rows = -(-total // self.count)  # collectives want one size
        padded = torch.zeros(rows, *share.shape[1:], dtype=share.dtype, device=_device())
        padded[: len(share)] = share
        found = [torch.empty_like(padded) for _ in range(self.count)]
        with self.lost_as_errors():
            dist.all_gather(found, padded)
        return torch.cat(
            [part[: World(rank, self.count).size(total)] for rank, part in enumerate(found)]
        ).cpu()

    def of(self, rank: int, rows: Tensor, count: int) -> Tensor:
        """The rows [count, ...] of process ``rank``, on the CPU of each process.

        Args:
            rank: whose rows are wanted.
            rows: those of this process, [n, ...], of which the shape [...] and dtype count.
            count: number of rows of process ``rank``.

        Raises:
            TrainingError: another process has ended.
        """
        if self.count == 1:
            return rows.cpu()
        found = torch.empty(count, *rows.shape[1:], dtype=rows.dtype, device=_device())
        if rank == self.rank:
            found.copy_(rows)
        with self.lost_as_errors():
            dist.broadcast(found, src=rank)
        return found.cpu()

    def size(self, total: int) -> int:
        """Size of this process's :meth:`share`."""
        start, stop = self.share(total)
        return stop - start

    def largest(self, *values: int) -> int:
        """The largest of the values that the processes give; TrainingError if one has ended."""
        value = max(values)
        if self.count == 1:
            return value
        found = torch.tensor(value, device=_device())
        with self.lost_as_errors():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def by_first(self, action: Callable[[], Any]) -> None:
        """The first process does ``action``, for which the others wait; its error is everyone's.

        Raises:
            InputError: of ``action``, in every process; other errors of it are a TrainingError in
                the processes that waited.
        """
        if self.count == 1:
            action()
            return
        error: BaseException | None = None
        if self.first:
            try:
                action()
            except BaseException as raised:
                error = raised
        # An error that is no input's may hold anything, even what cannot be pickled.
        told = (
            error
            if error is None or isinstance(error, InputError)
            else TrainingError(
                f"the first process of the run failed: {type(error).__name__}: {error}"
            )
        )
        box = [told]
        with self.lost_as_errors():
            dist.broadcast_object_list(box, src=0, device=_device())
        if error is not None:
            raise error
        if box[0] is not None:
            raise box[0]

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Give tensors the mean of the values that they have in the processes."""
        if self.count == 1:
            return
        with self.lost_as_errors():
            for group in _groups(tensors):
                flat = torch.cat([tensor.flatten() for tensor in group]).div_(self.count)
                dist.all_reduce(flat)
                sizes = [tensor.numel() for tensor in group]
                for tensor, mean in zip(group, flat.split(sizes), strict=True):
                    tensor.copy_(mean.view(tensor.shape))

    @torch.no_grad()
    def as_first(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors the values that they have in the first process."""
        if self.count == 1:
            return
        with self.lost_as_errors():
            for tensor in tensors:
                value = tensor.contiguous()  # whatever strides the processes have chosen
                if _device().type == "cuda":
                    value = value.to(_device())
                dist.broadcast(value, src=0)
                tensor.copy_(value)

    @contextmanager
    def lost_as_errors(self) -> Iterator[None]:
        """For a ``with`` block, turn errors of connections into a TrainingError of one line."""
        try:
            yield
        except RuntimeError as error:
            text = str(error).split("\n")[0]
            named = isinstance(error, dist.DistError) or any(part in text for part in LOST)
            if self.count == 1 or isinstance(error, InputError) or not named:
                raise
            raise TrainingError(self._missing(text)) from None

    def _missing(self, text: str) -> str:
        """Which process has ended, as far as this machine can tell; else the error's ``text``."""
        until = time.monotonic() + GRACE
        here = socket.gethostname()
        gone: list[str] = []
        while not gone and time.monotonic() < until:
            gone = [
                f"{rank} (PID {peer.pid} on {peer.host})"
                for rank, peer in enumerate(self.peers)
                if peer.host == here and not _lives(peer.pid)
            ]
            time.sleep(0.05)
        if not gone:
            return f"process {self.rank} lost the connection to another process of the run: {text}"
        which = "process" if len(gone) == 1 else "processes"
        return f"{which} {', '.join(gone)} of the run ended, so process {self.rank} cannot go on"


def present() -> World:
    """The processes of torch's default process group; this one alone if there is none.

    Raises:
        InputError: ``torchrun`` started several processes, but they are no group yet.
    """
    if not dist.is_available() or not dist.is_initialized():
        if _started() > 1:
            raise InputError(
                f"torchrun started {_started()} processes, which are no process group yet: train "
                "in `with fastdiff.training.process_group(device):`, or call "
                "torch.distributed.init_process_group first"
            )
        return World()
    count = dist.get_world_size()
    peers: list[Any] = [None] * count
    if count > 1:
        dist.all_gather_object(peers, Peer(socket.gethostname(), os.getpid()))
    return World(dist.get_rank(), count, tuple(peers) if count > 1 else ())


@contextmanager
def process_group(device: str | torch.device = "cpu") -> Iterator[World]:
    """For a ``with`` block, make the processes that ``torchrun`` started one process group.

    Without ``torchrun``, with one process, or if there is a group already, nothing is made.

    Args:
        device: where the processes compute: gloo connects CPUs, NCCL CUDA devices.

    Raises:
        InputError: the processes cannot be connected.
    """
    if _started() == 1 or not dist.is_available() or dist.is_initialized():
        yield present()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo"
    try:
        store, rank, count = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
        # torchrun keeps one store for all its starts, with what the processes of earlier starts
        # have put there, such as the addresses at which nobody listens any more.
        store = dist.PrefixStore(_name_of_start(store, rank, count), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        text = str(error).split("\n")[0]
        raise InputError(f"the {_started()} processes cannot be connected: {text}") from None
    yield present()
    # Only at a good end: after an error NCCL would wait for processes that have ended.
    dist.destroy_process_group()


def _name_of_start(store: dist.Store, rank: int, count: int) -> str:
    """A name on which the processes that were started together agree, and no others.

    The first process chooses it, and answers each question with it until all have heard it. Some
    questions may be of processes that have died; nobody waits for the answer.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"fastdiff/question/{rank}", own)
        name = store.get(f"fastdiff/answer/{own}").decode()  # waits until there is one
        store.set(f"fastdiff/heard/{name}/{rank}", "")
        return name
    waiting, until = set(range(1, count)), time.monotonic() + TIMEOUT.total_seconds()
    while waiting:
        for other in sorted(waiting):
            if store.check([f"fastdiff/heard/{own}/{other}"]):
                waiting.remove(other)
            elif store.check([question := f"fastdiff/question/{other}"]):
                store.set(f"fastdiff/answer/{store.get(question).decode()}", own)
        if time.monotonic() > until:
            raise RuntimeError(f"processes {sorted(waiting)} have not come")
        time.sleep(0.01)
    return own


def local_rank() -> int:
    """Number of this process among those of its machine, by which it takes its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if _started() > 1 else 0


def is_first() -> bool:
    """Whether this process is the first that ``torchrun`` started, also before they are a group."""
    return _started() == 1 or os.environ.get("RANK") == "0"


def _started() -> int:
    """Number of processes that ``torchrun`` started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def _groups(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in their order, in lists of one dtype whose values travel together."""
    group: list[Tensor] = []
    for tensor in tensors:
        if group and (
            tensor.dtype != group[0].dtype or sum(map(Tensor.numel, group)) >= TRAVELLING
        ):
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group


def _device() -> torch.device:
    """Where the group's backend takes small tensors."""
    devices = dist.get_backend_config()
    return torch.device("cpu" if "cpu" in str(devices) else "cuda")


def _lives(pid: int) -> bool:
    """Whether a process of this machine runs; one that waits to be buried does not."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:  # no permission to ask, or no /proc
        return True
    return state not in "ZX"
