"""What ``accelerate`` says, changes, refuses, and how ``restore`` undoes it; nothing is called."""

from __future__ import annotations

import copy
import gc
import os
import weakref
from functools import partial
from typing import Any

import accelerate.hooks
import diffusers
import pytest
import small_pipelines as small
import torch
import unconditional
from torch import nn

import fastdiff
from fastdiff.acceleration import components, obstacles, report
from fastdiff.compiler.run import packing

CALL = "_compiled_call_impl"


@pytest.fixture
def sd() -> Any:
    return small.stable_diffusion()


def compiled(module: nn.Module) -> bool:
    return getattr(module, CALL) is not None


def rows(target: Any) -> dict[str, Any]:
    return {row.component: row for row in report(target).rows}


def test_report(sd, capsys):
    fastdiff.accelerate(sd, precision="strict")
    printed = capsys.readouterr().out
    assert printed == f"{report(sd)}\n"
    assert printed.startswith("fastdiff.accelerate: StableDiffusionPipeline, precision strict\n")
    found = rows(sd)
    assert list(found) == ["vae.encoder", "vae.decoder", "text_encoder", "unet", "scheduler"]
    for name in ("vae.encoder", "vae.decoder", "unet"):
        assert found[name].done == "compiled, computes in float32"
    assert found["unet"].kind == "UNet2DConditionModel"
    assert "once for each prompt" in found["text_encoder"].left
    assert found["scheduler"].kind == "DDIMScheduler"
    for row in found.values():
        assert bool(row.done) != bool(row.left)
        assert row.component in printed


def test_class_configuration_and_hooks_stay(sd):
    kind, config = type(sd.unet), dict(sd.unet.config)
    calls = []
    sd.unet.register_forward_hook(lambda *_: calls.append(1))
    fastdiff.accelerate(sd)
    assert type(sd.unet) is kind
    assert dict(sd.unet.config) == config
    assert isinstance(sd.scheduler, diffusers.DDIMScheduler)
    sd(**small.arguments(1))
    assert calls == [1]


def test_a_second_call_changes_settings(sd):
    original = sd.scheduler
    fastdiff.accelerate(sd)
    first = sd.unet.__dict__[CALL]
    fastdiff.accelerate(sd)
    assert sd.unet.__dict__[CALL] is first  # its graphs are kept
    fastdiff.accelerate(sd, precision="bf16", scheduler=False)
    assert sd.unet.__dict__[CALL] is not first
    assert sd.scheduler is original
    assert rows(sd)["unet"].done == "compiled, computes in bfloat16 (weights in float32)"
    assert "scheduler=False" in rows(sd)["scheduler"].left
    fastdiff.restore(sd)
    assert not compiled(sd.unet)


def test_a_part_that_is_replaced_is_restored_by_the_second_call(sd):
    fastdiff.accelerate(sd)
    old, sd.unet = sd.unet, small.unet()
    fastdiff.accelerate(sd)
    assert compiled(sd.unet)
    assert not compiled(old)


def test_restore_leaves_what_the_user_has_set_since(sd):
    fastdiff.accelerate(sd)
    mine = diffusers.EulerDiscreteScheduler.from_config(sd.scheduler.config)
    sd.scheduler = mine
    sd.unet.compile(backend="eager")
    other = sd.unet.__dict__[CALL]
    fastdiff.restore(sd)
    assert sd.scheduler is mine
    assert sd.unet.__dict__[CALL] is other
    assert not compiled(sd.vae.decoder)


def test_restore_twice(sd):
    fastdiff.accelerate(sd)
    fastdiff.restore(sd)
    with pytest.raises(ValueError, match="StableDiffusionPipeline is not accelerated"):
        fastdiff.restore(sd)
    with pytest.raises(ValueError, match="not accelerated"):
        report(sd)


def test_shared_components(sd):
    """A pipeline made of an accelerated one's components, which also knows the first scheduler."""
    original = sd.scheduler
    fastdiff.accelerate(sd)
    other = diffusers.StableDiffusionImg2ImgPipeline(**sd.components, requires_safety_checker=False)
    call = sd.unet.__dict__[CALL]
    fastdiff.accelerate(other)
    assert sd.unet.__dict__[CALL] is call
    fastdiff.restore(other)
    assert not compiled(sd.unet)
    assert other.scheduler is original
    fastdiff.restore(sd)
    assert sd.scheduler is original


def test_copies_are_not_accelerated(sd):
    fastdiff.accelerate(sd)
    twin = copy.deepcopy(sd)
    assert not compiled(twin.unet)
    with pytest.raises(ValueError, match="not accelerated"):
        fastdiff.restore(twin)
    fastdiff.accelerate(twin)
    assert compiled(twin.unet)


