"""Every sampler of k-diffusion against its formula, and our own samplers in its manner."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from accuracy import CountCalls
from sigma_oracles import SAMPLERS, dpm_fast

import fastdiff.k_diffusion as K
from fastdiff import samplers

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:torchsde is not installed"),
]

HIGH, LOW = 14.6, 0.03
CHURN = {"s_churn": 8.0, "s_tmin": 0.1, "s_tmax": 3.0, "s_noise": 1.1}
CASES = [
    ("euler", {}), ("euler", {"s_churn": 3.0}), ("euler", CHURN),
    ("heun", {}), ("heun", {"s_churn": 3.0}), ("heun", CHURN),
    ("dpm_2", {}), ("dpm_2", {"s_churn": 3.0}), ("dpm_2", CHURN),
    ("euler_ancestral", {}), ("euler_ancestral", {"eta": 0.4, "s_noise": 1.2}),
    ("dpm_2_ancestral", {}), ("dpm_2_ancestral", {"eta": 0.4, "s_noise": 1.2}),
    ("dpmpp_2s_ancestral", {}), ("dpmpp_2s_ancestral", {"eta": 0.0}),
    ("lms", {}), ("lms", {"order": 2}),
    ("dpmpp_sde", {}), ("dpmpp_sde", {"eta": 0.4, "s_noise": 1.2, "r": 0.4}),
    ("dpmpp_2m", {}),
    ("dpmpp_2m_sde", {}), ("dpmpp_2m_sde", {"eta": 0.4, "solver_type": "heun"}),
    ("dpmpp_3m_sde", {}), ("dpmpp_3m_sde", {"eta": 0.0}), ("dpmpp_3m_sde", {"s_noise": 1.2}),
]  # fmt: skip
ROUNDING = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 0.04}


def clean(x, sigma, scale=1.0):
    """Some smooth denoiser, of sigma [N] or a number."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype).view(-1, *[1] * (x.ndim - 1))
    return 0.5 * scale * torch.sin(x) + 0.3 * x / (1 + sigma * sigma)


def begin(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return (HIGH * torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)).to(dtype)


def noises(x, seed=2):
    """A function that gives the noise that torch.randn_like will give after the same seed."""
    torch.manual_seed(seed)
    return lambda *levels: torch.randn_like(x)


def grid(steps, *, zero=True):
    levels = K.get_sigmas_karras(steps + (not zero), LOW, HIGH).double()
    return levels if zero else levels[:-1]


def assert_close(found, wanted, dtype=torch.float64):
    error = (found.double() - wanted.double()).abs().max() / wanted.abs().max()
    assert error < ROUNDING[dtype]


def options_of(name, options, x):
    takes_noise = "noise_sampler" in inspect.signature(getattr(K, f"sample_{name}")).parameters
    return {**options, "noise_sampler": noises(x)} if takes_noise else options


