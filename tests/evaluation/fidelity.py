"""torch-fidelity for tests, where it is installed; and weights of its network made at random."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch


def torch_fidelity() -> types.ModuleType:
    """The package; a test module that calls this is skipped without it.

    It imports torchvision whatever is asked of it. Nothing that the tests call uses that, so an
    empty stand-in takes its place where it is missing, for the time of the import.
    """
    stand_ins: list[str] = []
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        sets = types.ModuleType("torchvision.datasets")
        for name in ("CIFAR10", "CIFAR100", "STL10"):
            setattr(sets, name, type(name, (), {}))
        modules = [types.ModuleType("torchvision"), sets]
        modules += [types.ModuleType(f"torchvision.transforms{end}") for end in ("", ".functional")]
        stand_ins = [module.__name__ for module in modules]
        sys.modules.update(zip(stand_ins, modules, strict=True))
        modules[2].functional = modules[3]  # type: ignore[attr-defined]
    try:
        return pytest.importorskip("torch_fidelity")
    finally:
        for name in stand_ins:  # others ask whether torchvision is there
            del sys.modules[name]


def random_weights(path: Path, module: types.ModuleType, seed: int = 0) -> dict[str, torch.Tensor]:
    """Write weights of the FID's network as torch.save does, with features that differ by image.

    The published file has no counts of batches, and this one has none either.
    """
    generator = torch.Generator().manual_seed(seed)
    inception = module.feature_extractor_inceptionv3
    loaded = inception.FeatureExtractorInceptionV3.load_state_dict
    shapes: dict[str, torch.Size] = {}

    def look(self: torch.nn.Module, state: object) -> None:
        shapes.update({name: value.shape for name, value in self.state_dict().items()})

    inception.FeatureExtractorInceptionV3.load_state_dict = look
    try:
        torch.save({}, path)
        inception.FeatureExtractorInceptionV3("x", ["2048"], str(path))
    finally:
        inception.FeatureExtractorInceptionV3.load_state_dict = loaded
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            continue
        values = torch.randn(shape, generator=generator)
        if name.endswith("running_var"):
            values = values.abs() + 0.5
        elif len(shape) == 4:
            values *= (2 / shape[1:].numel()) ** 0.5
        elif name.endswith("weight"):
            values = 1 + 0.1 * values
        else:
            values *= 0.1
        weights[name] = values
    torch.save(weights, path)
    return weights
