"""Options, the two precisions, and what ``explain`` says."""

from __future__ import annotations

import logging

import pytest
import torch
from judging import assert_as_eager, compiled, distance
from models import in_float64, inputs, make
from small import small_inputs, small_net
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import fastdiff.compiler
from fastdiff.compiler import explain
from fastdiff.compiler.pipeline import MODES, _inductor, _warned

BAD = [
    ({"precision": "exact"}, "fast, bf16, strict, got 'exact'"),
    ({"precision": None}, "fast, bf16, strict, got None"),
    ({"packed_bytes": -1}, "whole number from 0, got -1"),
    ({"packed_bytes": 1.5}, "whole number from 0, got 1.5"),
    ({"packed_bytes": True}, "whole number from 0, got True"),
    ({"packed_bytes": "1GB"}, "whole number from 0, got '1GB'"),
    ({"drop_weights": 1}, "drop_weights must be True or False, got 1"),
    ({"precisoin": "fast"}, "'precisoin'.*wanted precision, packed_bytes or drop_weights"),
]


@pytest.mark.parametrize(("options", "text"), BAD, ids=lambda value: str(value))
def test_bad_options(options, text):
    graph = torch.fx.GraphModule({}, torch.fx.Graph())
    with pytest.raises(ValueError, match=text):
        fastdiff.compiler.backend(graph, [], options=options)
    with pytest.raises(BackendCompilerFailed, match=text) as raised, torch.no_grad():
        compiled(small_net(), options=options)(*small_inputs())
    assert isinstance(raised.value.inner_exception, ValueError)


@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("dynamic", [None, True])
@torch.no_grad()
def test_modes_of_torch_compile(mode, dynamic):
    """All are fused alike on a CPU."""
    model, case = small_net(), small_inputs()
    found = compiled(model, mode=mode, dynamic=dynamic)(*case)
    assert torch.equal(found, compiled(model, dynamic=dynamic)(*case))
    assert_as_eager(found, model, case)


@torch.no_grad()
def test_modes_in_place_and_through_dynamo():
    model, case = small_net(), small_inputs()
    expected = compiled(model)(*case)
    model.compile(backend="fastdiff", mode="max-autotune", fullgraph=True)
    assert torch.equal(model(*case), expected)
    net = torch._dynamo.optimize("fastdiff", nopython=True)(small_net())
    assert torch.equal(net(*case), expected)


@torch.no_grad()
def test_an_unknown_mode():
    text = "mode must be one of default, reduce-overhead, .*, got 'fastest'"
    graph = torch.fx.GraphModule({}, torch.fx.Graph())
    with pytest.raises(ValueError, match=text):
        fastdiff.compiler.backend(graph, [], mode="fastest")
    with pytest.raises(BackendCompilerFailed, match=text):
        compiled(small_net(), mode="fastest")(*small_inputs())


def test_inductor_is_given_the_mode(monkeypatch):
    """Cards have CUDA graphs and longer searches."""
    from torch._inductor import compile_fx

    seen = []
    monkeypatch.setattr(compile_fx, "compile_fx", lambda *_, **given: seen.append(given))
    for mode in MODES:
        _inductor(mode, torch.fx.GraphModule({}, torch.fx.Graph()), [])
    patches = dict(zip(MODES, [given["config_patches"] for given in seen], strict=True))
    assert patches["default"] == {}
    assert patches["reduce-overhead"] == {"triton.cudagraphs": True}
    assert patches["max-autotune"]["max_autotune"]
    assert not patches["max-autotune-no-cudagraphs"].get("triton.cudagraphs")


def test_name_is_known_without_an_import_of_the_compiler():
    assert "fastdiff" in torch.compiler.list_backends()


@torch.no_grad()
def test_precisions_differ_and_hold_what_they_promise():
    model = small_net()
    case = small_inputs(3, (16, 24))
    exact, found = in_float64(model, case, {}), {}
    for precision in ("fast", "strict"):
        net = compiled(model, options={"precision": precision})
        found[precision] = net(*case)
        assert_as_eager(found[precision], model, case, precision=precision)
    assert not torch.equal(found["fast"], found["strict"])
    assert torch.equal(compiled(model)(*case), found["fast"])
    assert distance(found["fast"], exact) <= 1e-4


@torch.no_grad()
def test_strict_is_direct_and_fast_is_not():
    model, case = small_net(), small_inputs(3, (16, 24))
    algorithms = {
        precision: {row.algorithm for row in explain(model, *case, options=options).fused}
        for precision in ("fast", "strict")
        for options in [{"precision": precision}]
    }
    assert not any("winograd" in name for name in algorithms["strict"])
    assert any("winograd" in name for name in algorithms["fast"])


@torch.no_grad()
def test_packed_bytes_bound_what_is_transformed():
    case, found = small_inputs(3, (16, 24)), []
    for size in (0, 200_000, None):
        model, options = small_net(), {"packed_bytes": size}
        assert_as_eager(compiled(model, options=options)(*case), model, case)
        rows = explain(model, *case, options=options).fused
        found.append([row.packed_bytes for row in rows if "winograd" in row.algorithm])
        assert size is None or sum(found[-1]) <= size
    assert sum(found[0]) == 0 < sum(found[1]) < sum(found[2])


@torch.no_grad()
def test_explanation_of_the_fast_path():
    model, case = small_net(), small_inputs(2, (16, 24))
    told = explain(model, *case)
    text = str(told)
    assert told.graphs == 1
    assert "graphs: 1, breaks: 0" in text
    assert "not on the fast path" not in text
    # each 3x3 convolution (the 1x1 shortcut may be part of one), the projections of the time
    # embedding together, those of the attention's inputs together, and that of its result
    assert len(told.fused) >= 5 + 3
    assert told.packed_bytes > 0
    for row in told.fused:
        assert row.what in text
        assert row.shape in text
    assert all(kind not in dict(told.left) for kind in ("group_norm", "silu"))
    assert {name for name, _ in told.left} & {"conv2d", "group_norm", "silu", "cat"} == set()