@pytest.mark.parametrize("zero", [True, False], ids=["to zero", "to sigma_min"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20], ids="{} steps".format)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_the_formula(name, options, steps, zero):
    x, sigmas = begin(), grid(steps, zero=zero)
    given = x.clone()
    draw = noises(x)
    wanted = SAMPLERS[name](clean, x, sigmas.tolist(), draw, **options)
    sample = getattr(K, f"sample_{name}")
    torch.manual_seed(2)
    found = sample(clean, x, sigmas, disable=True, **options_of(name, options, x))
    assert_close(found, wanted)
    assert torch.equal(x, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_the_formula_in_other_dtypes(name, options, dtype):
    """From float32 levels; a run rounds x once a step."""
    x, sigmas, told = begin(dtype), grid(7).float(), []

    def model(x, sigma):
        told.append((x.dtype, sigma.dtype, sigma.shape))
        return (0.1 * x.double() / (1 + sigma.double().view(-1, 1, 1, 1) ** 2)).to(x.dtype)

    draw = noises(x)
    wanted = SAMPLERS[name](
        lambda x, sigma: 0.1 * x / (1 + sigma**2),
        x.double(),
        sigmas.tolist(),
        lambda: draw().double(),
        **options,
    )
    torch.manual_seed(2)
    sample = getattr(K, f"sample_{name}")
    found = sample(model, x, sigmas, disable=True, **options_of(name, options, x))
    assert found.dtype == dtype
    assert set(told) == {(dtype, dtype, torch.Size([2]))}
    assert_close(found, wanted, dtype)


@pytest.mark.parametrize("options", [{}, {"eta": 0.6, "s_noise": 1.1}], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9, 10, 11])
def test_dpm_fast(n, options):
    x = begin()
    calls = []

    def model(x, sigma):
        calls.append(sigma[0].item())
        return clean(x, sigma)

    draw = noises(x)
    wanted = dpm_fast(clean, x, [HIGH, LOW], draw, n=n, **options)
    torch.manual_seed(2)
    info = []
    found = K.sample_dpm_fast(model, x, LOW, HIGH, n, callback=info.append, disable=True, **options)
    assert_close(found, wanted)
    assert len(calls) == n
    assert [each["i"] for each in info] == list(range(n // 3 + 1))
    assert info[-1]["t"].exp().reciprocal().item() == pytest.approx(info[-1]["sigma"].item())


@pytest.mark.parametrize("name", samplers.names())
def test_every_sampler_of_the_registry(name):
    """Against its table on a path with alpha = 1, and it is listed."""
    function = getattr(K, f"sample_{name.replace('-', '_')}")
    assert function.__name__ in dir(K)
    if function.__name__ == "sample_dpm_fast":
        return  # k-diffusion's, of other arguments
    x, sigmas = begin(), grid(6)
    if name == "ddim-inverse":
        x = x / HIGH
    found = function(clean, x, sigmas, disable=True)
    assert found.shape == x.shape
    assert bool(found.isfinite().all())
    if name in ("ddim", "dpm-1", "dpmpp-1s"):  # Euler's method in other words
        assert_close(found, K.sample_euler(clean, x, sigmas, disable=True))
    if name in ("ddpm", "euler-ancestral"):
        torch.manual_seed(2)
        found = function(clean, x, sigmas, disable=True)
        torch.manual_seed(2)
        assert_close(found, K.sample_euler_ancestral(clean, x, sigmas, disable=True))


def test_inversion_leads_back_to_the_noise():
    """From the last level to the first: with small steps DDIM's way back."""

    def gaussian(x, sigma):
        return x / (1 + 4 * sigma.view(-1, 1, 1, 1) ** 2)

    x, info = begin(), []
    distances = []
    for steps in (200, 400):
        sigmas = grid(steps)
        image = K.sample_ddim(gaussian, x, sigmas, disable=True)
        back = K.sample_ddim_inverse(gaussian, image, sigmas, callback=info.append, disable=True)
        distances.append(((back - x).norm() / x.norm()).item())
    assert distances[1] < 0.05
    assert distances[1] == pytest.approx(distances[0] / 2, rel=0.1)
    info = info[200:]
    assert [each["sigma"].item() for each in info] == sigmas.flip(0)[:-1].tolist()


def test_consistency_models_have_a_smallest_level():
    """Each jump's noise leads from sigma_min, not from 0, to the next level."""
    x, sigmas = begin(), torch.tensor([HIGH, 2.0, 0.5, 0.0], dtype=torch.float64)
    draw = noises(x)
    wanted = clean(x, HIGH)
    for level in (2.0, 0.5):
        wanted = clean(wanted + math.sqrt(level**2 - 0.2**2) * draw(), level)
    torch.manual_seed(2)
    assert_close(K.sample_consistency(clean, x, sigmas, disable=True, sigma_min=0.2), wanted)
    torch.manual_seed(2)
    lcm = K.sample_lcm(clean, x, sigmas, disable=True)
    torch.manual_seed(2)
    wanted = clean(x, HIGH)
    for level in (2.0, 0.5):
        wanted = clean(wanted + level * draw(), level)
    assert_close(lcm, wanted)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2"])
def test_callbacks_see_each_step_after_its_churn(name):
    """x and denoised belong together, at sigma_hat, and no later step overwrites them."""
    x, sigmas, seen = begin(), grid(5), []
    sample = getattr(K, f"sample_{name}")
    sample(clean, x, sigmas, callback=seen.append, disable=True, s_churn=4.0, s_tmax=5.0)
    assert [info["i"] for info in seen] == list(range(5))
    for info, sigma in zip(seen, sigmas, strict=False):
        raised = 1.0 if sigma > 5 else math.sqrt(2)
        assert info["sigma"].item() == sigma.item()
        assert info["sigma_hat"].item() == pytest.approx(raised * sigma.item(), rel=1e-12)
        assert_close(info["denoised"], clean(info["x"], info["sigma_hat"]))
    assert len({info["x"].data_ptr() for info in seen}) == 5
    assert seen[0]["x"] is x  # which is above s_tmax


def test_extra_arguments_reach_the_model():
    x, sigmas = begin(), grid(4)
    found = K.sample_dpmpp_2m(clean, x, sigmas, extra_args={"scale": 0.7}, disable=True)
    wanted = SAMPLERS["dpmpp_2m"](lambda x, s: clean(x, s, scale=0.7), x, sigmas.tolist(), None)
    assert_close(found, wanted)


def test_noise_is_asked_for_by_the_levels_of_its_step():
    x, sigmas, asked = begin(), grid(3), []

    def noise(before, after):
        asked.append((before.item(), after.item()))
        return torch.zeros_like(x)

    K.sample_dpmpp_sde(clean, x, sigmas, disable=True, noise_sampler=noise)
    a, b, c, _ = sigmas.tolist()
    wanted = [(a, math.sqrt(a * b)), (a, b), (b, math.sqrt(b * c)), (b, c)]
    assert asked == [pytest.approx(pair, rel=1e-12) for pair in wanted]


def test_a_step_is_two_calls_of_the_dispatcher():
    """An empty tensor and the step; and one more to draw noise."""
    x = begin(torch.float32)
    for name, calls in (("euler", 2), ("dpmpp_2m", 2), ("unipc_2", 2), ("euler_ancestral", 3)):
        counts = []
        for steps in (10, 20):
            sample, sigmas = getattr(K, f"sample_{name}"), grid(steps).float()
            sample(lambda x, sigma: x, x, sigmas, disable=True)  # makes the table
            with CountCalls() as counted:
                sample(lambda x, sigma: x, x, sigmas, disable=True)
            counts.append(len(counted.names))
        assert (counts[1] - counts[0]) / 10 == calls, name


def test_the_bar_counts_steps_unless_disabled(capfd):
    x, sigmas = begin(), grid(4)
    for disable, shown in ((False, True), (True, False), (None, False)):  # None: no terminal here
        K.sample_heun(clean, x, sigmas, disable=disable)
        assert ("4/4" in capfd.readouterr().err) == shown


X, SIGMAS = torch.zeros(2, 3, 4, 4), torch.tensor([3.0, 1.0, 0.0])
REFUSED = [
    ("rising", ValueError, "must decrease", {"sigmas": SIGMAS.flip(0)}),
    ("staying", ValueError, "must decrease", {"sigmas": torch.tensor([3.0, 3.0, 0.0])}),
    ("NaN", ValueError, "must decrease.*nan", {"sigmas": torch.tensor([3.0, math.nan, 0.0])}),
    ("NaN at the end", ValueError, "must decrease", {"sigmas": torch.tensor([3.0, math.nan])}),
    ("infinite", ValueError, "finite.*inf", {"sigmas": torch.tensor([math.inf, 1.0, 0.0])}),
    ("negative", ValueError, "negative.*-1", {"sigmas": torch.tensor([3.0, 1.0, -1.0])}),
    ("one level", ValueError, r"at least one step, got \(1,\)", {"sigmas": SIGMAS[:1]}),
    ("no level", ValueError, r"got \(0,\)", {"sigmas": SIGMAS[:0]}),
    ("matrix", ValueError, r"got \(1, 3\)", {"sigmas": SIGMAS[None]}),
    ("list", TypeError, "floating point tensor, got list", {"sigmas": [3.0, 0.0]}),
    ("whole numbers", TypeError, "got torch.int64", {"sigmas": SIGMAS.long()}),
    ("elsewhere", ValueError, "on x's device, cpu, .* got meta", {"sigmas": SIGMAS.to("meta")}),
    ("x of integers", TypeError, "x must be a floating point tensor", {"x": X.long()}),
    ("x without channels", ValueError, r"\[N, C, ...\], got \(2,\)", {"x": X[:, 0, 0, 0]}),
    ("eta", ValueError, r"eta must lie in \[0, 1\], got 1.5", {"eta": 1.5}),
    ("s_noise", ValueError, "s_noise must not be negative", {"s_noise": -1.0}),
    ("noise of another shape", ValueError, r"must return noise of shape \(2, 3, 4, 4\)",
     {"noise_sampler": lambda a, b: X[:1]}),
    ("noise that is none", TypeError, "must return a tensor, got float",
     {"noise_sampler": lambda a, b: 0.0}),
    ("output of another shape", ValueError, r"must return \(2, 3, 4, 4\), got \(1, 3, 4, 4\)",
     {"model": lambda x, sigma: x[:1]}),
    ("output that is none", TypeError, "must return a tensor", {"model": lambda x, sigma: None}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [pytest.param(*case, id=name) for name, *case in REFUSED],
)
def test_refusals(error, message, arguments):
    arguments = {"model": clean, "x": X, "sigmas": SIGMAS, "disable": True, **arguments}
    with pytest.raises(error, match=message):
        K.sample_euler_ancestral(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 1.0}, "'temperature'"),
        ({"grid": "karras"}, "no option 'grid' here: the sigmas are the grid"),
        ({"prediction": "eps", "rho": 3.0}, "'prediction', 'rho'"),
        ({"sigma_min": 0.1}, "'sigma_min'"),
    ],
    ids=str,
)
def test_options_that_a_sampler_does_not_have(options, message):
    with pytest.raises(TypeError, match=message):
        K.sample_unipc_2(clean, X, SIGMAS, disable=True, **options)


def test_unknown_names():
    with pytest.raises(AttributeError, match="no attribute 'sample_rk45'"):
        K.sample_rk45  # noqa: B018


def test_half_precision_output_is_cast_and_images_of_any_rank_are_sampled():
    x = begin(torch.float32)
    found = K.sample_euler(lambda x, sigma: clean(x, sigma).bfloat16(), x, grid(4), disable=True)
    assert found.dtype == torch.float32
    for shape in ((3, 5), (3, 5, 7), (2, 3, 4, 5, 6), (0, 3, 4, 4)):
        found = K.sample_dpmpp_2m(clean, torch.ones(shape), grid(3), disable=True)
        assert found.shape == shape


def test_nothing_is_recorded_for_a_gradient():
    x = begin().requires_grad_()
    assert not K.sample_euler(clean, x, grid(3), disable=True).requires_grad