def test_nothing_is_kept_alive():
    pipe = unconditional.ddim()
    fastdiff.accelerate(pipe)
    gone = [weakref.ref(pipe), weakref.ref(pipe.unet), weakref.ref(pipe.scheduler)]
    del pipe
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3


@pytest.mark.parametrize(
    "after", [fastdiff.restore, partial(fastdiff.accelerate, precision="strict")]
)
@torch.no_grad()
def test_packed_weights_are_freed(after):
    model = unconditional.unet()
    others = set(packing._packed)
    fastdiff.accelerate(model)
    model(torch.randn(1, 3, 8, 8), torch.tensor(5))
    packed = [weakref.ref(packing._packed[key]) for key in set(packing._packed) - others]
    assert len(packed) > 10
    after(model)
    gc.collect()
    assert not any(reference() for reference in packed)


def test_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIFF_CACHE", "before")
    model = unconditional.unet()
    fastdiff.accelerate(model, cache=tmp_path / "new" / "folder")
    assert os.environ["FASTDIFF_CACHE"] == str(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder").is_dir()
    fastdiff.accelerate(model)
    assert os.environ["FASTDIFF_CACHE"] == "before"
    monkeypatch.delenv("FASTDIFF_CACHE")
    fastdiff.accelerate(model, cache=str(tmp_path))
    fastdiff.restore(model)
    assert "FASTDIFF_CACHE" not in os.environ
    fastdiff.accelerate(model, cache=tmp_path)
    os.environ["FASTDIFF_CACHE"] = "later"
    fastdiff.restore(model)
    assert os.environ["FASTDIFF_CACHE"] == "later"
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="must be a directory, got the file"):
        fastdiff.accelerate(model, cache=tmp_path / "file")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"precision": "half"}, ValueError, "None or one of fast, bf16, strict, got 'half'"),
        ({"scheduler": "ddim"}, TypeError, "True or False, got 'ddim'"),
    ],
)
def test_wrong_options(options, error, text):
    model = unconditional.unet()
    with pytest.raises(error, match=text):
        fastdiff.accelerate(model, **options)
    assert not compiled(model)


MODELS = {
    "UNet2DModel": (unconditional.unet, [""]),
    "UNet2DConditionModel": (small.unet, [""]),
    "ControlNetModel": (small.controlnet, [""]),
    "AutoencoderKL": (small.autoencoder, ["encoder", "decoder"]),
    "of nobody's": (lambda: nn.Sequential(nn.Conv2d(3, 3, 3)), [""]),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_alone(name):
    make, parts = MODELS[name]
    model = make()
    assert fastdiff.accelerate(model) is model
    assert all(compiled(model.get_submodule(part)) for part in parts)
    fastdiff.restore(model)
    assert not any(map(compiled, model.modules()))


def dit() -> diffusers.DiTTransformer2DModel:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, num_layers=1, sample_size=8,
        norm_num_groups=4, num_embeds_ada_norm=10,
    )  # fmt: skip


def test_a_transformer_is_refused_by_name():
    with pytest.raises(
        TypeError, match=r"DiTTransformer2DModel cannot be accelerated.*UNet2DModel"
    ):
        fastdiff.accelerate(dit())


def test_a_pipeline_around_a_transformer_is_refused_by_name():
    pipe = diffusers.DiTPipeline(dit(), small.autoencoder(), diffusers.DDIMScheduler())
    scheduler = pipe.scheduler
    with pytest.raises(TypeError, match="no U-Net: transformer is a DiTTransformer2DModel"):
        fastdiff.accelerate(pipe)
    assert pipe.scheduler is scheduler
    assert not compiled(pipe.vae.decoder)


@pytest.mark.parametrize("wrong", [None, "a name", diffusers.DDIMScheduler(), nn.Linear(2, 2)])
def test_what_is_neither_pipeline_nor_network_is_refused(wrong):
    with pytest.raises(TypeError, match=type(wrong).__name__):
        fastdiff.accelerate(wrong)


def compiled_by_others(model: nn.Module) -> None:
    model.compile(backend="eager")


def part_compiled_by_others(model: nn.Module) -> None:
    model.down_blocks[0].compile(backend="eager")


def method_compiled_by_others(model: nn.Module) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


def offloaded(model: nn.Module) -> None:
    accelerate.hooks.add_hook_to_module(model.conv_in, accelerate.hooks.AlignDevicesHook())


