"""The embedded pairs on equations with known solutions, and each sample's steps in a batch."""

from __future__ import annotations

import math

import pytest
import torch

from fastdiff.sde.solvers.runge_kutta import METHODS, integrate

pytestmark = pytest.mark.usefixtures("one_thread")
STARTS = torch.tensor([[1.0, 0.5], [2.0, 1.0], [30.0, 3.0]], dtype=torch.float64)
METHOD = pytest.mark.parametrize("method", METHODS)


def hill(x, t, index=None):
    """x' = -x^2 cos t, solved by 1 / x = 1 / x(0) + sin t."""
    return -(x**2) * torch.cos(t).view(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def hill_solution(start, t):
    return 1 / (1 / start + math.sin(t))


def one_step(tableau, x, t, h):
    """The step's solution and the embedded one, spelled out."""
    slopes = []
    for row, node in zip(tableau.matrix, tableau.nodes, strict=True):
        at = x + h * sum((a * k for a, k in zip(row, slopes, strict=True)), torch.zeros_like(x))
        slopes.append(hill(at, t + node * h))
    x_new = x + h * sum(b * k for b, k in zip(tableau.weights, slopes, strict=True))
    error = h * sum(e * k for e, k in zip(tableau.error, slopes, strict=True))
    return x_new, x_new - error


@METHOD
def test_orders_of_the_pair(method):
    """A method of order p is wrong by h^(p + 1) in one step, the embedded one by h^p."""
    tableau = METHODS[method]
    for row, node in zip(tableau.matrix, tableau.nodes, strict=True):
        assert sum(row) == pytest.approx(node, abs=1e-14)
    assert sum(tableau.error) == pytest.approx(0, abs=1e-15)
    x, t = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
    base = 1 / (1 / x - math.sin(0.3))  # where the curve through (t, x) was at t = 0
    errors = []
    for h in (0.01, 0.005):
        true = hill_solution(base, 0.3 + h)
        errors.append([(found - true).abs().item() for found in one_step(tableau, x, t, h)])
    slopes = [math.log2(coarse / fine) for coarse, fine in zip(*errors, strict=True)]
    assert slopes[0] == pytest.approx(tableau.order + 1, abs=0.3)
    assert slopes[1] == pytest.approx(tableau.order, abs=0.3)


@METHOD
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_error_follows_the_tolerance(method, backward):
    """On x' = -x^2 cos t, where no error is amplified by more than 1.2."""
    starts = STARTS[:2]
    ends = hill_solution(starts, 1.4)
    x, wanted, t0, t1 = (ends, starts, 1.4, 0.0) if backward else (starts, ends, 0.0, 1.4)
    amplified = ((starts / ends) ** 2).max().item() if backward else 1.0
    errors = []
    for tolerance in (1e-3, 1e-5, 1e-7) if method != "heun21" else (1e-3, 1e-4, 1e-5):
        found = integrate(hill, x, t0, t1, rtol=tolerance, atol=tolerance, method=method)
        errors.append((found.x - wanted).abs().max().item())
        steps = found.accepted.max().item()
        assert errors[-1] <= steps * amplified * 3 * tolerance
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


def test_linear_system_to_the_tolerance():
    """x' = A x turns and shrinks; the solution is a matrix exponential."""
    matrix = torch.tensor([[-0.3, 4.0], [-4.0, -0.3]], dtype=torch.float64)
    for tolerance in (1e-4, 1e-7, 1e-10):
        found = integrate(lambda x, t, i: x @ matrix.T, STARTS, 0, 5, rtol=0, atol=tolerance)
        wanted = STARTS @ torch.linalg.matrix_exp(5 * matrix).T
        assert (found.x - wanted).abs().max() <= 20 * tolerance
    assert bool((found.accepted > 20).all())


def test_agrees_with_scipy():
    integrate_scipy = pytest.importorskip("scipy.integrate")

    def van_der_pol(x):
        return torch.stack([x[..., 1], 3 * (1 - x[..., 0] ** 2) * x[..., 1] - x[..., 0]], -1)

    found = integrate(lambda x, t, i: van_der_pol(x), STARTS[:2], 0, 10, rtol=1e-10, atol=1e-10)
    for start, end, evaluations in zip(STARTS[:2], found.x, found.evaluations, strict=True):
        wanted = integrate_scipy.solve_ivp(
            lambda t, y: van_der_pol(torch.from_numpy(y)).numpy(),
            (0, 10), start.numpy(), method="RK45", rtol=1e-10, atol=1e-10,
        )  # fmt: skip
        torch.testing.assert_close(end, torch.from_numpy(wanted.y[:, -1]), rtol=1e-7, atol=1e-7)
        assert evaluations < 1.15 * wanted.nfev


@METHOD
def test_a_batch_is_its_samples_alone(method):
    found = integrate(hill, STARTS, 0, 3, method=method, rtol=1e-4, atol=1e-4)
    for n, start in enumerate(STARTS):
        alone = integrate(hill, start[None], 0, 3, method=method, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone.x[0], found.x[n], rtol=1e-12, atol=0)
        for count in ("evaluations", "accepted", "rejected"):
            assert getattr(alone, count).tolist() == [getattr(found, count)[n].item()]
    assert found.accepted[0] < found.accepted[1] < found.accepted[2]


@METHOD
def test_arrived_samples_are_not_evaluated(method):
    asked = torch.zeros(3, dtype=torch.int64)
    rows = []

    def field(x, t, index):
        assert x.shape == (len(index), 2)
        assert t.shape == index.shape
        assert t.dtype == torch.float64
        asked[index] += 1
        rows.append(len(index))
        return hill(x, t)

    found = integrate(field, STARTS, 0, 3, method=method, rtol=1e-4, atol=1e-4)
    assert asked.tolist() == found.evaluations.tolist()
    assert sum(rows) == found.evaluations.sum()
    assert 1 in rows
    steps = found.accepted + found.rejected
    stages = len(METHODS[method].nodes) - 1
    if METHODS[method].reuses_last:
        assert found.evaluations.tolist() == (2 + stages * steps).tolist()
    else:  # a rejected step keeps its first slope, and the last state needs none
        assert found.evaluations.tolist() == (1 + stages * steps + found.accepted).tolist()


def test_index_lets_a_condition_follow():
    rates = torch.tensor([0.1, 1.0, 20.0], dtype=torch.float64)
    found = integrate(lambda x, t, i: -rates[i, None] * x, torch.ones_like(STARTS), 0, 1)
    torch.testing.assert_close(found.x[:, 0], (-rates).exp(), rtol=1e-4, atol=1e-4)
    assert found.accepted[0] < found.accepted[2]


def test_rejects_steps_at_a_sudden_change():
    def field(x, t, index):
        return (1 / (1 + ((t[:, None] - 2) / 0.01) ** 2)) * torch.ones_like(x)

    found = integrate(field, STARTS[:1], 0, 3, rtol=1e-7, atol=1e-7)
    area = 0.01 * (math.atan(100) + math.atan(200))
    torch.testing.assert_close(found.x, STARTS[:1] + area, rtol=0, atol=1e-6)
    assert found.rejected[0] > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype(dtype):
    seen = set()

    def field(x, t, index):
        seen.add(x.dtype)
        return -x

    x = torch.linspace(-1, 1, 2 * 3 * 4 * 4, dtype=torch.float64).view(2, 3, 4, 4).to(dtype)
    found = integrate(field, x, 0, 1, rtol=1e-4, atol=1e-4)
    assert seen == {dtype}
    assert found.x.dtype == dtype
    eps = torch.finfo(dtype).eps
    wanted = x.double() * math.exp(-1)
    torch.testing.assert_close(found.x.double(), wanted, rtol=eps + 1e-4, atol=eps + 1e-4)


def test_nothing_to_do():
    found = integrate(hill, STARTS, 1, 1)
    assert torch.equal(found.x, STARTS)
    assert found.evaluations.tolist() == [0, 0, 0]
    assert integrate(hill, STARTS[:0], 0, 1).x.shape == (0, 2)


def test_times_stay_inside():
    times = []

    def field(x, t, index):
        times.append(t)
        return torch.zeros_like(x)

    integrate(field, STARTS, 0.7, 0.1)
    times = torch.cat(times)
    assert times.max() == 0.7
    assert times.min() == 0.1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        pytest.param({"method": "rk4"}, ValueError, "'rk4'.* heun21, bosh3, dopri5", id="method"),
        pytest.param({"atol": 0}, ValueError, "atol > 0 .* got atol 0", id="atol"),
        pytest.param({"rtol": -1e-3}, ValueError, "rtol >= 0, .* rtol -0.001", id="rtol"),
        pytest.param({"rtol": math.nan}, ValueError, "rtol nan", id="rtol nan"),
        pytest.param({"max_evaluations": 0}, ValueError, "positive, got 0", id="no evaluations"),
        pytest.param(
            {"max_evaluations": 110},
            RuntimeError,
            "sample 2 .*used up max_evaluations .* dopri5, rtol 1e-05, atol 1e-05",
            id="evaluations",
        ),
    ],
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        integrate(hill, STARTS, 0, 3, **options)


