"""A U-Net called through a fused graph: values, changes of the model, and calls that are its own.

``calls`` counts the graph's calls, so that no test passes for want of a graph.
"""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref

import pytest
import torch
from judging import assert_as_eager, distance, settled
from models import in_float64
from nn.unet_cases import CASES, TINY, inputs, randomized
from ops.accuracy import CountCalls
from torch import nn
from torch.nn.utils import parametrize

import fastdiff
from fastdiff.compiler import network as networks
from fastdiff.compiler.network import FusedNetwork
from fastdiff.compiler.run import packing
from fastdiff.nn import UNet2DModel
from fastdiff.ops import backend
from fastdiff.sampling.quick import is_compiled, quick

pytestmark = pytest.mark.skipif(backend.extension is None, reason="needs the C++ extension")
SCALED = {**TINY, "resnet_time_scale_shift": "scale_shift", "num_class_embeds": 10}


def unet(options=TINY, **more):
    return randomized(UNet2DModel(**{**options, **more})).eval()


@pytest.fixture
def calls(monkeypatch):
    """A list that grows with every call of a graph."""
    seen, plain = [], FusedNetwork._layers

    def counted(self, x, rows):
        seen.append(tuple(x.shape))
        return plain(self, x, rows)

    monkeypatch.setattr(FusedNetwork, "_layers", counted)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_agrees_with_the_network(options, dtype, layout, calls):
    model = unet(options).to(dtype)
    net = quick(model)
    for batch in (3, 1):
        sample, timesteps, labels = inputs(options, batch)
        if options.get("class_embed_type") == "identity":
            labels = labels.to(dtype)
        sample = sample.to(dtype).to(memory_format=layout)
        args = sample, timesteps, labels
        assert_as_eager(settled(net, args), model, args)
        one = (sample, timesteps[:1], labels)
        assert_as_eager(net(*one), model, one)
        rows = model.precompute(timesteps[:1], labels, batch).at(0)
        kwargs = {"precomputed": rows, "timestep": timesteps}
        assert_as_eager(settled(net, (sample,), kwargs), model, (sample,), kwargs)
    assert len(calls) == 14


@torch.no_grad()
def test_all_sizes_share_a_graph_and_packed_weights():
    model, args = unet(), inputs(TINY)
    net = quick(model)
    net(*args)

    def count():
        ids = set(map(id, model.parameters()))
        return sum(not ids.isdisjoint(key[1:]) for key in packing._packed)

    before = count()
    assert before > 10
    for batch in (1, 4, 3, 2):
        net(*inputs(TINY, batch))
    net(torch.randn(2, 3, 16, 8), 5)
    assert count() == before
    assert len(networks._graphs[model]) == 3  # rows one an image, or for all, of two sizes


@torch.no_grad()
def test_graphs_are_bounded_and_go_with_their_network(monkeypatch):
    monkeypatch.setattr(networks, "MOST_GRAPHS", 2)
    model = unet()
    net = quick(model)
    for height in (2, 4, 6, 8):
        net(torch.randn(2, 3, height, 4), 5)
    assert len(networks._graphs[model]) == 2
    graph, _ = next(iter(networks._graphs[model].values()))
    held = [weakref.ref(model), weakref.ref(graph), weakref.ref(model.conv_in.weight)]
    del graph
    del model, net
    gc.collect()
    assert [reference() for reference in held] == [None] * len(held)


def with_hook(model):
    model.mid_block.attentions[0].to_q.register_forward_hook(lambda _, args, out: out * 0.5)


def with_pre_hook(model):
    model.conv_in.register_forward_pre_hook(lambda _, args: (args[0] * 2,))


def with_forward(model):
    plain = model.conv_norm_out.forward
    model.conv_norm_out.forward = lambda *args, **kwargs: plain(*args, **kwargs) + 1


class Halved(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) / 2


def with_foreign_part(model):
    model.conv_out.__class__ = Halved


def with_parametrisation(model):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(model.conv_out, "weight", Doubled())


def as_subclass(model):
    class Own(UNet2DModel):
        def layers(self, x, rows):
            return super().layers(x, rows) + 1

        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) + 1

    model.__class__ = Own


def in_training(model):
    model.up_blocks[0].resnets[0].dropout.p = 0.9
    model.up_blocks[0].resnets[0].train()


def compiled_part(model):
    model.conv_out.compile(backend="eager")
    with_forward(model)


PLAIN = [
    with_hook, with_pre_hook, with_forward, with_foreign_part, with_parametrisation, as_subclass,
    in_training, compiled_part,
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("change", PLAIN, ids=lambda change: change.__name__)
def test_what_can_be_told_from_outside_is_called_plainly(change):
    model, args = unet(), inputs(TINY)
    before = quick(model)(*args)
    change(model)
    assert quick(model) is model
    assert not is_compiled(model)
    assert (quick(model)(*args) - before).abs().max() > 1e-2


def trained(model):
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))


