"""What else pipelines give to a U-Net, or change of it, after it was compiled."""

from __future__ import annotations

from collections import Counter

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from side_by_side import SideBySide, distance, graphs
from small_pipelines import (
    WIDTH,
    controlnet,
    ip_adapter,
    stable_diffusion,
    stable_diffusion_xl,
    t2i_adapter,
    unet,
)

from fastdiff.compiler import explain


def image(seed: int = 0, size: int = 16):
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_controlnet():
    pipe = stable_diffusion(diffusers.StableDiffusionControlNetPipeline, controlnet=controlnet())
    beside = SideBySide(pipe, accelerated=True)
    beside(image=image())
    beside(image=image(1))
    beside(image=image(1), guess_mode=True)
    beside(image=image(1), control_guidance_end=0.5)
    made = graphs()
    for scale in (0.4, 0.7, 0.2):
        beside(image=image(1), controlnet_conditioning_scale=scale)
    assert graphs() - made <= 1


def test_t2i_adapter():
    pipe = stable_diffusion(diffusers.StableDiffusionAdapterPipeline, adapter=t2i_adapter())
    beside = SideBySide(pipe, accelerated=True)
    for scale in (1.0, 0.3):
        beside(image=image(), adapter_conditioning_scale=scale)


def embeds(seed: int, count: int = 1):
    """Embeddings of images, without and with which the U-Net is evaluated."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, WIDTH, generator=generator)


def test_ip_adapter():
    pipe = stable_diffusion()
    beside = SideBySide(pipe, accelerated=True)
    plain = beside()
    weights = ip_adapter(pipe.unet, 1)
    pipe.load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)
    for scale in (1.0, 0.4):
        pipe.set_ip_adapter_scale(scale)
        beside(ip_adapter_image_embeds=[embeds(1)])
    made = graphs()
    for scale in (0.8, 0.6, 0.25, 0.1):
        pipe.set_ip_adapter_scale(scale)
        beside(ip_adapter_image_embeds=[embeds(1)])
    assert graphs() - made <= 1
    beside(ip_adapter_image_embeds=[embeds(2, count=3)])
    pipe.set_ip_adapter_scale(0.0)
    assert distance(beside(ip_adapter_image_embeds=[embeds(1)]), plain) < 1e-3
    pipe.unload_ip_adapter()
    assert distance(beside(changed=False), plain) < 1e-3


def test_two_ip_adapters():
    pipe = stable_diffusion()
    beside = SideBySide(pipe, accelerated=True)
    weights = [ip_adapter(pipe.unet, seed) for seed in (1, 2)]
    pipe.load_ip_adapter(weights, subfolder="", weight_name=["", ""], image_encoder_folder=None)
    pipe.set_ip_adapter_scale([0.7, 0.3])
    beside(ip_adapter_image_embeds=[embeds(1), embeds(2, count=2)])
    pipe.set_ip_adapter_scale([0.2, 0.9])
    beside(ip_adapter_image_embeds=[embeds(1), embeds(2, count=2)])


def test_free_u():
    pipe = stable_diffusion()
    beside = SideBySide(pipe)
    plain = beside()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    beside()
    pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)
    beside()
    pipe.disable_freeu()
    assert distance(beside(), plain) < 1e-3


def test_textual_inversion():
    pipe = stable_diffusion()
    beside = SideBySide(pipe, accelerated=True)
    beside(prompt="cat")
    pipe.load_textual_inversion(torch.randn(3, WIDTH), token="<thing>")
    beside(prompt="cat <thing>")
    made = graphs()
    beside(prompt=["cat <thing>", "dog"], negative_prompt=["<thing>", ""])
    assert graphs() - made <= 2


def test_lengths_of_prompts():
    pipe = stable_diffusion()
    beside = SideBySide(pipe)
    generator = torch.Generator().manual_seed(0)

    def prompts(length: int):
        pair = torch.randn(2, 1, length, WIDTH, generator=generator)
        return {"prompt": None, "prompt_embeds": pair[0], "negative_prompt_embeds": pair[1]}

    for length in (16, 9):
        beside(**prompts(length))
    made = graphs()
    for length in (32, 20, 7, 3, 77):
        beside(**prompts(length))
    assert graphs() == made


def test_processors_of_attention():
    pipe = stable_diffusion()
    beside = SideBySide(pipe)
    beside()
    pipe.enable_attention_slicing(1)
    beside(changed=False)
    pipe.disable_attention_slicing()
    beside(changed=False)
    pipe.unet.set_attn_processor(AttnProcessor())
    beside(changed=False)
    pipe.unet.set_default_attn_processor()
    pipe.unet.fuse_qkv_projections()
    beside(changed=False)
    pipe.unet.unfuse_qkv_projections()
    beside(changed=False)


class Doubled:
    """An attention processor of a user."""

    def __init__(self, factor: float) -> None:
        self.factor, self.inner = factor, AttnProcessor()

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return self.factor * self.inner(attn, hidden_states, *args, **kwargs)


def test_a_users_processor():
    pipe = stable_diffusion()
    beside = SideBySide(pipe)
    for factor in (1.5, 2.0, 0.5):
        pipe.unet.set_attn_processor(Doubled(factor))
        beside()


def test_hooks_registered_later():
    pipe = stable_diffusion()
    beside = SideBySide(pipe, accelerated=True)
    beside()
    block = pipe.unet.mid_block
    handle = block.register_forward_hook(lambda module, args, result: 0.5 * result)
    beside()
    handle.remove()
    before = pipe.unet.register_forward_pre_hook(lambda module, args: (0.5 * args[0], *args[1:]))
    beside()
    before.remove()
    beside()


def test_switches_of_the_model():
    pipe = stable_diffusion()
    beside = SideBySide(pipe)
    beside()
    pipe.unet.enable_gradient_checkpointing()
    beside(changed=False)
    pipe.unet.disable_gradient_checkpointing()
    for block in pipe.unet.modules():
        if hasattr(block, "set_chunk_feed_forward"):
            block.set_chunk_feed_forward(chunk_size=1, dim=0)
    beside(changed=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_another_dtype_after_compiling(dtype):
    pipe = stable_diffusion()
    beside = SideBySide(pipe)
    wanted = beside()
    pipe.to(dtype)
    beside.bound = 40 * torch.finfo(dtype).eps
    assert distance(beside(changed=False).float(), wanted) < beside.bound


def test_xl():
    pipe = stable_diffusion_xl()
    beside = SideBySide(pipe, accelerated=True)
    beside()
    made = graphs()
    beside(original_size=(32, 24), crops_coords_top_left=(2, 4))
    assert graphs() == made


@pytest.mark.parametrize(
    "changes",
    [
        {"class_embed_type": "timestep"},
        {"num_class_embeds": 5},
        {"encoder_hid_dim": WIDTH, "encoder_hid_dim_type": "text_proj", "cross_attention_dim": 24},
        {"time_cond_proj_dim": 6},
    ],
    ids=lambda changes: next(iter(changes)),
)
@torch.no_grad()
def test_other_embeddings(changes):
    """U-Nets that pipelines of other models have, called by themselves."""
    model = unet(**changes)
    generator = torch.Generator().manual_seed(0)
    given = {"encoder_hidden_states": torch.randn(2, 5, WIDTH, generator=generator)}
    if "time_cond_proj_dim" in changes:
        given["timestep_cond"] = torch.randn(2, 6, generator=generator)
    model.compile(backend="fastdiff", fullgraph=True)
    for label in (1, 3):
        if changes.keys() & {"class_embed_type", "num_class_embeds"}:
            given["class_labels"] = torch.tensor([label, 2])
        x = torch.randn(2, 4, 8, 8, generator=generator)
        with torch.compiler.set_stance("force_eager"):
            expected = model(x, label, **given).sample
        assert distance(model(x, label, **given).sample, expected) < 1e-4


@torch.no_grad()
def test_conditions_cost_no_fusion():
    """An IP-Adapter's attention is fused too, and ControlNet's residuals cost additions alone."""
    torch.compiler.reset()  # sizes that have changed would be inputs of the graphs
    model, case = unet(), (torch.randn(2, 4, 8, 8), 7, torch.randn(2, 5, WIDTH))
    down, middle = controlnet()(*case, torch.rand(2, 3, 16, 16), return_dict=False)
    before = explain(model, *case)
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    added = explain(model, *case, **residuals)
    assert len(added.fused) == len(before.fused)
    assert {name for name, _ in Counter(added.left) - Counter(before.left)} <= {"add"}
    pipe = stable_diffusion(unet=model)
    weights = ip_adapter(model, 1)
    pipe.load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)
    images = {"image_embeds": [torch.randn(2, 1, WIDTH)]}
    adapted = explain(model, *case, added_cond_kwargs=images)
    crossing = sum(name.endswith("attn2.processor") for name in model.attn_processors)
    counts = [sum(row.what == "attention" for row in x.fused) for x in (before, adapted)]
    assert counts == [2 * crossing, 3 * crossing]
