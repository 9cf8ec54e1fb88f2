"""Ranges for profilers: which there are, how they nest, and that there are none when off."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import fastdiff
from fastdiff import data, ops, samplers, schedules
from fastdiff.nn import UNet2DModel
from fastdiff.nn.image_unet import make_unet
from fastdiff.ops import profiling
from fastdiff.training.trainer import Trainer, TrainingOptions


@pytest.fixture
def nvtx(monkeypatch):
    """A list of what reaches NVTX: (depth, domain, name) of each range, in their order."""
    seen, depth = [], [0]

    @contextmanager
    def annotate(name, domain):
        seen.append((depth[0], domain, name))
        depth[0] += 1
        yield
        depth[0] -= 1

    monkeypatch.setattr(profiling, "_nvtx", lambda: SimpleNamespace(annotate=annotate))
    return seen


def draw(model, **options) -> torch.Tensor:
    sampler = samplers.DDIM(schedules.cosine(100), 2)
    return fastdiff.sample(model, sampler, (1, 1, 8, 8), seed=0, progress=False, **options)


SAMPLING = [
    (0, "sample"),
    (1, "step 0"), (2, "model"), (3, "group_norm_silu"), (2, "sampler_step"),
    (1, "step 1"), (2, "model"), (3, "group_norm_silu"), (2, "sampler_step"),
]  # fmt: skip


def model(x, t):
    """One norm, so that its range can be named."""
    return ops.group_norm_silu(x, 1)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_sampling(nvtx, backend) -> None:
    with fastdiff.backend(backend), fastdiff.profile():
        profiled = draw(model)
    drawn = [(depth, name) for depth, domain, name in nvtx if name != "philox_normal"]
    assert drawn == SAMPLING
    assert {domain for _, domain, _ in nvtx} == {"fastdiff"}
    with fastdiff.backend(backend):
        assert torch.equal(profiled, draw(model))


def test_a_training_step(nvtx) -> None:
    images = data.digits("train", 8)
    unet = make_unet(8, 1, 10, widths=(8, 16), layers_per_block=1, attention=())
    trainer = Trainer(unet, schedules.cosine(100), images, TrainingOptions(batch_size=2))
    with fastdiff.profile():
        trainer.step()
    phases = [name for depth, _, name in nvtx if depth == 1]
    assert phases == ["data", "forward", "backward", "optimizer"]
    assert nvtx[0] == (0, "fastdiff", "train step")
    names = {name for depth, _, name in nvtx if depth > 1}
    kernels = {"q_sample_from_seed", "group_norm_silu", "denoising_loss_from_seed", "adamw_update"}
    assert kernels <= names


def test_every_operation_has_a_range(nvtx) -> None:
    from fastdiff.ops import selfcheck

    with fastdiff.profile():
        assert all(record.ok for record in selfcheck.run())
    gradients = {f"{name}_backward" for name in selfcheck.CASES}
    assert {name for _, _, name in nvtx} == set(selfcheck.CASES) - gradients


def test_torch_profiler_shows_the_same_names() -> None:
    with torch.profiler.profile() as seen, fastdiff.profile():
        draw(model)
    events = {event.name for event in seen.events()}
    assert {f"fastdiff::{name}" for _, name in SAMPLING} <= events
    step, inner = (
        next(event for event in seen.events() if event.name == f"fastdiff::{name}")
        for name in ("step 1", "sample")
    )
    assert inner.time_range.start <= step.time_range.start
    assert step.time_range.end <= inner.time_range.end


def test_off_there_is_no_range_and_no_further_call(nvtx) -> None:
    assert profiling.span("a") is profiling.span("b")
    assert profiling.ranged("a", draw) is draw
    x = torch.zeros(1, 4, 2, 2)

    def python_calls() -> int:
        calls = []
        sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name))
        try:
            ops.group_norm_silu(x, 2)
        finally:
            sys.setprofile(None)
        return sum("span" in name or "range" in name for name in calls)

    assert python_calls() == 0
    with fastdiff.profile():
        assert python_calls() > 0
    nvtx.clear()
    draw(model)
    assert not nvtx


def test_blocks_nest_and_an_error_closes_them(nvtx) -> None:
    with fastdiff.profile():
        with pytest.raises(ZeroDivisionError), fastdiff.profile():
            1 / 0  # noqa: B018
        draw(model)
    assert nvtx
    assert profiling.depth == 0


def test_it_does_not_break_the_compiler(nvtx) -> None:
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 4, 4, 4)
    with fastdiff.profile():
        assert torch.equal(compiled(x, None), model(x, None))
    assert [name for _, _, name in nvtx] == ["group_norm_silu"]  # the call that is not compiled


def test_without_the_package_it_warns_once_and_goes_on(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    profiling._nvtx.cache_clear()
    try:
        with (
            pytest.warns(UserWarning, match="the package nvtx is not installed"),
            fastdiff.profile(),
        ):
            draw(model)
        with fastdiff.profile():
            draw(model)
    finally:
        profiling._nvtx.cache_clear()


def test_a_unet_that_is_profiled_is_still_precomputed(nvtx, tiny_unet) -> None:
    unet = tiny_unet()
    assert isinstance(unet, UNet2DModel)
    with fastdiff.profile():
        profiled = draw(unet)
    assert torch.equal(profiled, draw(unet))


@pytest.mark.parametrize(("value", "depth"), [("1", 1), ("0", 0), ("", 0)])
def test_the_environment_switches_it_on(value, depth) -> None:
    code = "from fastdiff import profiling; print(profiling.depth)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"FASTDIFF_NVTX": value, "PATH": ""},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) == depth


def test_another_value_is_an_error() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import fastdiff"], env={"FASTDIFF_NVTX": "yes", "PATH": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "FASTDIFF_NVTX is 'yes', wanted 0, 1 or unset" in done.stderr
