"""How the time of a call grows: with the batch, with the size of the images, and with threads.

One of the three varies at a time; the other two are those of one image of 32x32 on all cores.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import rows, tables
from benchmarks.turns import report
from benchmarks.turns.job import DTYPES, OURS, Case
from benchmarks.unet.peers import PEERS

NETWORK = "cifar10"
BATCH, SIZE = 1, 32
BATCHES, SIZES = (1, 2, 4, 8, 16, 32), (16, 32, 64, 128)
AXES = {"batch": "images in a batch", "size": "height and width, pixels", "threads": "threads"}
PICTURE = "scaling.png"
LEAST_GAP = 0.065  # between two labels, as a share of the axis


def cases(threads: int) -> list[Case]:
    """Every dtype with each batch, size and number of threads, 1 and its doubles up to all."""
    fewer = [2**power for power in range(threads.bit_length()) if 2**power < threads]
    return [
        case
        for dtype in DTYPES
        for case in dict.fromkeys(
            [
                *(Case(NETWORK, batch, dtype, threads, SIZE) for batch in BATCHES),
                *(Case(NETWORK, BATCH, dtype, threads, size) for size in SIZES),
                *(Case(NETWORK, BATCH, dtype, count, SIZE) for count in fewer),
            ]
        )
    ]


def text(records: list[dict[str, Any]]) -> str:
    """The table of all points, and what they were measured on."""
    return f"{report.machines(records)}\n{tables.markdown(rows.scaling({'records': records}))}"


def curve(
    records: list[dict[str, Any]], axis: str, dtype: str, peer: str
) -> list[tuple[int, float]]:
    """(x, milliseconds) where ``axis`` varies and the other two axes are at their fixed values.

    Args:
        records: of the suite.
        axis: a key of ``AXES``.
        dtype, peer: whose times.
    """
    all_threads = max(r["threads"] for r in records)
    fixed = {"batch": BATCH, "size": SIZE, "threads": all_threads}
    points = []
    for record in records:
        if record["dtype"] != dtype or any(record[k] != v for k, v in fixed.items() if k != axis):
            continue
        points += [
            (record[axis], 1e3 * row["median"])
            for row in record["rows"]
            if row["peer"] == peer and row["median"] is not None and not row["failed"]
        ]
    return sorted(points)


def draw(records: list[dict[str, Any]], results: Path) -> None:
    """A panel for each dtype and axis, both scales logarithmic, each line named at its end.

    Args:
        records: of the suite; with none nothing is drawn.
        results: the folder of the figures; the picture of the documentation's figures goes to
            docs/images, any other stands beside its figures.

    Raises:
        SystemExit: Matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise SystemExit(
            "the picture needs matplotlib: pip install 'fastdiff[plot]', or make scaling"
        ) from None
    if not records:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes = list(dict.fromkeys(r["dtype"] for r in records))
    figure, panels = pyplot.subplots(
        len(dtypes), len(AXES), figsize=(4.4 * len(AXES), 3.6 * len(dtypes)), squeeze=False,
        sharey="row", layout="constrained", dpi=110,
    )  # fmt: skip
    peers = dict.fromkeys(row["peer"] for record in records for row in record["rows"])
    for line, dtype in zip(panels, dtypes, strict=True):
        line[0].set_ylabel(f"{dtype}, milliseconds a call")
        for panel, axis in zip(line, AXES, strict=True):
            _draw_curves(panel, axis, {peer: curve(records, axis, dtype, peer) for peer in peers})
        for panel in line:  # when the scale that they share is final
            _name_curves(panel)
    figure.suptitle(_title(records), fontsize=10)
    figure.savefig(tables.picture_folder(results) / PICTURE)
    pyplot.close(figure)


def _draw_curves(panel: Any, axis: str, curves: dict[str, list[tuple[int, float]]]) -> None:
    panel.set(xscale="log", yscale="log", xlabel=AXES[axis])
    ticks = sorted({x for points in curves.values() for x, _ in points})
    panel.set_xticks(ticks, [str(x) for x in ticks])
    panel.minorticks_off()
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.grid(alpha=0.3)
    for number, (peer, points) in enumerate(curves.items()):
        if points:
            panel.plot(
                *zip(*points, strict=True), marker="o", markersize=4, color=f"C{number}",
                linewidth=2.2 if peer == OURS else 1.4,
                label=PEERS[peer].summary.removeprefix("torch.compile, "),
            )  # fmt: skip


def _name_curves(panel: Any) -> None:
    """Write the name of each curve beside its last point."""
    low, high = (math.log(limit) for limit in panel.get_ylim())
    lines = panel.get_lines()
    ends = [(math.log(line.get_ydata()[-1]) - low) / (high - low) for line in lines]
    for line, height in zip(lines, apart(ends, LEAST_GAP), strict=True):
        panel.annotate(
            line.get_label(), (1.02, height), xycoords="axes fraction", color=line.get_color(),
            fontsize=9, va="center",
        )  # fmt: skip


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Heights moved up where that is needed for a distance of ``gap``; their order stays."""
    moved = list(heights)
    order = sorted(range(len(moved)), key=moved.__getitem__)
    for below, above in itertools.pairwise(order):
        moved[above] = max(moved[above], moved[below] + gap)
    return moved


def _title(records: list[dict[str, Any]]) -> str:
    facts = records[0]["machine"]
    cores = max(r["threads"] for r in records)
    return (
        f"DDPM CIFAR-10 U-Net on {facts['cpu']}, fastdiff's kernels for {facts['kernels']}. "
        f"Where it does not vary: {BATCH} image, {SIZE}x{SIZE}, threads: {cores}"
    )
