"""What a step costs beside the model, where it works, and mode="compile"."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import pytest
import torch
from ops.accuracy import CountCalls
from torch import nn

from fastdiff import sample, samplers, schedules
from fastdiff.samplers import DDIM, DDPM
from fastdiff.sampling import device_loop
from fastdiff.sampling.device_loop import Buffers, advance
from fastdiff.sampling.loop import PerRow, State

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = schedules.cosine(100)
SHAPE = (2, 1, 8, 8)
OUT = torch.zeros(SHAPE)
ROWS = {"y": torch.zeros(2, 3)}
IMAGE, MASK = torch.zeros(SHAPE), torch.ones(1, 1, 8, 8)


def free(x, t, **cond):
    """A model that costs the dispatcher nothing."""
    return OUT


def free_guided(x, t, **cond):
    return OUT_GUIDED


OUT_GUIDED = torch.zeros(4, 1, 8, 8)


@pytest.mark.parametrize(
    ("model", "name", "options", "calls"),
    [
        pytest.param(free, "ddim", {}, {"fastdiff.sampler_step": 1}, id="plain"),
        pytest.param(free, "unipc-2", {}, {"fastdiff.sampler_step": 1}, id="history"),
        pytest.param(free, "ddpm", {"seed": 0}, {"fastdiff.sampler_step": 1}, id="seed"),
        pytest.param(
            free, "ddpm", {}, {"fastdiff.sampler_step": 1, "aten.normal_": 1}, id="generator"
        ),
        pytest.param(
            free_guided,
            "ddim",
            {"cond": ROWS, "uncond": ROWS, "guidance": 2.0},
            {"fastdiff.sampler_step": 1, "aten.copy_": 1},
            id="guidance",
        ),
        pytest.param(
            lambda x, t: x, "ddim", {}, {"fastdiff.sampler_step": 1}, id="input as output"
        ),
        pytest.param(
            free,
            "ddim",
            {"image": IMAGE, "mask": MASK},
            {"fastdiff.sampler_step": 1, "aten.mul": 1, "aten.add": 1, "aten.lerp": 1,
             "aten.copy_": 1, "aten.empty": 1, "aten.normal_": 1},  # fresh noise each time
            id="inpainting",
        ),
        pytest.param(
            free,
            "ddim",
            {"callback": lambda *_: None},
            {"fastdiff.sampler_step": 1, "aten.clone": 1},
            id="callback",
        ),
    ],
)  # fmt: skip
def test_dispatcher_calls_of_an_eager_step(model, name, options, calls):
    counts = []
    for steps in (10, 15):
        sampler = samplers.make(name, SCHEDULE, steps)
        with CountCalls() as counted:
            sample(model, sampler, SHAPE, progress=False, **options)
        counts.append(Counter(call.rsplit(".", 1)[0] for call in counted.names))
    counts[1].subtract(counts[0])
    assert {call: count / 5 for call, count in counts[1].items() if count} == calls


@pytest.mark.parametrize(
    ("guided", "calls"),
    [
        (False, ["aten.index_select", "fastdiff.sampler_step", "aten.add_"]),
        (True, ["aten.index_select", "aten.cat", "fastdiff.sampler_step", "aten.add_"]),
    ],
    ids=["plain", "guided"],
)
def test_dispatcher_calls_of_a_step_counted_on_the_device(guided, calls):
    """But for those that make views, which a graph does without."""
    times = PerRow(torch.arange(3)[:, None], torch.zeros(4 if guided else 2, dtype=torch.int64))
    table = DDIM(SCHEDULE, 3).table.values.float()
    state = State(
        OUT.clone(),
        table,
        torch.arange(len(table)).unbind(),
        None,
        None,
        {"t": times},
        {},
        guided,
        False,
    )
    buffers = Buffers(state).begin()
    model = free_guided if guided else free
    advance(model, buffers)
    with CountCalls() as counted:
        advance(model, buffers)
    names = [call.rsplit(".", 1)[0] for call in counted.names]
    assert [name for name in names if name != "aten.split_with_sizes"] == calls


def test_labels_cost_an_eager_step_one_call_where_they_differ(tiny_unet):
    model, counts = tiny_unet(num_classes=3), []
    for labels in ([1, 1], [1, 2], [1, 2, 2]):
        cond = {"class_labels": torch.tensor(labels)}
        with CountCalls() as counted:
            sample(model, DDIM(SCHEDULE, 2), (len(labels), 1, 8, 8), cond=cond, progress=False)
        counts.append(counted.names.count("aten.index_select.out"))
    assert counts == [0, 0, 2]


def test_the_loop_stays_in_its_memory():
    places = []

    def model(x, t):
        places.append(x.data_ptr())
        return x / 2

    drawn = sample(model, samplers.make("heun", SCHEDULE, 5), SHAPE, progress=False)
    assert set(places) == {drawn.data_ptr()}


@pytest.mark.parametrize(
    "returned",
    [lambda x: x, lambda x: x[:], lambda x: x.mT, lambda x: x.flip(0)[:].detach(), torch.clone],
    ids=["input", "view", "transposed view", "copy", "clone"],
)
@pytest.mark.parametrize("mode", ["eager", "compile"])
def test_a_model_may_return_its_input_or_a_view_of_it(returned, mode, eager_compiler):
    x_T = torch.randn(SHAPE)
    options = {"x_T": x_T, "progress": False}
    wanted = sample(lambda x, t: returned(x.clone()).clone(), DDIM(SCHEDULE, 3), SHAPE, **options)
    drawn = sample(lambda x, t: returned(x), DDIM(SCHEDULE, 3), SHAPE, mode=mode, **options)
    assert torch.equal(drawn, wanted)


def test_times_are_whole_numbers_where_all_of_them_are():
    kinds = []

    def model(x, t):
        kinds.append((t.dtype, t.shape))
        return x

    whole, fractional = DDIM(SCHEDULE, 2), samplers.make("heun", SCHEDULE, 3)
    for sampler, dtype in (
        (whole, torch.float32),
        (whole.table, torch.float64),
        (fractional, torch.bfloat16),
        (fractional, torch.float64),
    ):
        sample(model, sampler, SHAPE, dtype=dtype, progress=False)
    assert list(dict.fromkeys(kinds)) == [
        (torch.int64, (2,)), (torch.float32, (2,)), (torch.float64, (2,))
    ]  # fmt: skip


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t, shift=0.0):
        return x * self.weight + t.view(-1, 1, 1, 1) * 1e-3 + shift


class Compiler:
    """A backend that compiles in no time, and counts its graphs."""

    graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def eager_compiler(monkeypatch):
    compiler, compile_with = Compiler(), torch.compile
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile_with(f, backend=compiler, **kw))
    return compiler


def draw(model, sampler=None, mode="compile", shape=SHAPE, **options):
    options = {"seed": 0, "progress": False, **options}
    return sample(model, sampler or DDIM(SCHEDULE, 3), shape, mode=mode, **options)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "heun", "unipc-3", "dpmpp-2m-sde"])
def test_compiled_once_for_all_rows_and_calls(name, eager_compiler):
    model, sampler = Half(), samplers.make(name, SCHEDULE, 4)
    shift = torch.ones(2, 1, 1, 1)
    for number in (1, 2):
        options = {"seed": number, "cond": {"shift": shift * number}, "guidance": 2.0 + number,
                   "uncond": {"shift": -shift}}  # fmt: skip
        wanted = draw(model, sampler, "eager", **options)
        torch.testing.assert_close(draw(model, sampler, **options), wanted)
        assert eager_compiler.graphs == 1
    draw(model, sampler, shape=(3, 1, 8, 8))
    assert eager_compiler.graphs == 2


def test_every_model_is_compiled_for_itself(eager_compiler):
    """More models than the recompilations that torch.compile allows a function."""
    for number in range(12):
        model = Half()
        torch.nn.init.constant_(model.weight, number / 10)
        torch.testing.assert_close(draw(model), draw(model, mode="eager"))
    assert eager_compiler.graphs == 12


def test_compiled_code_goes_with_its_model(eager_compiler):
    model = Half()
    draw(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_bound_method_is_compiled_once(eager_compiler):
    model = Half()
    for _ in range(2):
        draw(model.forward)
    assert eager_compiler.graphs == 1


def test_a_model_that_cannot_be_referenced_weakly(eager_compiler):
    class Slots:
        __slots__ = ()

        def __call__(self, x, t):
            return x / 2

    assert device_loop.compiled[Slots()] is not device_loop.compiled[Slots()]
    torch.testing.assert_close(draw(Slots()), draw(Slots(), mode="eager"))


def test_compiled_generator_noise_watching_and_slices(eager_compiler):
    model, results = Half(), []
    for mode in ("compile", "eager"):
        seen = []
        drawn, path = draw(
            model, DDPM(SCHEDULE, 3), mode, shape=(4, 1, 8, 8), max_batch=2, seed=None,
            generator=torch.Generator().manual_seed(1), return_trajectory=True, check_finite=True,
            preview=lambda step, t, x0, seen=seen: seen.append(x0),
        )  # fmt: skip
        results.append([drawn, path, *seen])
    torch.testing.assert_close(*results)
    assert eager_compiler.graphs == 1


def test_a_compiled_model_that_returns_its_input_may_be_watched(eager_compiler):
    seen = {"compile": [], "eager": []}
    for mode, estimates in seen.items():
        draw(
            lambda x, t: x, DDIM(SCHEDULE, 3, prediction="v"), mode,
            preview=lambda step, t, x0, estimates=estimates: estimates.append(x0),
        )  # fmt: skip
    torch.testing.assert_close(seen["compile"], seen["eager"])


def test_compiled_labels_share_code(eager_compiler, tiny_unet):
    """As in graphs, the number of distinct labels is rounded up to a power of two."""
    model, sampler = tiny_unet(num_classes=5), DDIM(SCHEDULE, 2, prediction="v")
    for labels in ([0, 1, 2, 0, 0, 0], [4, 3, 2, 1, 1, 1]):
        cond = {"class_labels": torch.tensor(labels)}
        options = {"shape": (6, 1, 8, 8), "cond": cond}
        compiled, eager = (draw(model, sampler, mode, **options) for mode in ("compile", "eager"))
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    assert eager_compiler.graphs == 1


def test_no_images_need_no_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    assert draw(Half(), shape=(0, 1, 8, 8)).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("name", ["ddpm", "unipc-2"])
def test_inductor(name):
    torch.compiler.reset()
    model, sampler = Half(), samplers.make(name, SCHEDULE, 3)
    torch.testing.assert_close(
        draw(model, sampler), draw(model, sampler, "eager"), rtol=1e-4, atol=1e-5
    )


def test_inductor_keeps_a_view_of_the_input_apart():
    torch.compiler.reset()
    options = {"x_T": torch.randn(SHAPE), "progress": False}
    drawn = sample(lambda x, t: x.mT, DDIM(SCHEDULE, 2), SHAPE, mode="compile", **options)
    wanted = sample(lambda x, t: x.mT.clone(), DDIM(SCHEDULE, 2), SHAPE, **options)
    torch.testing.assert_close(drawn, wanted, rtol=1e-4, atol=1e-5)
