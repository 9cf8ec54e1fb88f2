"""The figure of the layers is what the package imports, and nothing imports upwards."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache

from benchmarks import tables

PACKAGE = tables.ROOT / "fastdiff"
PAGE = (tables.ROOT / "docs" / "architecture.md").read_text("utf-8")
Arrows = dict[str, set[str]]


# Public modules and packages.
PARTS = {path.stem for path in PACKAGE.glob("[a-z]*.py")}
PARTS |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


@cache
def imports() -> Arrows:
    """What each module or package of fastdiff imports of the others."""
    arrows: Arrows = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        importer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            imported = {name.split(".")[1] for name in names if name.startswith("fastdiff.")}
            arrows[importer] |= imported & PARTS - {importer}
    return {importer: arrows[importer] for importer in PARTS}


def figure() -> Arrows:
    """The arrows of the page's figure."""
    arrows: Arrows = {name: set() for name in PARTS}
    for importer, imported in re.findall(r"^    (\w+) --> (.*)$", PAGE, re.M):
        arrows[importer] |= set(imported.split(" & "))
    return arrows


def reached(arrows: Arrows, start: str) -> set[str]:
    found, todo = set(), [start]
    while todo:
        for name in arrows[todo.pop()] - found:
            found.add(name)
            todo.append(name)
    return found


def test_dependencies_point_one_way():
    arrows = figure()
    assert [name for name in arrows if name in reached(arrows, name)] == []


def test_every_import_follows_the_arrows():
    arrows = figure()
    upwards = {name: imported - reached(arrows, name) for name, imported in imports().items()}
    assert {name: left for name, left in upwards.items() if left} == {}


def test_every_arrow_is_an_import():
    found = imports()
    missing = {name: imported - found[name] for name, imported in figure().items()}
    assert {name: left for name, left in missing.items() if left} == {}


def test_every_part_is_described():
    described = re.findall(r"^\| ((?:`\w+`,? ?)+)\|", PAGE, re.M)
    names = [name for cell in described for name in re.findall(r"`(\w+)`", cell)]
    assert set(names) >= PARTS
