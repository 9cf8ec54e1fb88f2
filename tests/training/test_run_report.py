"""The report of a run: its curves keep their extremes, its page is whole and needs nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import schedules
from fastdiff.common.errors import InputError
from fastdiff.data.datasets import ImageSet
from fastdiff.nn.image_unet import make_unet
from fastdiff.training import Trainer, TrainingOptions
from fastdiff.training.run_report import ReportWriter, RunRecord, page, write
from fastdiff.training.run_report import report_writer as writer_module
from fastdiff.training.run_report.line_chart import Chart, Line, linear_axis, log_axis, number, svg
from fastdiff.training.run_report.series import Series, read_log, smoothed, thinned, window

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = TrainingOptions(
    steps=6, batch_size=4, warmup=0, save_every=3, sample_every=3, validate_every=2, seed=1
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that was continued, and another."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (12, 1, 8, 8), generator=generator, dtype=torch.uint8)
    images = ImageSet(pixels, torch.arange(12) % 2, ("<left>", "right & up"), "arrows")
    root = tmp_path_factory.mktemp("runs")
    for name, lr in (("first", 1e-3), ("second", 2e-3)):
        torch.manual_seed(0)
        model = make_unet(8, 1, 2, widths=(8, 16), layers_per_block=1, attention=(1,))
        options = dataclasses.replace(OPTIONS, lr=lr, steps=3 if name == "first" else 6)
        trainer = Trainer(
            model, schedules.cosine(50), images, options, prediction="v", validation=images,
            out=root / name,
        )  # fmt: skip
        trainer.run(progress=False)
    Trainer.resume(root / "first", images, OPTIONS, validation=images).run(progress=False)
    return root


class Page(HTMLParser):
    """What a browser would show: its elements, and their text outside of style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text += data + "\n"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


# Curves.


def test_a_log_is_read_as_it_is(tmp_path):
    """With lists, values that are not finite, a line cut short, one without a step."""
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"step": 1, "loss": 2.5, "parts": [1, 2], "name": "x", "on": true}\n'
        '{"step": 2, "loss": NaN}\n{"step": 2, "loss": null}\n{"loss": 4}\n[]\n'
        '{"step": 3, "loss": 0.5}\n{"step": 4, "lo'
    )
    found = read_log(path)
    assert set(found) == {"loss", "parts.0", "parts.1"}
    assert found["loss"].steps.tolist() == [1, 3]
    assert found["loss"].values.tolist() == [2.5, 0.5]
    assert found["loss"].left_out == 2
    assert read_log(tmp_path / "none") == {}


def test_smoothing_is_a_mean_of_values_on_both_sides():
    values = np.random.default_rng(0).normal(1e6, 1.0, 400)
    series = Series(np.arange(400.0), values)
    assert window(series) == 10
    mean = smoothed(series).values
    for i, first, end in ((0, 0, 1), (3, 0, 7), (5, 0, 11), (200, 195, 206), (399, 394, 400)):
        assert mean[i] == pytest.approx(values[first:end].mean(), rel=1e-12)
    assert window(Series(series.steps[:79], values[:79])) == 1
    few = Series(series.steps[:79], values[:79])
    assert smoothed(few) is few
    assert window(Series(np.arange(10.0**5), np.ones(10**5))) == 1000


def test_smoothing_does_not_lag():
    """A straight line stays where it is, but for its last few values."""
    line = Series(np.arange(400.0), np.linspace(1, 0, 400))
    assert np.allclose(smoothed(line).values[:-5], line.values[:-5])


def test_thinning_keeps_every_extreme_in_its_place():
    values = np.random.default_rng(0).normal(size=100_003)
    values[[7, 50_000]] = 99, -99
    thin = thinned(Series(np.arange(len(values)), values))
    assert len(thin) <= 1002
    assert (thin.values[thin.steps == 7], thin.values[thin.steps == 50_000]) == (99, -99)
    assert (thin.steps[0], thin.steps[-1]) == (0, 100_002)
    assert (np.diff(thin.steps) > 0).all()
    assert np.array_equal(values[thin.steps.astype(int)], thin.values)
    few = Series(np.arange(1000.0), values[:1000])
    assert thinned(few) is few


# Charts.


@pytest.mark.parametrize(("low", "high"), [
    (0.2, 0.9), (0, 1e-9), (-3, 17), (5, 5), (0, 0), (1e6, 1e6 + 1), (-1e-3, 0), (0.1, 0.3)
])  # fmt: skip
def test_a_linear_axis_has_round_ticks_around_the_values(low, high):
    axis = linear_axis(low, high, 5)
    assert axis.low <= low <= high <= axis.high
    assert 2 <= len(axis.ticks) <= 8
    steps = np.diff(axis.ticks)
    assert np.allclose(steps, steps[0])
    assert float(f"{steps[0]:.1e}".split("e")[0]) in (1.0, 2.0, 5.0)


