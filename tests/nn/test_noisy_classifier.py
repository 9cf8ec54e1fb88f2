"""The classifier of noised images: shapes, what it depends on, refusals."""

from __future__ import annotations

import pytest
import torch

from fastdiff.nn import NoisyClassifier

OPTIONS = {
    "in_channels": 2,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}


def classifier(**options):
    torch.manual_seed(0)
    return NoisyClassifier(5, **OPTIONS | options).eval()


@pytest.mark.parametrize("t", [3, 3.0, torch.tensor(3), torch.tensor([3.0])], ids=repr)
@pytest.mark.parametrize("options", [{}, {"mid_block_type": None}, {"add_attention": False}])
def test_one_time_for_all_or_one_each(t, options, generator):
    model, x = classifier(**options), torch.randn(3, 2, 8, 12, generator=generator)
    logits = model(x, t)
    assert logits.shape == (3, 5)
    torch.testing.assert_close(model(x, torch.tensor([3, 3, 3])), logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(x, torch.tensor([3, 400, 3]))[1], logits[1])


def test_images_do_not_depend_on_each_other(generator):
    model, x = classifier(), torch.randn(4, 2, 8, 8, generator=generator)
    t = torch.tensor([1, 100, 500, 999])
    for n in range(4):
        alone = model(x[n : n + 1], t[n : n + 1])
        torch.testing.assert_close(model(x, t)[n : n + 1], alone, rtol=1e-5, atol=1e-5)


def test_images_as_large_as_their_noise(generator):
    """Beyond some size only an image's direction counts, and no number grows with it."""
    model, x = classifier(), torch.randn(2, 2, 8, 8, generator=generator)
    large, larger = model(1e3 * x, 3), model(1e5 * x, 3)
    torch.testing.assert_close(large, larger, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(0.3 * x, 3), large, rtol=1e-2, atol=1e-3)


def test_the_gradient_that_guides(generator):
    """Of a log-probability in x, against differences in float64."""
    model = classifier().double()
    x = torch.randn(2, 2, 4, 4, generator=generator, dtype=torch.float64).requires_grad_()

    def log_prob(x):
        return model(x, torch.tensor([5, 700])).log_softmax(1)[:, 2].sum()

    (gradient,) = torch.autograd.grad(log_prob(x), x)
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        change = log_prob(x + 1e-5 * direction) - log_prob(x - 1e-5 * direction)
    assert (gradient * direction).sum().item() == pytest.approx(change.item() / 2e-5, rel=1e-5)


def test_refusals():
    model, x = classifier(), torch.zeros(3, 2, 8, 8)
    with pytest.raises(ValueError, match=r"sample must be \[N, 2, H, W\], got \(3, 1, 8, 8\)"):
        model(x[:, :1], 3)
    with pytest.raises(ValueError, match=r"t must have 1 element or 3, one an image, got \(2,\)"):
        model(x, torch.zeros(2))
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        NoisyClassifier(1, **OPTIONS)
    with pytest.raises(ValueError, match="no option colour"):
        classifier(colour="red")
