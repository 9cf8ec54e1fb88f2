"""Weaker models by perturbed self-attention, for guidance without a second network or a condition.

Such a model keeps the network's weights and loses what attention tells it of the whole image. Away
from it, by ``guidance.autoguided`` or another contrast, lie images of better structure.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.nn import UNet2DModel
from fastdiff.nn.self_attention import Attention

MIDDLE = ("mid_block",)  # the layers that both papers perturb by default

Attend = Callable[[tuple[int, int], Tensor, Tensor, Tensor], Tensor]


def perturbed_attention(model: nn.Module, layers: Sequence[str] = MIDDLE) -> nn.Module:
    """The network with each pixel attending to itself alone (Ahn et al. 2024, eq. 14).

    Perturbed-attention guidance, arXiv:2403.17377. The paper's scale s is s + 1 of ``autoguided``.

    Args:
        model: a U-Net of ``fastdiff.nn`` with self-attention. The result shares its weights.
        layers: the attention layers whose names begin with one of these are perturbed.

    Raises:
        TypeError: another kind of model.
        ValueError: no attention layer has such a name.

    Example:
        >>> weaker = guidance.perturbed_attention(model)
        >>> guided = guidance.autoguided(model, weaker, scale=2.0)
    """
    return _with_attention(model, layers, _own_value)


def smoothed_energy(
    model: nn.Module, sigma: float = math.inf, layers: Sequence[str] = MIDDLE
) -> nn.Module:
    """The network with queries blurred over the pixels (Hong 2024, arXiv:2408.00760, sec. 4).

    Smoothed energy guidance: a Gaussian blur of the queries blurs the attention's weights and
    lowers the curvature of its energy. Beyond an edge of the image there is nothing to blur with;
    weights of the blur that fall there are spread over the others. The paper's scale s is s + 1 of
    ``autoguided``.

    Args:
        model: a U-Net of ``fastdiff.nn`` with self-attention. The result shares its weights.
        sigma: standard deviation of the blur in pixels of the attention layer; infinite for the
            mean over all pixels, with which the paper's best images were made.
        layers: as of :func:`perturbed_attention`.

    Raises:
        TypeError: another kind of model.
        ValueError: a sigma that is not positive; no attention layer has such a name.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    return _with_attention(model, layers, partial(_of_blurred_queries, sigma))


def _own_value(size: tuple[int, int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v


def _of_blurred_queries(
    sigma: float, size: tuple[int, int], q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    rows, columns = (_blur(length, sigma, q) for length in size)
    blurred = torch.einsum("yr,xc,nhrcd->nhyxd", rows, columns, q.unflatten(2, size))
    return F.scaled_dot_product_attention(blurred.flatten(2, 3), k, v)


def _blur(length: int, sigma: float, like: Tensor) -> Tensor:
    """Weights [length, length] of a Gaussian blur, each row adding up to 1."""
    place = torch.arange(length, dtype=torch.float32, device=like.device)
    weights = torch.exp(-((place[:, None] - place) ** 2) / (2 * sigma**2))
    return (weights / weights.sum(1, keepdim=True)).to(like.dtype)


def _with_attention(model: nn.Module, layers: Sequence[str], attend: Attend) -> nn.Module:
    if not isinstance(model, UNet2DModel):
        raise TypeError(f"wanted a fastdiff.nn.UNet2DModel, got {type(model).__name__}")
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    weaker = copy.deepcopy(model, shared)
    # Attention over frames, a subclass, has no height and width to blur over.
    known = [name for name, part in weaker.named_modules() if type(part) is Attention]
    chosen = [name for name in known if name.startswith(tuple(layers))]
    if not chosen:
        raise ValueError(
            f"no attention layer has a name that begins with {' or '.join(map(repr, layers))}; "
            f"the model's are {', '.join(known) or 'none'}"
        )
    for name in chosen:
        parent, _, last = name.rpartition(".")
        setattr(weaker.get_submodule(parent), last, _Perturbed(weaker.get_submodule(name), attend))
    return weaker.eval() if not model.training else weaker


class _Perturbed(nn.Module):
    """An attention layer with another function of queries, keys and values."""

    def __init__(self, attention: nn.Module, attend: Attend) -> None:
        super().__init__()
        assert isinstance(attention, Attention)
        self.attention, self.attend = attention, attend

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        return self.attention.attended(x, partial(self.attend, (height, width)))
