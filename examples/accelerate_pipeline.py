"""Accelerate a pipeline of diffusers in one line; compare its images and its time with before.

The pipeline is Stable Diffusion's in small, with random weights: nothing is downloaded.

python examples/accelerate_pipeline.py --channels 64 --size 256 --steps 10
"""

import argparse
import time

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

import fastdiff


def make_pipeline(channels: int) -> StableDiffusionPipeline:
    """A pipeline without a text encoder: it is called with states of 64 channels."""
    torch.manual_seed(0)
    widths = (channels, 2 * channels, 4 * channels, 4 * channels)
    unet = UNet2DConditionModel(block_out_channels=widths, cross_attention_dim=64)
    blocks = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    vae = AutoencoderKL(3, 3, *blocks, widths, latent_channels=4)
    models = {"vae": vae.eval(), "unet": unet.eval(), "text_encoder": None, "tokenizer": None}
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**models, scheduler=scheduler, **checker)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--channels", type=int, default=32, help="a multiple of 32")
    options.add_argument("--size", type=int, default=128, help="height and width of the image")
    options.add_argument("--steps", type=int, default=10, help="evaluations of the U-Net")
    args = options.parse_args()

    pipe = make_pipeline(args.channels)
    pipe.set_progress_bar_config(disable=True)
    prompt = torch.randn(2, 1, 16, 64)  # states of the prompt, and of the empty one

    def draw() -> tuple[torch.Tensor, float]:
        """An image with values in [0, 1], and the seconds that it took."""
        start = time.perf_counter()
        states = {"prompt_embeds": prompt[0], "negative_prompt_embeds": prompt[1]}
        sizes = {"height": args.size, "width": args.size, "num_inference_steps": args.steps}
        generator = torch.Generator().manual_seed(0)
        image = pipe(**states, **sizes, generator=generator, output_type="pt").images
        return image, time.perf_counter() - start

    draw()
    expected, before = draw()
    fastdiff.accelerate(pipe)
    draw()  # compiles, and measures algorithms
    image, after = draw()
    print(f"largest difference {(image - expected).abs().max():.1e}")
    print(f"before {before:.2f} s, after {after:.2f} s, ratio {before / after:.2f}")


if __name__ == "__main__":
    main()
