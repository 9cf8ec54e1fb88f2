"""Train a U-Net on signals, made here, and compare what it draws with them by their spectra.

A signal is a sine or a sawtooth wave of 2 to 5 periods, with a phase of its own. A model that has
learned them draws signals with one strong frequency, each of the four as often as the data does.

    python examples/signals.py --steps 1000
"""

import argparse

import torch
from torch import Tensor

from fastdiff import schedules
from fastdiff.data import ImageSet
from fastdiff.training import Trainer, TrainingOptions, make_unet

LENGTH, PERIODS = 64, (2, 3, 4, 5)


def make_signals(count: int, generator: torch.Generator) -> Tensor:
    """[count, 1, LENGTH] in [-1, 1]."""
    periods = torch.randint(PERIODS[0], PERIODS[-1] + 1, (count, 1, 1), generator=generator)
    phase = torch.rand(count, 1, 1, generator=generator)
    turns = periods * torch.arange(LENGTH) / LENGTH + phase
    sawtooth = torch.rand(count, 1, 1, generator=generator) < 0.5
    return torch.where(sawtooth, 2 * (turns % 1) - 1, (2 * torch.pi * turns).sin())


def show(name: str, signals: Tensor) -> None:
    power = torch.fft.rfft(signals.double().squeeze(1)).abs().square()
    pure = power.max(dim=1).values / power.sum(dim=1)
    strongest = power.argmax(dim=1)
    shares = "  ".join(f"{(strongest == p).double().mean():6.2f}" for p in PERIODS)
    print(f"{name:<8} {signals.std():9.2f}  {pure.mean():20.2f}  {shares}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, default=1000, help="of the training")
    options.add_argument("--samples", type=int, default=500)
    args = options.parse_args()
    data = make_signals(4000, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = make_unet((LENGTH,), widths=(32, 64), layers_per_block=1, attention=(1,))
    chosen = TrainingOptions(steps=args.steps, batch_size=32, lr=1e-3, sample_every=0)
    trainer = Trainer(
        model, schedules.cosine(1000), ImageSet(data, dimensions=1), chosen, prediction="v"
    )
    trainer.run()
    diffusion = trainer.checkpoint().diffusion()
    noise = torch.Generator().manual_seed(1)
    drawn = diffusion.sample((args.samples, 1, LENGTH), steps=20, generator=noise, progress=False)
    print(f"{'':<8} deviation  strongest frequency's  share of {PERIODS} periods")
    show("data", data)
    show("samples", drawn)


if __name__ == "__main__":
    main()
