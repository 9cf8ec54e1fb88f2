"""EDM2's network by the equations of arXiv:2312.02696, appendix B, from the weights of a model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _unit(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Eq. 30 and 47: x over 1e-4 plus its norm, as if of the root of its number of elements."""
    count = 1
    for dim in dims:
        count *= x.shape[dim]
    return x / (1e-4 + torch.linalg.vector_norm(x, dim=dims, keepdim=True) / count**0.5)


def _weight(w: Tensor, gain: Any = 1.0) -> Tensor:
    flat = _unit(w.flatten(1), (1,)) * gain / w[0].numel() ** 0.5
    return flat.view(w.shape)


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x) / 0.596


def _sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    return ((1 - t) * a + t * b) / ((1 - t) ** 2 + t**2) ** 0.5


def _cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    na, nb = a.shape[1], b.shape[1]
    c = ((na + nb) / ((1 - t) ** 2 + t**2)) ** 0.5
    return torch.cat([(1 - t) * c / na**0.5 * a, t * c / nb**0.5 * b], 1)


def _attention(block: Any, x: Tensor) -> Tensor:
    part = block.attention
    n, c, h, w = x.shape
    qkv = torch.einsum("kc,nchw->nkhw", _weight(part.qkv.weight), x)
    q, k, v = _unit(qkv.view(n, 3, part.heads, c // part.heads, h * w), (3,)).unbind(1)
    weights = torch.einsum("nhcq,nhck->nhqk", q, k / q.shape[2] ** 0.5).softmax(3)
    y = torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(x.shape)
    return _sum(x, torch.einsum("kc,nchw->nkhw", _weight(part.out.weight), y), part.balance)


def _block(block: Any, x: Tensor, emb: Tensor, gain: Tensor, *, encoder: bool) -> Tensor:
    if encoder and isinstance(block.resample, torch.nn.AvgPool2d):
        x = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))
    elif not encoder and block.up:
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    shortcut = x
    if not isinstance(block.shortcut, torch.nn.Identity):
        shortcut = F.conv2d(x, _weight(block.shortcut.weight))
    if encoder:
        x = shortcut = _unit(shortcut, (1,))
    y = F.conv2d(_silu(x), _weight(block.conv1.weight), padding=1)
    y = y * (emb @ _weight(block.embedding.weight, gain).T + 1)[:, :, None, None]
    y = F.conv2d(_silu(y), _weight(block.conv2.weight), padding=1)
    x = _sum(shortcut, y, block.balance)
    if not isinstance(block.attention, torch.nn.Identity):
        x = _attention(block, x)
    return x.clip(-block.clip, block.clip)


def reference(model: Any, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
    """The model's output for images [N, C, H, W], times [N] and classes [N]."""
    config, fourier = model.config, model.fourier
    angles = t[:, None] * config.time_scale * fourier.frequencies + fourier.phases
    emb = 2**0.5 * angles.cos() @ _weight(model.noise_embedding.weight).T
    if labels is not None:
        one_hot = F.one_hot(labels, config.num_class_embeds).to(x.dtype)
        table = _weight(model.class_embedding.weight)
        emb = _sum(emb, one_hot * config.num_class_embeds**0.5 @ table.T, config.label_balance)
    emb = _silu(emb)
    gains = iter(model.embedding_gains)
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    x = F.conv2d(x, _weight(model.conv_in.weight), padding=1)
    skips = [x]
    for block in model.encoder:
        x = _block(block, x, emb, next(gains), encoder=True)
        skips.append(x)
    for block in model.decoder:
        if block.conv1.weight.shape[1] != x.shape[1] and not block.up:
            x = _cat(x, skips.pop(), config.concat_balance)
        x = _block(block, x, emb, next(gains), encoder=False)
    assert not skips
    return F.conv2d(x, _weight(model.conv_out.weight, model.out_gain), padding=1)
