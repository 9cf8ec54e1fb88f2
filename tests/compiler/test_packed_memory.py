"""What packed weights take: nothing is kept twice, and ``drop_weights`` frees the model's own."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
from judging import assert_as_eager, compiled
from small import small_inputs, small_net
from torch import nn

from fastdiff.compiler import explain
from fastdiff.compiler.choose import algorithms, budget
from fastdiff.compiler.choose.sizes import Sizes
from fastdiff.compiler.choose.timings import ALGORITHM_NAMES
from fastdiff.compiler.run import packing
from fastdiff.ops import backend
from fastdiff.ops.conv2d_spec import ConvSpec
from fastdiff.ops.weights_state import drop_weights, weights_state

needs_kernels = pytest.mark.skipif(backend.isa() == "none", reason="needs the C++ kernels")
DROP = {"drop_weights": True}


@pytest.fixture
def by_kernels(monkeypatch):
    """PyTorch's own convolution, which reads the weights themselves, is never the quickest."""
    original = algorithms.heuristic
    monkeypatch.setattr(algorithms, "heuristic", lambda sizes: {**original(sizes), "plain": 1e9})
    monkeypatch.setenv("FASTDIFF_PLAN", "heuristic")


def packed_weights(model):
    """Those of a model's parameters."""
    mine = {id(parameter) for parameter in model.parameters()}
    return [w for w in packing._packed.values() if mine & {id(ref()) for ref in w.references}]


@needs_kernels
@torch.no_grad()
def test_joined_weights_are_kept_only_packed(by_kernels):
    model, inputs = small_net(), small_inputs()
    net = compiled(model)
    for _ in range(3):  # in Python, recorded, and from the list
        assert_as_eager(net(*inputs), model, inputs)
        weights = packed_weights(model)
        joined = [w for w in weights if len(w.references) > 1]
        assert joined
        assert all(len(w.by_algorithm) == 1 for w in weights)
        assert all(w.memory()["copy"] == 0 for w in weights)
        assert not any("weight" in dict(w.tensors()) for w in joined)


@needs_kernels
@torch.no_grad()
def test_memory_is_one_packed_form_of_each_weight(by_kernels):
    """All tensors that a first call leaves, as the collector sees them."""
    model, inputs = small_net(), small_inputs()

    def tensors():
        gc.collect()
        found = (x for x in gc.get_objects() if type(x) is torch.Tensor and not x.is_meta)
        kept = [x.untyped_storage() for x in found if x.layout == torch.strided]
        return {storage.data_ptr(): storage.nbytes() for storage in kept}

    before = tensors()
    net = compiled(model)
    out = net(*inputs)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()} | {out.data_ptr()}
    left = sum(size for ptr, size in tensors().items() if ptr not in before and ptr not in own)
    packed = sum(x.nbytes for w in packed_weights(model) for x in w.by_algorithm.values())
    assert 0 < packed <= left
    biases = sum(p.nbytes for p in model.parameters() if p.ndim == 1)
    assert left <= packed + 2 * biases + 4096


@needs_kernels
@torch.no_grad()
def test_weights_that_pytorch_reads_stay(monkeypatch):
    monkeypatch.setattr(packing, "conv2d_pack", None)
    monkeypatch.setenv("FASTDIFF_PLAN", "heuristic")
    model, inputs = small_net(), small_inputs()
    net = compiled(model, options={"packed_bytes": 0, **DROP})
    for _ in range(3):
        net(*inputs)
    assert_as_eager(net(*inputs), model, inputs)


@needs_kernels
@torch.no_grad()
def test_dropped_weights(by_kernels):
    """Results stay the same; every way to read or change the weights says what has happened."""
    model, inputs = small_net(), small_inputs()
    twin = copy.deepcopy(model)
    net = compiled(model, options=DROP)
    biases_of_one_head = {"q.bias", "v.bias", "out.bias"}  # multiplied into others'
    for _ in range(4):
        assert_as_eager(net(*inputs), twin, inputs)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and name not in biases_of_one_head:
            parameter.sum()
            continue
        for use in (
            lambda p: p.sum(),
            lambda p: p.detach().numpy(),
            lambda p: p.detach().zero_(),
            lambda p: p.detach().clone(),
            lambda p: torch.save(p.detach(), io.BytesIO()),
            copy.deepcopy,
        ):
            with pytest.raises(RuntimeError, match="dropped after it had been packed"):
                use(parameter)
    with pytest.raises(RuntimeError, match="dropped after it had been packed"):
        torch.save(model.state_dict(), io.BytesIO())
    with pytest.raises(RuntimeError, match="dropped after it had been packed"):
        model.load_state_dict(twin.state_dict())
    with pytest.raises(RuntimeError, match="dropped after it had been packed"):
        model(*inputs)
    assert_as_eager(net(*inputs), twin, inputs)