@pytest.mark.parametrize(("low", "high"), [(0.03, 4), (1e-8, 1), (0.9, 9.1), (1, 1e12)])
def test_a_log_axis_has_round_ticks_around_the_values(low, high):
    axis = log_axis(low, high)
    assert axis.low <= low < high <= axis.high
    assert 3 <= len(axis.ticks) <= 15
    assert all(float(f"{tick:.1e}".split("e")[0]) in (1.0, 2.0, 5.0) for tick in axis.ticks)
    ends = axis.share(np.array([axis.low, math.sqrt(axis.low * axis.high), axis.high]))
    assert np.allclose(ends, [0, 0.5, 1])


def test_numbers_are_short():
    texts = [number(v) for v in (0, 0.25, 1500, 2e6, 3e9, -1500, 2e-5, 1234.5678e-9, 999)]
    assert texts == ["0", "0.25", "1.5k", "2M", "3G", "-1.5k", "2e-5", "1.23e-6", "999"]
    assert number(0.014, percent=True) == "1.4%"


def points_of(drawn: str) -> list[tuple[float, float]]:
    (line,) = (e for e in ElementTree.fromstring(drawn).iter() if e.tag == "polyline")
    return [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]


def test_a_chart_draws_values_where_its_axes_say():
    """The values are read back from the picture, as the page's script does."""
    series = Series(np.array([0.0, 5.0, 10.0]), np.array([0.01, 1.0, 0.1]))
    for log in (False, True):
        drawn = svg(Chart("a <b>", 'loss "x"', [Line("it", series, 0)], log=log))
        root = ElementTree.fromstring(drawn)
        assert root.get("data-log") == str(int(log))
        low, high = map(float, root.get("data-y").split())
        (frame,) = (e.get("d") for e in root.iter("path"))
        left, top, bottom, right = map(float, re.findall(r"[\d.]+", frame))
        for (across, down), step, value in zip(
            points_of(drawn), series.steps, series.values, strict=True
        ):
            share = (bottom - down) / (bottom - top)
            there = low * (high / low) ** share if log else low + (high - low) * share
            assert there == pytest.approx(value, rel=1e-3, abs=1e-4)
            assert (across - left) / (right - left) == pytest.approx(step / 10, abs=1e-3)
        assert ("(log scale)" in drawn) == log


def test_an_axis_is_logarithmic_only_for_positive_values_that_span_much():
    steps = np.arange(2.0)
    for values, log in (([1, 9], "0"), ([1, 11], "1"), ([0, 100], "0"), ([-1, 100], "0")):
        drawn = svg(Chart("", "", [Line("", Series(steps, np.array(values)), 0)], log=True))
        assert ElementTree.fromstring(drawn).get("data-log") == log


def test_a_chart_without_values_is_none():
    assert svg(Chart("", "", [Line("", Series(np.empty(0), np.empty(0)), 0)])) == ""
    assert svg(Chart("", "", [])) == ""


# The page.


