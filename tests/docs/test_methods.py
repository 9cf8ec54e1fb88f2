"""The page of methods names every method that the package has, and none that it has not."""

from __future__ import annotations

import importlib
import re

import pytest

from benchmarks import tables
from fastdiff import guidance, losses, objectives, samplers, schedules, sde
from fastdiff.losses import weights
from fastdiff.samplers import grids
from fastdiff.sde.solvers import by_name

ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (tables.ROOT / "docs" / "methods.md").read_text("utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| kind")
]
SOURCE = re.compile(r"arXiv:\d{4}\.\d{5}|[A-Z]\w+( & \w+| et al\.)? \d{4}|k-diffusion|guided-diff")


def named(kind: str) -> set[str]:
    """The names without a dot in the rows of a kind."""
    cells = " ".join(row[1] for row in ROWS if row[0] == kind)
    return {name for name in re.findall(r"`([^`]+)`", cells) if re.fullmatch(r"[\w-]+", name)}


def dotted() -> list[str]:
    """The names with a dot, without arguments."""
    cells = " ".join(row[1] for row in ROWS)
    return sorted(set(re.findall(r"`((?:\w+\.)+\w+)", cells)))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1])
def test_each_row_has_a_name_a_description_and_a_source(row):
    assert len(row) == 4
    assert "`" in row[1]
    assert row[2]
    assert SOURCE.search(row[3])


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("sampler", samplers.names()),
        ("objective", objectives.NAMES),
        ("times of training", objectives.TIMESTEPS),
        ("grid", grids.NAMES),
        ("weighting", [*weights.NAMES, "likelihood"]),
        ("solver", by_name.METHODS),
    ],
)
def test_every_name_of_a_kind_is_listed(kind, names):
    assert named(kind) == {*names}


@pytest.mark.parametrize("name", dotted())
def test_named_parts_exist(name):
    module, _, last = name.removeprefix("fastdiff.").rpartition(".")
    part = importlib.import_module(f"fastdiff.{module}" if module else "fastdiff")
    assert hasattr(part, last)


def test_functions_of_the_packages_are_listed():
    """Every process, schedule and way to guide is a method of someone's; few names are tools."""
    tools = {
        schedules: {"GaussianPath", "NoiseSchedule", "FlowSchedule", "make", "sigmoid"},
        guidance: {
            "Linear", "LogProb", "Measured", "Projected", "Rule", "gradient_of", "grey",
            "guided_by_contrast", "log_prob_of", "pixels", "smaller",
        },
    }  # fmt: skip
    for package, others in tools.items():
        name = package.__name__.removeprefix("fastdiff.")
        public = {part for part in package.__all__ if not part.isupper()} - others
        assert public <= {part.split(".")[1] for part in dotted() if part.startswith(name + ".")}
    processes = {
        name for name in sde.__all__
        if isinstance(getattr(sde, name), type) and issubclass(getattr(sde, name), sde.SDE)
    } - {"SDE", "Interpolated", "LogSNR"}  # bases of others  # fmt: skip
    listed = {part.split(".")[1] for part in dotted() if part.startswith("sde.")}
    assert processes - {"DiscretizedSDE"} <= listed
    of_losses = {name for name in losses.__all__ if name.endswith("_loss")}
    mentioned = {part.split(".")[1] for part in dotted() if part.startswith("losses.")}
    assert of_losses - {"vlb_loss"} <= mentioned  # which the objectives are
