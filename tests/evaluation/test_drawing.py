"""Images drawn in batches for a comparison, and their classes."""

from __future__ import annotations

import pytest
import torch

from fastdiff import samplers, schedules
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.common.errors import InputError
from fastdiff.evaluation import balanced_labels, draw_in_batches, drawing, labels_like

pytestmark = pytest.mark.usefixtures("one_thread")


def counts(labels, classes):
    return torch.tensor(labels).bincount(minlength=classes).tolist()


def test_balanced_labels():
    assert counts(balanced_labels(40, 4), 4) == [10] * 4
    assert sorted(counts(balanced_labels(10, 4), 4)) == [2, 2, 3, 3]
    assert balanced_labels(40, 4) != sorted(balanced_labels(40, 4))
    assert balanced_labels(40, 4) == balanced_labels(40, 4)
    assert balanced_labels(40, 4, seed=1) != balanced_labels(40, 4)


def test_labels_in_the_proportions_of_a_set():
    shares = torch.tensor([0] * 30 + [2] * 10)
    assert counts(labels_like(400, shares, 4), 4) == [300, 0, 100, 0]
    assert counts(labels_like(3, shares, 4), 4)[0] in (2, 3)
    with pytest.raises(InputError, match="no class"):
        labels_like(3, shares[:0], 4)


def test_a_batch_depends_on_no_other(tiny_unet, monkeypatch):
    monkeypatch.setattr(drawing, "BATCH", 4)
    model = tiny_unet(num_classes=3)
    source = Checkpoint(model, schedules.cosine(10), "v", ("a", "b", "c"))
    sampler = samplers.DDPM(source.forward, 2, prediction="v")
    labels = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    drawn = list(draw_in_batches(source, sampler, labels=labels, seed=3))
    assert [len(each.images) for each in drawn] == [4, 4, 2]
    again = list(draw_in_batches(source, sampler, labels=labels[:6], seed=3))
    assert torch.equal(drawn[0].images, again[0].images)
    assert not torch.equal(drawn[0].images, drawn[1].images)
    other = next(draw_in_batches(source, sampler, labels=labels, seed=4))
    assert not torch.equal(drawn[0].images, other.images)
    with pytest.raises(InputError, match="class-conditional"):
        next(draw_in_batches(source, sampler, count=2))
