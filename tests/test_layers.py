"""Dependencies point one way: each module imports from its own layer and from those below it.

The order of the layers is that of ``LAYERS``, lowest first. Imports inside functions count as well.
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fastdiff

ROOT = Path(fastdiff.__file__).parent
LAYERS = (
    "common",
    "kernels",
    "ops",
    "compiler.graph",
    "compiler.match",
    "compiler.choose",
    "compiler.run",
    "compiler.rewrite",
    "compiler",
    "schedules",
    "process",
    "nn",
    "samplers",
    "sampling",
    "k_diffusion",
    "sde.processes",
    "sde.score",
    "sde.reverse",
    "sde.solvers",
    "sde",
    "losses",
    "objectives",
    "guidance",
    "generation",
    "diffusion",
    "checkpoints",
    "data",
    "training",
    "evaluation",
    "diffusers",
    "acceleration",
    "cli",
    "",  # the package itself
)
FREE = ("__main__", "_moved")  # the entry point, and old names of modules


def modules() -> dict[str, Path]:
    """Every module by its name without ``fastdiff.``; the package itself is ``""``."""
    names = {}
    for path in [*ROOT.rglob("*.py"), *Path(fastdiff.__file__).parents[1].glob("kernels/*.py")]:
        base = ROOT if path.is_relative_to(ROOT) else ROOT.parent
        parts = path.relative_to(base).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = modules()


def imported(name: str) -> set[str]:
    """The modules of fastdiff that a module imports, wherever the statement stands."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are written in full"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    inside = {full.partition(".")[2] for full in found if full.split(".")[0] == "fastdiff"}
    return {module if module in MODULES else module.rpartition(".")[0] for module in inside}


def layer(name: str) -> int:
    """The number of the layer with the longest name that begins a module's name."""
    fitting = [known for known in LAYERS if f"{name}.".startswith(f"{known}.") or not known]
    assert fitting != [""] or not name, f"{name} is in no layer: name it in LAYERS"
    return LAYERS.index(max(fitting, key=len))


@pytest.mark.parametrize("name", [name for name in MODULES if name not in FREE])
def test_a_module_imports_from_below(name) -> None:
    above = {other for other in imported(name) - {*FREE} if layer(other) > layer(name)}
    assert not above, f"fastdiff.{name} imports from layers above its own: {sorted(above)}"


def test_there_is_no_circle() -> None:
    """A module and its package's ``__init__`` count as two."""
    graph = {name: imported(name) - {name} for name in MODULES if name not in FREE}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_two_modules_have_one_name() -> None:
    """Of the package's own; ``fastdiff.kernels`` has the stems of ``fastdiff.ops`` by design."""
    seen: dict[str, str] = {}
    for name in MODULES:
        stem = name.rpartition(".")[2]
        if name.startswith("kernels.") or MODULES[name].name == "__init__.py":
            continue
        assert stem not in seen, f"{name} and {seen[stem]}"
        seen[stem] = name
