"""What could be imported in version 0.1.0 can be imported from there still."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from fastdiff._moved import MOVED, SHADOWED

# Names that a module of version 0.1.0 had, where others now hold them.
NAMES = {
    "backend": ["backend", "current", "describe", "extension", "isa", "missing"],
    "checkpoint": ["Checkpoint", "export", "load", "newest", "save", "shipped"],
    "classifier": ["Architecture", "Classifier", "load", "save"],
    "classifier_training": ["ClassifierOptions", "ClassifierTrainer"],
    "data": ["ImageSet", "digits", "folder"],
    "drawing": ["Drawn", "Guide", "Network", "draw"],
    "errors": ["CheckpointError", "DataError", "InputError", "StuckError", "TrainingError"],
    "images": ["from_uint8", "grid", "save", "to_uint8"],
    "profiling": ["profile", "span"],
    "recipe": ["LR_SCHEDULES", "TrainingOptions", "WEIGHTINGS", "make_unet", "recorded_options"],
    "reference": ["conv2d", "group_norm_silu", "q_sample", "sampler_step"],
    "sampling.conditions": ["PerImage", "Shared"],
    "sampling.loop": ["Model", "Output", "State", "eager"],
    "sde.adaptive": ["solve_adaptive"],
    "sde.likelihood": ["Likelihood", "bits_per_dim", "log_likelihood"],
    "sde.ode": ["solve_ode"],
    "sde.path": ["DiscretizedSDE", "continuous", "discretize", "on_path"],
    "sde.process": ["EDM", "SDE", "VE", "VP", "SubVP"],
    "sde.runge_kutta": ["Integrated", "integrate"],
    "sde.solver": ["Sampled", "Solver"],
    "sde.solvers": ["solve", "time_grid"],
    "sde.views": ["Interpolated", "Straight"],
    "training": ["Trainer", "TrainingOptions", "make_diffusion", "make_unet"],
}


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_the_module_itself(old) -> None:
    module = importlib.import_module(f"fastdiff.{old}")
    assert module is importlib.import_module(f"fastdiff.{MOVED[old]}")
    assert module.__spec__.name == module.__name__ == f"fastdiff.{MOVED[old]}"


@pytest.mark.parametrize("module", NAMES)
def test_a_module_has_the_names_that_it_had(module) -> None:
    there = vars(importlib.import_module(f"fastdiff.{module}"))
    assert [name for name in NAMES[module] if name not in there] == []


@pytest.mark.parametrize("old", SHADOWED)
def test_a_class_or_function_named_like_a_module_stays(old) -> None:
    """In a new process: what is imported once replaces nothing later."""
    code = (
        f"import fastdiff, fastdiff.{old} as module, sys\n"
        f"assert callable(fastdiff.{old}) and callable(module), module\n"
        f"assert sys.modules['fastdiff.{old}'] is sys.modules['fastdiff.{SHADOWED[old]}']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_old_name_is_an_attribute_without_an_import_of_its_own() -> None:
    code = "import fastdiff; print(fastdiff.sde.solver.Solver, fastdiff.drawing, fastdiff.errors)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_never_was_is_an_error() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        importlib.import_module("fastdiff.no_such_module")


def test_images_can_be_drawn_under_the_old_names() -> None:
    from fastdiff import Diffusion, generation
    from fastdiff.checkpoints.trained_model import Checkpoint

    assert generation.Drawn is generation.Samples
    assert generation.draw is generation.generate
    assert Diffusion.draw is Diffusion.generate
    assert Checkpoint.draw is Checkpoint.generate
