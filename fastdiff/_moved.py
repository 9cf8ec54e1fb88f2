"""Aliases: modules under the names that they had in earlier versions.

``import fastdiff.drawing`` gives the module ``fastdiff.generation``: the same object under both
names. New code uses the new names.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "checkpoint": "checkpoints.checkpoint",
    "classifier": "checkpoints.classifier_checkpoint",
    "classifier_training": "training.classifier_trainer",
    "cli.objective": "cli.objective_options",
    "drawing": "generation",
    "errors": "common.errors",
    "images": "data.image_grid",
    "losses.likelihood": "losses.discretized_gaussian",
    "losses.terms": "losses.bound_terms",
    "nn.attention": "nn.self_attention",
    "nn.build": "nn.unet_parts",
    "nn.checks": "nn.input_checks",
    "ops.checks": "common.checks",
    "profiling": "ops.profiling",
    "recipe": "training",
    "reference": "ops.reference",
    "sampling.conditions": "common.conditions",
    "sampling.guidance": "sampling.classifier_free",
    "sampling.per_model": "common.per_model",
    "sde.adaptive": "sde.solvers.adaptive",
    "sde.adaptive_steps": "sde.solvers.adaptive_schemes",
    "sde.brownian": "sde.solvers.brownian",
    "sde.langevin": "sde.solvers.langevin",
    "sde.ode": "sde.solvers.ode",
    "sde.path": "sde.discretization",
    "sde.predictors": "sde.solvers.predictors",
    "sde.process": "sde.processes",
    "sde.rounding": "sde.solvers.rounding",
    "sde.runge_kutta": "sde.solvers.runge_kutta",
    "sde.solver": "sde.solvers.by_name",
    "sde.views": "sde.processes.from_schedule",
    "selfcheck": "ops.selfcheck",
}


class _Finder(MetaPathFinder, Loader):
    """Finds a moved module by its old name; the module is loaded once, under both names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for an old name; None for any other."""
        package, _, name = fullname.partition(".")
        if package != "fastdiff" or name not in MOVED:
            return None
        return ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module at its new name.

        The import system is about to replace the module's own spec by ``spec``, so that is kept.
        """
        _, _, name = spec.name.partition(".")
        module = importlib.import_module(f"fastdiff.{MOVED[name]}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Put the module's own spec back."""
        spec = module.__spec__
        assert spec is not None
        module.__spec__ = spec.loader_state


# These old names are also those of a class and of functions, which an import of a module of that
# name must not replace. A module that is in ``sys.modules`` already replaces nothing.
SHADOWED = {
    "backend": "ops.backend",
    "ops.denoising_loss_from_seed": "ops.denoising_loss",
    "ops.q_sample_from_seed": "ops.q_sample",
}


def install() -> None:
    """Make the old names importable."""
    sys.meta_path.append(_Finder())
    for old, new in SHADOWED.items():
        sys.modules[f"fastdiff.{old}"] = importlib.import_module(f"fastdiff.{new}")
    for package in {f"fastdiff.{old}".rpartition(".")[0] for old in MOVED} & set(sys.modules):
        attach(package)


def attach(package: str) -> None:
    """Make the old names of loaded modules attributes of the package that had them."""
    for old, new in MOVED.items():
        parent, _, name = f"fastdiff.{old}".rpartition(".")
        if parent == package and f"fastdiff.{new}" in sys.modules:
            setattr(sys.modules[package], name, sys.modules[f"fastdiff.{new}"])
