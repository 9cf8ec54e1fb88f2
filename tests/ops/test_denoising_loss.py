"""denoising_loss and denoising_loss_from_seed: values, gradients, layouts and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import DTYPE_IDS, DTYPES, LAYOUT_IDS, LAYOUTS, CountCalls, assert_as_accurate
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdiff
from fastdiff import ops

STEPS = 10
SHAPES = {
    "image": (3, 3, 5, 7),
    "aligned": (2, 4, 16, 16),
    "many channels": (2, 37, 9, 10),
    "large": (1, 3, 70, 61),
    "vector": (5, 3),
    "numbers": (4,),
    "volume": (2, 3, 4, 5, 6),
}
# What the target has: x0, and noise that is given or that of a seed.
TARGETS = {
    "both": (True, "given"), "eps": (False, "given"), "x0": (True, None), "nothing": (False, None),
    "both, seeded": (True, "seeded"), "eps, seeded": (False, "seeded"),
}  # fmt: skip
ROW = torch.tensor([7 + 2**32])  # of which the lowest 32 bits count


def make(shape, dtype, layout=torch.contiguous_format):
    """Prediction, x0 and noise, timesteps, seeds, the loss's gradient."""
    g = torch.Generator().manual_seed(0)
    layout = layout if len(shape) == 4 else torch.contiguous_format
    images = [
        torch.randn(shape, generator=g).to(dtype).contiguous(memory_format=layout).requires_grad_()
        for _ in range(3)
    ]
    t = torch.randint(STEPS, shape[:1], generator=g)
    seed = torch.randint(-(2**62), 2**62, (*shape[:1], 2), generator=g)
    grad = torch.rand(shape[:1], generator=g).to(wide(dtype)) + 0.5
    return *images, t, seed, grad


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def tables(dtype):
    g = torch.Generator().manual_seed(1)
    p, q = torch.randn(2, STEPS, generator=g)
    weight = torch.rand(STEPS, generator=g) + 0.1
    return [value.to(wide(dtype)) for value in (p, q, weight)]


def runner(has_x0, noise_is):
    """A function that gives the loss and its gradients, for make's values."""

    def run(prediction, x0, noise, t, seed, grad):
        x0 = x0 if has_x0 else None
        if noise_is == "seeded":
            loss = ops.denoising_loss_from_seed(
                prediction, x0, seed, ROW, t, *tables(prediction.dtype)
            )
        else:
            noise = noise if noise_is else None
            loss = ops.denoising_loss(prediction, x0, noise, t, *tables(prediction.dtype))
        leaves = [prediction, *([x0] if has_x0 else []), *([noise] if noise_is == "given" else [])]
        gradients = torch.autograd.grad(loss, leaves, grad.to(loss.dtype))
        for gradient, leaf in zip(gradients, leaves, strict=True):
            assert gradient.dtype == leaf.dtype
        return [loss.detach(), *gradients]

    return run


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_values_and_gradients(target, shape, dtype, layout) -> None:
    assert_as_accurate(runner(*target), *make(shape, dtype, layout))


@settings(max_examples=60)
@given(
    shape=st.lists(st.integers(1, 14), min_size=1, max_size=4).map(tuple),
    dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS),
    target=st.sampled_from(list(TARGETS.values())),
)  # fmt: skip
def test_any_shape(shape, dtype, layout, target) -> None:
    assert_as_accurate(runner(*target), *make(shape, dtype, layout))


