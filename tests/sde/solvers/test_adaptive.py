"""The adaptive SDE solver on data whose score is known: right distributions, few evaluations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastdiff.sde import EDM, VE, VP, SubVP
from fastdiff.sde.solvers.adaptive import solve_adaptive
from fastdiff.sde.solvers.brownian import BrownianPath

pytestmark = pytest.mark.usefixtures("one_thread")
PROCESSES = pytest.mark.parametrize("sde", [VP(), SubVP(), VE(), EDM()], ids=lambda s: repr(s)[:3])
SCHEMES = pytest.mark.parametrize("scheme", ["exponential", "improved-euler"])
STD = 0.2


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def mixture(sde, mean=0.5, std=STD):
    """Two equal Gaussians at +-mean in every coordinate; one at 0 where it is 0."""

    def score(x, t):
        alpha, sigma = (level.view(-1, 1).to(x.dtype) for level in sde.levels(t))
        variance = (alpha * std) ** 2 + sigma**2
        return (alpha * mean * torch.tanh(alpha * mean * x / variance) - x) / variance

    return score


def final_cdf(sde, x, mean=0.5):
    alpha, sigma = sde.levels(torch.tensor(sde.smallest, dtype=torch.float64))
    normal = torch.distributions.Normal(0.0, ((alpha * STD) ** 2 + sigma**2).sqrt())
    return (normal.cdf(x - alpha * mean) + normal.cdf(x + alpha * mean)) / 2


def kolmogorov(sde, x, mean=0.5):
    """Distance of the empirical distribution of all coordinates from the true one."""
    levels = final_cdf(sde, x.double().flatten().sort().values, mean)
    grid = torch.arange(len(levels) + 1, dtype=torch.float64) / len(levels)
    return torch.maximum(grid[1:] - levels, levels - grid[:-1]).max().item()


def solve(sde, score, generator, shape=(4000, 1), dtype=torch.float64, **options):
    x = sde.prior_sample(shape, generator=generator, dtype=dtype)
    options = {"denoise": False, "progress": False, "generator": generator, **options}
    return solve_adaptive(score, sde, x, **options)


@PROCESSES
@pytest.mark.parametrize("mean", [0.0, 0.5], ids=["Gaussian", "mixture"])
@SCHEMES
def test_distribution(sde, mean, scheme, generator):
    """In one dimension, where the noise decides about every step, and is not chosen by it."""
    tolerance = {"exponential": 0.01, "improved-euler": 0.03}[scheme]
    found = solve(sde, mixture(sde, mean), generator, scheme=scheme, eps_rel=tolerance)
    assert kolmogorov(sde, found.x, mean) < 1.63 / math.sqrt(4000)  # 1% of true samples are off
    assert found.rejected.sum() > 0.1 * found.accepted.sum()


def test_new_noise_after_a_rejection_spreads_the_images(generator):
    """The published algorithm, and why it is not the default."""
    sde, published = VE(), {"scheme": "improved-euler", "redraw": True}
    found = solve(sde, mixture(sde), generator, **published)
    assert kolmogorov(sde, found.x) > 3 * 1.63 / math.sqrt(4000)
    assert found.x.std() > 1.1 * math.sqrt(0.25 + STD**2)
    # An image's error has less of a single number's chance in it.
    found = solve(sde, mixture(sde), generator, shape=(16, 256), **published)
    assert kolmogorov(sde, found.x) < 1.63 / math.sqrt(4096)


def published(sde, score, x, generator, eps_rel, eps_abs, h_max):
    """Jolicoeur-Martineau et al. 2021, algorithm 1, for one image: where it ends, and its times."""
    t, h, safety, exponent = sde.end, sde.end / 100, 0.9, 0.9
    before, times, rejected = x, [], 0

    def moved(at, t):
        time = torch.tensor([t], dtype=torch.float64)
        f, squared = (rate.item() for rate in sde.rates(time))
        return h * (squared * score(at, time) - f * at) + math.sqrt(h * squared) * z

    while t - sde.smallest > 1e-12:  # nothing is left but rounding
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        euler = x + moved(x, t)
        improved = (euler + x + moved(euler, t - h)) / 2
        times += [t, t - h]
        allowed = torch.maximum(euler.abs(), before.abs()).mul(eps_rel).clamp(min=eps_abs)
        error = ((euler - improved) / allowed).square().mean().sqrt().item()
        if error <= 1:
            x, before, t = improved, euler, t - h
        else:
            rejected += 1
        h = min(t - sde.smallest, safety * h * error**-exponent, h_max)
    return x, times, rejected


@PROCESSES
@pytest.mark.parametrize("share", [math.inf, 0.03], ids=["free", "limited"])
def test_the_published_algorithm_step_for_step(sde, share):
    """Every size of a step, good or not, is the one that the last error asks for."""
    known, asked = mixture(sde), []

    def score(x, t):
        asked.append(t.item())
        return known(x, t)

    options = {"eps_rel": 0.02, "eps_abs": 1 / 256, "h_max": share * sde.end}
    x = sde.prior_sample((1, 64), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = solve_adaptive(
        score, sde, x, scheme="improved-euler", redraw=True, denoise=False, progress=False,
        generator=torch.Generator().manual_seed(4), **options,
    )  # fmt: skip
    again = torch.Generator().manual_seed(4)
    wanted, times, rejected = published(sde, known, x, again, **options)
    assert len(asked) == len(times)
    assert found.rejected.item() == rejected
    torch.testing.assert_close(float64(asked), float64(times), rtol=1e-11, atol=1e-11 * sde.end)
    torch.testing.assert_close(found.x, wanted, rtol=1e-11, atol=1e-11)


def euler_maruyama(sde, score, x, steps, generator):
    times = torch.linspace(sde.end, sde.smallest, steps + 1, dtype=torch.float64)
    for start, stop in itertools.pairwise(times):
        t, h = start.expand(len(x)), start - stop
        f, squared = sde.rates(start)
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        x = x - h * (f * x - squared * score(x, t)) + (h * squared).sqrt() * z
    return x


@SCHEMES
def test_fewer_evaluations_than_euler_maruyama(scheme, generator):
    """Narrow data need small steps at the end only; the deviation is known to 0.6% here."""
    sde, std = VP(), 0.05
    score, shape = mixture(sde, 0.0, std), (64, 256)
    alpha, sigma = sde.levels(torch.tensor(sde.smallest, dtype=torch.float64))
    true = ((alpha * std) ** 2 + sigma**2).sqrt()
    tolerance = {"exponential": 1 / 256, "improved-euler": 2 / 256}[scheme]
    found = solve(
        sde, score, generator, shape=shape, scheme=scheme, eps_rel=0.03, eps_abs=tolerance
    )
    assert (found.x.std() / true - 1).abs() < 0.012
    steps = 2 * int(found.evaluations.double().mean())
    x = sde.prior_sample(shape, generator=generator, dtype=torch.float64)
    x = euler_maruyama(sde, score, x, steps, generator)
    assert x.std() / true - 1 > 0.02


def test_exponential_steps_need_a_quarter_of_the_evaluations(generator):
    """At tolerances that give the same accuracy: both pass ``test_distribution``."""
    euler, exponential = (
        solve(VP(), mixture(VP()), generator, scheme=scheme, eps_rel=tolerance)
        for scheme, tolerance in (("improved-euler", 0.03), ("exponential", 0.01))
    )
    spent = exponential.evaluations.double().mean()
    assert 2.5 * spent < euler.evaluations.double().mean()


@pytest.mark.parametrize("sde", [VP(), SubVP(), VE(), EDM()], ids=lambda s: repr(s)[:3])
def test_exponential_steps_are_exact_where_the_clean_image_is_known(sde, generator):
    """D is constant then: the ends have the posterior's mean and variance after any steps."""
    clean = 0.3

    def score(x, t):
        alpha, sigma = (level.view(-1, 1) for level in sde.levels(t))
        return (alpha * clean - x) / sigma**2

    found = solve(sde, score, generator, shape=(2000, 8), eps_rel=10.0, h_max=math.inf)
    alpha, sigma = sde.levels(torch.tensor(sde.smallest, dtype=torch.float64))
    z = (found.x - alpha * clean) / sigma
    assert found.evaluations.max() < 10
    assert abs(z.mean().item()) < 4 / math.sqrt(z.numel())
    assert abs(z.var().item() - 1) < 4 * math.sqrt(2 / z.numel())