def test_a_run_leaves_a_report_that_needs_nothing_else(runs):
    text = (runs / "first" / "report.html").read_text(encoding="utf-8")
    found = Page(text)
    assert found.open == []
    addresses = [value for _, attributes in found.tags for name, value in attributes.items()
                 if name in ("src", "href", "srcset", "data", "action")]  # fmt: skip
    assert len(addresses) == 2  # the grids
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert not re.findall(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    assert not found.all("link")


def test_it_shows_curves_grids_numbers_options_and_machine(runs):
    found = Page((runs / "first" / "report.html").read_text(encoding="utf-8"))
    for title in (
        "Training loss", "Validation loss", "Validation loss by noise", "Learning rate",
        "Norm of the gradient", "Speed", "Waiting for images", "Memory of the process",
    ):  # fmt: skip
        assert title in found.text
    assert len(found.all("svg")) == 8
    assert [image["alt"] for image in found.all("img")] == [
        "samples at step 3",
        "samples at step 6",
    ]
    for text in ("of 6", "grad_clip", torch.__version__, "1x8x8, 2 classes", "from step 3"):
        assert text in found.text
    assert "nan" not in found.text.lower()


def test_several_runs_are_shown_side_by_side(runs, tmp_path):
    write([runs / "first", runs / "second"], tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text(encoding="utf-8")
    found = Page(text)
    assert found.open == []
    assert text.count('<tr class="differs"><th>lr</th><td>0.001</td><td>0.002</td></tr>') == 1
    assert text.index("<th>lr</th>") < text.index("<th>batch_size</th>")
    labels = {line.get("data-label") for line in found.all("polyline")}
    assert {"first", "second"} <= labels
    assert len(found.all("img")) == 4


def test_names_and_options_are_text_not_markup(runs, tmp_path):
    record = RunRecord.read(runs / "second")
    named = dataclasses.replace(record, options={"<b>x</b>": "<script>alert(1)</script>"})
    found = Page(page([named]))
    assert len(found.all("script")) == 1
    assert "<script>alert(1)</script>" in found.text


def test_runs_of_earlier_versions_are_shown(runs, tmp_path):
    """With losses alone, and options from the checkpoint."""
    old = tmp_path / "old"
    (old / "checkpoints").mkdir(parents=True)
    lines = (json.loads(line) for line in (runs / "second" / "losses.jsonl").open())
    (old / "losses.jsonl").write_text(
        "".join(json.dumps({k: line[k] for k in ("step", "loss", "lr")}) + "\n" for line in lines)
    )
    assert len(Page(page([RunRecord.read(old)])).all("svg")) == 2
    (runs / "second" / "checkpoints" / "step-00000006").rename(
        old / "checkpoints" / "step-00000006"
    )
    assert RunRecord.read(old).options["lr"] == 2e-3
    assert "lr" in Page(page([RunRecord.read(old), RunRecord.read(runs / "first")])).text
    (old / "checkpoints" / "step-00000006").rename(
        runs / "second" / "checkpoints" / "step-00000006"
    )


def test_steps_that_were_left_out_are_counted(tmp_path):
    lines = [
        {"step": 1, "loss": 1.0, "lr": 1.0},
        {"step": 2, "loss": None, "lr": 1.0, "fault": "x"},
    ]
    (tmp_path / "losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = Page(page([RunRecord.read(tmp_path)])).text
    assert re.search(r"steps left out\n+1\n", text)
    assert "Values that are not finite are left out: 1." in text


def test_an_empty_log_is_a_report(tmp_path):
    (tmp_path / "losses.jsonl").write_text("")
    assert Page(page([RunRecord.read(tmp_path)])).open == []


def test_a_folder_without_a_log_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"is no folder of a run: it has no losses\.jsonl"):
        write([tmp_path], tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_a_long_run_makes_a_short_page(tmp_path):
    """30,000 steps, and 300 grids of noise, which PNG cannot compress."""
    losses = np.random.default_rng(0).random(30_000)
    losses[12_345] = 50
    with (tmp_path / "losses.jsonl").open("w") as file:
        for step, loss in enumerate(losses, 1):
            file.write(json.dumps({"step": step, "loss": float(loss), "lr": 1e-3}) + "\n")
    (tmp_path / "samples").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    for step in range(100, 30_001, 100):
        target = tmp_path / "samples" / f"step-{step:08d}.png"
        if step == 100:
            Image.fromarray(noise).save(target)
        else:
            target.hardlink_to(tmp_path / "samples" / "step-00000100.png")
    write([tmp_path], tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 6_500_000
    found = Page((tmp_path / "report.html").read_text())
    steps = [image["alt"] for image in found.all("img")]
    assert (steps[0], steps[-1]) == ("samples at step 100", "samples at step 30000")
    assert 10 <= len(steps) <= 24
    raw = next(line for line in found.all("polyline") if "faint" in line["class"])
    assert min(float(pair.split(",")[1]) for pair in raw["points"].split()) < 25  # the largest


# Writing it.


def test_reports_at_checkpoints_take_a_small_share_of_the_time(tmp_path, monkeypatch):
    """By a clock that tells 10 s for each report and 100 s between checkpoints."""
    now, written = [0.0], []

    def slow(folders, target):
        now[0] += 10
        written.append(now[0])

    monkeypatch.setattr(writer_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(writer_module, "write", slow)
    (tmp_path / "losses.jsonl").write_text("")
    writer = ReportWriter(tmp_path)
    writer.begin(None)
    for _ in range(40):
        now[0] += 100
        writer.step(None)
        writer.checkpoint(0)
    assert written == [110, 1020, 2030, 3040, 4050]
    writer.step(None)
    writer.end()
    assert len(written) == 6
    writer.end()
    assert len(written) == 6  # no news


def test_a_report_that_cannot_be_written_is_a_warning(tmp_path, tiny_unet, generator):
    pixels = torch.randint(256, (4, 1, 8, 8), generator=generator, dtype=torch.uint8)
    options = dataclasses.replace(OPTIONS, steps=1, sample_every=0)
    trainer = Trainer(tiny_unet(), schedules.cosine(50), ImageSet(pixels), options, out=tmp_path)
    (tmp_path / "report.html").mkdir()
    with pytest.warns(UserWarning, match=r"no report: cannot write .*report\.html: it is a folder"):
        assert trainer.run(progress=False) is None
