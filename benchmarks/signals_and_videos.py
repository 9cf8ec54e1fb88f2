"""The U-Net for signals and for videos, by fastdiff and by its peers, in turns.

    python -m benchmarks.signals_and_videos --out benchmarks/results

times one call without gradients of each of ``NETWORKS``, on one thread, after its result agrees
with that of eager mode. The peers are the same model with fastdiff's operations turned off (so that
it is plain PyTorch), in eager mode and compiled by Inductor, each with weights contiguous and
channels-last. It writes signals_and_videos.json, and renders the documentation's table.

Processor seconds of the thread are counted, which other work on the machine changes least.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastdiff
from benchmarks import machine, tables
from fastdiff.nn.image_unet import make_unet
from fastdiff.sampling.quick import quick

# Size of a sample, options of ``make_unet``, and the batch.
NETWORKS: dict[str, tuple[tuple[int, ...], dict[str, Any], int]] = {
    "signals": (
        (1024,),
        {"channels": 2, "widths": (64, 128, 128), "layers_per_block": 2, "attention": (2,)},
        4,
    ),
    "videos": (
        (8, 32, 32),
        {"channels": 3, "widths": (32, 64, 64), "layers_per_block": 1, "attention": (1, 2)},
        1,
    ),
}
LAYOUTS = {"": torch.contiguous_format, " channels_last": torch.channels_last}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, required=True, help="folder of the file")
    options.add_argument("--rounds", type=int, default=15, help="calls of each, in turns")
    args = options.parse_args()
    torch.set_num_threads(1)
    found = [measured(name, args.rounds) for name in NETWORKS]
    results = {"machines": [machine.facts(1)], "figures": found}
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1) + "\n"
    (args.out / "signals_and_videos.json").write_text(text, encoding="utf-8")
    tables.publish(args.out)


@torch.no_grad()
def measured(name: str, rounds: int) -> dict[str, Any]:
    """The median seconds of each peer on a network."""
    size, given, batch = NETWORKS[name]
    torch.manual_seed(0)
    model = make_unet(size, **given).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)  # no layer's result is zero
    x, t = torch.randn(batch, given["channels"], *size), torch.full((batch,), 500)
    calls: dict[str, Callable[[], Tensor]] = {"fastdiff": partial(quick(model), x, t)}
    for layout, memory_format in LAYOUTS.items():
        other = copy.deepcopy(model).to(memory_format=memory_format)
        calls[f"eager{layout}"] = partial(plain, other, x, t)
        calls[f"inductor{layout}"] = partial(plain, torch.compile(other), x, t)
    expected = calls["eager"]()
    for peer, call in calls.items():
        error = (call() - expected).abs().max() / expected.abs().max()
        if error > 1e-4:
            raise RuntimeError(f"{peer} differs by {error:.1e} of the largest output")
    seconds: dict[str, list[float]] = {peer: [] for peer in calls}
    for _ in range(rounds):
        for peer, call in calls.items():
            begin = time.thread_time()
            call()
            seconds[peer].append(time.thread_time() - begin)
    medians = {peer: statistics.median(times) for peer, times in seconds.items()}
    return {"network": name, "shape": [batch, given["channels"], *size], "seconds": medians}


def plain(model: Callable[..., Tensor], x: Tensor, t: Tensor) -> Tensor:
    """A call with PyTorch's operations alone."""
    with fastdiff.backend("reference"):
        return model(x, t)


if __name__ == "__main__":
    main()
