"""kernels/philox.py: the words bit for bit, and the normal values made of any word."""

from __future__ import annotations

import math

import pytest
import torch

from fastdiff.ops import reference

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

philox = pytest.importorskip("fastdiff.kernels.philox")

WORD = 0xFFFFFFFF
COUNTERS = 256
SEEDS = torch.tensor([[0, 0], [-1, -5], [2**40 + 7, 2**32 + 1], [-(2**63), WORD]])


@triton.jit
def _words(seed, row, first, out, COUNTERS: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    key_low, key_high, number = philox.stream(seed, image)
    counter = tl.arange(0, COUNTERS)
    group = tl.load(first) + counter
    place = out + image * 4 * COUNTERS + 4 * counter
    a, b, c, d = philox.words(group, key_low, key_high, number, tl.load(row))
    tl.store(place, a.to(tl.int64))
    tl.store(place + 1, b.to(tl.int64))
    tl.store(place + 2, c.to(tl.int64))
    tl.store(place + 3, d.to(tl.int64))


@triton.jit
def _values(seed, row, first, out, again, COUNTERS: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    key_low, key_high, number = philox.stream(seed, image)
    element = tl.arange(0, 4 * COUNTERS)
    group = tl.load(first) + tl.arange(0, COUNTERS)
    place = image * 4 * COUNTERS + element
    z = philox.normal_run(group, key_low, key_high, number, tl.load(row))
    tl.store(out + place, z)
    z = philox.normal_at(4 * tl.load(first) + element, key_low, key_high, number, tl.load(row))
    tl.store(again + place, z)


@triton.jit
def _box_muller(u, v, cosine, sine, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    a, b = philox.box_muller(tl.load(u + place).to(tl.uint32), tl.load(v + place).to(tl.uint32))
    tl.store(cosine + place, a)
    tl.store(sine + place, b)


@pytest.fixture
def device(gpu):
    if not gpu.is_triton:
        pytest.skip("device functions in Triton")
    return gpu.device


@pytest.mark.parametrize("row", [0, 1, 12345, WORD], ids=hex)
@pytest.mark.parametrize("first", [0, 2**32 - 100, 2**35 + 1], ids=hex)
def test_words_are_those_of_the_reference(device, first, row) -> None:
    found = torch.empty(len(SEEDS), COUNTERS, 4, dtype=torch.int64, device=device)
    start, at = (torch.tensor([value], device=device) for value in (first, row))
    _words[(len(SEEDS),)](SEEDS.to(device), at, start, found, COUNTERS=COUNTERS)
    group = torch.arange(COUNTERS) + first
    for (seed, image), words in zip(SEEDS.tolist(), found.cpu(), strict=True):
        counter = (group & WORD, group >> 32, *(torch.tensor(w & WORD) for w in (image, row)))
        key = (torch.tensor(seed & WORD), torch.tensor(seed >> 32 & WORD))
        wanted = reference.philox(counter, key)
        assert torch.equal(words, torch.stack(torch.broadcast_tensors(*wanted), dim=1))


def test_a_value_is_the_same_by_itself_and_in_a_run(device) -> None:
    run, alone = (torch.empty(len(SEEDS), 4 * COUNTERS, device=device) for _ in range(2))
    first, row = (torch.tensor([value], device=device) for value in (2**33 - 5, WORD))
    _values[(len(SEEDS),)](SEEDS.to(device), row, first, run, alone, COUNTERS=COUNTERS)
    assert torch.equal(run, alone)
    assert run.unique().numel() > 0.99 * run.numel()


def draw(u, v, device):
    """Values of these upper 24 bits of words, and in float64; as many as the longer has."""
    size, block = max(u.numel(), v.numel()), 4096
    size += -size % block
    u, v = (value.repeat(-(-size // value.numel()))[:size] for value in (u, v))
    found = [torch.empty(size, device=device) for _ in range(2)]
    words = [(value << 8 | 0xA5).to(device) for value in (u, v)]  # the lower bits do not count
    _box_muller[(size // block,)](*words, *found, SIZE=block)
    quarter = v + 2**21 >> 22
    angle = (v - (quarter << 22)).double() * (math.pi / 2 * 2.0**-22)
    radius = torch.sqrt(-2 * torch.log1p(-u.double() * 2.0**-24))
    circle = torch.stack([angle.cos(), angle.sin(), -angle.cos(), -angle.sin()])
    cosine = circle.gather(0, (-quarter % 4)[None])[0]
    # cos(a + q turns/4) is cos, -sin, -cos, sin of a, which is the circle walked backwards.
    sine = circle.gather(0, ((1 - quarter) % 4)[None])[0]
    return [value.cpu() for value in found], [radius * cosine, radius * sine]


def units(found, wanted):
    """The error in units in the last place."""
    power = torch.frexp(wanted).exponent.double().clamp(min=-125)
    return ((found.double() - wanted).abs() / torch.exp2(power - 24)).max().item()


STEPS = torch.arange(0, 2**24, 97)
ENDS = torch.cat([torch.arange(4096), 2**24 - 1 - torch.arange(4096)])
TURNS = torch.cat([(at << 21) + torch.arange(-2048, 2048) for at in range(9)]) % 2**24


@pytest.mark.parametrize(
    ("u", "v"),
    [
        (torch.cat([ENDS, STEPS]), STEPS.flip(0)),
        (STEPS, TURNS),
        (ENDS, torch.arange(0, 2**24, 2**21)),
        (torch.tensor([0, 1, 2, 2**23, 2**24 - 2, 2**24 - 1, 4913934]), STEPS),
    ],
    ids=["steps", "around eighths of a turn", "ends", "few radii"],
)
def test_normal_values_of_any_word(device, u, v) -> None:
    """Radius, turn and product are each rounded, which adds up to 3.3 units at most."""
    for found, wanted in zip(*draw(u, v, device), strict=True):
        assert units(found, wanted) <= 4


def test_extreme_words(device) -> None:
    (cosine, sine), _ = draw(torch.tensor([0, 2**24 - 1]), torch.tensor([0]), device)
    assert cosine[0] == 0 == sine[0]
    assert cosine[1] == pytest.approx(math.sqrt(2 * math.log(2**24)), rel=1e-6)
    assert sine[1] == 0