def through_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.3)


def replaced(model):
    model.conv_in.weight = nn.Parameter(2 * model.conv_in.weight)
    model.conv_norm_out.bias = nn.Parameter(model.conv_norm_out.bias + 1)


def replaced_module(model):
    model.mid_block.resnets[0].conv1 = randomized(nn.Conv2d(16, 16, 3, padding=1), seed=4).eval()


def assigned(model):
    model.load_state_dict(randomized(unet(), seed=9).state_dict(), assign=True)


def other_setting(model):
    model.conv_norm_out.eps = 3.0


def other_scale(model):
    model.mid_block.resnets[0].output_scale_factor = 5.0


def tied(model):
    model.mid_block.resnets[1].conv1.weight = model.mid_block.resnets[0].conv1.weight


def channels_last(model):
    model.to(memory_format=torch.channels_last)
    trained(model)


CHANGES = [
    trained, through_data, replaced, replaced_module, assigned, other_setting, other_scale, tied,
    channels_last,
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_between_calls_are_seen(change, calls):
    model, args = unet(), inputs(TINY)
    before = settled(quick(model), args)
    change(model)
    after = settled(quick(model), args)
    assert (after - before).abs().max() > 1e-2
    assert_as_eager(after, model, args)
    assert len(calls) == 6


@torch.no_grad()
@pytest.mark.parametrize("change", [trained, through_data])
def test_new_values_are_seen_within_a_run(change, calls):
    model, args = unet(), inputs(TINY)
    net = quick(model)
    settled(net, args)
    change(model)
    assert_as_eager(net(*args), model, args)
    assert len(calls) == 4


@torch.no_grad()
def test_untied_weights_are_told_apart():
    model, args = unet(), inputs(TINY)
    tied(model)
    settled(quick(model), args)
    first = model.mid_block.resnets[0].conv1.weight
    model.mid_block.resnets[1].conv1.weight = nn.Parameter(-first)
    assert_as_eager(settled(quick(model), args), model, args)


@torch.no_grad()
def test_to_bfloat16_and_back(calls):
    model, args = unet(), inputs(TINY)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        given = args[0].to(dtype), args[1]
        model.to(dtype)
        assert_as_eager(settled(quick(model), given), model, given)
    assert len(calls) == 9
    model.double()
    assert quick(model) is model


@torch.no_grad()
@pytest.mark.parametrize("options", [TINY, SCALED], ids=["tiny", "scaled"])
def test_float16_is_no_less_accurate(options, calls):
    model, (x, *rest) = unet(options), inputs(options)
    exact = in_float64(model, (x, *rest), {})
    model, x = model.half(), x.half()
    found, wanted = settled(quick(model), (x, *rest)), model(x, *rest)
    assert (found.dtype, found.stride()) == (torch.float16, wanted.stride())
    assert distance(found, exact) <= distance(wanted, exact)
    assert len(calls) == 3


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(dtype, calls):
    """In bfloat16 at most twice the network's error, and no more than the network's in float16."""
    model, args = unet(SCALED), inputs(SCALED)
    net, exact = quick(model), in_float64(model, args, {})
    before = net(*args)
    with torch.autocast("cpu", dtype):
        found, wanted = settled(net, args), model(*args)
        assert torch.is_autocast_enabled("cpu")
    assert (found.dtype, found.stride()) == (dtype, wanted.stride())
    times = 2 if dtype == torch.bfloat16 else 1
    assert distance(found, exact) <= times * distance(wanted, exact)
    assert torch.equal(net(*args), before)
    assert len(calls) == 5


@torch.no_grad()
def test_train_and_eval_again(calls):
    model, args = unet(), inputs(TINY)
    wanted = settled(quick(model), args)
    assert quick(model.train()) is model
    assert torch.equal(quick(model.eval())(*args), wanted)
    assert len(calls) == 4


@torch.no_grad()
def test_threads_and_backend_may_change_meanwhile(calls):
    model, args = unet(), inputs(TINY)
    net = quick(model)
    wanted, before = settled(net, args), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.testing.assert_close(settled(net, args), wanted)
    finally:
        torch.set_num_threads(before)
    done = len(calls)
    with fastdiff.backend("reference"):
        assert torch.equal(net(*args), model(*args))
        assert quick(model) is model
    assert len(calls) == done
    assert torch.equal(net(*args), wanted)


def with_gradients(net, args):
    with torch.enable_grad():
        return net(*args)


def of_another_dtype(net, args):
    with pytest.raises(RuntimeError):
        net(args[0].double(), *args[1:])


class OwnTensor(torch.Tensor):
    pass


def of_a_subclass(net, args):
    return net(args[0].as_subclass(OwnTensor), *args[1:])


def of_other_strides(net, args):
    return net(args[0].mT, *args[1:])


def of_no_images(net, args):
    return net(args[0][:0], args[1][:0])


def under_a_dispatch_mode(net, args):
    with CountCalls() as counted:
        found = net(*args)
    assert any("group_norm_silu" in name for name in counted.names)
    return found


def under_a_function_mode(net, args):
    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(func)
            return func(*args, **(kwargs or {}))

    names = []
    with Seen():
        found = net(*args)
    assert torch.conv2d in names
    return found


def under_vmap(net, args):
    with warnings.catch_warnings():  # of operations that it calls one by one
        warnings.simplefilter("ignore")
        return torch.vmap(lambda x: net(x, 5))(args[0][None])


def under_forward_derivatives(net, args):
    return torch.func.jvp(lambda x: net(x, args[1]), (args[0],), (args[0],))[1]


SEEN = [
    with_gradients, of_another_dtype, of_a_subclass, of_other_strides, of_no_images,
    under_a_dispatch_mode, under_a_function_mode, under_vmap, under_forward_derivatives,
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("call", SEEN, ids=lambda call: call.__name__)
def test_calls_that_are_the_networks_own(call, calls):
    model, args = unet(), inputs(TINY)[:2]
    net = quick(model)
    assert isinstance(net, FusedNetwork)
    found, wanted = call(net, args), call(model, args)
    assert type(found) is type(wanted)
    assert calls == []
    if wanted is not None:
        assert torch.equal(found, wanted)
        assert found.requires_grad == wanted.requires_grad


@torch.inference_mode()
def test_inference_mode(calls):
    model, args = unet(), inputs(TINY)
    assert_as_eager(settled(quick(model), args), model, args)
    assert len(calls) == 3


@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_default_device_changes_nothing(device, calls):
    model, args = unet(SCALED), inputs(SCALED)
    torch.set_default_device(device)
    try:
        found = settled(quick(model), args)
    finally:
        torch.set_default_device(None)
    assert_as_eager(found, model, args)
    assert len(calls) == 3


@torch.no_grad()
def test_the_average_of_weights_is_seen_through(calls):
    average = torch.optim.swa_utils.AveragedModel(unet())
    average.eval()
    args = inputs(TINY)
    assert_as_eager(settled(quick(average), args), average, args)
    assert len(calls) == 3
    average.register_forward_hook(lambda *_: None)
    assert quick(average) is average


@torch.no_grad()
def test_other_models_are_called_as_they_are():
    model = unet()
    for other in (model.forward, lambda x, t: x, nn.Identity(), nn.DataParallel(model), 3):
        assert quick(other) is other
    net = quick(model)
    assert quick(net) is net


@torch.no_grad()
def test_errors_are_the_networks():
    model = unet()
    x, narrow = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 7, 8)
    rows = {"precomputed": torch.randn(2, 5)}
    for args, kwargs in [
        ((), {}), ((narrow, 1), {}), ((x,), {}), ((x, 1, torch.tensor([1])), {}), ((x, 1), rows),
    ]:  # fmt: skip
        with pytest.raises((TypeError, ValueError)) as wanted:
            model(*args, **kwargs)
        with pytest.raises(wanted.type) as found:
            quick(model)(*args, **kwargs)
        assert str(found.value) == str(wanted.value)


@torch.no_grad()
def test_first_calls_at_once():
    model, args, found = unet(), inputs(TINY), []
    wanted = quick(copy.deepcopy(model))(*args)

    def work():
        with torch.no_grad():
            found.append(quick(model)(*args))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(one, wanted) for one in found)


@torch.no_grad()
@pytest.mark.parametrize("plan", [None, "heuristic", "measured"])
def test_the_plan_is_heuristic_unless_said_otherwise(plan, monkeypatch):
    seen = []
    fused = networks.fused
    monkeypatch.setattr(
        networks,
        "fused",
        lambda *a, measured: seen.append(measured) or fused(*a, measured=measured),
    )
    if plan is None:
        monkeypatch.delenv("FASTDIFF_PLAN")
    else:
        monkeypatch.setenv("FASTDIFF_PLAN", plan)
    quick(unet())(*inputs(TINY))
    assert seen == [plan == "measured"]
    monkeypatch.setenv("FASTDIFF_PLAN", "guess")
    with pytest.raises(
        ValueError, match="FASTDIFF_PLAN must be measured or heuristic, got 'guess'"
    ):
        quick(unet())(*inputs(TINY))
