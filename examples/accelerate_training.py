"""Train diffusers' U-Net in a loop of accelerate, go on in fastdiff's trainer, and go back.

python examples/accelerate_training.py --steps 50 --out pipeline
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel

from fastdiff import data, nn, schedules
from fastdiff.diffusers import DDPMScheduler, UNet2DModel  # in place of diffusers'
from fastdiff.training import Trainer, TrainingOptions


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, default=20, help="of either optimizer")
    options.add_argument("--out", type=Path, default=Path("pipeline"), help="diffusers' folder")
    args = options.parse_args()

    torch.manual_seed(0)
    digits = data.ImageSet(data.digits("train", 8).images)
    images = torch.utils.data.DataLoader(digits.images / 127.5 - 1, 16, shuffle=True)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(8, 1, 1, block_out_channels=(32, 64), layers_per_block=1, **blocks)
    scheduler = DDPMScheduler()
    average = EMAModel(unet.parameters())
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    rate = get_cosine_schedule_with_warmup(optimizer, 10, args.steps)
    accelerator = Accelerator()
    unet, optimizer, images, rate = accelerator.prepare(unet, optimizer, images, rate)
    for _, x0 in zip(range(args.steps), images, strict=False):
        noise = torch.randn_like(x0)
        t = torch.randint(len(scheduler), x0.shape[:1], device=x0.device)
        with accelerator.accumulate(unet):
            eps = unet(scheduler.add_noise(x0, noise, t), t).sample
            loss = torch.nn.functional.mse_loss(eps, noise)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step(), rate.step(), optimizer.zero_grad()
        average.step(unet.parameters())
    print(f"accelerate: loss {loss.item():.3f}")
    average.copy_to(unet.parameters())
    DDPMPipeline(accelerator.unwrap_model(unet), scheduler).save_pretrained(args.out)

    recipe = TrainingOptions(steps=args.steps, batch_size=16, sample_every=0)
    trainer = Trainer(nn.UNet2DModel.from_pretrained(args.out), schedules.linear(), digits, recipe)
    losses = [trainer.step() for _ in range(args.steps)]
    print(f"fastdiff's trainer: loss {losses[-1]:.3f}")
    trainer.network.save_pretrained(args.out / "unet")
    print(DDPMPipeline.from_pretrained(args.out)(num_inference_steps=5).images[0].size)


if __name__ == "__main__":
    main()