def test_the_formula() -> None:
    prediction, x0, noise, t, _, grad = make((3, 2, 4, 5), torch.float64)
    p, q, weight = tables(torch.float64)
    loss, dprediction, dx0, dnoise = runner(True, "given")(prediction, x0, noise, t, None, grad)
    for n, step in enumerate(t.tolist()):
        triples = zip(*(v[n].flatten().tolist() for v in (prediction, x0, noise)), strict=True)
        errors = [a - p[step].item() * b - q[step].item() * c for a, b, c in triples]
        wanted = weight[step].item() * math.fsum(e * e for e in errors) / 40
        assert loss[n].item() == pytest.approx(wanted, rel=1e-13)
        slope = grad[n].item() * 2 * weight[step].item() / 40
        gradient = [slope * e for e in errors]
        assert dprediction[n].flatten().tolist() == pytest.approx(gradient, rel=1e-12)
        for found, factor in ((dx0, p), (dnoise, q)):
            wanted_here = [-factor[step].item() * value for value in gradient]
            assert found[n].flatten().tolist() == pytest.approx(wanted_here, rel=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("shape", [(3, 3, 30, 33), (2, 1, 8, 8), (3, 40, 4, 5), (2, 6, 50, 21)])
def test_a_seed_gives_what_its_noise_gives(shape, dtype, layout) -> None:
    prediction, x0, _, t, seed, grad = make(shape, dtype, layout)
    p, q, _ = tables(dtype)
    noise = ops.philox_normal(seed, 7, shape, dtype).requires_grad_()
    given_noise = runner(True, "given")(prediction, x0, noise, t, seed, grad)
    from_seed = runner(True, "seeded")(prediction, x0, None, t, seed, grad)
    tight = {"rtol": 1e-6, "atol": 1e-8} if dtype == torch.float32 else {"rtol": 1e-13, "atol": 0}
    for a, b in zip(from_seed, given_noise, strict=False):
        torch.testing.assert_close(a, b, **tight)
    x_t = ops.q_sample_from_seed(x0, t, seed, ROW, p, q)
    torch.testing.assert_close(x_t, ops.q_sample(x0, t, noise, p, q), rtol=0, atol=0)


def test_noise_from_a_seed_is_not_rounded() -> None:
    """Of a bfloat16 prediction of 0 the loss is the mean square of float32 noise."""
    prediction = torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16)
    seed, t, one = torch.tensor([[5, 0]]), torch.tensor([0]), torch.ones(1)
    found = ops.denoising_loss_from_seed(prediction, None, seed, ROW, t, one, one, one)
    noise = ops.philox_normal(seed, 7, prediction.shape, torch.float32).double()
    assert found.item() == pytest.approx(noise.square().mean().item(), rel=1e-6)
    rounded = noise.bfloat16().double().square().mean().item()
    assert found.item() != pytest.approx(rounded, rel=1e-6)


def test_large_images_keep_their_digits_and_threads_do_not_matter() -> None:
    """A million values of which each adds 2^-20 of the sum, and an offset that is the target."""
    shape = (2, 3, 512, 512)
    prediction, x0, noise, t, seed, grad = make(shape, torch.float32)
    p, q, weight = tables(torch.float32)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(
            [*runner(True, "given")(prediction, x0, noise, t, seed, grad),
             *runner(True, "seeded")(prediction, x0, noise, t, seed, grad)]
        )  # fmt: skip
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    beside = (-1, 1, 1, 1)
    with torch.no_grad():
        error = prediction.double() - p[t].double().view(beside) * x0.double()
        error -= q[t].double().view(beside) * noise.double()
        wanted = weight[t].double() * error.square().flatten(1).mean(1)
    torch.testing.assert_close(found[0][0].double(), wanted, rtol=2e-7, atol=0)


def test_keeps_the_predictions_layout_and_dtype() -> None:
    for dtype in DTYPES:
        for layout in LAYOUTS:
            prediction, x0, noise, t, seed, grad = make((2, 3, 4, 5), dtype, layout)
            x0, noise = x0.contiguous(), noise.contiguous(memory_format=torch.channels_last)
            for target in TARGETS.values():
                loss, gradient, *_ = runner(*target)(prediction, x0, noise, t, seed, grad)
                assert (loss.dtype, loss.shape) == (wide(dtype), (2,))
                assert (gradient.dtype, gradient.stride()) == (dtype, prediction.stride())


