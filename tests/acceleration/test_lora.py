"""LoRA by PEFT on a compiled U-Net: loaded, switched, rescaled, fused and deleted afterwards."""

from __future__ import annotations

import pytest
import torch
from side_by_side import SideBySide, distance, graphs
from small_pipelines import save_lora, stable_diffusion

from fastdiff.compiler import explain

pytest.importorskip("peft")


@pytest.fixture
def files(tmp_path):
    """Two files of LoRA weights for the U-Net, of attention alone and of convolutions too."""
    unet = stable_diffusion().unet
    return [save_lora(tmp_path, unet, seed, convolutions=seed == 2) for seed in (1, 2)]


def test_everything_after_compiling(files):
    pipe = stable_diffusion()
    beside = SideBySide(pipe)
    plain = beside()
    pipe.load_lora_weights(files[0], adapter_name="one")
    one = beside()
    pipe.load_lora_weights(files[1], adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.7, 0.4])
    both = beside()
    pipe.disable_lora()
    assert distance(beside(), plain) < 1e-3
    pipe.enable_lora()
    pipe.set_adapters("one")
    assert distance(beside(), one) < 1e-3
    pipe.fuse_lora(adapter_names=["one"], lora_scale=0.5)
    beside()
    pipe.unfuse_lora()  # diffusers keeps the scale
    beside(changed=False)
    pipe.set_adapters("one", 1.0)
    assert distance(beside(), one) < 1e-3
    pipe.delete_adapters("one")
    pipe.set_adapters("two", 0.5)
    assert distance(beside(), both) > 1e-2
    pipe.unload_lora_weights()
    assert distance(beside(), plain) < 1e-3


def test_scales_that_change_at_each_call(files):
    """A second scale makes the graph that all further ones use."""
    pipe = stable_diffusion()
    pipe.load_lora_weights(files[0])
    beside = SideBySide(pipe)
    for scale in (0.3, 0.5):
        beside(cross_attention_kwargs={"scale": scale})
    made = graphs()
    for scale in (0.7, 0.35, 1.5, 2.25, 0.9, 0.1):
        beside(cross_attention_kwargs={"scale": scale})
    assert graphs() - made <= 2
    beside(cross_attention_kwargs={"scale": 0.0})
    beside()


def test_weights_of_adapters_that_change_at_each_call(files):
    pipe = stable_diffusion()
    beside = SideBySide(pipe, accelerated=True)
    for name, file in zip(("one", "two"), files, strict=True):
        pipe.load_lora_weights(file, adapter_name=name)
    for i in range(3):
        pipe.set_adapters(["one", "two"], [0.3 + 0.1 * i, 0.8 - 0.1 * i])
        beside()
    made = graphs()
    for i in range(3, 8):
        pipe.set_adapters(["one", "two"], [0.3 + 0.1 * i, 0.8 - 0.07 * i])
        beside()
    assert graphs() == made


def test_adapted_layers_are_as_few_as_plain_ones(files):
    """The adapters' products are added to the weights: no call is left of them."""
    unet = stable_diffusion().unet
    case = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 16, 16)
    with torch.no_grad():
        before = explain(unet, *case)
        pipe = stable_diffusion(unet=unet)
        for name, file in zip(("one", "two"), files, strict=True):
            pipe.load_lora_weights(file, adapter_name=name)
        for scales in ([0.7, 0.4], [0.5, 0.8]):  # of which Dynamo makes inputs of the second graph
            pipe.set_adapters(["one", "two"], scales)
            after = explain(unet, *case)
            assert [row.what for row in after.fused] == [row.what for row in before.fused]
            assert after.left == before.left
            assert after.packed_bytes == before.packed_bytes


def test_hot_swap(files, tmp_path):
    """diffusers' own way to exchange adapters of a compiled model, without another graph."""
    pipe = stable_diffusion()
    other = save_lora(tmp_path, pipe.unet, 3, rank=4)
    pipe.enable_lora_hotswap(target_rank=4)
    pipe.load_lora_weights(files[0], adapter_name="default")
    beside = SideBySide(pipe, accelerated=True)
    first = beside()
    made = graphs()
    pipe.load_lora_weights(other, adapter_name="default", hotswap=True)
    beside()
    pipe.load_lora_weights(files[0], adapter_name="default", hotswap=True)
    assert distance(beside(), first) < 1e-3
    assert graphs() == made
