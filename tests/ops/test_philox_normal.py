"""philox_normal: known answers of the generator, the same values everywhere, and their law."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import DTYPE_IDS, DTYPES, CountCalls, assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import fastdiff
from fastdiff import ops
from fastdiff.ops import reference

WORD = 0xFFFFFFFF
START = WORD  # the row of the noise that sampling starts from
SEEDS = torch.tensor([[0, 0], [1, 0], [-1, 3], [2**40 + 7, 2**32 + 1], [2**63 - 1, WORD]])

# Counter, key and words of Philox4x32-10, as published with the generator.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([WORD] * 4, [WORD] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words) -> None:
    found = reference.philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert [int(word) for word in found] == words


def words_of(z):
    """The upper 24 bits of the words that float64 normal values were made of."""
    a, b = z.view(-1, 2).unbind(1)
    u = 1 - torch.exp(-(a**2 + b**2) / 2)
    v = torch.atan2(b, a) / (2 * math.pi) % 1
    return (torch.stack([u, v], dim=1) * 2**24).round().long().flatten() & 0xFFFFFF


def python_words(seed, image, row, group):
    """Philox in Python's own integers."""
    c = [group & WORD, group >> 32, image & WORD, row]
    k0, k1 = seed & WORD, seed >> 32 & WORD
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k0, b & WORD, a >> 32 ^ c[3] ^ k1, a & WORD]
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return c


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("row", [0, 1, 12345, START])
def test_every_bit_of_the_integers(row, backend) -> None:
    with fastdiff.backend(backend):
        z = ops.philox_normal(SEEDS, row, (len(SEEDS), 2, 17, 4), torch.float64)
    for (seed, image), values in zip(SEEDS.tolist(), z, strict=True):
        wanted = [w >> 8 for i in range(34) for w in python_words(seed, image, row, i)]
        assert words_of(values).tolist() == wanted
    if row == 0:
        assert words_of(z[0])[:4].tolist() == [word >> 8 for word in KNOWN[0][2]]


def draw(seed, like):
    return [ops.philox_normal(seed, 3, like.shape, like.dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", [(5, 3, 5, 7), (5, 4, 40, 33), (5, 1), (5,)], ids=str)
def test_values(shape, dtype) -> None:
    assert_as_accurate(draw, SEEDS, torch.empty(shape, dtype=dtype))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**63 - 1), image=st.integers(-(2**63), 2**63 - 1),
    row=st.integers(0, WORD), shape=st.lists(st.integers(1, 70), min_size=1, max_size=2),
)  # fmt: skip
def test_any_seed(seed, image, row, shape) -> None:
    seeds = torch.tensor([[seed, image]])
    z = ops.philox_normal(seeds, row, (1, *shape), torch.float64)
    with fastdiff.backend("reference"):
        torch.testing.assert_close(z, ops.philox_normal(seeds, row, (1, *shape), torch.float64))
    group = (z.numel() - 1) // 4
    words = words_of(ops.philox_normal(seeds, row, (1, 4 * group + 4), torch.float64))
    assert words[-4:].tolist() == [word >> 8 for word in python_words(seed, image, row, group)]


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_a_value_depends_on_nothing_else(dtype) -> None:
    """Not on the batch, the shape, the number of elements, or threads."""
    z = ops.philox_normal(SEEDS, 2, (5, 3, 100, 41), dtype)
    for n in range(5):
        alone = ops.philox_normal(SEEDS[n : n + 1], 2, (1, 3, 100, 41), dtype)
        assert torch.equal(alone, z[n : n + 1])
    for count in (1, 2, 5, 63, 64, 65, 1023, 1024, 1025, 5000):
        assert torch.equal(ops.philox_normal(SEEDS, 2, (5, count), dtype), z.flatten(1)[:, :count])
    spread = torch.stack([SEEDS, SEEDS], dim=2)[..., 0]
    assert torch.equal(ops.philox_normal(spread, 2, z.shape, dtype), z)


def test_the_law_is_normal() -> None:
    seeds = torch.tensor([[s, i] for s in (0, 1, 2**33) for i in range(10)])
    z = ops.philox_normal(seeds, 0, (30, 40000))
    assert torch.isfinite(z).all()
    values = z.double().flatten().numpy()
    count = values.size
    assert stats.kstest(values, "norm").pvalue > 1e-3
    assert abs(values.mean()) < 4 / math.sqrt(count)
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs(stats.skew(values)) < 4 * math.sqrt(6 / count)
    assert abs(stats.kurtosis(values)) < 4 * math.sqrt(24 / count)
    assert abs(values).max() < 6.1  # sqrt(2 ln 2^24) = 5.77 is the largest there is


