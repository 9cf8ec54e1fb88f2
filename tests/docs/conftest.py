"""The documentation's pages, one test case each."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import tables

PAGES = {page.name: page for page in [*tables.pages(), tables.ROOT / "CONTRIBUTING.md"]}


@pytest.fixture(params=PAGES.values(), ids=PAGES)
def page(request: pytest.FixtureRequest) -> Path:
    return request.param
