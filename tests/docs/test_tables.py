"""Figures in the documentation are measured ones: nobody edits a table of them by hand."""

from __future__ import annotations

import re

import pytest

from benchmarks import tables
from benchmarks.unet.report import Report

# A figure with decimals, a unit or a ratio. Bare whole numbers may be orders, options or steps.
MEASURED = re.compile(
    r"[-+]?\d[\d,]*(\.\d+(e[-+]\d+)?|e[-+]?\d+|(\.\d+)? ?(%|x|us|ms|s|[KMG]iB)|(?= \())"
    r"( \(.*\))?"
)


def table_cells(text: str) -> list[str]:
    rows = re.findall(r"^\|(.*)\|$", text, re.M)
    return [cell.strip() for row in rows for cell in row.split("|")]


def test_tables_are_what_is_stored(page):
    text = page.read_text("utf-8")
    assert tables.rendered(text) == text, "run python -m benchmarks.tables"


def test_no_figures_stand_in_other_tables(page):
    outside = tables.BLOCK.sub("", page.read_text("utf-8"))
    assert [cell for cell in table_cells(outside) if MEASURED.fullmatch(cell)] == []


@pytest.mark.parametrize(
    "cell", ["38.8", "1.25 ms", "77.7 (2.00x)", "99.6%", "8 (2x)", "5.4e-06", "12 s"]
)
def test_a_figure_is_known_as_one(cell):
    assert MEASURED.fullmatch(cell)


def test_every_table_is_shown_once():
    shown = [
        m[1] for page in tables.pages() for m in tables.BLOCK.finditer(page.read_text("utf-8"))
    ]
    assert sorted(shown) == sorted(tables.TABLES)


def test_a_trial_run_leaves_the_pages_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "pages", lambda: pytest.fail("wrote to the documentation"))
    tables.publish(tmp_path)


def test_every_table_says_where_and_when():
    for name, table in tables.TABLES.items():
        text = table.text()
        assert table.command in text, name
        if not table.file.exists():
            assert "Not measured yet" in text, name
            continue
        assert re.search(r"\d{4}-\d\d-\d\d; python .*torch", text), name


def test_the_report_on_u_nets_is_what_is_stored():
    report = Report(tables.RESULTS)
    assert report.markdown.read_text("utf-8") == report.text()
