"""Arguments that the tests of attention and of its gradients share."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)
DTYPE_IDS = ("f32", "bf16")

# B, H, L, S, D, D'; the kernels take 48 or 64 queries and 256 keys at a time
SHAPES = {
    "one of everything": (1, 1, 1, 1, 1, 1),
    "one query": (2, 3, 1, 70, 13, 13),
    "one key": (2, 3, 70, 1, 13, 13),
    "odd": (2, 2, 33, 77, 13, 13),
    "47 queries": (1, 2, 47, 9, 8, 8),
    "48 queries": (1, 2, 48, 9, 8, 8),
    "49 queries": (1, 2, 49, 9, 8, 8),
    "255 keys": (1, 2, 50, 255, 40, 40),
    "256 keys": (1, 2, 50, 256, 40, 40),
    "257 keys": (1, 2, 50, 257, 40, 40),
    "513 queries and keys": (1, 1, 513, 513, 16, 16),
    "width 1": (1, 2, 30, 300, 1, 1),
    "width 64": (2, 2, 64, 64, 64, 64),
    "width 256": (1, 1, 64, 300, 256, 256),
    "wider values": (1, 2, 20, 300, 8, 37),
    "narrower values": (1, 2, 20, 300, 40, 3),
    "scores without a width": (1, 2, 20, 300, 0, 5),
    "values without a width": (1, 2, 5, 6, 4, 0),
    "no images": (0, 2, 5, 6, 4, 4),
    "no heads": (2, 0, 5, 6, 4, 4),
    "no queries": (2, 2, 0, 6, 4, 4),
    "text": (2, 5, 64, 77, 40, 40),
}


def make(shape, dtype=torch.float32, seed=0):
    """q, k and v."""
    g = torch.Generator().manual_seed(seed)
    b, h, queries, keys, width, value_width = shape
    sizes = (queries, width), (keys, width), (keys, value_width)
    return tuple(torch.randn(b, h, *size, generator=g).to(dtype) for size in sizes)


# What is left of 32, in which products of bfloat16 take each dimension, or of 16 lanes.
TAILS = {
    "queries": lambda n: (1, 2, n, 9, 8, 8),
    "queries of a second unit": lambda n: (1, 1, 64 + n, 9, 8, 8),
    "keys": lambda n: (1, 2, 5, n, 8, 8),
    "keys of a second block": lambda n: (1, 1, 5, 256 + n, 8, 8),
    "width": lambda n: (1, 2, 5, 9, n, 8),
    "width of values": lambda n: (1, 2, 5, 9, 8, n),
    "width of values of a second panel": lambda n: (1, 1, 5, 9, 8, 32 + n),
}


def rising(keys: int) -> Tensor:
    """A factor for each key, so that every block of keys has a new largest score."""
    return torch.linspace(0.1, 3, keys)[:, None]


SCORES = {
    "30 times as large": lambda q, k: (q * 30, k),
    "rising": lambda q, k: (q.abs() * 4, k.abs() * rising(k.shape[2])),
    "falling": lambda q, k: (q.abs() * 4, k.abs() * rising(k.shape[2]).flip(0)),
    "very negative": lambda q, k: (q.abs() * 1e3, -k.abs() * rising(k.shape[2])),
    "all equal": lambda q, k: (q, k[:, :, :1].expand_as(k)),
    "one that towers": lambda q, k: (
        q.abs(), k.abs() * torch.where(torch.arange(k.shape[2]) == 290, 1e4, 1)[:, None],
    ),
    "tiny": lambda q, k: (q * 1e-20, k * 1e-20),
}  # fmt: skip


# In which tensor, where and what. All else is positive, so that there are scores of -inf.
BAD = {
    "nan in q": (0, (0, 1, 20, 3), torch.nan),
    "nan in k": (1, (0, 1, 290, 3), torch.nan),
    "nan in the first key": (1, (0, 1, 0, 0), torch.nan),
    "nan in v": (2, (0, 1, 290, 3), torch.nan),
    "inf in q": (0, (0, 1, 20, 3), torch.inf),
    "inf in k": (1, (0, 1, 290, 3), torch.inf),
    "inf in v": (2, (0, 1, 290, 3), torch.inf),
    "-inf in v": (2, (0, 1, 2, 3), -torch.inf),
    "nan in the last key": (1, (0, 1, 599, 3), torch.nan),
    "inf in the last key": (1, (0, 1, 599, 3), torch.inf),
    "nan in the last v": (2, (0, 1, 599, 3), torch.nan),
    "inf in the last v": (2, (0, 1, 599, 4), torch.inf),
    "a query that scores -inf": (0, (0, 1, 20), -torch.inf),
    "a key that scores -inf": (1, (0, 1, 290), -torch.inf),
    "a first key that scores -inf": (1, (0, 1, 0), -torch.inf),
    "256 first keys that score -inf": (1, (0, 1, slice(256)), -torch.inf),
    "256 keys that score -inf": (1, (0, 1, slice(256, 512)), -torch.inf),
    "a last key that scores -inf": (1, (0, 1, 599), -torch.inf),
    "all keys score -inf": (1, (0, 1), -torch.inf),
    "largest floats": (1, (0, 1, slice(100, 300)), torch.finfo(torch.float32).max),
}

VIEWS = {
    "slices of one product": lambda t: t.view(2, 60, 3, 2, 13).permute(2, 0, 3, 1, 4),
    "heads innermost": lambda t: t.view(3, 2, 60, 13, 2).permute(0, 1, 4, 2, 3),
    "queries innermost": lambda t: t.view(3, 2, 2, 13, 60).mT,
    "heads repeated": lambda t: t.view(3, 2, 2, 60, 13)[:, :, :1].expand(-1, -1, 2, -1, -1),
    "images repeated": lambda t: t.view(3, 2, 2, 60, 13)[:, :1].expand(-1, 2, -1, -1, -1),
    "rows repeated": lambda t: t.view(3, 2, 2, 60, 13)[..., :1, :].expand(-1, -1, -1, 60, -1),
    "one value repeated": lambda t: t[:3].view(3, 1, 1, 1, 1).expand(3, 2, 2, 60, 13),
    "every other value": lambda t: t.view(3, 2, 2, 30, 26)[..., ::2],
    "width 1 of more": lambda t: t.view(3, 2, 2, 60, 13)[..., 4:5],
}
