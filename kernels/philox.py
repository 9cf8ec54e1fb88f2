"""Philox4x32-10 (Salmon et al. 2011) and normal noise made of it (Box and Muller 1958).

Device functions for the kernels that compute noise. A counter (group, image, row) under a key of
two words gives four words, so four normal values: elements 4 group .. 4 group + 3 of an image,
counted in the contiguous order of its [C, ...] dimensions whatever its layout in memory is.

`normal_run` is for elements in that order: it computes each counter once, and a thread holds its
four values as one vector of float32 to store; 16-bit values are exchanged once between threads, to
be stored eight at a time. `normal_at` is for elements in any other order, such as channels-last
memory: it computes a counter for each element, and only the half of it that it needs. `normal_tile`
chooses between the two.

The polynomials are those of csrc/cpu/kernels/philox.h: minimax in the relative error, which is
below 3.2e-8 for the logarithm between sqrt(1/2) and sqrt(2) and below 3.3e-9 for sine and cosine
up to an eighth of a turn. No approximate function of the device is used, so a value is the same on
every card.
"""

import triton
import triton.language as tl


@triton.jit
def stream(seed, image, mask=None):
    """The streams of rows `image` of `seed` [N, 2] (int64): key (two words) and image number.

    `image` is a scalar or a block, and the results have its shape. `mask` is the mask of the load.
    """
    key = tl.load(seed + 2 * image, mask)
    number = tl.load(seed + 2 * image + 1, mask)
    return key.to(tl.uint32), (key >> 32).to(tl.uint32), number.to(tl.uint32)


@triton.jit
def words(group, key_low, key_high, image, row):
    """The four words, uint32, of counters `group` (int64). All arguments broadcast to `group`."""
    c0 = group.to(tl.uint32)
    c1 = (group >> 32).to(tl.uint32)
    c2 = image.to(tl.uint32)
    c3 = row.to(tl.uint32)
    k0 = key_low.to(tl.uint32)
    k1 = key_high.to(tl.uint32)
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = b.to(tl.uint32)
        c3 = a.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def radius(word):
    """sqrt(-2 ln(1 - u)), where u is the upper 24 bits of a word in units of 2^-24."""
    x = (0x1000000 - (word >> 8).to(tl.int32)).to(tl.float32)  # 2^24 (1 - u), which is exact
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # x = 2^exponent (1 + f)
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1
    p = 0.08700435608625412 * f - 0.14267486333847046
    p = p * f + 0.14914767444133759
    p = p * f - 0.1657758504152298
    p = p * f + 0.19963063299655914
    p = p * f - 0.2500133812427521
    p = p * f + 0.3333390951156616
    p = f * f * (f * p - 0.5) + f
    return tl.sqrt_rn(-2 * ((exponent - 24).to(tl.float32) * 0.6931471805599453 + p))


@triton.jit
def turn(word):
    """Sine and cosine of the distance of v from the nearest quarter turn, and that quarter, 0..4.

    v is the upper 24 bits of a word in units of 2^-24, a fraction of a turn. The distance is exact.
    The quarter tells how sine and cosine of 2 pi v follow: by exchange and signs.
    """
    v = (word >> 8).to(tl.int32)
    quarter = (v + 0x200000) >> 22
    t = (v - (quarter << 22)).to(tl.float32) * 2.384185791015625e-07  # -1/2..1/2 of a quarter
    s = t * t
    sine = -0.004601659441119196 * s + 0.0796800334531243
    sine = sine * s - 0.6459634603196706
    sine = (sine * s + 0.0707963217110894) * t + 1.5 * t  # 1.5 t is exact
    cosine = 0.000903766543869096 * s - 0.02086016511192402
    cosine = cosine * s + 0.2536692259655934
    cosine = cosine * s - 1.2337005425976737
    cosine = cosine * s + 1
    return sine, cosine, quarter


@triton.jit
def _negated(value, bit_one):
    """`value`, negated where bit 1 of `bit_one` is set."""
    sign = (bit_one.to(tl.uint32) & 2) << 30
    return (value.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def box_muller(word_u, word_v):
    """Two normal values, float32, from two words: one gives the radius, the other the angle."""
    r = radius(word_u)
    sine, cosine, quarter = turn(word_v)
    odd = (quarter & 1) != 0  # odd quarters exchange sine and cosine
    # The cosine is negative in quarters 1 and 2, the sine in quarters 2 and 3.
    a = _negated(tl.where(odd, sine, cosine), quarter + 1) * r
    b = _negated(tl.where(odd, cosine, sine), quarter) * r
    return a, b


@triton.jit
def normals(group, key_low, key_high, image, row):
    """The four normal values, float32, of counters `group` (int64): elements 4 group + 0..3."""
    w0, w1, w2, w3 = words(group, key_low, key_high, image, row)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def normal_run(group, key_low, key_high, image, row):
    """The normal values of counters [..., B] in the elements' order: float32 [..., 4 B].

    The values are those of consecutive elements if the last dimension of `group` is consecutive
    numbers. The stream's words are scalars or broadcast to `group`.
    """
    z0, z1, z2, z3 = normals(group, key_low, key_high, image, row)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def normal_at(element, key_low, key_high, image, row):
    """The normal values, float32, of the elements with indices `element` (int64), in any order."""
    w0, w1, w2, w3 = words(element >> 2, key_low, key_high, image, row)
    second = (element & 2) != 0
    r = radius(tl.where(second, w2, w0))
    sine, cosine, quarter = turn(tl.where(second, w3, w1))
    # Even elements are the cosine. Odd ones are the sine: the cosine of a quarter turn less.
    quarter = quarter - (element & 1).to(tl.int32)
    even = _negated(tl.where((quarter & 1) != 0, sine, cosine), quarter + 1)
    return even * r


@triton.jit
def normal_tile(
    first,
    key_low,
    key_high,
    image,
    row,
    pixels,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Normal values, float32 [R, COLUMNS], of R images, from element `first` on in memory order.

    `first` is a multiple of 4, and so is COLUMNS. The streams' words are [R, 1]. `pixels` and
    CHANNELS are the numbers of pixels and channels of an image. They are used channels-last only,
    where element e of the memory is channel e % CHANNELS of pixel e // CHANNELS.
    """
    if CHANNELS_LAST:
        element = (first + tl.arange(0, COLUMNS))[None, :]
        pixel = element // CHANNELS
        number = (element - pixel * CHANNELS) * pixels + pixel
        return normal_at(number.to(tl.int64), key_low, key_high, image, row)
    else:
        group = first // 4 + tl.arange(0, COLUMNS // 4).to(tl.int64)
        return normal_run(group[None, :], key_low, key_high, image, row)
