"""Optimizers and learning rates: PyTorch's results, and runs that go on bit for bit."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastdiff.checkpoints import checkpoint
from fastdiff.common.errors import CheckpointError, InputError
from fastdiff.training import optimizers
from fastdiff.training.adamw import AdamW
from fastdiff.training.learning_rate import learning_rate
from fastdiff.training.optimizers import Muon, as_matrix, from_matrix
from fastdiff.training.trainer import Trainer, TrainingOptions

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = TrainingOptions(
    steps=4, batch_size=4, lr=1e-2, warmup=0, save_every=2, sample_every=0, ema=(0.5, 0.9)
)
KINDS = {
    "adamw": {},
    "adam": {"optimizer": "adam"},
    "adam, decay": {"optimizer": "adam", "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-6},
    "sgd": {"optimizer": "sgd"},
    "sgd, nesterov": {"optimizer": "sgd", "nesterov": True, "momentum": 0.5},
    "sgd, plain": {"optimizer": "sgd", "momentum": 0.0},
    "muon": {"optimizer": "muon", "weight_decay": 0.1},
}
EACH = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)


def parameters(memory_format=torch.channels_last) -> list[tuple[str, nn.Parameter]]:
    """Weights of a hidden convolution, of one that reads images, a matrix, a table and a bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "mid.weight": (8, 4, 3, 3), "conv_in.weight": (4, 2, 3, 3), "mid.linear.weight": (5, 7),
        "class_embedding.weight": (3, 6), "mid.bias": (6,), "mid.one.weight": (4, 6, 1, 1),
    }  # fmt: skip
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return [
        (name, nn.Parameter(v.contiguous(memory_format=memory_format) if v.ndim == 4 else v))
        for name, v in values.items()
    ]


def give_gradients(named, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for _, p in named:
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))


def peer_of(changes, named) -> torch.optim.Optimizer:
    values, decay = [p for _, p in named], changes.get("weight_decay", 0.0)
    betas, eps = changes.get("betas", (0.9, 0.999)), changes.get("eps", 1e-8)
    if changes.get("optimizer", "adamw") == "adamw":
        return torch.optim.AdamW(values, 0.01, betas, eps, decay)
    if changes["optimizer"] == "adam":
        return torch.optim.Adam(values, 0.01, betas, eps, decay)
    momentum = changes.get("momentum", 0.9)
    return torch.optim.SGD(values, 0.01, momentum, nesterov=changes.get("nesterov", False))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "muon"])
def test_it_does_what_torch_does(kind) -> None:
    """With a factor of the gradient and averages."""
    ours, theirs = parameters(), parameters()
    options = dataclasses.replace(OPTIONS, **KINDS[kind])
    optimizer, peer = optimizers.make(options, ours), peer_of(KINDS[kind], theirs)
    averages = [torch.zeros_like(p) for _, p in ours]
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        for _, p in theirs:
            p.grad *= 0.5
        optimizer.step(gradient_factor=0.5, averages=averages, average_weight=0.25)
        peer.step()
    for (_, p), (_, wanted), average in zip(ours, theirs, averages, strict=True):
        torch.testing.assert_close(p, wanted, rtol=1e-5, atol=1e-6)
        assert not torch.equal(average, torch.zeros_like(average))
    moved = [0.25 * p.detach() for _, p in ours]
    averages = [torch.zeros_like(p) for _, p in ours]
    for _, p in ours:
        p.grad = None
    optimizer.step(averages=averages, average_weight=0.25)  # without gradients
    for average, wanted in zip(averages, moved, strict=True):
        torch.testing.assert_close(average, wanted)


def test_adam_without_decay_is_the_fused_one() -> None:
    options = dataclasses.replace(OPTIONS, optimizer="adam")
    assert isinstance(optimizers.make(options, parameters()), AdamW)