def test_refuses_times_and_dtypes():
    with pytest.raises(ValueError, match="must be finite, got 0 and inf"):
        integrate(hill, STARTS, 0, math.inf)
    with pytest.raises(TypeError, match=r"floating point, got torch\.int64"):
        integrate(hill, STARTS.long(), 0, 1)
    with pytest.raises(ValueError, match=r"shape of x, \(3, 2\), got \(3,\)"):
        integrate(lambda x, t, i: x[:, 0], STARTS, 0, 1)
    with pytest.raises(TypeError, match=r"dtype of x, torch\.float64, got torch\.float32"):
        integrate(lambda x, t, i: x.float(), STARTS, 0, 1)


def test_names_the_sample_whose_field_is_not_finite():
    def field(x, t, index):
        late = (t > 0.5) & (index == 1)
        return torch.where(late[:, None], math.nan, -x)

    with pytest.raises(
        FloatingPointError, match=r"field of sample 1 is not finite at t = 0\.[5-9]"
    ):
        integrate(field, STARTS, 0, 1)


def test_a_solution_that_ends():
    """x' = x^2 from 2 has no value at t = 1/2; the steps shrink towards it."""
    x = torch.tensor([[-1.0], [2.0]], dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"sample 1 is stuck at t = 0.50+1?: its step size"):
        integrate(lambda x, t, i: x**2, x, 0, 3)
