"""Sampling by a U-Net's fused graph, the default on a CPU: beside eager mode, and in every process.

``counted`` says for how many images the graph was called, so that no test passes for want of one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from fastdiff import Diffusion, nn, sample, schedules, sde
from fastdiff.compiler.network import FusedNetwork
from fastdiff.ops import backend
from fastdiff.samplers import DDIM, DDPM

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(backend.extension is None, reason="needs the C++ extension"),
]
SCHEDULE = schedules.cosine(100)
SHAPE = (5, 1, 8, 8)
MIXED = {"class_labels": torch.tensor([0, 2, 1, 2, 2])}
NONE = {"class_labels": torch.full((5,), 2)}


@pytest.fixture
def counted(monkeypatch):
    seen, plain = [], FusedNetwork._layers

    def layers(self, x, rows):
        seen.append(len(x))
        return plain(self, x, rows)

    monkeypatch.setattr(FusedNetwork, "_layers", layers)
    return seen


CASES = {
    "mixed labels": ({}, [5, 5, 5]),
    "equal labels": ({"cond": NONE}, [5, 5, 5]),
    "guidance": ({"uncond": NONE, "guidance": 2.0}, [10, 10, 10]),
    "slices": ({"max_batch": 2}, [2, 2, 2, 2, 2, 2, 1, 1, 1]),
    "guided slices": ({"uncond": NONE, "guidance": 2.0, "max_batch": 3}, [6, 6, 6, 4, 4, 4]),
    "inpainting": ({"image": torch.zeros(SHAPE), "mask": torch.ones(1, 1, 8, 8)}, [5, 5, 5]),
    "trajectory": ({"return_trajectory": True}, [5, 5, 5]),
    "callbacks": ({"callback": lambda *_: None, "preview": lambda *_: None}, [5, 5, 5]),
    "channels-last": ({"x_T": torch.randn(SHAPE).to(memory_format=torch.channels_last)}, [5, 5, 5]),
    "no images": ({"cond": {}}, []),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("options", "images"), CASES.values(), ids=CASES)
def test_agrees_with_eager_mode(options, images, dtype, tiny_unet, counted):
    model = tiny_unet(num_classes=3).to(dtype)
    options = {"seed": 3, "cond": MIXED, "progress": False, **options}
    shape = SHAPE
    if "x_T" in options:
        options["x_T"] = options["x_T"].to(dtype)
    if not images:
        shape, model = (0, *SHAPE[1:]), tiny_unet().to(dtype)
    sampler = DDPM(SCHEDULE, 3, prediction="v")
    drawn = sample(model, sampler, shape, **options)
    assert counted == images
    wanted = sample(model, sampler, shape, mode="eager", **options)
    assert counted == images
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for a, b in zip([drawn] if torch.is_tensor(drawn) else drawn,
                    [wanted] if torch.is_tensor(wanted) else wanted, strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_eager_mode_is_the_models_own_arithmetic(tiny_unet, counted):
    """Bit for bit that of a model with a hook, which is called plainly in every mode."""
    sampler, options = DDPM(SCHEDULE, 4, prediction="v"), {"seed": 1, "cond": MIXED}
    drawn = sample(tiny_unet(num_classes=3), sampler, SHAPE, mode="eager", **options)
    hooked, calls = tiny_unet(num_classes=3), []
    hooked.conv_in.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(sample(hooked, sampler, SHAPE, **options), drawn)
    assert (len(calls), counted) == (4, [])


def test_a_callback_may_train_the_model(tiny_unet, counted):
    """In place, as an optimizer does; what is computed before the loop stays, in every mode."""

    def train(model):
        def callback(step, t, x):
            for name, weight in model.named_parameters():
                if name.startswith(("conv_out", "mid_block.resnets.0.conv")):
                    weight.data.mul_(1.1)

        return callback

    drawn = [
        sample(model, DDIM(SCHEDULE, 3), SHAPE, seed=0, mode=mode, callback=train(model))
        for mode, model in (("auto", tiny_unet()), ("eager", tiny_unet()))
    ]
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-4)
    assert counted == [5, 5, 5]


def test_learned_variance(tiny_unet, counted):
    model = tiny_unet(learned_variance=True)
    sampler = DDPM(SCHEDULE, 3, variance="learned")
    drawn, wanted = (
        sample(model, sampler, SHAPE, seed=0, mode=mode, progress=False)
        for mode in ("auto", "eager")
    )
    torch.testing.assert_close(drawn, wanted, rtol=1e-4, atol=1e-4)
    assert counted == [5, 5, 5]


FOURIER = {
    "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "attention_head_dim": 8,
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "time_embedding_type": "fourier",
}  # fmt: skip
DRAWN = {
    "sampler without the variance": (SCHEDULE, "eps", "ddim", 3, True),
    "sampler of a process": (sde.EDM(), "edm", "heun", 3, False),
    "solver": (sde.VP(), "eps", "reverse-diffusion", 3, False),
    "solver of a learned variance": (SCHEDULE, "eps", "euler-maruyama", 3, True),
    "adaptive steps, images that finish early": (sde.VP(), "eps", "adaptive", None, False),
    "ode": (sde.VP(), "eps", "ode", None, False),
}


@pytest.mark.parametrize(
    ("forward", "kind", "method", "steps", "learned"), DRAWN.values(), ids=DRAWN
)
def test_diffusion_draws_by_the_graph(forward, kind, method, steps, learned, tiny_unet, counted):
    torch.manual_seed(0)
    model = tiny_unet(learned_variance=learned)
    objective = "hybrid" if learned else None
    diffusion = Diffusion(model, forward, kind, objective=objective)
    options = {"eps_rel": 0.5} if method == "adaptive" else {}

    def draw(mode):
        generator = torch.Generator().manual_seed(1)
        return diffusion.sample(
            SHAPE, method=method, steps=steps, generator=generator, mode=mode, progress=False,
            **options,
        )  # fmt: skip

    drawn, calls = draw("auto"), len(counted)
    wanted = draw("eager")
    assert 0 < calls == len(counted)
    torch.testing.assert_close(drawn, wanted, rtol=1e-3, atol=1e-3)


def test_a_solver_has_two_modes(tiny_unet):
    diffusion = Diffusion(tiny_unet(), sde.VP(), "eps")
    with pytest.raises(ValueError, match="a solver's mode must be auto or eager, got 'compile'"):
        diffusion.sample(SHAPE, method="euler-maruyama", steps=2, mode="compile")


def test_a_likelihood_is_the_models_own(tiny_unet, counted):
    """It differentiates the model."""
    diffusion = Diffusion(tiny_unet(), sde.VP(), "eps")
    found = diffusion.log_likelihood(torch.zeros(1, 1, 8, 8), rtol=1e-1, atol=1e-1, progress=False)
    assert found.logp.isfinite().all()
    assert counted == []


def test_fourier_embeddings(counted):
    torch.manual_seed(0)
    model = nn.UNet2DModel(**FOURIER).eval()
    sampler = DDIM(SCHEDULE, 3, prediction="x0", grid="trailing")  # which leaves out time 0
    drawn, wanted = (
        sample(model, sampler, SHAPE, seed=0, mode=mode, progress=False)
        for mode in ("auto", "eager")
    )
    torch.testing.assert_close(drawn, wanted, rtol=1e-4, atol=1e-4)
    assert counted == [5, 5, 5]


PROGRAM = """
import hashlib, json, sys
import torch
from fastdiff import sample, schedules
from fastdiff.nn.image_unet import make_unet
from fastdiff.samplers import DDIM
torch.set_num_threads(1)
torch.manual_seed(0)
model = make_unet(8, widths=(8, 16), layers_per_block=1, attention=(1,)).eval()
drawn = sample(model, DDIM(schedules.cosine(100), 3), (3, 1, 8, 8), seed=0, progress=False)
slow = [n for n in ("torch._dynamo", "torch._inductor", "sympy", "triton") if n in sys.modules]
ran = "fastdiff.compiler.network" in sys.modules
print(json.dumps([hashlib.sha256(drawn.numpy().tobytes()).hexdigest(), slow, ran]))
"""


def test_every_process_draws_the_same_bits_and_imports_no_dynamo(tmp_path):
    """Also where no plan is named, and neither reads nor writes the user's cache."""
    environment = {**os.environ, "FASTDIFF_CACHE": str(tmp_path / "cache")}
    environment.pop("FASTDIFF_PLAN")
    found = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, check=True
            ).stdout
        )
        for _ in range(2)
    ]
    assert found[0] == found[1]
    assert found[0][1:] == [[], True]
    assert not (tmp_path / "cache").exists()
