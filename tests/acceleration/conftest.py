from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("diffusers")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def _no_eager_fallback() -> Iterator[None]:
    """Where Dynamo has as many graphs as it may have, it fails, and runs nothing uncompiled."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch.compiler.reset()
