"""Self-conditioned networks: they are given their last estimate of x0 beside x_t.

Chen, Zhang & Hinton 2022, "Analog bits", arXiv:2208.04202, section 3.2. Such a network takes a
keyword argument ``estimate``, images like x: in sampling what its last evaluation said of x0, and
zeros at the beginning. In training half of the images get the estimate of a first pass, the others
zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.common.model import Model

SHARE = 0.5  # of the images that get an estimate in training, as in the paper


def limited(x0: Tensor) -> Tensor:
    """An estimate as networks are given it: within -1..1, where images are.

    The x0 that a prediction of eps implies is its error divided by alpha, so that at the most noise
    it would be thousands of times larger than an image.
    """
    return x0.clamp(-1, 1)


class Unaided(nn.Module):
    """A self-conditioned network whose estimate is always 0, a function of x and t alone.

    Args:
        model: (x, t, *, estimate, **cond) -> prediction.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.train(model.training if isinstance(model, nn.Module) else False)

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Any:
        """What the network returns for x without an estimate."""
        return self.model(x, t, **cond, estimate=torch.zeros_like(x))