def test_strides() -> None:
    prediction, x0, noise, t, seed, grad = make((4, 6, 4, 5), torch.float32, torch.channels_last)
    cut = [v.detach()[::2, ::2].requires_grad_() for v in (prediction, x0.transpose(2, 3), noise)]
    cut[1] = cut[1].detach().transpose(2, 3).requires_grad_()
    spread = torch.stack([seed, seed], dim=2)[::2, :, 0]
    arguments = (*cut, t[::2], spread, grad[:1].expand(2))
    dense = (*(v.detach().contiguous().requires_grad_() for v in cut), t[::2].clone(),
             seed[::2].clone(), grad[:1].repeat(2))  # fmt: skip
    for target in TARGETS.values():
        for a, b in zip(runner(*target)(*arguments), runner(*target)(*dense), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_images_and_empty_images(backend) -> None:
    with fastdiff.backend(backend):
        for shape in ((0, 3, 4, 4), (0,), (3, 0, 4), (2, 3, 0, 4)):
            arguments = make(shape, torch.float32)
            for target in TARGETS.values():
                loss, gradient, *_ = runner(*target)(*arguments)
                assert loss.shape == shape[:1]
                assert loss.isnan().all()  # the mean of nothing, as torch.mean has it
                assert gradient.shape == shape


def test_what_is_not_finite_stays_with_its_image() -> None:
    prediction, x0, noise, t, seed, grad = make((3, 3, 5, 7), torch.float32)
    with torch.no_grad():
        prediction[1, 0, 0, 0] = torch.nan
        prediction[2, 1, 4, 6] = torch.inf
    for target in TARGETS.values():
        loss, gradient, *_ = runner(*target)(prediction, x0, noise, t, seed, grad)
        assert [v.isfinite().item() for v in loss] == [True, False, False]
        assert loss[1].isnan()
        assert loss[2].isinf()
        assert (~gradient.isfinite()).sum() == 2


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_gradients_in_float64(target) -> None:
    prediction, x0, noise, t, seed, _ = make((2, 2, 3, 2), torch.float64)
    has_x0, noise_is = target
    known = (t, *tables(torch.float64))

    def loss(prediction, x0, noise):
        if noise_is == "seeded":
            return ops.denoising_loss_from_seed(prediction, x0, seed, ROW, *known)
        return ops.denoising_loss(prediction, x0, noise, *known)

    inputs = (prediction, x0 if has_x0 else None, noise if noise_is == "given" else None)
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_second_gradient_is_refused(target) -> None:
    prediction, x0, noise, t, seed, _ = make((2, 2, 3, 2), torch.float64)
    arguments = (prediction, x0 if target[0] else None)
    if target[1] == "seeded":
        loss = ops.denoising_loss_from_seed(*arguments, seed, ROW, t, *tables(torch.float64))
    else:
        given_noise = noise if target[1] else None
        loss = ops.denoising_loss(*arguments, given_noise, t, *tables(torch.float64))
    (gradient,) = torch.autograd.grad(loss.sum(), prediction, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        gradient.sum().backward()


def test_is_one_dispatcher_call() -> None:
    prediction, x0, noise, t, seed, _ = make((2, 3, 4, 4), torch.float32)
    given_tables = tables(torch.float32)
    with torch.no_grad(), CountCalls() as counted:
        ops.denoising_loss(prediction, x0, noise, t, *given_tables)
        ops.denoising_loss_from_seed(prediction, None, seed, ROW, t, *given_tables)
    assert counted.names == [
        "fastdiff.denoising_loss.default", "fastdiff.denoising_loss_from_seed.default",
    ]  # fmt: skip


def test_opcheck() -> None:
    layout = torch.channels_last
    prediction, x0, noise, t, seed, grad = make((2, 3, 4, 5), torch.float32, layout)
    known = (t, *tables(torch.float32))
    namespace = torch.ops.fastdiff
    for clean in (x0, None):
        for given_noise in (noise, None):
            arguments = (prediction, clean, given_noise, *known)
            torch.library.opcheck(namespace.denoising_loss.default, arguments)
        seeded = (prediction, clean, seed, ROW, *known)
        torch.library.opcheck(namespace.denoising_loss_from_seed.default, seeded)
    # The backward operations have no derivative, so nothing that would ask for one.
    with torch.no_grad():
        detached = tuple(v.detach() for v in (grad, prediction, x0))
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(
            namespace.denoising_loss_backward.default, (*detached, noise.detach(), *known),
            test_utils=checks,
        )  # fmt: skip
        torch.library.opcheck(
            namespace.denoising_loss_from_seed_backward.default, (*detached, seed, ROW, *known),
            test_utils=checks,
        )  # fmt: skip


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_compile(target) -> None:
    arguments = make((2, 3, 4, 5), torch.float32, torch.channels_last)
    has_x0, noise_is = target
    t, seed, grad = arguments[3:]
    given_tables = tables(torch.float32)

    def loss(prediction, x0, noise):
        x0 = x0 if has_x0 else None
        if noise_is == "seeded":
            return ops.denoising_loss_from_seed(prediction, x0, seed, ROW, t, *given_tables)
        return ops.denoising_loss(prediction, x0, noise if noise_is else None, t, *given_tables)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    a, b = loss(*arguments[:3]), compiled(*arguments[:3])
    assert torch.equal(a, b)
    left, right = (torch.autograd.grad(v, arguments[0], grad)[0] for v in (a, b))
    assert torch.equal(left, right)


X, T, TABLE = torch.randn(2, 3, 4, 4), torch.tensor([0, 9]), torch.rand(10)
SEED, ONE = torch.tensor([[1, 0], [1, 1]]), torch.tensor(0)
BEFORE = {"prediction": X, "x0": X}
NAMES = {
    "denoising_loss": {**BEFORE, "noise": X},
    "denoising_loss_from_seed": {**BEFORE, "seed": SEED, "row": ONE},
}
AFTER = {"t": T, "target_x0": TABLE, "target_noise": TABLE, "weight": TABLE}
REFUSED = {
    "t above": ({"t": T + 1}, IndexError, r"0\.\.9 .* from 1 to 10"),
    "t below": ({"t": T - 1}, IndexError, r"0\.\.9 .* from -1 to 8"),
    "t of another length": ({"t": T[:1]}, ValueError, "t must have shape"),
    "t of another dtype": ({"t": T.int()}, TypeError, "t must be int64"),
    "x0 of another shape": ({"x0": X[:1]}, ValueError, "x0 must have the shape of prediction"),
    "x0 of another dtype": ({"x0": X.half()}, TypeError, "x0 must have the dtype of prediction"),
    "noise of another shape": ({"noise": X[:, :1]}, ValueError, "noise must have the shape"),
    "noise of another dtype": ({"noise": X.double()}, TypeError, "noise must have the dtype"),
    "seeds of another batch": ({"seed": SEED[:1]}, ValueError, r"seed must have shape \(2, 2\)"),
    "seeds of another dtype": ({"seed": SEED.int()}, TypeError, "seed must be int64"),
    "row of another dtype": ({"row": ONE.int()}, TypeError, "row must be an int64 tensor"),
    "two rows": ({"row": T}, TypeError, "of one element"),
    "a short table": ({"target_noise": TABLE[:5]}, ValueError, "target_noise must have shape"),
    "weights in rows": ({"weight": TABLE.view(2, 5)}, ValueError, "weight must have shape"),
    "a table in rows": ({"target_x0": TABLE.view(2, 5)}, ValueError, r"must have shape \[T\]"),
    "weights of another dtype": ({"weight": TABLE.double()}, TypeError, "weight must be torch.fl"),
    "empty tables": (dict.fromkeys(("target_x0", "target_noise", "weight"), TABLE[:0]),
                     IndexError, "t must lie in"),
    "integers": ({"prediction": X.long()}, TypeError, "prediction must be floating point"),
    "a number": ({"prediction": X[0, 0, 0, 0], "x0": None, "noise": None}, ValueError, "t must"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("operation", "case"),
    [
        (operation, case)
        for operation, images in NAMES.items()
        for case, (change, *_) in REFUSED.items()
        if {*change} & {*images, *AFTER}  # else it is another operation's argument
    ],
)
def test_the_kernel_checks_for_itself(operation, case) -> None:
    change, error, message = REFUSED[case]
    known = {**NAMES[operation], **AFTER}
    arguments = {**known, **{name: value for name, value in change.items() if name in known}}
    with pytest.raises(error):
        getattr(torch.ops.fastdiff, operation)(*arguments.values())
    with pytest.raises(error):
        getattr(torch.ops.fastdiff, f"{operation}_backward")(torch.ones(2), *arguments.values())
    with pytest.raises(error, match=message):
        getattr(ops, operation)(*arguments.values())


@pytest.mark.parametrize("grad", [torch.ones(3), torch.ones(2).double(), torch.ones(2, 1)])
def test_the_backward_checks_its_gradient(grad) -> None:
    for operation, images in NAMES.items():
        backward = getattr(torch.ops.fastdiff, f"{operation}_backward")
        with pytest.raises((ValueError, TypeError), match="grad must"):
            backward(grad, *images.values(), *AFTER.values())
