"""Links lead somewhere, what the pages name exists, and the first page stays short."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import tables
from fastdiff import objectives, samplers, schedules
from fastdiff.cli.sampler_options import DEFAULTS

README_LINES = 150
LINK = re.compile(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"")
TARGETS = re.findall(r"^([a-z][a-z0-9/-]*):", (tables.ROOT / "Makefile").read_text("utf-8"), re.M)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def test_readme_is_short():
    assert len((tables.ROOT / "README.md").read_text("utf-8").splitlines()) <= README_LINES


def test_links_lead_somewhere(page):
    for link in (a or b for a, b in LINK.findall(page.read_text("utf-8"))):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


def test_every_page_can_be_reached_from_the_first():
    seen, todo = set(), [tables.ROOT / "README.md"]
    while todo:
        page = todo.pop().resolve()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        links = (a or b for a, b in LINK.findall(page.read_text("utf-8")))
        todo += [page.parent / link.partition("#")[0] for link in links if "//" not in link]
    assert set(map(Path.resolve, tables.pages())) <= seen


def test_named_files_exist(page):
    folders = "fastdiff|csrc|kernels|tools|tests|benchmarks|docs|examples"
    for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text("utf-8")):
        assert (tables.ROOT / name).exists(), f"{page.name} names {name}"


def test_make_targets_exist(page):
    text = page.read_text("utf-8")
    commands = re.findall(r"(?:^ {4}|`)make ([a-z][a-z0-9 /-]*)", text, re.M)
    named = {target for words in commands for target in words.split()}
    assert named <= set(TARGETS), named - set(TARGETS)


def test_list_of_samplers_is_the_registry():
    """Name, evaluations in S steps, and whether there is noise, of every sampler."""
    text = (tables.ROOT / "docs" / "samplers.md").read_text("utf-8")
    lines = re.findall(r"^\| `([a-z0-9-]+)` \| (.*) \|$", text.split("## How many")[0], re.M)
    listed = {name: [cell.strip() for cell in cells.split("|")] for name, cells in lines}
    assert list(listed) == list(samplers.names())
    steps = 12
    for name, (_, _, evaluations, noise) in listed.items():
        table = samplers.make(name, schedules.linear(), steps).table
        count = eval(re.sub(r"(\d) S", r"\1 * S", evaluations), {"S": steps})
        assert table.rows == count, name
        assert any(table.noisy) == (noise == "yes"), name
        if noise.startswith("with"):
            option = {noise.split("`")[1]: 0.5}
            assert any(samplers.make(name, schedules.linear(), steps, **option).table.noisy), name


def test_list_of_objectives_is_the_package_s():
    """Names, and the sampler that each is drawn by unless one is named."""
    text = (tables.ROOT / "docs" / "theory.md").read_text("utf-8").split("## Objectives")[1]
    rows = re.findall(r"^\| `(\w+)` \|.*\| `([a-z0-9-]+)` \|$", text, re.M)
    assert [name for name, _ in rows] == list(objectives.NAMES)
    defaults = {name: sampler for name, (sampler, _) in DEFAULTS.items()}
    assert dict(rows) == {"ncsn": "annealed-langevin"} | defaults


def test_environment_variables_and_macros_exist(page):
    sources = [tables.ROOT / "setup.py"]
    for folder in ("fastdiff", "tools", "csrc"):
        kinds = ("*.py", "*.h", "*.cpp")
        sources += [path for kind in kinds for path in (tables.ROOT / folder).rglob(kind)]
    known = set(re.findall(r"FASTDIFF_[A-Z]+", "".join(s.read_text("utf-8") for s in sources)))
    known |= {f"FASTDIFF_{part}" for part in ("CPU", "CUDA")}  # their names are put together
    assert set(re.findall(r"FASTDIFF_[A-Z]+", page.read_text("utf-8"))) <= known
