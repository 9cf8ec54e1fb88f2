"""CUDA graphs of the sampling loop, through a stand-in that records on the CPU; and real ones."""

from __future__ import annotations

import warnings

import pytest
import torch
from recording_graphs import (
    CAPTURE,
    SCHEDULE,
    SHAPE,
    Half,
    draw,
    same,
)
from torch import nn

import fastdiff
from fastdiff import PerImage, samplers
from fastdiff.nn import UNet2DModel
from fastdiff.samplers import DDIM, DDPM
from fastdiff.sampling import capture

pytestmark = pytest.mark.usefixtures("one_thread")


def test_warm_up_capture_and_a_replay_for_each_row(graphs):
    model = Half()
    same(model)
    assert graphs.take() == [*CAPTURE, *["replay"] * 3]
    same(model, seed=9)
    assert graphs.take() == ["replay"] * 3


def test_nothing_is_computed_by_the_model_between_capture_and_replay(graphs):
    calls = []
    model = Half()
    model.register_forward_hook(lambda *_: calls.append(1))
    draw(model)
    assert len(calls) == capture.WARM_UP_ROWS + 3


NAMES = ["ddim", "ddpm", "heun", "unipc-3", "dpmpp-2m-sde", "plms"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("noise", ["seed", "generator"])
def test_every_kind_of_table(name, noise, graphs):
    """One evaluation or two, with a history or without, with noise of either kind."""
    sampler, model = samplers.make(name, SCHEDULE, 4), Half()

    def run(mode):
        generator = torch.Generator().manual_seed(3)
        own = {"seed": 3} if noise == "seed" else {"seed": None, "generator": generator}
        return draw(model, sampler, mode, **own)

    for _ in range(2):
        torch.testing.assert_close(run("cudagraph"), run("eager"))
    assert graphs.take() == [*CAPTURE, *["replay"] * 2 * sampler.table.rows]


def other_weights(model):
    model.weight = nn.Parameter(torch.tensor(0.25))


@pytest.mark.parametrize(
    ("change", "options"),
    [
        pytest.param(None, {"shape": (3, 1, 8, 8)}, id="shape"),
        pytest.param(None, {"dtype": torch.float64}, id="dtype"),
        pytest.param(None, {"sampler": DDIM(SCHEDULE, 4)}, id="rows"),
        pytest.param(None, {"sampler": samplers.make("unipc-2", SCHEDULE, 3)}, id="history"),
        pytest.param(None, {"seed": None, "x_T": torch.ones(SHAPE)}, id="no seed"),
        pytest.param(None, {"cond": {"shift": torch.ones(2, 1, 1, 1)}}, id="condition"),
        pytest.param(None, {"cond": {"shift": 2.0}}, id="number"),
        pytest.param(
            None,
            {"cond": {"shift": 2.0}, "uncond": {"shift": 2.0}, "guidance": 3.0},
            id="guidance",
        ),
        pytest.param(other_weights, {}, id="weights in new memory"),
        pytest.param(lambda model: model.eval(), {}, id="eval mode"),
    ],
)
def test_captured_anew(change, options, graphs):
    model = Half()
    draw(model)
    graphs.take()
    if change is not None:
        change(model)
    same(model, **options)
    assert graphs.take()[: len(CAPTURE)] == CAPTURE
    same(model, **options)
    assert "capture" not in graphs.take()


def test_captured_anew_for_another_memory_format_stream_backend_and_autocast(graphs):
    class Convolution(nn.Conv2d):
        def forward(self, x, t):
            return super().forward(x)

    model, x_T = Convolution(2, 2, 3, padding=1), torch.randn(2, 2, 8, 8)

    def run(x_T=x_T):
        drawn = draw(model, shape=x_T.shape, seed=None, x_T=x_T)
        return drawn, "capture" in graphs.take()

    assert run()[1]
    last, anew = run(x_T.to(memory_format=torch.channels_last))
    assert anew
    assert last.is_contiguous(memory_format=torch.channels_last)
    graphs.stream_number = 7
    assert run()[1]
    with fastdiff.backend("reference"):
        assert run()[1]
    with torch.autocast("cpu", torch.bfloat16):
        mixed, anew = run()
    assert anew
    exact, anew = run()
    assert not anew
    assert not torch.equal(mixed, exact)


def test_a_graph_of_inference_mode_is_not_written_outside_of_it(graphs):
    model = Half()
    with torch.inference_mode():
        inside = draw(model)
    outside = draw(model)
    assert torch.equal(inside, outside)
    assert graphs.take().count("capture") == 2
    with torch.inference_mode():
        assert torch.equal(draw(model), outside)
    assert "capture" not in graphs.take()


def test_values_that_change_without_a_capture(graphs):
    """Tables, times, guidance, conditions, seeds, and weights changed in place."""

    def sampler(**options):
        return DDIM(SCHEDULE, 3, **{"grid": "trailing", "clip": None, **options})

    model, shift = Half(), torch.linspace(-1, 1, 128).view(SHAPE)
    options = {"cond": {"shift": shift}, "uncond": {"shift": -shift}, "guidance": 2.0}
    results = [same(model, sampler(), **options)]
    assert "capture" in graphs.take()
    results += [
        same(model, sampler(grid="leading"), **options),
        same(model, sampler(prediction="v"), **options),
    ]
    for change in (
        {"guidance": 3.0},
        {"guidance_rescale": 0.5},
        {"cond": {"shift": 3 * shift}},
        {"uncond": {"shift": 3 * shift}},
        {"seed": [4, 5]},
        {"seed": 8},
    ):
        results.append(same(model, sampler(), **{**options, **change}))
    with torch.no_grad():
        model.weight.mul_(0.5)
    results.append(same(model, sampler(), **options))
    assert set(graphs.take()) == {"replay"}
    for index, result in enumerate(results):
        assert not any(torch.allclose(result, other) for other in results[:index])


def test_labels_of_a_unet(tiny_unet, graphs):
    """As many distinct labels, to the next power of two, share a graph."""
    model, shape = tiny_unet(num_classes=9), (6, 1, 8, 8)
    sampler = DDIM(SCHEDULE, 2, prediction="v")
    captures = []
    for labels in ([0, 1, 2, 0, 1, 2], [3, 4, 5, 6, 6, 6], [7, 7, 8, 7, 7, 7], [5] * 6,
                   [8, 7, 6, 5, 4, 3], [0, 1, 2, 3, 4, 0]):  # fmt: skip
        same(model, sampler, shape=shape, cond={"class_labels": torch.tensor(labels)})
        captures.append("capture" in graphs.take())
    assert captures == [True, False, True, True, True, False]


def test_fourier_embeddings_keep_their_times(graphs):
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4,
        layers_per_block=1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        time_embedding_type="fourier",
    ).eval()  # fmt: skip
    same(model, DDIM(SCHEDULE, 3, prediction="v", offset=1))