@pytest.mark.parametrize(
    "memory_format", [torch.channels_last, torch.contiguous_format], ids=["NHWC", "NCHW"]
)
def test_muon_makes_the_steps_of_hidden_layers_orthogonal(memory_format) -> None:
    named = parameters(memory_format)
    options = dataclasses.replace(OPTIONS, **KINDS["muon"])
    optimizer = optimizers.make(options, named)
    assert isinstance(optimizer, Muon)
    values = dict(named)
    hidden = {"mid.weight", "mid.linear.weight", "mid.one.weight"}
    assert {name for name, p in named if p in optimizer.matrices} == hidden
    plain = parameters(memory_format)
    adamw = AdamW([p for name, p in plain if name not in hidden], 0.01, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in named}
    versions = {name: p._version for name, p in named}
    for every in (named, plain):
        give_gradients(every, 0)
        for _, p in every:
            p.grad *= 0.5
    optimizer.step(averages=[torch.zeros_like(p) for _, p in named], average_weight=0.5)
    adamw.step()
    for name, wanted in plain:
        p = values[name]
        assert p._version > versions[name]  # which packed copies of the weights are compared by
        if name not in hidden:
            torch.testing.assert_close(p, wanted)
            continue
        # W <- (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) O, O nearly orthogonal.
        step = (before[name] * (1 - 0.01 * 0.1) - p.detach()).flatten(1).double()
        singular = torch.linalg.svdvals(step / (0.01 * 0.2 * math.sqrt(max(step.shape))))
        assert float(singular.min()) > 0.5
        assert float(singular.max()) < 1.5
        # The directions are the gradient's, and the memory format makes no difference.
        u, _, v = torch.linalg.svd(wanted.grad.flatten(1).double(), full_matrices=False)
        aligned = u.T @ (step / step.norm()) @ v.T
        assert float(aligned.diagonal().min()) > 0
        assert float((aligned - aligned.diagonal().diag()).abs().max()) < 0.02


def test_a_matrix_is_a_view_in_both_layouts() -> None:
    for memory_format in (torch.channels_last, torch.contiguous_format):
        for _, p in parameters(memory_format):
            if p.ndim >= 2:
                matrix = as_matrix(p.detach(), p)
                assert matrix.shape == (p.shape[0], p[0].numel())
                assert matrix.data_ptr() == p.data_ptr()
                assert torch.equal(from_matrix(matrix, p), p)