@pytest.mark.parametrize("name", ["guided", "conditional", "autoencoder"])
@torch.no_grad()
def test_models_are_fused(name):
    """No convolution is left, and no group norm but where it is read by others."""
    model = make(name)
    args, kwargs = inputs(name, 1)
    told = explain(model, *args, **kwargs)
    assert (told.graphs, told.breaks, told.reasons) == (1, (), ())
    left = [kind for kind, _ in told.left]
    assert "conv2d" not in left
    assert "conv1d" not in left
    wanted = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    used = wanted if name != "autoencoder" else wanted // 2 - 2  # the encoder's are not
    assert len(told.fused) >= used


def explained(model, *case, **options):
    told = explain(model, *case, **options)
    assert not told.fused
    assert len(told.reasons) == 1
    assert told.reasons[0] in str(told)
    return told.reasons[0]


def test_explanation_where_gradients_of_another_dtype_are_wanted():
    reason = explained(small_net().half(), *small_inputs(dtype=torch.float16))
    assert "float16, wanted float32 or bfloat16" in reason


@torch.no_grad()
def test_explanation_where_dropout_is_drawn():
    assert "training mode: dropout" in explained(small_net(dropout=0.3).train(), *small_inputs())


@torch.no_grad()
def test_explanation_of_another_dtype():
    case = small_inputs(dtype=torch.float64)
    assert "float64, wanted float32, bfloat16 or float16" in explained(small_net().double(), *case)


@torch.no_grad()
def test_explanation_of_breaks():
    net = small_net()

    def broken(x, emb):
        x = net(x, emb)
        torch._dynamo.graph_break()
        return net(x, emb)

    told = explain(broken, *small_inputs())
    assert told.graphs == 2
    assert len(told.breaks) == 1
    assert "graphs: 2, breaks: 1" in str(told)


@torch.no_grad()
def test_explanation_says_why_a_convolution_is_left():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.Tanh(),
        nn.Conv2d(16, 16, 3, padding=2, dilation=2),
    ).eval()  # fmt: skip
    told = explain(model, small_inputs()[0])
    why = {reason for (kind, reason), _ in told.left.items() if kind == "conv2d"}
    assert any("grouped" in reason for reason in why)
    assert any("dilated" in reason for reason in why)
    assert len(told.fused) == 1


@torch.no_grad()
def test_explaining_leaves_the_compiled_model_as_it_was():
    model, case = small_net(), small_inputs()
    net = compiled(model)
    before = net(*case)
    explain(net, *case)
    assert torch.equal(net(*case), before)


@pytest.fixture
def notices(caplog):
    """Levels and texts of what the compiler has logged since the last call; nothing is told yet."""
    known = set(_warned)
    _warned.clear()

    def since():
        found = [r for r in caplog.records if r.name.startswith("fastdiff.compiler")]
        caplog.clear()
        return [(r.levelno, r.getMessage()) for r in found]

    with caplog.at_level(logging.INFO, logger="fastdiff.compiler"):
        yield since
    _warned.update(known)


def test_notice_of_the_slow_path(caplog):
    """One line, for those who ask for it; no warning."""
    with caplog.at_level(logging.INFO, logger="fastdiff.compiler"):
        compiled(small_net().half())(*small_inputs(dtype=torch.float16))
        notes = [r for r in caplog.records if r.name.startswith("fastdiff.compiler")]
        assert len(notes) == 1
        assert "wanted float32 or bfloat16" in notes[0].getMessage()
        caplog.clear()
        with torch.no_grad():
            compiled(small_net())(*small_inputs())
        assert not [r for r in caplog.records if r.name.startswith("fastdiff.compiler")]


def training(model, case):
    return model.train(), case


def double(model, case):
    return model.double(), tuple(value.double() for value in case)


def modes(model, case):
    return torch.enable_grad()(model.eval().forward), case


SLOW = {
    "float64": (double, "torch.float64, wanted float32, bfloat16 or float16", "model.float()"),
    "train": (training, "training mode: dropout", "model.eval()"),
    "modes": (modes, "within the graph, gradients or vmap", "around the call"),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_warning_where_a_model_is_slow_for_no_reason(notices, name):
    """One in a process for each reason, with what to do."""
    change, reason, advice = SLOW[name]
    model, case = change(small_net(dropout=0.3), small_inputs())
    with torch.no_grad():
        for _ in range(2):
            torch.compile(model, backend="fastdiff")(*case)
            torch.compiler.reset()
        (first, text), (second, _) = notices()
        assert (first, second) == (logging.WARNING, logging.INFO)
        assert reason in text
        assert advice in text
        assert explain(model, *case).reasons[0] in text
        assert not notices()


def test_no_note_of_autocast_with_gradients_or_without(notices):
    model, case = small_net(), small_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        compiled(model)(*case)
        with torch.no_grad():
            compiled(model)(*case)
    assert not notices()


@torch.no_grad()
def test_a_warning_of_tensors_on_several_devices(notices):
    values = [torch.empty(2, 3, 4, 4, device=device) for device in ("cpu", "meta")]
    torch.compile(lambda x, y: (x + 1, y + 1), backend="fastdiff")(*values)
    ((level, text),) = notices()
    assert level == logging.WARNING
    assert "tensors on cpu, meta" in text
