"""denoising_loss and denoising_loss_from_seed, forward and backward, on the GPU kernels."""

from __future__ import annotations

import pytest
import torch
from accuracy import LAYOUT_IDS, LAYOUTS
from conftest import DTYPE_IDS, DTYPES
from gpu_accuracy import assert_close_to_oracle

from fastdiff import ops, schedules
from fastdiff.ops import reference

pytest.importorskip("triton")
from fastdiff.kernels import denoising_loss as kernels
from fastdiff.kernels.denoising_loss_plan import Plan, plan

SCHEDULE = schedules.cosine(1000)
SHAPES = {
    "image": (3, 3, 5, 7),
    "latent": (2, 4, 8, 8),
    "wide pixels": (2, 8, 3, 4),
    "many small": (70, 3, 2, 1),
    "vector": (5, 3),
    "numbers": (4,),
}
CASES = [
    pytest.param(shape, layout, id=f"{name} {layout_id}")
    for name, shape in SHAPES.items()
    for layout, layout_id in zip(LAYOUTS, LAYOUT_IDS, strict=True)
    if layout == torch.contiguous_format or (len(shape) == 4 and min(shape[1:]) > 1)
]


@pytest.fixture
def cut(gpu, monkeypatch):
    """The shape of an image that is cut into pieces; a small one where Triton is interpreted."""
    if gpu.name != "triton-interpreted":
        return (1, 3, 53, 55)
    monkeypatch.setattr(kernels, "plan", lambda *_: Plan(1, 128, 2, 3, 1))
    return (1, 3, 13, 17)


