"""Graphs with gradients: errors against float64, what is fused, what is kept, what is refused."""

from __future__ import annotations

import copy

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from judging import LAYOUTS, compiled
from models import KeepFloat64, inputs, make, randomized, wide
from random_unet import DRAWS, EMB, build, nets
from small import SmallNet, small_inputs, small_net
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastdiff.compiler import explain

FAST = 2e-5  # relative L2 error that Winograd's transforms may add to a gradient in float32


def gradients(call, model, arguments, dtype=torch.float32):
    """Gradients of the arguments of floating point and of all weights, by name."""
    model.zero_grad()
    arguments = [a.clone().to(a.dtype if not a.is_floating_point() else dtype) for a in arguments]
    wanted = {i: a.requires_grad_() for i, a in enumerate(arguments) if a.is_floating_point()}
    out = call(*arguments)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    (out.double() * weights).sum().backward()
    found = {f"argument {i}": a.grad for i, a in wanted.items()}
    found |= {name: p.grad for name, p in model.named_parameters()}
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def exact_gradients(model, arguments):
    """In float64."""
    model = wide(model)
    with KeepFloat64():
        return gradients(model, model, arguments, torch.float64)


def assert_accurate(net, model, arguments, *, added=FAST, autocast=False):
    """The error of each gradient against float64 is at most twice eager's and ``added``.

    The error of a gradient that is zero but for rounding, as that of the keys' bias, counts in
    units of a thousandth of the largest gradient.
    """

    def under_autocast(call):
        def run(*args):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return call(*args)

        return run

    ours = gradients(under_autocast(net), model, arguments)
    eager = gradients(under_autocast(model), model, arguments)
    exact = exact_gradients(model, arguments)
    largest = max(g.norm() for g in exact.values())
    for name, oracle in exact.items():
        scale = max(oracle.norm(), 1e-3 * largest)
        error, allowed = ((g[name].double() - oracle).norm() / scale for g in (ours, eager))
        assert ours[name].dtype == eager[name].dtype
        assert error <= 2 * allowed + added, f"{name}: {error:.3g}, eager's {allowed:.3g}"


@pytest.mark.parametrize("name", ["diffusers", "fastdiff", "guided", "lucid"])
def test_gradients_of_models(name):
    model = make(name).train()
    arguments, _ = inputs(name, 2, (8, 8))
    assert_accurate(compiled(model), model, arguments)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_a_net(threads, layout):
    model = small_net().to(memory_format=LAYOUTS[layout])
    x, emb = small_inputs(3, (16, 16))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        arguments = (x.contiguous(memory_format=LAYOUTS[layout]), emb)
        assert_accurate(compiled(model), model, arguments)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["diffusers", "fastdiff"])
def test_gradients_under_autocast(name):
    model = make(name).train()
    arguments, _ = inputs(name, 2, (8, 8))
    # Whether one rounding is up or down changes all that follow: twice the error, and a bit.
    assert_accurate(compiled(model), model, arguments, added=5e-3, autocast=True)


def test_gradients_of_a_bfloat16_model():
    model = small_net().bfloat16()
    arguments = small_inputs(dtype=torch.bfloat16)
    net = compiled(model)
    ours, eager = (gradients(call, model, arguments, torch.bfloat16) for call in (net, model))
    exact = exact_gradients(model, arguments)
    largest = max(g.norm() for g in exact.values())
    for name, oracle in exact.items():
        scale = max(oracle.norm(), 1e-3 * largest)
        error, allowed = ((g[name].double() - oracle).norm() / scale for g in (ours, eager))
        assert error <= 2 * allowed + 5e-3, name


def test_strict_gradients_are_as_exact_as_eagers():
    model = small_net()
    net = compiled(model, options={"precision": "strict"})
    assert_accurate(net, model, small_inputs(4, (16, 16)), added=1e-6)
    told = explain(model, *small_inputs(), options={"precision": "strict"})
    used = {name for row in told.fused for name in row.algorithm.split(", ")}
    assert used == {"direct", "streamed"}  # of convolutions, and of attention


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (9, 8)])
@pytest.mark.parametrize("batch", [1, 3])
def test_gradients_of_odd_sizes(size, batch):
    model = small_net()
    assert_accurate(compiled(model), model, small_inputs(batch, size))


@pytest.mark.slow
@hypothesis.given(
    spec=nets(),
    batch=st.integers(1, 3),
    size=st.sampled_from([(4, 4), (5, 7), (8, 6), (12, 16), (9, 8)]),
    layout=st.sampled_from(list(LAYOUTS)),
)
@DRAWS
def test_gradients_of_drawn_nets(spec, batch, size, layout):
    torch.compiler.reset()
    model = build(spec)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, *size, generator=generator)
    emb = torch.randn(batch, EMB, generator=generator)
    arguments = x.contiguous(memory_format=LAYOUTS[layout]), emb
    try:
        eager = gradients(model, model, arguments)
    except (ValueError, RuntimeError, AttributeError):  # a norm of one value; no gradient
        hypothesis.reject()
    net = compiled(model)
    ours = gradients(net, model, arguments)
    exact = exact_gradients(model, arguments)
    assert set(ours) == set(eager)
    largest = max(g.norm() for g in exact.values())
    for name, oracle in exact.items():
        scale = max(oracle.norm(), 1e-3 * largest)
        error, allowed = ((g[name].double() - oracle).norm() / scale for g in (ours, eager))
        assert error <= 2 * allowed + 1e-4, f"{name}: {error:.3g}, eager's {allowed:.3g}"


