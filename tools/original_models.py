"""Hold the layouts of checkpoints to the programs themselves, of which the user has a checkout.

    python -m tools.original_models guided-diffusion PATH
    python -m tools.original_models improved-diffusion PATH
    python -m tools.original_models score-sde PATH

Each of the program's networks below gets random weights and is saved by torch.save; what
``fastdiff.load`` makes of the file must compute the same to 1e-5. PATH is a checkout of the
program's repository, whose Python code is run. The tests of the package do the same with module
trees of their own, which need no checkout.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

import fastdiff

SIZE, TOLERANCE = 16, 1e-5
Case = tuple[str, nn.Module, dict[str, Any]]

_OLD = {"use_new_attention_order": False}
_OPENAI: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"num_heads": 1}),
    "heads": ({"num_heads": 4}, {"num_heads": 4, **_OLD}),
    "scale and shift, labels, variance": (
        {"num_heads": 4, "use_scale_shift_norm": True, "num_classes": 10, "out_channels": 6},
        {"num_heads": 4, **_OLD},
    ),
}
_GUIDED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "resampling blocks": ({"resblock_updown": True}, {"num_heads": 1}),
    "channels of a head": ({"num_head_channels": 16}, {"num_head_channels": 16, **_OLD}),
    "new order, everything": (
        {
            "num_head_channels": 16, "use_new_attention_order": True, "num_classes": 10,
            "resblock_updown": True, "use_scale_shift_norm": True, "out_channels": 6,
            "attention_resolutions": (1, 4),
        },
        {"num_head_channels": 16, "use_new_attention_order": True},
    ),
}  # fmt: skip
_SCORE_SDE: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention at two levels": {"attn_resolutions": (16, 4)},
    "no attention, one block": {"attn_resolutions": (), "num_res_blocks": 1},
    "images in [0, 1]": {"centered": False},
}


class _Options(dict[str, Any]):
    """A dictionary whose entries are attributes, as score_sde's configurations are."""

    __getattr__ = dict.__getitem__


def _of_openai(package: str, cases: Mapping[str, Any], **extra: Any) -> Iterator[Case]:
    network = importlib.import_module(f"{package}.unet").UNetModel
    base = {
        "in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 2,
        "attention_resolutions": (2, 4), "channel_mult": (1, 2, 2), **extra,
    }  # fmt: skip
    for name, (options, facts) in cases.items():
        yield name, network(**{**base, **options}), facts


def guided_diffusion(checkout: Path) -> Iterator[Case]:
    """Networks of guided-diffusion."""
    yield from _of_openai("guided_diffusion", {**_OPENAI, **_GUIDED}, image_size=SIZE)


def improved_diffusion(checkout: Path) -> Iterator[Case]:
    """Networks of improved-diffusion."""
    yield from _of_openai("improved_diffusion", _OPENAI)


def score_sde(checkout: Path) -> Iterator[Case]:
    """Networks of score_sde's model ddpm, without its other models, which compile CUDA code."""
    package = ModuleType("models")
    package.__path__ = [str(checkout / "models")]
    sys.modules["models"] = package
    network = importlib.import_module("models.ddpm").DDPM
    for name, changes in _SCORE_SDE.items():
        model = _Options(
            nf=32, ch_mult=(1, 2, 2), num_res_blocks=2, attn_resolutions=(8,), dropout=0.1,
            resamp_with_conv=True, conditional=True, scale_by_sigma=False, nonlinearity="swish",
            sigma_min=0.01, sigma_max=50, num_scales=1000,
        )  # fmt: skip
        data = _Options(image_size=SIZE, num_channels=3, centered=True)
        for key, value in changes.items():
            (data if key in data else model)[key] = value
        facts = {"centered": data["centered"], "scale_by_sigma": False}
        yield name, network(_Options(model=model, data=data)), facts


PROGRAMS: dict[str, Callable[[Path], Iterator[Case]]] = {
    "guided-diffusion": guided_diffusion,
    "improved-diffusion": improved_diffusion,
    "score-sde": score_sde,
}


def difference(network: nn.Module, facts: Mapping[str, Any], folder: Path) -> float:
    """The largest difference of both outputs, over the largest value."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():  # many of them start at zero
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
        noise = torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in)
        parameter.data = noise + (parameter.ndim == 1)
    torch.save(network.eval().state_dict(), folder / "weights.pt")
    ours = fastdiff.load(folder / "weights.pt", **facts)
    x, t = torch.randn(2, 3, SIZE, SIZE, generator=generator), torch.tensor([3, 871])
    labels = None if ours.config.num_class_embeds is None else torch.tensor([1, 7])
    with torch.no_grad():
        wanted = network(x, t) if labels is None else network(x, t, labels)
        return float((ours(x, t, labels) - wanted).abs().max() / wanted.abs().max())


def main() -> int:
    """Compare, print a line for each network, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", choices=tuple(PROGRAMS))
    parser.add_argument("checkout", type=Path)
    args = parser.parse_args()
    sys.path.insert(0, str(args.checkout))
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name, network, facts in PROGRAMS[args.program](args.checkout):
            found = difference(network, facts, Path(folder))
            worst = max(worst, found)
            print(f"{args.program}: {name}: {found:.1e}")
    return int(not worst <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