def tables(gpu, dtype):
    """v's target, with a weight."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    signal, sigma = SCHEDULE.coefficients(gpu.device, wide)
    return -sigma, signal, 0.5 + sigma


class Inputs:
    """Tensors of one shape, dtype and layout, always the same."""

    def __init__(self, gpu, shape, dtype, layout=torch.contiguous_format):
        g = torch.Generator().manual_seed(0)
        self.images = [
            torch.randn(shape, generator=g)
            .to(gpu.device, dtype)
            .contiguous(memory_format=layout)
            .requires_grad_()
            for _ in range(3)
        ]
        self.t = torch.randint(1000, shape[:1], generator=g).to(gpu.device)
        self.seed = torch.randint(-(2**62), 2**62, (shape[0], 2), generator=g).to(gpu.device)
        self.row = torch.tensor([2**32 + 17], device=gpu.device)
        self.grad = torch.randn(shape[:1], generator=g).to(gpu.device)


def of_given(gpu, inputs):
    """A call for ``assert_close_to_oracle``: the loss, and the gradients of all images given."""

    def run(prediction, x0, noise):
        loss = ops.denoising_loss(prediction, x0, noise, inputs.t, *tables(gpu, prediction.dtype))
        return with_gradients(loss, inputs, prediction, x0, noise)

    return run


def of_seed(gpu, inputs):
    def run(prediction, x0):
        loss = ops.denoising_loss_from_seed(
            prediction, x0, inputs.seed, inputs.row, inputs.t, *tables(gpu, prediction.dtype)
        )
        return with_gradients(loss, inputs, prediction, x0)

    return run


def with_gradients(loss, inputs, *images):
    given = [image for image in images if image is not None]
    return [loss.detach(), *torch.autograd.grad(loss, given, inputs.grad.to(loss.dtype))]


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_values_and_gradients(gpu, shape, layout, dtype) -> None:
    inputs = Inputs(gpu, shape, dtype, layout)
    assert_close_to_oracle(of_given(gpu, inputs), *inputs.images)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_values_and_gradients_with_the_noise_of_a_seed(gpu, shape, layout, dtype) -> None:
    inputs = Inputs(gpu, shape, dtype, layout)
    assert_close_to_oracle(of_seed(gpu, inputs), *inputs.images[:2])


@pytest.mark.parametrize("given", [(1, 0), (0, 1), (0, 0)], ids=["x0", "noise", "neither"])
def test_what_is_not_given_is_not_in_the_target(gpu, given) -> None:
    inputs = Inputs(gpu, (3, 3, 5, 7), torch.bfloat16)
    prediction, *others = inputs.images
    others = [value if wanted else None for value, wanted in zip(others, given, strict=True)]
    assert_close_to_oracle(of_given(gpu, inputs), prediction, *others)
    if not given[1]:
        assert_close_to_oracle(of_seed(gpu, inputs), prediction, others[0])


def test_an_image_that_a_program_takes_alone(gpu) -> None:
    inputs = Inputs(gpu, (1, 4, 32, 20), torch.float32)
    assert_close_to_oracle(of_given(gpu, inputs), *inputs.images)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
def test_a_large_image_alone_is_cut_into_pieces(gpu, cut, layout) -> None:
    inputs = Inputs(gpu, cut, torch.float32, layout)
    assert_close_to_oracle(of_given(gpu, inputs), *inputs.images)
    assert_close_to_oracle(of_seed(gpu, inputs), *inputs.images[:2])


@pytest.mark.parametrize("seeded", [False, True], ids=["given", "seeded"])
def test_a_plan_has_every_element_once(seeded) -> None:
    for images in (1, 2, 131, 133, 5000):
        for elements in (1, 63, 64, 3072, 8745, 12289, 786432):
            for itemsize in (2, 4):
                found = plan(images, elements, itemsize, 3 - seeded, seeded)
                piece = found.columns * found.loops
                assert (found.pieces - 1) * piece < elements <= found.pieces * piece
                assert found.rows == 1 or found.pieces == found.loops == 1
                assert found.rows * found.columns <= 16 * 32 * found.warps or found.warps == 16


def test_only_large_images_that_are_few_are_cut_into_pieces() -> None:
    assert plan(1, 8745, 4, 3, False).pieces > 1
    assert plan(1, 8745, 4, 2, True).pieces > 1
    assert plan(128, 3072, 4, 3, False).pieces == 1
    assert plan(132, 786432, 4, 3, False).pieces == 1


@pytest.mark.parametrize("pieces", [1, 4])
def test_a_large_sum_keeps_its_digits(monkeypatch, pieces) -> None:
    """3 x 512 x 512 values of mean 100, in few programs, which are quick to interpret."""
    if torch.cuda.is_available():
        pytest.skip("interpreted only")
    shape, g = (1, 3, 512, 512), torch.Generator().manual_seed(0)
    loops = -(-3 * 512 * 512 // (8192 * pieces))
    monkeypatch.setattr(kernels, "plan", lambda *_: Plan(1, 8192, loops, pieces, 16))
    prediction, t = 100 + torch.randn(shape, generator=g), torch.zeros(1, dtype=torch.int64)
    one = torch.ones(1)
    loss = kernels.denoising_loss(prediction, None, None, t, one, one, one)
    exact = reference.denoising_loss(prediction.double(), None, None, t, *[one.double()] * 3)
    assert (loss - exact).abs() <= 2e-7 * exact


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_IDS)
def test_an_unknown_timestep_makes_its_image_nan(gpu, layout) -> None:
    """The device alone knows the timesteps; nothing is read outside of the tables."""
    inputs = Inputs(gpu, (5, 3, 4, 4), torch.float32, layout)
    prediction, x0, noise = (image.detach() for image in inputs.images)
    t = torch.tensor([0, -1, 999, 1000, -(2**40)], device=gpu.device)
    more = (t, *tables(gpu, torch.float32))
    # The operations themselves: beside a CPU tensor the public functions refuse such timesteps.
    o = torch.ops.fastdiff
    noise_of_seed = (inputs.seed, inputs.row)
    results = [
        o.denoising_loss(prediction, x0, noise, *more),
        o.denoising_loss(prediction, None, None, *more),
        o.denoising_loss_backward(inputs.grad, prediction, x0, noise, *more),
        o.denoising_loss_backward(inputs.grad, prediction, None, None, *more),
        o.denoising_loss_from_seed(prediction, x0, *noise_of_seed, *more),
        o.denoising_loss_from_seed_backward(inputs.grad, prediction, None, *noise_of_seed, *more),
    ]
    for found in results:
        finite = torch.isfinite(found).reshape(5, -1)
        assert finite[[0, 2]].all()
        assert found[[1, 3, 4]].isnan().all()


def test_an_unknown_timestep_of_a_large_image(gpu, cut) -> None:
    inputs = Inputs(gpu, cut, torch.float32)
    prediction = inputs.images[0].detach()
    t = torch.tensor([1000], device=gpu.device)
    more = (inputs.seed, inputs.row, t, *tables(gpu, torch.float32))
    assert torch.ops.fastdiff.denoising_loss_from_seed(prediction, None, *more).isnan().all()


def test_mixed_layouts_and_strides(gpu) -> None:
    inputs = Inputs(gpu, (2, 6, 4, 5), torch.float32, torch.channels_last)
    prediction, x0, noise = (image.detach() for image in inputs.images)
    prediction, x0, noise = prediction[:, ::2], x0.contiguous()[:, 1::2], noise[:, 3:]
    t = torch.stack([inputs.t, inputs.t], dim=1)[:, 0]
    seed = torch.stack([inputs.seed, inputs.seed], dim=2)[..., 0]
    grad = torch.ones(1, device=gpu.device).expand(2)
    p, q, weight = (torch.stack([v, v], dim=1)[:, 0] for v in tables(gpu, torch.float32))
    o = torch.ops.fastdiff
    for forward, backward, more in (
        (o.denoising_loss, o.denoising_loss_backward, (noise, t)),
        (o.denoising_loss_from_seed, o.denoising_loss_from_seed_backward, (seed, inputs.row, t)),
    ):
        dense = [value.contiguous() for value in (prediction, x0, *more, p, q, weight)]
        found, wanted = forward(prediction, x0, *more, p, q, weight), forward(*dense)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)  # summed in another order
        found = backward(grad, prediction, x0, *more, p, q, weight)
        assert found.shape == prediction.shape
        torch.testing.assert_close(found, backward(grad.contiguous(), *dense), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)], ids=str)
def test_nothing(gpu, shape) -> None:
    """No image has no loss, and an image without elements has torch.mean's."""
    inputs = Inputs(gpu, shape, torch.bfloat16)
    for run, images in ((of_given, inputs.images), (of_seed, inputs.images[:2])):
        loss, *gradients = run(gpu, inputs)(*images)
        assert loss.shape == shape[:1]
        assert loss.isnan().all()
        assert all(gradient.shape == shape for gradient in gradients)
