"""The page of a report: numbers, charts, sample grids, options, machine and command.

Everything is inside the file, and nothing is fetched when it is opened.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.training.run_report.line_chart import Chart, svg
from fastdiff.training.run_report.report_charts import GIB, charts
from fastdiff.training.run_report.report_style import SCRIPT, STYLE
from fastdiff.training.run_report.run_record import RunRecord
from fastdiff.training.run_report.series import FAULT, Series, window

MOST_GRIDS = 24  # of a run
MOST_GRID_BYTES = 4_000_000  # of a run's grids together, as files
MACHINE = (
    ("processor", "processor"), ("device", "device"), ("processes", "processes"),
    ("threads", "threads of each"), ("system", "system"), ("instruction_set", "instruction set"),
    ("backend", "backend"), ("fastdiff", "fastdiff"), ("torch", "torch"), ("python", "python"),
)  # fmt: skip


def page(runs: Sequence[RunRecord]) -> str:
    """The report of a run, or of several side by side, as the text of an HTML file."""
    names = _names(runs)
    title = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    drawn = [_chart(chart) for chart in charts(runs, names)]
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(_what(runs))}</p>',
        _numbers(runs, names),
        "<h2>Curves</h2>",
        f'<div class="charts">{"".join(drawn)}</div>',
        _all_grids(runs, names),
        _options(runs, names),
        _processes(runs, names),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}: training report</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(body)}\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """The names of the runs' folders, or their paths where two have one name."""
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else str(run.folder.resolve())
        for name, run in zip(names, runs, strict=True)
    ]


def _what(runs: Sequence[RunRecord]) -> str:
    """What is trained, in a line, if the runs agree."""
    told = []
    for run in runs:
        images, prediction = run.fact("images"), run.fact("prediction")
        parts = [f"prediction {prediction}"] if prediction else []
        parts = [str(run.fact(name)) for name in ("objective", "process") if run.fact(name)] + parts
        if isinstance(images, dict) and images.get("name"):
            parts.append(f"trained on {images['name']}")
        told.append(", ".join(parts))
    return told[0] if len(set(told)) == 1 else "; ".join(filter(None, told))


def _chart(chart: Chart) -> str:
    drawn = svg(chart)
    if not drawn:
        return ""
    shown = [line for line in chart.lines if line.label and len(line.series)]
    legend = "".join(
        f'<li><i class="c{line.colour}{" faint" * line.faint}{" dashed" * line.dashed}"></i>'
        f"{escape(line.label)}</li>"
        for line in shown
    )
    marks = " Dotted: another process continued the run." if chart.marks else ""
    note = (chart.note + marks).strip()
    return (
        f'<section class="card"><h3>{escape(chart.title)}</h3>'
        + (f'<ul class="legend">{legend}</ul>' if legend else "")
        + drawn
        + (f'<p class="note">{escape(note)}</p>' if note else "")
        + "</section>"
    )