class Kept:
    """Counts the bytes that autograd keeps for the backward, each memory once, weights not."""

    def __init__(self, model):
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.storages = {}

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def pack(self, x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return x

    @property
    def bytes(self):
        return sum(self.storages.values())


def test_less_is_kept_than_in_eager_mode():
    """Of each norm, activation and convolution the input alone, which others keep too."""
    model, arguments = make("diffusers").train(), inputs("diffusers", 2, (16, 16))[0]
    kept = []
    for call in (compiled(model), model):
        with Kept(model) as of_call:
            out = call(*arguments)
        kept.append(of_call.bytes)
        out.sum().backward()
    assert kept[0] < 0.6 * kept[1]


def test_everything_is_fused_with_gradients():
    model = make("diffusers").train()
    arguments, _ = inputs("diffusers", 2, (16, 16))
    told = explain(model, *arguments)
    assert told.gradients
    assert not told.reasons
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len([row for row in told.fused if "conv" in row.what]) == len(layers)
    assert not {kind for kind, _ in told.left} & {"conv2d", "group_norm"}


class Block(nn.Module):
    """A transformer block: attention of two heads, and a gated linear unit."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.wide, self.narrow = nn.Linear(16, 2 * 24), nn.Linear(24, 16)

    def forward(self, x):
        q, k, v = (f(x).unflatten(2, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        a, b = self.wide(x).chunk(2, dim=-1)
        return x + self.narrow(a * F.gelu(b))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_gradients_of_attention_and_gated_units(autocast):
    model, x = Block(), torch.randn(2, 70, 16, generator=torch.Generator().manual_seed(0))
    added = 5e-3 if autocast else FAST
    assert_accurate(compiled(model), model, (x,), added=added, autocast=autocast)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        told = explain(model, x)
    assert "attention" in [row.what for row in told.fused]
    assert told.composed == 1
    assert not {kind for kind, _ in told.left} & {"attention", "gelu", "linear"}


def test_second_derivatives_are_refused():
    model, (x, emb) = small_net(), small_inputs()
    x.requires_grad_()
    out = compiled(model)(x, emb).square().sum()
    with pytest.raises(RuntimeError, match=r"without torch\.compile for second derivatives"):
        torch.autograd.grad(out, x, create_graph=True)


def test_gradients_are_accumulated():
    """Two halves of a batch give the sum of their gradients."""
    model, (x, emb) = small_net(), small_inputs(4)
    net = compiled(model)
    whole = gradients(net, model, (x, emb))
    model.zero_grad()
    weights = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape)
    for half in (slice(0, 2), slice(2, 4)):
        (net(x[half], emb[half]).double() * weights[half]).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], atol=1e-3, rtol=1e-4)


def test_adapters_alone_are_trained():
    """LoRA: frozen weights get no gradient, the adapters beside them do."""

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net().requires_grad_(False)
            self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)
            self.base = self.net.q
            self.net.q = self

        def forward(self, *args):
            return self.base(*args) + self.up(self.down(*args))

    adapted = Adapted()
    model = adapted.net
    del adapted.net
    arguments = small_inputs()
    found = []
    for call in (compiled(model), model):
        model.zero_grad()
        call(*arguments).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert set(found[0]) == set(found[1]) == {"q.down.weight", "q.up.weight"}
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-3, rtol=1e-4)


def test_checkpointed_regions_are_fused():
    model = small_net()

    def forward(x, emb):
        return checkpoint(model, x, emb, use_reentrant=False)

    assert len(explain(forward, *small_inputs()).fused) == len(
        explain(model, *small_inputs()).fused
    )
    with Kept(model) as whole:
        model(*small_inputs())
    with Kept(model) as region:
        compiled(forward)(*small_inputs())
    assert region.bytes < 0.5 * whole.bytes


def test_the_same_gradients_in_every_run():
    """Bit for bit: nothing is measured, and sums have an order."""
    model, arguments = small_net(), small_inputs(3, (16, 16))
    first = gradients(compiled(model), model, arguments)
    torch.compiler.reset()
    again = gradients(compiled(model), model, arguments)
    for name, gradient in first.items():
        assert torch.equal(gradient, again[name]), name


def test_not_a_number_is_passed_on():
    model, (x, emb) = small_net(), small_inputs()
    x[1, 0, 3, 4] = torch.nan
    ours, eager = (gradients(call, model, (x, emb)) for call in (compiled(model), model))
    for name, gradient in eager.items():
        if gradient.isnan().all():
            assert ours[name].isnan().all(), name


def test_an_output_that_nobody_differentiates():
    """Both results of a function, of which the loss reads one."""
    model, (x, emb) = small_net(), small_inputs()

    def both(x, emb):
        h = model.conv_in(x)
        return F.silu(model.norm1(h)), model.conv1(F.silu(model.norm1(h)))

    a, _ = compiled(both)(x, emb)
    a.sum().backward()
    found = model.norm1.weight.grad.clone()
    model.zero_grad()
    both(x, emb)[0].sum().backward()
    torch.testing.assert_close(found, model.norm1.weight.grad, atol=1e-4, rtol=1e-4)


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_gradients_in_a_distributed_model():
    """Dynamo cuts the graph where a bucket of gradients is full."""
    model, arguments = randomized(SmallNet(width=96)), small_inputs(2, (8, 8))
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model), bucket_cap_mb=1)
    ours = gradients(torch.compile(wrapped, backend="fastdiff"), wrapped, arguments)
    eager = gradients(model, model, arguments)
    largest = max(gradient.norm() for gradient in eager.values())
    for name, gradient in eager.items():
        found = ours[name if name in ours else f"module.{name}"]
        assert (found - gradient).norm() <= 1e-4 * max(gradient.norm(), 1e-3 * largest), name