@needs_kernels
@torch.no_grad()
def test_other_sizes_after_the_drop(by_kernels):
    """They are computed from the forms that there are, in the same graph and in a new one."""
    model = small_net()
    twin = copy.deepcopy(model)
    net, fixed = compiled(model, options=DROP, dynamic=True), compiled(model, dynamic=False)
    for batch, size in ((2, (8, 12)), (1, (32, 32)), (3, (5, 7)), (2, (4, 4))):
        case = small_inputs(batch, size)
        for _ in range(3):
            assert_as_eager(net(*case), twin, case)
            assert_as_eager(fixed(*case), twin, case)
    assert all(len(w.by_algorithm) == 1 for w in packed_weights(model))


@needs_kernels
@torch.no_grad()
def test_a_form_that_is_not_there_after_the_drop(by_kernels):
    model, inputs = small_net(), small_inputs()
    compiled(model, options=DROP)(*inputs)
    wide = tuple(value.bfloat16().float() for value in inputs)
    for weight in packed_weights(model):
        weight.by_algorithm.clear()
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match="was dropped"):
        compiled(model)(*wide)


@needs_kernels
@torch.no_grad()
def test_new_weights_after_the_drop(by_kernels):
    model, inputs, other = small_net(), small_inputs(), small_net(seed=7)
    net = compiled(model, options=DROP)
    net(*inputs)
    model.load_state_dict(other.state_dict(), assign=True)
    twin = copy.deepcopy(model)
    for _ in range(3):
        assert_as_eager(net(*inputs), twin, inputs)
    with pytest.raises(RuntimeError, match="dropped"):
        model.conv1.weight.sum()
    for parameter, given in zip(model.parameters(), twin.parameters(), strict=True):
        parameter.data = 2 * given
    twin = copy.deepcopy(model)
    assert_as_eager(net(*inputs), twin, inputs)


@needs_kernels
@torch.no_grad()
def test_weights_that_others_read_are_not_dropped(by_kernels):
    """A weight that the graph reads itself too, and one that is a part of a larger storage."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

        def forward(self, x):
            return self.second(self.first(x).tanh()) * self.first.weight.mean()

    model = Net().eval()
    flat = torch.randn(8 * 8 * 9 + 1)
    model.second.weight.data = flat[1:].view(8, 8, 3, 3)
    x = torch.randn(2, 8, 6, 6)
    net = compiled(model, options=DROP)
    for _ in range(3):
        assert_as_eager(net(x), model, (x,))


@needs_kernels
def test_dropping_a_part_of_a_storage():
    whole = torch.ones(4, 4)
    with pytest.raises(ValueError, match="only where it fills its storage"):
        drop_weights([whole[1:]], "gone")
    state = weights_state([whole])
    drop_weights([whole], "gone for a reason")
    with pytest.raises(RuntimeError, match="gone for a reason"):
        whole.sum()
    assert weights_state([whole]) == weights_state([whole]) != state


# -- what memory costs


def test_memory_is_free_for_small_models_and_priced_for_large_ones(monkeypatch):
    """Winograd's F(4x4) takes 4 times the memory of the direct algorithm."""
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.Tanh()).eval()
    x = torch.randn(1, 32, 16, 16)
    seconds = {"plain": 1.0, "direct": 1e-3, "winograd2": 1e-3, "winograd4": 0.85e-3}
    monkeypatch.setenv("FASTDIFF_PLAN", "heuristic")
    monkeypatch.setattr(
        algorithms,
        "heuristic",
        lambda s: {n: seconds.get(n, 1.0) for n in s.among(ALGORITHM_NAMES)},
    )

    def chosen(free):
        monkeypatch.setattr(budget, "FREE_BYTES", free)
        torch.compiler.reset()
        with torch.no_grad():
            return [row.algorithm for row in explain(model, x).fused]

    assert chosen(1 << 30) == chosen(4 * 36 * 32 * 32) == ["winograd4"]
    assert chosen(0) == ["direct"]  # 3 times the weight's memory for a seventh of the time
    monkeypatch.setattr(budget, "MEMORY_SHARE", 0.05)
    assert chosen(0) == ["winograd4"]


def test_a_form_that_is_there_costs_no_memory(monkeypatch):
    size = Sizes((2, 16, 8, 12), ConvSpec(32, 16, (3, 3), padding=(1, 1, 1, 1)), torch.float32, 1)
    row = {"direct": 1.0, "winograd4": 0.9}
    monkeypatch.setattr(algorithms, "heuristic", lambda size: row)
    price = 0.2 / algorithms.packed_bytes("winograd4", size.spec)
    for held, wanted in (((), "direct"), (("winograd4",), "winograd4"), (("direct",), "direct")):
        assert algorithms.choose(size, tuple(row), False, price, held) == wanted
    with pytest.raises(RuntimeError, match="its weight was dropped"):
        algorithms.choose(size, (), False)