def test_results_are_not_overwritten_by_the_next_call(graphs):
    model = Half()
    first = draw(model)
    kept = first.clone()
    second = draw(model, seed=1)
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)


def test_inputs_are_left_alone(graphs):
    x_T, shift = torch.randn(SHAPE), torch.ones(2, 1, 1, 1)
    kept, model = x_T.clone(), Half()
    same(model, x_T=x_T, cond={"shift": shift})
    same(model, x_T=x_T + 1, cond={"shift": shift + 1})  # into the memory of the first call's graph
    assert torch.equal(x_T, kept)
    assert bool((shift == 1).all())


def test_what_watches_the_loop_sees_the_same(graphs):
    """Also where the model returns its input, which the step overwrites."""

    class Same(nn.Module):
        def forward(self, x, t):
            return x

    image, mask = torch.zeros(SHAPE), torch.ones(1, 1, 8, 8).tril()
    for model in (Half(), Same()):
        captured, eager = (
            _watched(model, mode, image=image, mask=mask) for mode in ("cudagraph", "eager")
        )
        torch.testing.assert_close(captured, eager)
        assert "replay" in graphs.take()


def _watched(model, mode, **options):
    seen = []
    _, path = draw(
        model, DDPM(SCHEDULE, 3), mode, return_trajectory=True, check_finite=True,
        callback=lambda step, t, x: seen.append(x), preview=lambda step, t, x0: seen.append(x0),
        **options,
    )  # fmt: skip
    return [*seen, path]


def test_slices_share_a_graph(graphs):
    model = Half()
    shift = PerImage(torch.arange(4.0).view(4, 1, 1, 1))
    options = {"shape": (4, 1, 8, 8), "cond": {"shift": shift}}
    whole = draw(model, mode="eager", **options)
    torch.testing.assert_close(draw(model, max_batch=2, **options), whole)
    assert graphs.take() == [*CAPTURE, *["replay"] * 6]


def test_a_model_that_returns_a_view_of_its_input(graphs):
    class Turned(nn.Module):
        def forward(self, x, t):
            return x.mT

    same(Turned())


def test_auto_captures_modules_alone(graphs):
    draw(Half(), mode="auto")
    assert "capture" in graphs.take()
    draw(lambda x, t: x, mode="auto")
    assert graphs.take() == []
    draw(Half(), mode="auto", shape=(0, 1, 8, 8))
    assert graphs.take() == []


def test_auto_on_the_cpu_is_eager(monkeypatch):
    monkeypatch.setattr(capture, "_capture", lambda *_: pytest.fail("captured"))
    draw(Half(), mode="auto")


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("noise", ["seed", "generator"])
def test_real_graphs(name, noise, tiny_unet):
    model = tiny_unet(num_classes=4).cuda()
    cond = {"class_labels": torch.tensor([1, 3], device="cuda")}
    uncond = {"class_labels": torch.tensor([0, 0], device="cuda")}
    sampler = samplers.make(name, SCHEDULE, 5, prediction="v")

    def run(mode, number):
        generator = torch.Generator("cuda").manual_seed(number)
        own = {"seed": number} if noise == "seed" else {"seed": None, "generator": generator}
        return draw(
            model, sampler, mode, cond=cond, uncond=uncond, guidance=2.0, device="cuda", **own
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = run("cudagraph", 1)
    kept = first.clone()
    second = run("auto", 2)
    assert torch.equal(first, kept)
    torch.testing.assert_close(first, run("eager", 1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(second, run("eager", 2), rtol=1e-3, atol=1e-3)
    graphs = capture._graphs_of[model].captured.values()
    assert len(graphs) == 1
    assert None not in graphs


@pytest.mark.gpu
def test_real_graphs_under_autocast_and_after_new_weights(tiny_unet):
    model, sampler = tiny_unet().cuda(), DDIM(SCHEDULE, 4, prediction="v")

    def both():
        drawn = [draw(model, sampler, mode, device="cuda") for mode in ("cudagraph", "eager")]
        torch.testing.assert_close(*drawn, rtol=2e-2, atol=2e-2)

    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            both()
        both()
    model.to(memory_format=torch.channels_last)
    both()


@pytest.mark.gpu
def test_a_model_that_waits_for_the_gpu_runs_eagerly():
    class Waits(Half):
        def forward(self, x, t):
            return x * float(self.weight)

    model = Waits().cuda()
    with pytest.warns(UserWarning, match="cannot be captured"):
        drawn = draw(model, device="cuda")
    torch.testing.assert_close(drawn, draw(model, mode="eager", device="cuda"))
