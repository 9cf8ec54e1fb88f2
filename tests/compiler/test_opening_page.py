"""The graph that the compiler's opening page shows is the one that the compiler makes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdiff.compiler
from fastdiff.compiler.pipeline import Options, compile_and_report
from fastdiff.ops import backend


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, 64), nn.GroupNorm(32, 64)
        self.conv1, self.conv2 = (nn.Conv2d(64, 64, 3, padding=1) for _ in range(2))
        self.emb = nn.Linear(128, 64)

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.emb(F.silu(temb))[:, :, None, None]
        return x + self.conv2(F.silu(self.norm2(h)))


def calls(graph: torch.fx.Graph) -> list[str]:
    return [node.target.__name__ for node in graph.nodes if node.op == "call_function"]


def shown() -> tuple[list[str], list[str]]:
    """The operations that the page shows before and after."""
    page = fastdiff.compiler.__doc__
    before, after = page.split("and as it runs:")
    pattern = r"^    \w+ += (\w+)\("
    return re.findall(pattern, before, re.M), re.findall(pattern, after, re.M)


@pytest.mark.skipif(backend.extension is None, reason="needs the C++ extension")
def test_the_page_shows_what_happens() -> None:
    seen: list[list[str]] = []

    def recording(gm, example_inputs):
        seen.append(calls(gm.graph))
        compiled, _ = compile_and_report(gm, example_inputs, Options())
        seen.append(calls(gm.graph))
        return compiled

    model = torch.compile(Block().eval(), backend=recording)
    with torch.no_grad():
        model(torch.randn(2, 64, 16, 16), torch.randn(2, 128))
    assert (seen[0], seen[1]) == shown()


def test_the_page_names_every_file() -> None:
    page, root = fastdiff.compiler.__doc__, Path(fastdiff.compiler.__file__).parent
    names = {path.stem for path in root.rglob("*.py")} - {"__init__"}
    assert sorted(name for name in names if not re.search(rf"\b{name}\b", page)) == []
