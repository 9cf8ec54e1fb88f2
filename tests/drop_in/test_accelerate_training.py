"""A loop of accelerate in the manner of diffusers' scripts, on diffusers' classes and on ours."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
accelerate = pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState  # noqa: E402
from diffusers.optimization import get_scheduler  # noqa: E402
from diffusers.training_utils import EMAModel  # noqa: E402

from fastdiff import data, nn, schedules  # noqa: E402
from fastdiff import diffusers as ours  # noqa: E402
from fastdiff.training import Trainer, TrainingOptions  # noqa: E402

CONFIG = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
}
STEPS = 5


@pytest.fixture(autouse=True)
def _new_state(monkeypatch, tmp_path_factory):
    """accelerate keeps the precision of a process's first loop; algorithms are chosen by sizes."""
    monkeypatch.setenv("FASTDIFF_PLAN", "heuristic")
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.compiler.reset()


def images():
    return torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def train(classes, folder, *, prediction, mixed_precision="no", checkpointing=False):
    """Losses of each batch; the pipeline of averaged weights is saved in the folder."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=2,
        project_dir=str(folder),
    )  # fmt: skip
    unet = classes.UNet2DModel(**CONFIG)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    scheduler = classes.DDPMScheduler(prediction_type=prediction)
    average = EMAModel(
        unet.parameters(), decay=0.9, use_ema_warmup=True,
        model_cls=classes.UNet2DModel, model_config=unet.config,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(images(), 4, shuffle=True)
    rate = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=STEPS)
    unet, optimizer, loader, rate = accelerator.prepare(unet, optimizer, loader, rate)
    losses = []
    for x0 in loader:
        noise = torch.randn_like(x0)
        t = torch.randint(scheduler.config.num_train_timesteps, x0.shape[:1])
        noisy = scheduler.add_noise(x0, noise, t)
        target = scheduler.get_velocity(x0, noise, t) if prediction == "v_prediction" else noise
        with accelerator.accumulate(unet):
            loss = torch.nn.functional.mse_loss(unet(noisy, t).sample.float(), target)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            average.step(unet.parameters())
        losses.append(loss.item())
    accelerator.save_state(str(folder / "state"))
    accelerator.load_state(str(folder / "state"))
    average.save_pretrained(folder / "ema")
    plain = accelerator.unwrap_model(unet)
    average.copy_to(plain.parameters())
    diffusers.DDPMPipeline(plain, scheduler).save_pretrained(folder / "pipeline")
    return losses


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_losses_are_those_of_diffusers(tmp_path, prediction):
    stock = train(diffusers, tmp_path / "stock", prediction=prediction)
    mine = train(ours, tmp_path / "mine", prediction=prediction)
    assert len(mine) == 6
    assert mine == pytest.approx(stock, rel=1e-4)
    one, other = (
        diffusers.UNet2DModel.from_pretrained(tmp_path / who / "ema").state_dict()
        for who in ("stock", "mine")
    )
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)


def test_mixed_precision_and_gradient_checkpointing(tmp_path):
    options = {"prediction": "epsilon", "mixed_precision": "bf16", "checkpointing": True}
    stock = train(diffusers, tmp_path / "stock", **options)
    mine = train(ours, tmp_path / "mine", **options)
    assert mine == pytest.approx(stock, rel=2e-2)


def test_the_checkpoint_goes_on_in_our_trainer_and_back(tmp_path):
    train(ours, tmp_path, prediction="epsilon")
    pipeline = tmp_path / "pipeline"
    stock = diffusers.DDPMPipeline.from_pretrained(pipeline)
    assert type(stock.unet) is diffusers.UNet2DModel
    assert type(stock.scheduler) is diffusers.DDPMScheduler

    network = nn.UNet2DModel.from_pretrained(pipeline)
    x, t = images()[:2], torch.tensor([10, 500])
    with torch.no_grad():
        torch.testing.assert_close(network(x, t), stock.unet(x, t).sample, rtol=1e-4, atol=1e-5)
    before = copy.deepcopy(network.state_dict())
    trainer = Trainer(
        network, schedules.linear(), data.ImageSet(images()),
        TrainingOptions(steps=2, batch_size=4, sample_every=0, warmup=1),
    )  # fmt: skip
    trainer.run(progress=False)
    assert not torch.equal(before["conv_in.weight"], network.conv_in.weight)

    network.eval().save_pretrained(pipeline / "unet")
    back = ours.UNet2DModel.from_pretrained(pipeline, subfolder="unet")
    with torch.no_grad():
        torch.testing.assert_close(back(x, t).sample, network(x, t), rtol=1e-4, atol=1e-5)
    assert SimpleNamespace(**back.config).block_out_channels == [16, 32]