@SCHEMES
def test_arrived_images_cost_nothing(scheme, generator):
    """The third image's data are narrow: Euler's steps are small there, exponential ones large."""
    sde, asked, batches = VP(), torch.zeros(3, dtype=torch.int64), []
    spread = torch.tensor([1.0, 0.3, 0.003], dtype=torch.float64)

    def score(x, t, index):
        asked[index] += 1
        batches.append(len(index))
        alpha, sigma = (level.view(-1, 1) for level in sde.levels(t))
        return -x / ((alpha * spread[index, None]) ** 2 + sigma**2)

    found = solve(
        sde, score, generator, shape=(3, 8), scheme=scheme, eps_rel=0.02, conditioned=True
    )
    assert found.evaluations.tolist() == asked.tolist()
    tries = found.accepted + found.rejected
    counted = 2 * tries if scheme == "improved-euler" else 1 + tries
    assert found.evaluations.tolist() == counted.tolist()
    assert sum(batches) == found.evaluations.sum()
    assert batches[0] == 3
    assert batches[-1] == 1
    first, second, narrow = found.evaluations.tolist()
    if scheme == "improved-euler":
        assert first < second < narrow
    else:  # whose clean image is as good as known: what is exact for it
        assert narrow < min(first, second) / 2


def test_rejects_steps_where_the_score_turns_stiff(generator):
    sde = VP()

    def score(x, t):
        return -x * torch.where(t < 0.4, 300.0, 1.0).view(-1, 1)

    found = solve(sde, score, generator, shape=(3, 64))
    smooth = solve(sde, lambda x, t: -x, generator, shape=(3, 64))
    assert bool((found.rejected > smooth.rejected).all())
    assert bool((found.evaluations > 2 * smooth.evaluations).all())
    assert found.x.abs().max() < 1