def _numbers(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """The numbers of a run as tiles, or those of several as a table."""
    found = [_numbers_of(run) for run in runs]
    labels = list(dict.fromkeys(label for numbers in found for label in numbers))
    if len(runs) == 1:
        tiles = "".join(
            f"<div><dt>{escape(label)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd>"
            "</div>"
            for label, (value, more) in found[0].items()
        )
        return f'<dl class="tiles">{tiles}</dl>'
    rows = [
        (label, [_with_remark(*numbers.get(label, ("-", ""))) for numbers in found])
        for label in labels
    ]
    return f'<h2>Numbers</h2><div class="card">{_table(rows, names)}</div>'


def _with_remark(value: str, remark: str) -> str:
    return f"{value} ({remark})" if remark else value


def _numbers_of(run: RunRecord) -> dict[str, tuple[str, str]]:
    """The numbers of a run by what they are, each with a remark."""
    curves, empty = run.curves, Series(np.empty(0), np.empty(0))
    wanted = run.options.get("steps")
    found = {"steps": (f"{run.last_step:,}", f"of {wanted:,}" if isinstance(wanted, int) else "")}
    loss, validation = curves.get("loss", empty), curves.get("validation_loss", empty)
    if len(loss):
        count = window(loss)
        of = f"mean of the last {count} steps" if count > 1 else "of the last step"
        found["training loss"] = (f"{loss.values[-count:].mean():.4g}", of)
    if len(validation):
        best = int(validation.values.argmin())
        where = f"least {validation.values[best]:.4g} at step {int(validation.steps[best]):,}"
        found["validation loss"] = (f"{validation.values[-1]:.4g}", where)
    if FAULT in curves:
        found["steps left out"] = (f"{curves[FAULT].left_out:,}", "of a bad loss or gradient")
    seconds = curves.get("seconds", empty)
    if len(seconds):
        spent, rate, waited = (
            seconds.values, curves["images_per_second"].values, curves["data_wait_share"].values
        )  # fmt: skip
        found["time in steps"] = (_duration(float(spent.sum())), "")
        found["images a second"] = (f"{np.median(rate):.4g}", "median")
        found["waiting for images"] = (f"{np.average(waited, weights=spent):.1%}", "of the time")
        found["memory"] = (f"{curves['memory'].values.max() / GIB:.3g} GiB", "largest resident")
    if len(curves.get("device_memory", empty)):
        largest = curves["device_memory"].values.max() / GIB
        found["memory on the device"] = (f"{largest:.3g} GiB", "largest allocated")
    parameters, images = run.fact("parameters"), run.fact("images")
    if isinstance(parameters, int):
        found["parameters"] = (f"{parameters / 1e6:.3g} M", "")
    if isinstance(images, dict) and isinstance(images.get("count"), int):
        shape = "x".join(map(str, images.get("shape", ())))
        classes = images.get("classes")
        of = f"{shape}, {classes} classes" if classes else shape
        found["images"] = (f"{images['count']:,}", of)
    return found


def _duration(seconds: float) -> str:
    """A time as hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def _table(
    rows: Sequence[tuple[str, Sequence[str]]], names: Sequence[str], *, compared: bool = False
) -> str:
    """A table of a row for each quantity and a column for each run.

    If ``compared``, rows whose values differ stand out.
    """
    head = ""
    if len(names) > 1:
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        head = f"<thead><tr><th></th>{head}</tr></thead>"
    lines = []
    for label, values in rows:
        differs = ' class="differs"' if compared and len(set(values)) > 1 else ""
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        lines.append(f"<tr{differs}><th>{escape(label)}</th>{cells}</tr>")
    return f'<div class="scroll"><table>{head}<tbody>{"".join(lines)}</tbody></table></div>'


def _all_grids(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    cards = [
        f'<section class="card">{f"<h3>{escape(name)}</h3>" if len(runs) > 1 else ""}'
        f'<div class="grids over-time">{_grids(run)}</div></section>'
        for run, name in zip(runs, names, strict=True)
        if run.grids
    ]
    if not cards:
        return ""
    note = "Of the averaged weights; the noise of a run is the same at all steps."
    note = f'<p class="note">{note}</p>'
    beside = "charts" if len(cards) > 1 else ""
    return f'<h2>Samples</h2>{note}<div class="{beside}">{"".join(cards)}</div>'


def _grids(run: RunRecord) -> str:
    """Some of the sample grids of a run, evenly chosen, the first and the last included."""
    steps, count = list(run.grids), min(MOST_GRIDS, len(run.grids))
    mean = sum(path.stat().st_size for path in run.grids.values()) / len(steps)
    count = max(min(2, len(steps)), min(count, int(MOST_GRID_BYTES / max(1.0, mean))))
    chosen = np.unique(np.linspace(0, len(steps) - 1, count).round().astype(int))
    return "".join(_figure(steps[k], run.grids[steps[k]]) for k in chosen)


def _figure(step: int, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    source = f"data:image/png;base64,{data}"
    return (
        f"<figure><figcaption>step {step:,}</figcaption>"
        f'<img alt="samples at step {step}" src="{source}"></figure>'
    )


def _options(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    labels = list(dict.fromkeys(label for run in runs for label in run.options))
    if not labels:
        return ""
    rows = [(label, [_plain(run.options.get(label)) for run in runs]) for label in labels]
    rows.sort(key=lambda row: len(set(row[1])) == 1)  # those in which the runs differ come first
    return f'<h2>Options</h2><div class="card">{_table(rows, names, compared=True)}</div>'


def _processes(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """For each run the command that began it, and the machine of each process."""
    parts = []
    for run, name in zip(runs, names, strict=True):
        if not run.sessions:
            continue
        command = run.sessions[0].get("command")
        again = f"<p>The command that began it:</p><pre>{escape(command)}</pre>" if command else ""
        heads = [f"from step {session.get('step')}" for session in run.sessions]
        rows = [("began", [_plain(session.get("began")) for session in run.sessions])]
        rows += [
            (label, [_plain(session.get(key)) for session in run.sessions])
            for key, label in MACHINE
        ]
        title = f"<h3>{escape(name)}</h3>" if len(runs) > 1 else ""
        parts.append(f'<section class="card">{title}{again}{_table(rows, heads)}</section>')
    return f"<h2>Command and machine</h2>{''.join(parts)}" if parts else ""


def _plain(value: Any) -> str:
    """A JSON value as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return "-" if value is None else str(value)
