"""What Dynamo guards, how often it compiles, and what is told where it does not."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from judging import assert_as_eager, compiled, settled
from small import small_inputs, small_net
from test_grad import assert_same_gradients
from torch import nn
from torch.autograd import forward_ad

from fastdiff.compiler import dynamo, explain, pipeline
from fastdiff.compiler.choose.budget import Budget


def graphs_made():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def _threads_put_back():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_threads_put_back")
@torch.no_grad()
def test_one_graph_serves_every_number_of_threads():
    model, case = small_net(), small_inputs()
    net = compiled(model)
    for threads in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1):
        torch.set_num_threads(threads)
        assert_as_eager(net(*case), model, case)
    assert graphs_made() == 1


@pytest.mark.usefixtures("_threads_put_back")
def test_all_other_settings_are_guarded_still():
    model, case = small_net(), small_inputs()
    net = compiled(model)
    with torch.no_grad():
        net(*case)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.autocast("cpu", torch.bfloat16):
                assert net(*case).dtype == torch.bfloat16
            assert_as_eager(net(*case), model, case)
            with torch.enable_grad():
                assert_same_gradients(net, model, case)
    assert graphs_made() == 3


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_forward_mode_derivatives(grad):
    """The fused operations have none: a graph of PyTorch's own is made where they are wanted."""
    torch.manual_seed(0)
    model, (x, _) = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(),
        nn.Conv2d(16, 3, 3, padding=1),
    ), small_inputs()  # fmt: skip
    net, found = compiled(model), []
    with torch.set_grad_enabled(grad):
        settled(net, (x,))
        for call in (net, model):
            with forward_ad.dual_level():
                both = forward_ad.unpack_dual(call(forward_ad.make_dual(x, torch.ones_like(x))))
                found.append((both.primal, both.tangent))
        torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
        assert_as_eager(net(x).detach(), model, (x,))


@pytest.fixture
def _double_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_double_by_default")
@torch.no_grad()
def test_default_dtype():
    model, case = small_net().float(), small_inputs(dtype=torch.float32)
    assert_as_eager(settled(compiled(model), case), model, case)


@torch.no_grad()
def test_default_device(monkeypatch, tmp_path):
    """Nothing is made on it: the model and its inputs are on the CPU."""
    monkeypatch.setenv("FASTDIFF_PLAN", "measured")
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    model, case = small_net(), small_inputs()
    net = compiled(model)
    with torch.device("meta"):
        assert Budget("fast", None, True).measured == Budget("fast", 0, True).measured is True
        first = settled(net, case)
    assert_as_eager(first, model, case)
    assert torch.equal(settled(net, case), first)


@torch.no_grad()
def test_without_what_is_private_to_dynamo_its_guard_stays(monkeypatch):
    monkeypatch.setattr(dynamo.json, "loads", lambda text: {})
    model, case = small_net(), small_inputs()
    net = compiled(model)
    assert_as_eager(net(*case), model, case)
    with torch.enable_grad():
        assert net(*case).requires_grad


def notes(caplog, level=logging.WARNING):
    named = [r for r in caplog.records if r.name.startswith("fastdiff.compiler")]
    return [r.getMessage() for r in named if r.levelno >= level]


def missing(name):
    def private(*args):
        raise AttributeError(name)

    return private


@torch._dynamo.config.patch(recompile_limit=2)
@torch.no_grad()
def test_the_limit_of_graphs(caplog, monkeypatch):
    """Without what is private to Dynamo: a notice when it is reached, right results beyond it, and
    an explanation why it is slow."""
    monkeypatch.setattr(dynamo, "_backend_of", missing("backend"))
    model = small_net()
    net = torch.compile(model, backend="fastdiff", dynamic=False)
    net(*small_inputs(1))
    assert not notes(caplog)
    assert not explain(net, *small_inputs(1)).uncompiled
    for batch in (2, 3, 4):
        case = small_inputs(batch)
        assert_as_eager(net(*case), model, case)
    (note,) = notes(caplog)
    assert "forward" in note
    assert "recompile_limit allows (2)" in note
    assert graphs_made() == 3  # one of them is that of explain
    for told in (explain(net, *case), explain(model, *case)):
        (reason,) = told.uncompiled
        assert "SmallNet.forward" in reason
        assert "has 2 graphs" in reason
        assert "recompile_limit is 2" in reason
        assert f"runs uncompiled: {reason}" in str(told)
        assert (told.graphs, len(told.fused)) == (1, 10)
    torch.compiler.reset()
    assert not explain(net, *case).uncompiled


@torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=3)
@pytest.mark.parametrize("isolated", [False, True], ids=["shared", "isolated"])
@torch.no_grad()
def test_any_number_of_graphs(caplog, isolated):
    model = small_net()
    net = compiled(model, dynamic=False, **(dynamo.isolation_options() if isolated else {}))
    for batch in (1, 2, 3, 4, 5, 6, 1):
        case = small_inputs(batch)
        assert_as_eager(net(*case), model, case)
    assert graphs_made() == 6
    assert not notes(caplog)
    assert not explain(net, *case).uncompiled


@torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=3)
@torch.no_grad()
def test_the_graph_used_least_recently_is_dropped(monkeypatch):
    monkeypatch.setattr(dynamo, "MOST_GRAPHS", 3)
    made = []

    def note(gm, *args, **kwargs):
        made.append(weakref.ref(gm))
        return compile_graph(gm, *args, **kwargs)

    compile_graph = pipeline.compile_graph
    monkeypatch.setattr(pipeline, "compile_graph", note)
    model = small_net()
    net = compiled(model, dynamic=False)
    for batch in (1, 2, 3, 1, 4, 1, 3, 2):
        case = small_inputs(batch)
        assert_as_eager(net(*case), model, case)
    gc.collect()
    # Those of 2 and then of 4 images made room for those of 4 and of 2.
    assert [gm() is not None for gm in made] == [True, False, True, False, True]


@torch._dynamo.config.patch(recompile_limit=2)
@torch.no_grad()
def test_graphs_of_other_backends_are_counted_as_before():
    model = small_net()
    net = torch.compile(model, backend="eager", dynamic=False)
    for batch in (1, 2, 3, 4):
        net(*small_inputs(batch))
    assert graphs_made() == 2


@torch._dynamo.config.patch(recompile_limit=2)
@torch.no_grad()
def test_explaining_takes_none_of_a_models_graphs(caplog):
    model, case = small_net(), small_inputs()
    for _ in range(4):
        assert explain(model, *case).graphs == 1
    compiled(model)(*case)
    assert not notes(caplog)


def test_explanation_of_both_ways():
    """A user who samples only, but calls explain without ``torch.no_grad``, sees what he wants."""
    model, case = small_net(), small_inputs()
    told = explain(model, *case)
    assert told.gradients
    assert (told.reasons, len(told.fused)) == ((), 9)
    assert told.sampling is not None
    assert (told.sampling.reasons, len(told.sampling.fused)) == ((), 10)
    text = str(told)
    assert text.index("with gradients") < text.index("under torch.no_grad()")
    for row in told.sampling.fused:
        assert row.what in text
    with torch.no_grad():
        assert explain(model, *case) == told.sampling
    assert explain(model.requires_grad_(False), *case).sampling is None


def uncompiled(model, *case):
    told = explain(model, *case)
    assert told.graphs == 0
    for reason in told.uncompiled:
        assert f"runs uncompiled: {reason}" in str(told)
    return told.uncompiled


@torch.no_grad()
def test_explanation_where_dynamo_is_off():
    with torch._dynamo.config.patch(disable=True):
        (reason,) = uncompiled(small_net(), *small_inputs())
        assert "Dynamo is off" in reason
    with torch.compiler.set_stance("force_eager"):
        (reason,) = uncompiled(small_net(), *small_inputs())
        assert "set_stance('force_eager')" in reason


@torch.no_grad()
def test_explanation_of_suppressed_errors(monkeypatch):
    monkeypatch.setenv("FASTDIFF_PLAN", "exact")
    with torch._dynamo.config.patch(suppress_errors=True):
        (reason,) = uncompiled(small_net(), *small_inputs())
    assert "FASTDIFF_PLAN must be" in reason
    assert "suppresses" in reason


@torch.no_grad()
def test_explanation_where_dynamo_gives_up():
    class Stopped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        @torch.compiler.disable
        def forward(self, x, emb):
            return self.net(x, emb)

    assert uncompiled(Stopped(), *small_inputs())


@torch.no_grad()
def test_hooks_that_come_and_go():
    model, case = small_net(), small_inputs()
    net = compiled(model)
    for part in ("conv1", "norm2", "q"):
        net(*case)
        before = net(*case)
        handle = model.get_submodule(part).register_forward_hook(lambda m, args, y: 0.5 * y)
        assert_as_eager(net(*case), model, case)
        assert not torch.equal(net(*case), before)
        handle.remove()
        earlier = model.get_submodule(part).register_forward_pre_hook(lambda m, args: (-args[0],))
        assert_as_eager(net(*case), model, case)
        assert not torch.equal(net(*case), before)
        earlier.remove()
        assert torch.equal(net(*case), before)
