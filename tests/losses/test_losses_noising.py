"""Noise from seeds, and the fused error: every loss gives what it gives with that noise."""

from __future__ import annotations

import pytest
import torch

import fastdiff
from fastdiff import losses, ops, process, schedules
from fastdiff.losses import score_matching
from fastdiff.losses.noising import noised, squared_error
from fastdiff.losses.targets import target_of, weight_on
from fastdiff.sde import EDM, VE, VP

COSINE = schedules.cosine(50)
T3 = torch.tensor([0, 20, 48])
TIMES = torch.tensor([0.05, 0.4, 0.9], dtype=torch.float64)
SEEDS = torch.tensor([[11, 0], [11, 1], [-5, 2**40]])


def simple(kind):
    def loss(x0, noise, slope):
        weight = losses.min_snr(COSINE, kind)
        return losses.simple_loss(
            COSINE,
            lambda x, t: slope * x.tanh() + slope**2,
            x0,
            T3,
            noise,
            kind=kind,
            weight=weight,
        )

    return loss


def bound(of, **options):
    def loss(x0, noise, slope):
        def model(x, t):
            found = slope * x.tanh()
            return torch.cat([found, found / 3 - 0.2], dim=1)

        return of(COSINE, model, x0, T3, noise, discrete=False, **options)

    return loss


def score(x, slope):
    return slope * x.tanh() - x


