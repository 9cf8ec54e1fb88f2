"""The model that comes along: small, loadable by both libraries, and its digits can be told."""

from __future__ import annotations

import pytest
import torch

from fastdiff import data, samplers
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.checkpoint import PRETRAINED
from fastdiff.evaluation import evaluate


@pytest.fixture(scope="module")
def digits():
    return checkpoint.load("digits")


def test_is_small_and_without_training_state() -> None:
    files = {file.name: file.stat().st_size for file in (PRETRAINED / "digits").iterdir()}
    assert sum(files.values()) <= 5_000_000
    assert set(files) == {checkpoint.CONFIG, checkpoint.WEIGHTS, checkpoint.META}


def test_diffusers_reads_it(digits) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UNet2DModel.from_pretrained(PRETRAINED / "digits", torch_dtype=torch.float32)
    x, t, labels = torch.randn(3, 1, 16, 16), torch.tensor([1, 500, 999]), torch.tensor([3, 0, 9])
    with torch.no_grad():
        wanted = theirs(x, t, class_labels=labels).sample
        torch.testing.assert_close(digits.model(x, t, labels), wanted, atol=1e-5, rtol=1e-5)


def test_likelihoods_end_soon(digits) -> None:
    """Of a digit, and of plain noise, which it has never seen, at the default tolerance."""
    digit = data.digits("test", 16).images[:1]
    x = torch.cat([digit, torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))])
    labels = {"class_labels": torch.tensor([0, 1])}
    found = digits.diffusion().log_likelihood(x, cond=labels, progress=False)
    assert bool(found.logp.isfinite().all())
    assert found.evaluations.max() < 300


def test_draws_the_digits_it_is_asked_for(digits) -> None:
    sampler = samplers.DDIM(digits.forward, 20, prediction=digits.prediction)
    found = evaluate(digits, sampler, samples=100, progress=False)
    assert found.accuracy >= 0.9
    assert found.nearest_train_median > 0.75 * found.nearest_train_median_real  # no copies
