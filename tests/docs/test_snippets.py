"""The Python of every page runs, in the order of the page, each page by itself.

A comment ``<!-- setup ... -->`` holds code that comes first and is not shown: small models and
tensors. ``<!-- replace: OLD -> NEW -->`` before a block makes it small. A block marked
``python no-run: REASON`` is only compiled.
"""

from __future__ import annotations

import re

import pytest
import torch

BLOCK = re.compile(
    r"<!-- setup\n(?P<setup>.*?)-->"
    r"|(?:<!-- replace: (?P<old>.*?) -> (?P<new>.*?) -->\n)?"
    r"```python(?P<mark>[^\n]*)\n(?P<code>.*?)```",
    re.DOTALL,
)


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """A folder of its own, no file of measurements, the default backend afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTDIFF_PLAN", "heuristic")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def test_python_runs(page):
    text = page.read_text("utf-8")
    known: dict[str, object] = {"__name__": page.stem}
    for block in BLOCK.finditer(text):
        code = block["setup"] or block["code"]
        if block["old"]:
            assert block["old"] in code, f"{block['old']} is to be replaced, but is not there"
            code = code.replace(block["old"], block["new"])
        line = text.count("\n", 0, block.start("setup" if block["setup"] else "code"))
        compiled = compile("\n" * line + code, str(page), "exec")
        if not block["mark"]:
            exec(compiled, known)
        else:
            assert re.fullmatch(r" no-run: \S.*", block["mark"]), block["mark"]
