"""Captured loops over their life: how many are kept, which fail, which are at work already."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref

import pytest
import torch
from recording_graphs import SCHEDULE, SHAPE, WARM_UP, Half, draw, same
from torch import nn

from fastdiff.samplers import DDPM
from fastdiff.sampling import capture

pytestmark = pytest.mark.usefixtures("one_thread")


def test_few_graphs_are_kept(graphs):
    model = Half()

    def captures(size):
        draw(model, shape=(1, 1, size, size))
        return "capture" in graphs.take()

    sizes = range(1, capture.MAX_GRAPHS + 1)
    assert all(captures(size) for size in sizes)
    assert not captures(1)  # which makes 2 the one unused for longest
    assert captures(99)
    assert not captures(1)
    assert captures(2)


def test_graphs_go_with_their_model(graphs, monkeypatch):
    """A real graph holds no Python objects; neither does this stand-in."""

    def forget(device, run):
        return lambda: torch.zeros(SHAPE)

    monkeypatch.setattr(graphs, "capture", forget)
    model = Half()
    draw(model)
    buffers = weakref.ref(next(iter(capture._graphs_of[model].captured.values())).buffers)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert buffers() is None


def fails(device, run):
    raise RuntimeError("operation not permitted when stream is capturing")


def test_a_failed_capture_warns_once_and_runs_eagerly(graphs, monkeypatch):
    model = Half()
    wanted = draw(model, mode="eager")
    monkeypatch.setattr(graphs, "capture", fails)
    with pytest.warns(UserWarning, match="Half cannot be captured .* not permitted") as caught:
        assert torch.equal(draw(model), wanted)
    assert len(caught) == 1
    assert graphs.take() == WARM_UP
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(draw(model), wanted)
        assert graphs.take() == []  # not tried again
        draw(model, shape=(1, 1, 8, 8))
        assert graphs.take() == WARM_UP  # another one is, without a second warning
    with pytest.warns(UserWarning, match="cannot be captured"):
        draw(Half())


def test_a_failed_capture_leaves_autocast_and_noise_as_they_were(graphs, monkeypatch):
    monkeypatch.setattr(graphs, "capture", fails)
    model, sampler = Half(), DDPM(SCHEDULE, 3)

    def run(mode):
        generator = torch.Generator().manual_seed(3)
        return draw(model, sampler, mode, seed=None, generator=generator)

    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(UserWarning, match="cannot be captured"):
            drawn = run("cudagraph")
        assert torch.is_autocast_cache_enabled()
        assert torch.equal(drawn, run("eager"))


def test_an_error_of_the_model_is_raised(graphs):
    class Wrong(nn.Module):
        def forward(self, x, t):
            return x[..., :4]

    with (
        pytest.warns(UserWarning, match="cannot be captured"),
        pytest.raises(ValueError, match=r"must return \(2, 1, 8, 8\)"),
    ):
        draw(Wrong())


def test_what_is_no_module_is_captured_in_each_call(graphs):
    weight = [0.5]

    def model(x, t):
        return x * weight[0]

    same(model)
    weight[0] = 0.25
    same(model)
    assert graphs.take().count("capture") == 2


def test_an_argument_that_cannot_be_compared_is_captured_in_each_call(graphs):
    class Scale:
        __hash__ = None
        value = 0.5

    class Scaled(nn.Module):
        def forward(self, x, t, scale):
            return x * scale.value

    model = Scaled()
    for _ in range(2):
        same(model, cond={"scale": Scale()})
    assert graphs.take().count("capture") == 2


def test_weights_that_hide_their_memory_are_captured_in_each_call(graphs):
    class Wrapped(torch.Tensor):
        pass

    model = Half()
    model.register_buffer("wrapped", torch.zeros(1).as_subclass(Wrapped))
    for _ in range(2):
        same(model)
    assert graphs.take().count("capture") == 2


def test_a_graph_at_work_is_not_used_twice(graphs):
    """By a callback that samples too, or by another thread."""
    model = Half()
    wanted, other = draw(model, mode="eager"), draw(model, mode="eager", seed=1)
    inner = []
    outer = draw(model, callback=lambda *_: inner.append(draw(model, seed=1)))
    torch.testing.assert_close(outer, wanted)
    for drawn in inner:
        torch.testing.assert_close(drawn, other)

    def in_a_thread(*_):
        thread = threading.Thread(target=lambda: inner.append(draw(model, seed=1)))
        thread.start()
        thread.join()

    torch.testing.assert_close(draw(model, callback=in_a_thread), wanted)
    torch.testing.assert_close(inner[-1], other)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(model, callback=stop)
    graphs.take()
    torch.testing.assert_close(draw(model), wanted)  # the graph is free again
    assert graphs.take() == ["replay"] * 3
