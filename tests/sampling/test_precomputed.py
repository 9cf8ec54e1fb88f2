"""A U-Net's embeddings are computed before the loop only where that cannot be told from outside.

Each case changes what the plain model answers, or who sees its calls; ``sample`` must give what a
function that calls the model gives, and what is registered must be called at every step.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fastdiff import sample, schedules
from fastdiff.common.model import precomputing
from fastdiff.nn import UNet2DModel
from fastdiff.samplers import DDIM

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE, STEPS = (3, 1, 8, 8), 4
SAMPLER = DDIM(schedules.cosine(100), STEPS, prediction="v")
LABELS = torch.tensor([0, 2, 1])


def draw(model):
    torch.manual_seed(3)  # of dropout, too
    x_T = torch.randn(SHAPE)
    return sample(model, SAMPLER, SHAPE, x_T=x_T, cond={"class_labels": LABELS}, progress=False)


class ScaledTime(UNet2DModel):
    def forward(self, sample, timestep, class_labels=None):
        return super().forward(sample, timestep * 3.5, class_labels)


class LaxSignature(UNet2DModel):
    def forward(self, sample, timestep=None, class_labels=None, **options):
        timestep = None if timestep is None else timestep * 3.5
        return super().forward(sample, timestep, class_labels, **options)


class OwnTimeEmbedding(UNet2DModel):
    def _embed_time(self, timesteps):
        return super()._embed_time(timesteps) * 2


class OwnCall(UNet2DModel):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs) + 1


class Wrapper(nn.Module):
    """With the attribute that torch.compile's wrapper has."""

    def __init__(self, unet):
        super().__init__()
        self._orig_mod = unet

    def forward(self, x, t, class_labels):
        return 0.7 * self._orig_mod(x, t * 2, class_labels)


class PerImage(nn.Module):
    """A time embedding that has something of its own for every image of the batch."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.offset = inner, torch.randn(3, 1)

    def forward(self, t):
        return self.inner(t) + self.offset


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def of_class(kind):
    def make(unet):
        unet.__class__ = kind
        return unet

    return make


def with_partial_time(unet):
    plain = unet.forward
    unet.forward = lambda x, t, class_labels: plain(x, t + 30, class_labels)
    return unet


def with_own_method(unet):
    plain = unet._embed_time
    unet._embed_time = lambda t: plain(t) + 0.5
    return unet


def with_hook(unet):
    unet.register_forward_hook(lambda module, args, out: out * 0.5)
    return unet


def with_pre_hook(unet):
    unet.register_forward_pre_hook(lambda module, args: (args[0], args[1] / 2, *args[2:]))
    return unet


def with_embedding_of_each_image(unet):
    unet.time_embedding = PerImage(unet.time_embedding)
    return unet


def with_hook_for_each_image(unet):
    offset = torch.randn(3, 1)
    unet.time_embedding.register_forward_hook(lambda module, args, out: out + offset)
    return unet


def with_patched_embedding(unet):
    plain, offset = unet.class_embedding.forward, torch.randn(3, 1)
    unet.class_embedding.forward = lambda labels: plain(labels) + offset
    return unet


def with_parametrised_linear(unet):
    parametrize.register_parametrization(unet.time_embedding.linear_1, "weight", Doubled())
    return unet


def with_dropout_in_an_embedding(unet):
    linear = unet.mid_block.resnets[0].time_emb_proj
    unet.mid_block.resnets[0].time_emb_proj = nn.Sequential(linear, nn.Dropout(0.5))
    unet.mid_block.resnets[0].time_emb_proj.out_features = linear.out_features
    return unet


CASES = {
    "subclass with a forward": of_class(ScaledTime),
    "subclass with a lax forward": of_class(LaxSignature),
    "subclass with an embedding": of_class(OwnTimeEmbedding),
    "subclass with a call": of_class(OwnCall),
    "wrapper": Wrapper,
    "forward of the instance": with_partial_time,
    "method of the instance": with_own_method,
    "hook": with_hook,
    "pre-hook": with_pre_hook,
    "embedding of each image": with_embedding_of_each_image,
    "hook for each image": with_hook_for_each_image,
    "patched embedding": with_patched_embedding,
    "parametrised linear layer": with_parametrised_linear,
    "dropout in an embedding": with_dropout_in_an_embedding,
}


@pytest.mark.parametrize("change", CASES.values(), ids=CASES)
def test_a_changed_model_is_called_as_it_is(change, tiny_unet):
    plain = draw(tiny_unet(num_classes=3))
    model = change(tiny_unet(num_classes=3))
    drawn, wanted = (
        draw(called) for called in (model, lambda x, t, class_labels: model(x, t, class_labels))
    )
    torch.testing.assert_close(drawn, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(drawn, plain, atol=1e-3)


def test_every_call_is_seen_by_hooks(tiny_unet):
    def count(register):
        model, calls = tiny_unet(num_classes=3), []
        handle = register(model)(lambda *_: calls.append(1))
        draw(model)
        handle.remove()
        return len(calls)

    assert count(lambda model: model.register_forward_hook) == STEPS
    assert count(lambda model: model.time_proj.register_forward_pre_hook) == STEPS
    assert count(lambda model: model.class_embedding.register_forward_hook) == STEPS
    assert count(lambda model: model.time_embedding.linear_2.register_forward_hook) == STEPS
    block = "mid_block.resnets.0.time_emb_proj"
    assert count(lambda model: model.get_submodule(block).register_forward_hook) == STEPS
    modules = len(list(tiny_unet(num_classes=3).modules()))
    everywhere = count(lambda model: nn.modules.module.register_module_forward_hook)
    assert everywhere > STEPS * modules / 2


@pytest.mark.parametrize("change", ["none", "subclass", "compiled", "compiled in place", "hooks"])
def test_a_plain_model_keeps_the_fast_path(change, tiny_unet):
    class Sized(UNet2DModel):
        def __init__(self):
            super().__init__(block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
                             up_block_types=("UpBlock2D",) * 2)  # fmt: skip

        def size(self):
            return sum(p.numel() for p in self.parameters())

    model = Sized() if change == "subclass" else tiny_unet(num_classes=3)
    wanted = model
    if change == "compiled":
        model = torch.compile(model, backend="eager")
    elif change == "compiled in place":
        model.compile(backend="eager")
    elif change == "hooks":  # that see the same either way
        model.conv_in.register_forward_hook(lambda *_: None)
    assert precomputing(model) is wanted


def test_a_compiled_model_with_a_forward_of_its_own_is_called_as_it_is(tiny_unet):
    model = torch.compile(tiny_unet(num_classes=3), backend="eager")
    plain = model.forward
    model.forward = lambda x, t, class_labels: plain(x, t * 2, class_labels)
    assert precomputing(model) is None
    hooked = torch.compile(tiny_unet(num_classes=3), backend="eager")
    hooked.register_forward_hook(lambda *_: None)
    assert precomputing(hooked) is None


def test_other_callables_have_none(tiny_unet):
    model = tiny_unet()
    for other in (model.forward, functools.partial(model), nn.DataParallel(model), lambda x, t: x):
        assert precomputing(other) is None
