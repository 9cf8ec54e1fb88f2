"""Links lead somewhere, what the pages name exists, and the first page stays short."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import tables
from fastdiff import samplers, schedules

README_LINES = 150
LINK = re.compile(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"")
TARGETS = re.findall(r"^([a-z][a-z-]*):", (tables.ROOT / "Makefile").read_text("utf-8"), re.M)


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


def test_make_targets_exist(page):
    text = page.read_text("utf-8")
    commands = re.findall(r"(?:^ {4}|`)make ([a-z][a-z -]*)", text, re.M)
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
        count = eval(evaluations.replace("2 S", "2 * S"), {"S": steps})
        assert table.rows == count, name
        assert any(table.noisy) == (noise == "yes"), name
        if noise.startswith("with"):
            option = {noise.split("`")[1]: 0.5}
            assert any(samplers.make(name, schedules.linear(), steps, **option).table.noisy), name
