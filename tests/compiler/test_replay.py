"""Graphs that run from a recorded list, and those that must not."""

from __future__ import annotations

import itertools
import resource

import pytest
import torch
from judging import assert_as_eager, compiled, settled
from models import inputs, make
from small import small_inputs, small_net
from test_threads import run_together
from torch import nn

import fastdiff
from fastdiff.compiler.run import replay
from fastdiff.compiler.run.recording import Recorder
from fastdiff.ops.backend import isa

pytestmark = pytest.mark.skipif(isa() == "none", reason="without the C++ extension none are")


@pytest.fixture
def one_value():
    """A function of a tensor as a list, or None: function(x) is recorded and finished."""

    def record(function, *tensors):
        names = ((x, lambda *given, i=i: given[i]) for i, x in enumerate(tensors))
        recorder = Recorder(names)
        with recorder:
            result = function(*tensors)
        return recorder.finish(result)

    return record


@torch.no_grad()
def test_the_third_call_is_run_from_a_list(runs):
    model = small_net()
    net = compiled(model)
    for seed in range(4):
        case = small_inputs(seed=seed)
        assert_as_eager(net(*case), model, case)
        assert len(runs) == max(0, seed - 1)
    assert len(set(map(id, runs))) == 1


@torch.no_grad()
def test_a_number_for_the_time_is_no_hindrance(runs):
    """It is a constant of the list, which nothing may write to."""
    model = make("diffusers")
    case = (inputs("diffusers")[0][0], 10)
    assert_as_eager(settled(compiled(model), case), model, case)
    assert len(runs) == 1


@torch.no_grad()
def test_every_size_has_a_list_of_its_own(runs):
    model = small_net()
    net = compiled(model, dynamic=True)
    for _ in range(3):
        for batch, size in ((1, (8, 12)), (3, (8, 12)), (3, (5, 7))):
            case = small_inputs(batch, size)
            assert_as_eager(net(*case), model, case)
    assert len(runs) == len(set(map(id, runs))) == 3


@torch.no_grad()
def test_so_have_strides_threads_and_backends(runs):
    model = small_net()
    net, (x, emb) = compiled(model), small_inputs()
    for _ in range(3):
        net(x, emb)
    last = x.contiguous(memory_format=torch.channels_last)
    assert_as_eager(net(last, emb), model, (last, emb))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert_as_eager(net(x, emb), model, (x, emb))
    finally:
        torch.set_num_threads(threads)
    with fastdiff.backend("reference"):
        assert_as_eager(net(x, emb), model, (x, emb))
    assert len(runs) == 1
    net(x, emb)
    assert len(runs) == 2


@torch.no_grad()
def test_lists_are_not_kept_for_ever(monkeypatch, runs):
    monkeypatch.setattr(replay, "MOST_RECORDINGS", 2)
    model = small_net()
    net = compiled(model, dynamic=True)
    for _ in range(2):
        for batch in (2, 3, 4):
            case = small_inputs(batch)
            assert_as_eager(net(*case), model, case)
    for _ in range(3):
        net(*case)
    assert len(runs) == 2  # of the last, whose place was not taken


@torch.no_grad()
def test_changed_weights_are_seen(runs):
    model, donors = small_net(), [small_net(seed=seed) for seed in (1, 2, 3)]
    net, case = compiled(model), small_inputs()
    for _ in range(3):
        net(*case)
    for ours, theirs in zip(model.parameters(), donors[0].parameters(), strict=True):
        ours.copy_(theirs)
    assert_as_eager(net(*case), donors[0], case)
    model.load_state_dict(donors[1].state_dict())
    assert_as_eager(net(*case), donors[1], case)
    for ours, theirs in zip(model.parameters(), donors[2].parameters(), strict=True):
        ours.data = theirs.data.clone()
    assert_as_eager(net(*case), donors[2], case)
    assert len(runs) >= 3


@torch.no_grad()
def test_one_list_in_several_threads(runs):
    model = small_net()
    net = compiled(model)
    cases = [small_inputs(seed=seed) for seed in range(4)]
    alone = [net(*case) for case in cases]
    del runs[:]

    def call_often(index):
        for turn in range(10):
            which = (index + turn) % 4
            assert torch.equal(net(*cases[which]), alone[which])

    run_together(call_often)
    assert len(runs) == 40


def peak_memory():
    """Bytes that the process has had at the same time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def held_at_most(call):
    """Bytes of tensors that a call has made and holds at the same time."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        call()
    events = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in changes))