@EACH
def test_a_resumed_run_is_the_uninterrupted_one(changes, make_trainer, images, tmp_path):
    whole = make_trainer(**changes)
    for _ in range(4):
        whole.step()
    parts = make_trainer(tmp_path, **changes)
    for _ in range(2):
        parts.step()
    parts.save()
    parts.step()
    resumed = Trainer.resume(tmp_path, images)
    assert resumed.finished_steps == 2
    for _ in range(2):
        resumed.step()
    for name in ("ema-0.5", "ema-0.9"):
        one, other = resumed.averages.state(name), whole.averages.state(name)
        assert all(torch.equal(one[key], other[key]) for key in one)
    for one, other in zip(resumed.parameters, whole.parameters, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


@EACH
def test_it_learns(changes, make_trainer):
    lr = 0.05 if changes.get("optimizer") == "sgd" else 0.003
    trainer = make_trainer(steps=30, lr=lr, lr_schedule="constant", **changes)
    values = [trainer.step() for _ in range(30)]
    assert sum(values[-5:]) < 0.9 * sum(values[:5])


def test_each_parameter_keeps_its_own_count_of_steps(make_trainer, images, tmp_path):
    """A step that a parameter has not taken is none of its own; earlier versions recorded none."""
    trainer = make_trainer(tmp_path)
    trainer.step()
    trainer.finished_steps = 3
    trainer.save()
    resumed = Trainer.resume(tmp_path, images)
    p = resumed.network.conv_in.weight
    assert float(resumed.optimizer.state[p]["step"]) == 1
    path = checkpoint.newest(tmp_path) / checkpoint.STATE
    tensors = {k: v for k, v in load_file(path).items() if not k.startswith("step.")}
    save_file(tensors, path)
    facts = json.loads((path.parent / checkpoint.TRAINING).read_text())
    del facts[checkpoint.CHECKSUMS]
    (path.parent / checkpoint.TRAINING).write_text(json.dumps(facts))
    resumed = Trainer.resume(tmp_path, images)
    p = resumed.network.conv_in.weight
    assert float(resumed.optimizer.state[p]["step"]) == 3
    save_file({**tensors, "step.conv_in.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"step\.conv_in\.weight must be one number"):
        Trainer.resume(tmp_path, images)


def test_a_run_before_its_first_step_is_resumed(make_trainer, images, tmp_path):
    for kind in ("sgd", "muon"):
        trainer = make_trainer(tmp_path / kind, optimizer=kind)
        trainer.save()
        resumed = Trainer.resume(tmp_path / kind, images)
        assert resumed.step() == trainer.step()
        assert torch.equal(resumed.network.conv_out.weight, trainer.network.conv_out.weight)


def test_a_state_of_another_optimizer_is_refused(make_trainer, images, tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.save()
    options = dataclasses.replace(trainer.options, optimizer="muon")
    with pytest.raises(CheckpointError, match=r"momentum_buffer\..* must have shape"):
        Trainer.resume(tmp_path, images, options)


# The learning rate.


def rates(**changes) -> list[float]:
    options = TrainingOptions(steps=10, lr=2.0, warmup=2, **changes)
    return [learning_rate(options, step) for step in range(10)]


def test_the_rate_of_each_schedule() -> None:
    assert rates(lr_schedule="constant") == [1, *[2] * 9]
    assert rates(lr_schedule="linear") == [1, 2, *[2 * k / 8 for k in range(8, 0, -1)]]
    cosine = [2 * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert rates(lr_schedule="cosine") == pytest.approx([1, 2, *cosine])
    roots = [2 / math.sqrt(step / 4) for step in range(5, 10)]
    found = rates(lr_schedule="rsqrt", lr_reference=4)
    assert found == pytest.approx([1, 2, 2, 2, 2, *roots])
    assert rates(lr_schedule="rsqrt") == rates(lr_schedule="rsqrt", lr_reference=2)


def test_a_cooldown_ends_at_zero() -> None:
    assert rates(lr_schedule="constant", cooldown=4) == [1, *[2] * 5, 2, 1.5, 1, 0.5]
    whole, cooled = (rates(lr_schedule="rsqrt", cooldown=n) for n in (0, 2))
    assert cooled == [*whole[:8], whole[8], whole[9] / 2]


def test_a_run_of_constant_rate_is_cooled_down_later(make_trainer, images, tmp_path):
    trainer = make_trainer(tmp_path, lr_schedule="constant")
    trainer.run(progress=False)
    options = dataclasses.replace(trainer.options, steps=6, cooldown=2)
    resumed = Trainer.resume(tmp_path, images, options)
    assert [resumed.learning_rate(step) for step in range(6)] == [0.01] * 5 + [0.005]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"optimizer": "lion"}, "unknown optimizer 'lion', wanted one", id="optimizer"),
        pytest.param({"betas": (0.9,)}, r"betas must be two numbers in \[0, 1\)", id="one beta"),
        pytest.param({"betas": (0.9, 1.0)}, r"betas must be two numbers", id="beta"),
        pytest.param({"eps": -1.0}, "eps must not be negative", id="eps"),
        pytest.param({"momentum": 0.9}, "momentum is of sgd and muon; adamw", id="momentum"),
        pytest.param({"optimizer": "sgd", "momentum": 1.0}, r"lie in \[0, 1\)", id="momentum 1"),
        pytest.param({"nesterov": True}, "nesterov is for the optimizer sgd", id="nesterov"),
        pytest.param({"cooldown": 5}, "cooldown is for constant and rsqrt; the", id="cooldown"),
        pytest.param({"lr_reference": 5}, "lr_reference is for rsqrt", id="reference"),
        pytest.param({"lr_schedule": "rsqrt", "warmup": 0}, "rsqrt needs lr_reference", id="rsqrt"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(InputError, match=message):
        TrainingOptions(**changes)


# Gradient checkpointing.


def test_checkpointing_keeps_less_for_the_same_losses(make_trainer):
    kept, losses = {}, {}
    for on in (False, True):
        trainer = make_trainer(gradient_checkpointing=on, compile=False)
        stored: dict[int, int] = {}

        def pack(tensor, stored=stored):
            stored[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = trainer.loss(trainer.batch(trainer.draw(0)))
        weights = {p.data_ptr() for p in trainer.parameters}
        kept[on] = sum(size for place, size in stored.items() if place not in weights)
        del loss
        losses[on] = [trainer.step() for _ in range(3)]
    assert losses[True] == losses[False]
    assert kept[True] < 0.5 * kept[False]


def test_the_averaged_model_samples_as_fast_as_any(make_trainer):
    trainer = make_trainer(gradient_checkpointing=True)
    assert trainer.network._checkpointing
    assert not trainer.ema._checkpointing