def test_streams_are_independent() -> None:
    """Neighbours in element, image, step and seed are not correlated, nor are their squares."""
    count = 200000
    base = {"seed": 5, "image": 7, "row": 9}

    def stream(**changes):
        at = {**base, **changes}
        seeds = torch.tensor([[at["seed"], at["image"]]])
        return ops.philox_normal(seeds, at["row"], (1, count), torch.float64)[0]

    z = stream()
    others = [stream(seed=6), stream(seed=5 + 2**32), stream(image=8), stream(row=10),
              stream(row=START), *(z.roll(lag) for lag in (1, 2, 3, 4, 64, 1024))]  # fmt: skip
    for other in others:
        assert not torch.equal(z, other)
        for f in (torch.clone, torch.square):
            pair = torch.stack([f(z), f(other)])
            assert abs(torch.corrcoef(pair)[0, 1].item()) < 4.5 / math.sqrt(count)


def test_extreme_words() -> None:
    """u_0 = 0 gives 0, and the largest u_0 the longest radius: no infinity, no NaN."""
    z = ops.philox_normal(torch.tensor([[0, i] for i in range(64)]), 0, (64, 2**18))
    assert torch.isfinite(z).all()
    assert z.abs().max() <= math.sqrt(2 * math.log(2**24)) * (1 + 1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [(0, 3, 4), (5, 0, 4), (0,)])
def test_nothing(shape, backend) -> None:
    with fastdiff.backend(backend):
        seeds = SEEDS[: shape[0]]
        assert ops.philox_normal(seeds, 0, shape).shape == shape


def test_opcheck_compile_and_meta() -> None:
    out = torch.empty(5, 3, 4)
    torch.library.opcheck(torch.ops.fastdiff.philox_normal.default, (SEEDS, 3, out))
    torch.library.opcheck(
        torch.ops.fastdiff.philox_normal.default, (SEEDS, 3, torch.empty(3, 4, 5).permute(2, 0, 1))
    )
    compiled = torch.compile(ops.philox_normal, fullgraph=True, backend="aot_eager")
    wanted = ops.philox_normal(SEEDS, 3, (5, 3, 4))
    assert torch.equal(compiled(SEEDS, 3, (5, 3, 4)), wanted)
    with CountCalls() as counted:
        ops.philox_normal(SEEDS, 3, (5, 3, 4))
    assert counted.names == ["aten.empty.memory_format", "fastdiff.philox_normal.default"]
    big = ops.philox_normal(SEEDS[:2].to("meta"), 3, (2, 2**20, 2**11))
    assert (big.numel(), big.device.type) == (2**32, "meta")


def test_strided_out() -> None:
    memory = torch.zeros(5, 7, 6)
    torch.ops.fastdiff.philox_normal(SEEDS, 3, memory[..., ::2])
    assert torch.equal(memory[..., ::2], ops.philox_normal(SEEDS, 3, (5, 7, 3)))
    assert not memory[..., 1::2].any()


REFUSED = {
    "images": ((SEEDS, 0, (4, 3)), ValueError),
    "no images": ((SEEDS, 0, ()), ValueError),
    "seed without images": ((SEEDS[:, 0], 0, (5, 3)), ValueError),
    "seed of another dtype": ((SEEDS.int(), 0, (5, 3)), TypeError),
    "row below": ((SEEDS, -1, (5, 3)), ValueError),
    "row above": ((SEEDS, 2**32, (5, 3)), ValueError),
    "integers": ((SEEDS, 0, (5, 3), torch.int64), TypeError),
    "8 bits": ((SEEDS, 0, (5, 3), torch.int8), TypeError),
}


@pytest.mark.parametrize(("arguments", "error"), REFUSED.values(), ids=REFUSED)
def test_refusals(arguments, error) -> None:
    seed, row, shape, dtype = (*arguments, torch.float32)[:4]
    with pytest.raises(error):
        torch.ops.fastdiff.philox_normal(seed, row, torch.empty(shape, dtype=dtype))
    for name in ("cpu", "reference"):
        with fastdiff.backend(name), pytest.raises(error):
            ops.philox_normal(*arguments)