def cast_layerwise(model: nn.Module) -> None:
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def in_float64(model: nn.Module) -> None:
    model.double()


def quantised(model: nn.Module) -> None:
    model.is_quantized = True


def without_weights(model: nn.Module) -> None:
    model.to("meta")


OBSTACLES = {
    compiled_by_others: "it is compiled already, by other than fastdiff.accelerate",
    part_compiled_by_others: "its part down_blocks.0 is compiled already",
    method_compiled_by_others: r"it is compiled already, by other .* \(its forward\)",
    offloaded: "its part conv_in is moved between devices .* AlignDevicesHook",
    cast_layerwise: "diffusers' hook layerwise_casting",
    in_float64: "float64, wanted one of float32, bfloat16, float16",
    quantised: "quantised",
    without_weights: "on meta, wanted all on a CPU or all on an NVIDIA GPU",
}


@pytest.mark.parametrize("spoil", OBSTACLES, ids=lambda spoil: spoil.__name__)
def test_obstacles_are_named(spoil):
    model = unconditional.unet()
    spoil(model)
    state = {name: part.__dict__.get(CALL) for name, part in model.named_modules()}
    with pytest.raises(ValueError, match=f"UNet2DModel.*{OBSTACLES[spoil]}"):
        fastdiff.accelerate(model)
    assert {name: part.__dict__.get(CALL) for name, part in model.named_modules()} == state


def test_where_nothing_is_compiled():
    with (
        torch._dynamo.config.patch(disable=True),
        pytest.raises(ValueError, match=r"nothing is compiled in this process: Dynamo is off"),
    ):
        fastdiff.accelerate(unconditional.unet())


def test_a_cpu_without_the_extension(monkeypatch):
    monkeypatch.setattr(obstacles, "cpu_missing", "it was not built")
    with pytest.raises(ValueError, match=r"the C\+\+ extension is needed: it was not built"):
        fastdiff.accelerate(unconditional.unet())


@pytest.fixture
def on_gpu(monkeypatch) -> None:
    """Models appear to be on a GPU."""
    for module in (components, obstacles):
        monkeypatch.setattr(module, "devices", lambda part: {"cuda"})


@pytest.mark.usefixtures("on_gpu")
def test_a_gpu_without_triton(monkeypatch):
    monkeypatch.setattr(obstacles, "triton_missing", "Triton is not installed")
    with pytest.raises(ValueError, match="Triton is needed: Triton is not installed"):
        fastdiff.accelerate(unconditional.unet())


@pytest.mark.usefixtures("on_gpu")
def test_bf16_is_for_cpus():
    with pytest.raises(ValueError, match=r"to\(torch.bfloat16\)"):
        fastdiff.accelerate(unconditional.unet(), precision="bf16")


def test_a_model_wrapped_by_torch_compile():
    with pytest.raises(ValueError, match=r"wrapped by torch\.compile already"):
        fastdiff.accelerate(torch.compile(unconditional.unet(), backend="eager"))


def test_a_unet_that_is_left_is_warned_of(sd):
    sd.unet.compile(backend="eager")
    with pytest.warns(UserWarning, match="unet, a UNet2DConditionModel, is left as it is"):
        fastdiff.accelerate(sd)
    assert compiled(sd.vae.decoder)
    assert "compiled already" in rows(sd)["unet"].left


def test_a_decoder_that_others_have_compiled(sd):
    sd.vae.decode = torch.compile(sd.vae.decode, backend="eager")
    fastdiff.accelerate(sd)
    assert not compiled(sd.vae.decoder)
    assert "(its decode)" in rows(sd)["vae"].left


def test_a_motion_unet_is_left_by_name():
    """AnimateDiff's, whose tensors have a dimension of frames; the autoencoder is compiled."""
    adapter = diffusers.MotionAdapter(
        block_out_channels=small.CHANNELS, motion_layers_per_block=1, motion_num_attention_heads=2,
        motion_norm_num_groups=4, motion_mid_block_layers_per_block=1,
    )  # fmt: skip
    sd = small.stable_diffusion()
    pipe = diffusers.AnimateDiffPipeline(
        sd.vae, sd.text_encoder, sd.tokenizer, sd.unet, adapter, sd.scheduler
    )
    with pytest.warns(UserWarning, match="unet, a UNetMotionModel, is left as it is"):
        fastdiff.accelerate(pipe)
    assert compiled(pipe.vae.decoder)
    assert not compiled(pipe.unet)
    assert "none of UNet2DModel" in rows(pipe)["unet"].left
    fastdiff.restore(pipe)
