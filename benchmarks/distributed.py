"""Time training steps by one process with N threads, and by N processes with one thread each.

    python -m benchmarks.distributed [--processes 2] [--image-size 16] [--batch-size 64] [--bf16]

Both train the model of ``fastdiff train``'s defaults on the same batches, each side in processes of
its own, and the sides take turns. gloo connects the N processes. The ratio, of the medians of
images a second, is what is left of one process's speed when gradients travel between processes.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from statistics import median

import torch

from benchmarks import machine
from fastdiff import schedules
from fastdiff.common.world import process_group
from fastdiff.data.datasets import ImageSet
from fastdiff.training import Trainer, TrainingOptions, make_unet

IMAGES = 256


class Side:
    """Processes that wait for their turn.

    Args:
        processes: how many.
        threads: of each.
    """

    def __init__(self, processes: int, threads: int) -> None:
        self.name = f"{processes} process(es) of {threads} thread(s)"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {
            **os.environ, "OMP_NUM_THREADS": str(threads), "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "bench",
        }  # fmt: skip
        self._started = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.distributed", "--steps-by", str(threads),
                 *sys.argv[1:]],
                env={**common, "RANK": str(rank)},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for rank in range(processes)
        ]  # fmt: skip

    def turn(self) -> float:
        """Seconds of a turn's steps."""
        for process in self._started:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        seconds = []
        for process in self._started:
            assert process.stdout is not None
            seconds.append(float(process.stdout.readline()))
        return max(seconds)

    def end(self) -> None:
        """End the processes."""
        for process in self._started:
            process.kill()
            process.wait()


def take_steps(args: argparse.Namespace) -> None:
    """In a process of a side: for each line of standard input a turn, whose seconds are written."""
    torch.set_num_threads(args.steps_by)
    size, generator = args.image_size, torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (IMAGES, 1, size, size), generator=generator, dtype=torch.uint8)
    images = ImageSet(pixels, torch.arange(IMAGES) % 10, tuple("0123456789"))
    options = TrainingOptions(batch_size=args.batch_size, bf16=args.bf16)
    with process_group():
        trainer = Trainer(make_unet(size, 1, 10), schedules.cosine(), images, options)
        for _ in sys.stdin:
            began = time.perf_counter()
            for _ in range(args.steps):
                trainer.step()
            print(time.perf_counter() - began, flush=True)


def compare(args: argparse.Namespace) -> None:
    """Let both sides take turns; print their speeds and the ratio."""
    sides = [Side(1, args.processes), Side(args.processes, 1)]
    speeds: list[list[float]] = [[], []]
    try:
        for turn in range(args.turns + 1):
            for side, found in zip(sides, speeds, strict=True):
                seconds = side.turn()
                if turn:  # the first builds graphs and packs weights
                    found.append(args.batch_size * args.steps / seconds)
    finally:
        for side in sides:
            side.end()
    print(machine.line(machine.facts(None)))
    for side, found in zip(sides, speeds, strict=True):
        spread = f"{min(found):.1f}..{max(found):.1f}"
        print(f"{side.name:<32} {median(found):8.1f} images/s ({spread})")
    print(f"{'ratio':<32} {median(speeds[1]) / median(speeds[0]):8.3f}")


def main() -> None:
    """Compare, or, in a process that :class:`Side` started, take steps."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--processes", type=int, default=2, help="N")
    options.add_argument("--image-size", type=int, default=16, help="height and width")
    options.add_argument("--batch-size", type=int, default=64, help="of all processes together")
    options.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    options.add_argument("--steps", type=int, default=10, help="in a turn")
    options.add_argument("--turns", type=int, default=7, help="of each side")
    options.add_argument("--steps-by", type=int, help=argparse.SUPPRESS)
    args = options.parse_args()
    (compare if args.steps_by is None else take_steps)(args)


if __name__ == "__main__":
    main()
