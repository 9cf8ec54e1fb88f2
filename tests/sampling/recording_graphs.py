"""A stand-in for CUDA graphs that records on the CPU, and small models to capture with it.

The stand-in's capture computes nothing, and its replay runs the captured code again: on static
buffers that gives what a graph would, and on anything else it does not.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn

from fastdiff import sample, schedules
from fastdiff.samplers import DDIM
from fastdiff.sampling import capture

SCHEDULE = schedules.cosine(100)
SHAPE = (2, 1, 8, 8)
WARM_UP = ["side stream", *["run"] * capture.WARM_UP_ROWS, "main stream"]
CAPTURE = [*WARM_UP, "capture"]


class RecordingGraphs:
    """Stands for capture.CudaGraphs on the CPU."""

    def __init__(self):
        self.events, self.capturing, self.stream_number = [], False, 0

    def can_capture(self, device):
        return True

    def stream(self, device):
        return self.stream_number

    @contextmanager
    def side_stream(self, device):
        self.events.append("side stream")
        yield
        self.events.append("main stream")

    def capture(self, device, run):
        self.events.append("capture")

        def replay():
            self.events.append("replay")
            self.capturing = True
            output = run()
            self.capturing = False
            return output

        return replay

    def take(self):
        """The events since the last call."""
        events, self.events = self.events, []
        return events


def recorded(advance, graphs):
    def counted(*arguments):
        if not graphs.capturing:
            graphs.events.append("run")
        return advance(*arguments)

    return counted


class Half(nn.Module):
    """A model with one weight and, if it is given, a condition."""

    def __init__(self, weight=0.5):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x, t, shift=None):
        out = x * self.weight + t.view(-1, 1, 1, 1) * 1e-3
        return out if shift is None else out + shift


def draw(model, sampler=None, mode="cudagraph", **options):
    options = {"seed": 0, "progress": False, **options}
    shape = options.pop("shape", SHAPE)
    return sample(model, sampler or DDIM(SCHEDULE, 3), shape, mode=mode, **options)


def same(model, sampler=None, **options):
    """Sample with and without graphs, and hold the results together."""
    captured = draw(model, sampler, **options)
    torch.testing.assert_close(captured, draw(model, sampler, mode="eager", **options))
    return captured