LOSSES = {
    **{kind: simple(kind) for kind in process.KINDS},
    "vlb": bound(losses.vlb_loss),
    "hybrid": bound(losses.hybrid_loss, kind="v"),
    **{
        f"{weighting}-{type(sde).__name__}": (
            lambda x0, noise, slope, sde=sde, weighting=weighting: (
                score_matching.denoising_score_matching(
                    lambda x, t: score(x, slope), sde, x0, TIMES, noise, weighting=weighting
                )
            )
        )
        for sde in (VP(), VE())
        for weighting in score_matching.WEIGHTINGS
    },
    "edm": lambda x0, noise, slope: score_matching.edm_loss(
        lambda x, label: score(x, slope), EDM(), x0, 3 * TIMES, noise
    ),
    "ncsn": lambda x0, noise, slope: score_matching.ncsn_loss(
        lambda x, sigma: score(x, slope), x0, TIMES, noise
    ),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def values(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x0, slope = torch.randn(2, 3, 2, 3, 4, generator=g, dtype=torch.float64).to(dtype) / 2
    return x0, ops.philox_normal(SEEDS, 0, x0.shape, dtype), slope.requires_grad_()


@every_loss
def test_seeds_stand_for_their_noise(loss) -> None:
    x0, noise, slope = values()
    drawn, given = (loss(x0, z, slope) for z in (SEEDS, noise))
    torch.testing.assert_close(drawn, given, rtol=1e-11, atol=0)
    for a, b in zip(*(torch.autograd.grad(v.sum(), slope) for v in (drawn, given)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@every_loss
def test_kernels_agree_with_the_reference(loss) -> None:
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        x0, noise, slope = values(dtype)
        for z in (SEEDS, noise):
            found = loss(x0, z, slope)
            with fastdiff.backend("reference"):
                wanted = loss(x0, z, slope)
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=0)
            pair = (torch.autograd.grad(v.sum(), slope)[0] for v in (found, wanted))
            torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", sorted({*LOSSES} - {"hybrid"}))  # which detaches on purpose
def test_gradients_in_float64(name) -> None:
    """Also in the images and in the noise, where it is given."""
    loss = LOSSES[name]
    x0, noise, slope = values()
    x0, noise = x0.requires_grad_(), noise.requires_grad_()
    assert torch.autograd.gradcheck(loss, (x0, noise, slope))
    assert torch.autograd.gradcheck(lambda x0, slope: loss(x0, SEEDS, slope), (x0, slope))


@pytest.mark.parametrize("kind", process.KINDS)
@pytest.mark.parametrize("output", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_predictions_of_another_dtype(dtype, output, kind) -> None:
    """Images and prediction are rounded, and nothing else: the rest is that of float64."""
    x0, noise, prediction = (value.detach() for value in values(dtype))
    prediction = prediction.to(output).requires_grad_()
    for z in (noise, SEEDS):
        found = losses.simple_loss(COSINE, lambda x, t: prediction, x0, T3, z, kind=kind)
        assert found.dtype == torch.float32
        (gradient,) = torch.autograd.grad(found.sum(), prediction)
        assert gradient.dtype == output
        exact = prediction.detach().double().requires_grad_()
        exactly = z.double() if z.is_floating_point() else z
        wanted = losses.simple_loss(
            COSINE, lambda x, t, exact=exact: exact, x0.double(), T3, exactly, kind=kind
        )
        torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=0)
        (slope,) = torch.autograd.grad(wanted.sum(), exact)
        unit = 2 * torch.finfo(output).eps * slope.abs().max().item()
        torch.testing.assert_close(gradient.double(), slope, rtol=0, atol=unit)


def test_the_score_at_a_time_without_noise() -> None:
    """sigma = 0: the loss is the mean square of the noise, whatever the score."""
    x0, noise, slope = values(torch.float32)
    t = torch.zeros(3, dtype=torch.float64)
    found = score_matching.denoising_score_matching(
        lambda x, t: score(x, slope), VP(), x0, t, noise
    )
    torch.testing.assert_close(found, noise.square().flatten(1).mean(1))
    (gradient,) = torch.autograd.grad(found.sum(), slope)
    assert gradient.abs().max() < 1e-12


def test_tables_are_made_once_and_follow_the_weights() -> None:
    meta, wide = torch.device("meta"), torch.float32
    schedule = schedules.linear(10)
    first = target_of(schedule, "v", torch.device("cpu"), wide)
    assert target_of(schedule, "v", torch.device("cpu"), wide) is first
    assert target_of(schedule, "v", torch.device("cpu"), torch.float64) is not first
    assert torch.equal(first.of_x0, -schedule.sigma_t.float())
    assert torch.equal(first.of_noise, schedule.alpha_t.float())
    with torch.inference_mode():
        made = target_of(schedule, "flow", torch.device("cpu"), wide)
    assert not made.of_x0.is_inference()

    weight = torch.ones(10, dtype=torch.float64)
    brought = weight_on(weight, meta, wide)
    assert (brought.device, brought.dtype) == (meta, wide)
    assert weight_on(weight, meta, wide) is brought
    weight.mul_(2)
    assert weight_on(weight, meta, wide) is not brought
    assert weight_on(weight, weight.device, wide)[0] == 2


def test_under_torch_compile() -> None:
    x0, noise, slope = values(torch.float32)
    weight = losses.min_snr(COSINE, "v")

    def loss(x0, z, slope):
        model = lambda x, t: slope * x  # noqa: E731
        return losses.simple_loss(COSINE, model, x0, T3, z, kind="v", weight=weight)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for z in (noise, SEEDS):
        torch.testing.assert_close(compiled(x0, z, slope), loss(x0, z, slope))


X, TABLE = torch.zeros(3, 2, 4, 4), torch.ones(3)
EACH = torch.arange(3)


@pytest.mark.parametrize(
    ("noise", "error", "message"),
    [
        (SEEDS[:2], TypeError, r"or seeds, int64 \(3, 2\), got torch.int64 \(2, 2\)"),
        (SEEDS.int(), TypeError, r"got torch.int32 \(3, 2\)"),
        (X.long(), TypeError, r"must be torch.float32 \(3, 2, 4, 4\) like x0, or seeds"),
        (X[:1], ValueError, "shape of x0"),
        (X.double(), TypeError, "dtype of x0"),
    ],
    ids=["seeds", "dtype", "integers", "shape", "double"],
)
def test_bad_noise(noise, error, message) -> None:
    with pytest.raises(error, match=message):
        noised(X, EACH, noise, TABLE, TABLE)


def test_a_prediction_of_another_shape() -> None:
    for noise in (X, SEEDS):
        with pytest.raises(ValueError, match=r"prediction must have shape \(3, 2, 4, 4\), got"):
            squared_error(X[:, :1], X, EACH, noise, None, TABLE, TABLE)