class Steps(nn.Module):
    """Takes its time step as a number, and gives more than one result."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.register_buffer("shift", torch.full((1, 8, 1, 1), 0.25))

    def forward(self, x, step):
        times = torch.tensor([step], dtype=torch.float32) * 0.5
        y = self.conv(x) + self.shift
        return {"y": y, "x": x, "twice": (y, y[:, ::2]), "times": times + step, "step": step}


@torch.no_grad()
def test_numbers_and_results_of_all_kinds(runs):
    torch.manual_seed(0)
    model, x = Steps().eval(), torch.randn(2, 3, 6, 5)
    net = compiled(model, dynamic=True)
    for step in (3, 3, 3, 4, 4, 4, 5):
        found, wanted = net(x, step), model(x, step)
        assert found["x"] is x
        assert found["step"] == step
        assert found["twice"][0] is found["y"]
        torch.testing.assert_close(found["times"], wanted["times"], atol=0, rtol=0)
        torch.testing.assert_close(found["y"], wanted["y"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["twice"][1], wanted["twice"][1], atol=1e-5, rtol=1e-5)
    assert runs
    model.shift.fill_(1)
    torch.testing.assert_close(net(x, 4)["y"], model(x, 4)["y"], atol=1e-5, rtol=1e-5)


def test_every_kind_of_argument(one_value):
    def function(x, y):
        a = x.to(torch.float64).new_zeros((2, 2), device="cpu").sum([0], keepdim=True)
        b = torch.cat((x, y, x * 2 + 1), 1).split([2, 3, 1], 1)
        c = x.contiguous(memory_format=torch.channels_last).clamp(min=0.25).mean((2, 3))
        d = b[1][:, torch.arange(2) + 1].index_fill(1, torch.arange(1), 0.5)
        e = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest").add_(1)
        return a, b, c, [d, None, 7, e], torch.zeros(0)

    x, y, z = (torch.randn(2, 2, 3, 4) for _ in range(3))
    found = one_value(function, x, y)
    assert found is not None
    for given in ((x, y), (z, x)):
        torch.testing.assert_close(found.run(*given), function(*given), atol=0, rtol=0)


def test_what_depends_on_values_is_not_recorded(one_value):
    x = torch.tensor([0.0, 1.0, 2.0])
    assert one_value(lambda x: x * x.sum().item(), x) is None
    assert one_value(lambda x: x.nonzero(), x) is None
    assert one_value(lambda x: x[x > 0], x) is None
    assert one_value(lambda x: x * 2 if torch.equal(x, x) else x, x) is None
    assert one_value(lambda x: x + 1, x) is not None


def test_tensors_from_elsewhere_are_not_recorded(one_value):
    x, other = torch.ones(3), torch.ones(3)
    assert one_value(lambda x: x + other, x) is None
    assert one_value(lambda x: other, x) is None


def test_constants_are_recorded_where_nobody_writes(one_value):
    x = torch.ones(3)
    found = one_value(lambda x: x + torch.tensor([1.0, 2.0, 3.0]), x)
    assert found.run(2 * x).tolist() == [3.0, 4.0, 5.0]
    assert one_value(lambda x: torch.tensor([1.0, 2.0, 3.0]).add_(x), x) is None


def test_generators_are_not_recorded(one_value):
    generator = torch.Generator().manual_seed(0)
    assert one_value(lambda x: x + torch.randn(3, generator=generator), torch.ones(3)) is None


def test_results_are_freed_as_soon_as_nobody_reads_them(one_value):
    """Each is 64 MiB; all of them would be a gibibyte."""
    x = torch.ones(1 << 24)

    def function(x):
        for _ in range(16):
            x = x + 1
        return x

    found = one_value(function, x)  # which frees them too
    before = peak_memory()
    assert found.run(x)[0] == 17
    assert peak_memory() - before <= 3 * x.nbytes


@torch.no_grad()
def test_activations_take_less_memory_than_eager(runs):
    model, (case, _) = make("plain-decoder"), inputs("plain-decoder", 3)
    net = compiled(model)
    for _ in range(2):
        net(*case)
    ours, theirs = held_at_most(lambda: net(*case)), held_at_most(lambda: model(*case))
    assert len(runs) == 1
    assert 0 < ours < theirs


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        (lambda p: p.run([]), "wanted 1 inputs, got 0"),
        (lambda p: p.finish([1]), "no register 1"),
        (lambda p: p.finish([-1]), "no register -1"),
        (lambda p: p.add("aten::neg", "", (("register", 1),), ((1,),), []), "no register 1"),
        (lambda p: p.add("aten::neg", "", (), ((1,),), []), "has 1 arguments, got 0"),
        (lambda p: p.add("aten::neg", "", (("register", 0),), (), []), "has 1 results, got 0"),
        (lambda p: p.add("aten::neg", "", (("register", 0),), ((5,),), []), "numbered in order"),
        (lambda p: p.add("aten::neg", "", (("register", 0),), ((1,),), [2]), "no register 2"),
        (lambda p: p.add("aten::neg", "", (("value", "x"),), ((1,),), []), "as Tensor"),
        (lambda p: p.add("aten::neg", "", (("default",),), ((1,),), []), "has no default"),
        (lambda p: p.add("aten::item", "", (("register", 0),), ((1,),), []), "cannot record"),
        (lambda p: p.add("aten::stack", "", (("registers", (-1,)), ("value", 0)), ((1,),), []),
         "no register -1"),
        (lambda p: p.add("aten::none", "", (), (), []), "aten::none"),
    ],
)  # fmt: skip
def test_lists_that_cannot_be_are_refused(calls, message):
    program = torch.classes.fastdiff.Program(1)
    with pytest.raises((ValueError, RuntimeError), match=message):
        calls(program)