def test_tolerances_and_norms(generator):
    sde = VP()
    counts = [
        solve(sde, mixture(sde), generator, shape=(4, 64), **options).evaluations.sum().item()
        for options in ({"eps_rel": 0.4}, {}, {"eps_rel": 0.02}, {"norm": "linf"})
    ]
    assert counts[0] < counts[1] < counts[2]
    assert counts[1] < counts[3]


@SCHEMES
def test_denoising_is_the_mean_of_the_clean_image(scheme):
    sde = EDM(sigma_min=0.1)
    raw, mean = (
        solve(
            sde, mixture(sde, 0.0), torch.Generator().manual_seed(1), shape=(50, 2),
            scheme=scheme, eps_rel=0.02, denoise=choice,
        )
        for choice in (False, True)
    )  # fmt: skip
    wanted = raw.x * STD**2 / (STD**2 + 0.1**2)
    if scheme == "improved-euler":
        assert mean.evaluations.tolist() == (raw.evaluations + 1).tolist()
        torch.testing.assert_close(mean.x, wanted, rtol=1e-12, atol=0)
    else:  # of the last prediction, which the tolerance parts from its correction
        assert mean.evaluations.tolist() == raw.evaluations.tolist()
        torch.testing.assert_close(mean.x, wanted, rtol=0, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_repeatability(dtype):
    sde, seen = VP(), set()

    def score(x, t):
        seen.add((x.dtype, t.dtype))
        return mixture(sde)(x.flatten(1), t).view(x.shape)

    runs = [
        solve(sde, score, torch.Generator().manual_seed(2), (3, 2, 4), dtype=dtype, denoise=True)
        for _ in range(2)
    ]
    assert seen == {(dtype, torch.float64)}
    assert runs[0].x.dtype == dtype
    assert runs[0].x.shape == (3, 2, 4)
    assert torch.equal(runs[0].x, runs[1].x)


def test_no_images():
    found = solve_adaptive(mixture(VP()), VP(), torch.zeros(0, 3), progress=False)
    assert found.x.shape == (0, 3)


def test_a_path_is_brownian_however_it_is_cut(generator):
    """Increments have variance h and are independent; parts of a known one add up to it."""
    x = torch.zeros(20_000, 1, dtype=torch.float64)
    path = BrownianPath(x, generator)
    everyone = torch.ones(len(x), dtype=torch.bool)

    def tried(h):
        return path.increment(torch.full((len(x),), h, dtype=torch.float64))

    whole = tried(1.0)
    most = tried(0.6)  # cuts it
    parts = []
    for h in (0.2, 0.3, 0.1, 0.7):  # inside, across a time that is known, up to it, beyond the end
        parts.append(tried(h))
        torch.testing.assert_close(tried(h), parts[-1])  # as long as it is not left behind
        path.advance(everyone)
    assert path.gaps.shape[1] == 0
    torch.testing.assert_close(sum(parts[:3]), most)
    joined = sum(parts)
    covariance = torch.cov(torch.cat([*parts, whole], 1).T)
    wanted = torch.diag(torch.tensor([0.2, 0.3, 0.1, 0.7, 1.0], dtype=torch.float64))
    wanted[:4, 4] = wanted[4, :4] = torch.tensor([0.2, 0.3, 0.1, 0.4], dtype=torch.float64)
    torch.testing.assert_close(covariance, wanted, rtol=0, atol=0.04)  # 4 deviations
    assert (joined - whole).var().item() == pytest.approx(0.3, abs=0.015)


def test_paths_are_cut_each_in_its_own_way(generator):
    path = BrownianPath(torch.zeros(3, 2, dtype=torch.float64), generator)
    first = path.increment(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    path.advance(torch.tensor([True, False, False]))
    second = path.increment(torch.tensor([1.0, 1.0, 4.0], dtype=torch.float64))
    assert (path.gaps > 0).sum(1).tolist() == [1, 2, 2]
    path.advance(torch.tensor([True, True, True]))
    assert (path.gaps > 0).sum(1).tolist() == [0, 1, 0]
    rest = path.increment(torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(second[1] + rest[1], first[1])
    path.keep(torch.tensor([1]))
    assert (path.gaps > 0).sum(1).tolist() == [1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        pytest.param({"eps_rel": 0.0}, ValueError, "eps_rel must be positive", id="eps_rel"),
        pytest.param({"eps_abs": -1.0}, ValueError, "eps_abs must be positive", id="eps_abs"),
        pytest.param({"h_init": math.nan}, ValueError, "h_init must be positive", id="h_init"),
        pytest.param({"h_max": 0.0}, ValueError, "h_max must be positive", id="h_max"),
        pytest.param({"scheme": "x"}, ValueError, "unknown scheme 'x', wanted", id="scheme"),
        pytest.param(
            {"norm": "l1"}, ValueError, "unknown norm 'l1', wanted one of l2, linf", id="norm"
        ),
        pytest.param({"max_evaluations": 0}, ValueError, "at least 1, got 0", id="no evaluations"),
        pytest.param(
            {"max_evaluations": 11},
            RuntimeError,
            "sample 0 is stuck .* used up max_evaluations .*eps_rel 0.1, eps_abs 0.0078125",
            id="evaluations",
        ),
        pytest.param({"x": torch.zeros(2, 3).int()}, TypeError, "floating point", id="integers"),
        pytest.param(
            {"score": lambda x, t: x[:, :1]}, ValueError, "shape of x", id="score of another shape"
        ),
        pytest.param(
            {"score": lambda x, t: torch.where(t[:, None] < 0.5, math.inf, -x)},
            FloatingPointError,
            r"score of sample [01] is not finite at t = 0\.4",
            id="infinite score",
        ),
    ],
)
def test_refusals(options, error, message, generator):
    given = {"score": mixture(VP()), "x": torch.ones(2, 3), "progress": False, **options}
    with pytest.raises(error, match=message):
        solve_adaptive(given.pop("score"), VP(), given.pop("x"), generator=generator, **given)
