from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastdiff.compiler.run import recording


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_graphs() -> Iterator[None]:
    """Each test compiles for itself: how often one function is compiled is limited."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[recording.Recording]:
    """The lists of operations that C++ has run, in order."""
    found: list[recording.Recording] = []
    run = recording.Recording.run

    def noted(self: recording.Recording, *args: Any) -> Any:
        found.append(self)
        return run(self, *args)

    monkeypatch.setattr(recording.Recording, "run", noted)
    return found


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each run chooses the same algorithms, and none touches the user's cache."""
    monkeypatch.setenv("FASTDIFF_PLAN", "heuristic")
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
