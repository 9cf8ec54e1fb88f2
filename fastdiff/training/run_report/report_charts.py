"""The charts of a report: which curves of one run, or of several, belong into one."""

from __future__ import annotations

from collections.abc import Sequence

from fastdiff.training.run_report.line_chart import Chart, Line
from fastdiff.training.run_report.report_style import COLOURS
from fastdiff.training.run_report.run_record import RunRecord
from fastdiff.training.run_report.series import Series, smoothed, window

GIB = 2.0**30
PARTS = ("least noise", "second quarter", "third quarter", "most noise")


def charts(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Chart]:
    """The charts of some runs, one with a colour for each curve, several with one for each run.

    Args:
        runs: whose curves are shown.
        names: of the runs, for the legends.
    """
    alone = len(runs) == 1
    marks = runs[0].continued if alone else []

    def one(name: str) -> Sequence[Line]:
        """A curve of each run as it is."""
        return [
            Line("" if alone else label, run.curves[name], k % COLOURS)
            for k, (run, label) in enumerate(zip(runs, names, strict=True))
            if name in run.curves
        ]

    validation = list(one("validation_loss"))
    if alone and validation:
        raw = runs[0].curves["validation_loss_raw"]
        validation = [
            Line("averaged weights", validation[0].series, 0),
            Line("weights being trained", raw, 1, dashed=True),
        ]
    parts = [
        Line(label, runs[0].curves[f"validation_loss_parts.{k}"], k)
        for k, label in enumerate(PARTS)
        if alone and f"validation_loss_parts.{k}" in runs[0].curves
    ]
    loss, gradients = (_with_means(runs, names, name) for name in ("loss", "gradient_norm"))
    memory = [_scaled(line, 1 / GIB) for line in one("memory")]
    on_device = [_scaled(line, 1 / GIB) for line in one("device_memory")]
    several = "" if alone else " of the averaged weights"
    return [
        Chart("Training loss", "loss", loss, log=True, note=_about_means(loss), marks=marks),
        Chart(
            f"Validation loss{several}", "loss", validation, log=True, marks=marks,
            note="Of images that are not trained on, always at the same times and noise.",
        ),
        Chart(
            "Validation loss by noise", "loss", parts, log=True, marks=marks,
            note="Of the averaged weights, in each quarter of the distribution of times.",
        ),
        Chart("Learning rate", "learning rate", one("lr"), zero=True, marks=marks),
        Chart(
            "Norm of the gradient", "norm", gradients, log=True, marks=marks,
            note="Before clipping. " + _about_means(gradients),
        ),
        Chart(
            "Speed", "images a second", one("images_per_second"), zero=True, marks=marks,
            note="Of training steps alone, without checkpoints, grids and validation.",
        ),
        Chart(
            "Waiting for images", "share of the time", one("data_wait_share"), zero=True,
            percent=True, marks=marks,
        ),
        Chart(
            "Memory of the process", "largest so far, GiB", memory, zero=True, marks=marks,
            note="Resident, since the process began.",
        ),
        Chart(
            "Memory on the device", "largest so far, GiB", on_device, zero=True, marks=marks,
        ),
    ]  # fmt: skip


def _with_means(runs: Sequence[RunRecord], names: Sequence[str], name: str) -> list[Line]:
    """A curve of each run as it is, pale, below its means; all pale ones lie below all others."""
    pale, means = [], []
    for k, (run, label) in enumerate(zip(runs, names, strict=True)):
        if name not in run.curves:
            continue
        series, colour = run.curves[name], k % COLOURS
        count = window(series)
        if count == 1:
            means.append(Line("each step" if len(runs) == 1 else label, series, colour))
            continue
        pale.append(Line("each step" if len(runs) == 1 else "", series, colour, faint=True))
        of = f"mean over {count} steps"
        text = of if len(runs) == 1 else f"{label}, {of}"
        means.append(Line(text, smoothed(series), colour))
    return pale + means


def _about_means(lines: Sequence[Line]) -> str:
    """What the pale curves of a chart are, and what is not drawn."""
    left_out = max((line.series.left_out for line in lines), default=0)
    told = []
    if any(line.faint for line in lines):
        told.append("Pale: each step; where steps are dense, from the least value to the largest.")
    if left_out:
        told.append(f"Values that are not finite are left out: {left_out}.")
    return " ".join(told)


def _scaled(line: Line, factor: float) -> Line:
    series = line.series
    return Line(line.label, Series(series.steps, factor * series.values), line.colour)
