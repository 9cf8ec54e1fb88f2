"""EDM2's network: values, gradients, conditions, files and errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from karras_reference import reference

import fastdiff
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.nn import KarrasUNet, UNet2DModel, networks

SMALL = {
    "sample_size": 8,
    "block_out_channels": (16, 24, 32),
    "layers_per_block": 1,
    "attention_levels": (1,),
    "attention_head_dim": 8,
}


def small(**options: object) -> KarrasUNet:
    torch.manual_seed(0)
    model = KarrasUNet(**{**SMALL, **options})
    with torch.no_grad():  # before training all gains are 0
        model.out_gain.fill_(0.8)
        model.embedding_gains.copy_(torch.linspace(-1, 1, len(model.embedding_gains)))
    return model.eval()


@pytest.mark.parametrize("classes", [None, 5])
def test_it_computes_the_equations_of_the_paper(classes: int | None) -> None:
    model = small(num_class_embeds=classes, time_scale=0.5, concat_balance=0.4).double()
    x, t = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([-1.5, 0.0, 1.1]).double()
    labels = None if classes is None else torch.tensor([0, 4, 2])
    result, expected = (network(x, t, labels) for network in (model, _of(model)))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)  # cosines are float32
    weights = (model.conv_in.weight, model.embedding_gains, model.encoder[1].conv1.weight)
    ours, theirs = (torch.autograd.grad(y.square().sum(), weights) for y in (result, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def _of(model: KarrasUNet):  # type: ignore[no-untyped-def]
    return lambda x, t, labels: reference(model, x, t, labels)


def test_precomputed_embeddings_give_the_same() -> None:
    model, x = small(num_class_embeds=4), torch.randn(3, 3, 8, 8)
    times, labels = torch.tensor([0.3, -0.2]), torch.tensor([3, 0, 3])
    assert model.may_precompute()
    with torch.no_grad():
        rows = model.precompute(times, labels, 3)
        assert rows.rows.shape[:2] == (2, 2)
        for step, t in enumerate(times):
            expected = model(x, t, labels)
            torch.testing.assert_close(model(x, precomputed=rows.at(step)), expected)


def test_it_is_zero_before_training() -> None:
    assert not KarrasUNet(**SMALL)(torch.randn(1, 3, 8, 8), 0.5).any()


def test_the_uncertainty_depends_on_the_time_alone() -> None:
    model = small(uncertainty_channels=8)
    u = model.uncertainty(torch.tensor([0.1, 0.2]))
    assert u.shape == (2,)
    assert u[0] != u[1]
    with pytest.raises(ValueError, match="no uncertainty_channels"):
        small().uncertainty(0.1)


def test_folders_keep_the_class(tmp_path: Path) -> None:
    model, x = small(num_class_embeds=2), torch.randn(1, 3, 8, 8)
    model.save_pretrained(tmp_path / "model")
    for read in (KarrasUNet.from_pretrained, networks.from_pretrained, fastdiff.load):
        again = read(tmp_path / "model")
        assert type(again) is KarrasUNet
        assert torch.equal(again(x, 0.1, torch.tensor([1])), model(x, 0.1, torch.tensor([1])))
    with pytest.raises(ValueError, match="describes a KarrasUNet, wanted a UNet2DModel"):
        UNet2DModel.from_pretrained(tmp_path / "model")
    written = Checkpoint(model, fastdiff.sde.EDM(), "edm", ("a", "b"))
    checkpoint.save(written, tmp_path / "checkpoint")
    again = checkpoint.load(tmp_path / "checkpoint").model
    assert type(again) is KarrasUNet
    assert torch.equal(again(x, 0.1, torch.tensor([1])), model(x, 0.1, torch.tensor([1])))


def test_checkpointing_gives_the_same_gradients() -> None:
    model, x = small().train(), torch.randn(2, 3, 8, 8)
    found = []
    for switch in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
        switch()
        found.append(torch.autograd.grad(model(x, 0.5).square().sum(), model.conv_in.weight)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_head_dim": 7}, "must divide the channels .* got 7 for"),
        ({"attention_levels": (3,)}, "attention level 3 does not exist"),
        ({"residual_balance": 1.0}, r"residual_balance must lie in \(0, 1\), got 1.0"),
        ({"block_out_channels": ()}, "at least one level"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"clip": -1.0}, "clip must be positive, got -1.0"),
        ({"norm_num_groups": 8}, "KarrasUNet has no option norm_num_groups"),
    ],
)
def test_wrong_options_are_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KarrasUNet(**{**SMALL, **options})


def test_wrong_inputs_are_errors() -> None:
    model = small(num_class_embeds=2)
    with pytest.raises(ValueError, match="it needs class_labels"):
        model(torch.randn(1, 3, 8, 8), 0.5)
    with pytest.raises(IndexError, match=r"class_labels must lie in 0\.\.1"):
        model(torch.randn(1, 3, 8, 8), 0.5, torch.tensor([2]))
    with pytest.raises(ValueError, match="divisible by 4"):
        model(torch.randn(1, 3, 6, 6), 0.5, torch.tensor([1]))
