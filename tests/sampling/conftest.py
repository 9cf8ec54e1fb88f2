"""Fixtures of the sampling tests."""

from __future__ import annotations

import pytest
from recording_graphs import RecordingGraphs, recorded

from fastdiff.sampling import capture


@pytest.fixture
def graphs(monkeypatch):
    """The stand-in, in the place of CUDA."""
    recording = RecordingGraphs()
    monkeypatch.setattr(capture, "graphs", recording)
    monkeypatch.setattr(capture, "advance", recorded(capture.advance, recording))
    return recording
