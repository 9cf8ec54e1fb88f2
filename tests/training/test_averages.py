"""Several averages of one run: kept, resumed, found by name, and combined after the run."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.folder import checksums
from fastdiff.common.errors import CheckpointError, InputError, UnwritableError
from fastdiff.training import post_hoc, snapshots
from fastdiff.training.power_function import exponent, weight
from fastdiff.training.trainer import Trainer, TrainingOptions

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = TrainingOptions(
    steps=6, batch_size=4, lr=1e-2, warmup=0, lr_schedule="constant", save_every=100, keep=9,
    sample_every=0, ema=(0.5, 0.9), ema_std=(0.05, 0.1), snapshots=3,
)  # fmt: skip
NAMES = ("ema-0.5", "ema-0.9", "std-0.05", "std-0.1")


def same(a, b) -> bool:
    assert set(a) == set(b)
    return all(torch.equal(a[name], b[name]) for name in a)


def test_each_average_follows_its_formula(make_trainer):
    trainer = make_trainer()
    p = trainer.network.conv_in.weight
    averages = {name: p.detach().double().clone() for name in NAMES}
    for step in range(4):
        trainer.step()
        decay = (1 + step) / (10 + step)
        moves = [1 - min(0.5, decay), 1 - min(0.9, decay)]
        moves += [weight(exponent(0.05), step), weight(exponent(0.1), step)]
        for (name, average), move in zip(averages.items(), moves, strict=True):
            average += move * (p.detach().double() - average)
            found = trainer.averages.state(name)["conv_in.weight"].double()
            torch.testing.assert_close(found, average, rtol=1e-6, atol=1e-7)
    assert same(trainer.ema.state_dict(), trainer.averages.state("ema-0.5"))


def test_the_model_may_be_an_average_by_a_power_function(make_trainer):
    trainer = make_trainer(ema=(), ema_std=0.1)
    assert trainer.checkpoint().weights == "std-0.1"
    trainer.step()  # after which it is the weights, which replaced the start
    assert same(trainer.ema.state_dict(), trainer.network.state_dict())


def test_a_resumed_run_is_the_uninterrupted_one(make_trainer, images, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer = make_trainer(whole)
    trainer.run(progress=False)
    stopped = make_trainer(parts, save_every=3)
    for _ in range(3):
        stopped.step()
    stopped.save()
    resumed = Trainer.resume(parts, images)
    resumed.run(progress=False)
    for name in NAMES:
        assert same(resumed.averages.state(name), trainer.averages.state(name))
    files = [checkpoint.newest(out) for out in (whole, parts)]
    for path in files[0].glob("*.safetensors"):
        assert path.read_bytes() == (files[1] / path.name).read_bytes(), path.name
    for one, other in zip(snapshots.find(whole)[-4:], snapshots.find(parts), strict=True):
        assert (one.step, one.std) == (other.step, other.std)
        assert one.path.read_bytes() == other.path.read_bytes()


def test_weights_are_found_by_name(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.run(progress=False)
    for name in NAMES:
        found = checkpoint.load(tmp_path, name)
        assert found.weights == name
        assert same(found.model.state_dict(), trainer.averages.state(name))
    assert same(checkpoint.load(tmp_path).model.state_dict(), trainer.ema.state_dict())
    assert checkpoint.load(tmp_path).weights == "ema-0.5"
    raw = checkpoint.load(tmp_path, "raw").model.state_dict()
    assert same(raw, trainer.network.state_dict())
    names = "ema-0.5, ema-0.9, std-0.05, std-0.1, raw"
    with pytest.raises(CheckpointError, match=f"has no weights 'ema-0.7', but {names}"):
        checkpoint.load(tmp_path, "ema-0.7")
    with pytest.raises(CheckpointError, match="digits has no weights 'raw', but one set only"):
        checkpoint.load("digits", "raw")


def test_an_average_of_another_model_is_refused(make_trainer, images, tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.save()
    folder = checkpoint.newest(tmp_path)
    path = folder / "diffusion_pytorch_model.ema-0.9.safetensors"
    weights = load_file(path)
    for change, told in (
        ({"conv_in.bias": torch.zeros(1)}, r"conv_in.bias of ema-0.9 has shape \[1\], the model's"),
        ({"more": torch.zeros(2)}, r"more of ema-0.9 has shape \[2\], the model's has none"),
        ({"conv_in.bias": weights["conv_in.bias"] * torch.nan}, "conv_in.bias of ema-0.9 has NaN"),
    ):
        save_file({**weights, **change}, path)
        facts = json.loads((folder / checkpoint.TRAINING).read_text())
        facts[checkpoint.CHECKSUMS] = checksums(folder)
        (folder / checkpoint.TRAINING).write_text(json.dumps(facts))
        with pytest.raises(CheckpointError, match=told):
            Trainer.resume(tmp_path, images)


def test_diffusers_reads_an_average_as_a_variant(make_trainer, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    trainer = make_trainer(tmp_path)
    trainer.step()
    trainer.save()
    folder = checkpoint.newest(tmp_path)
    model = diffusers.UNet2DModel.from_pretrained(
        folder, variant="ema-0.9", use_safetensors=True, local_files_only=True
    )
    assert same(model.state_dict(), trainer.averages.state("ema-0.9"))


def test_a_name_leads_to_no_other_folder(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.save()
    meta = checkpoint.newest(tmp_path) / checkpoint.META
    facts = json.loads(meta.read_text())
    meta.write_text(json.dumps({**facts, "averages": ["../x", "ema-0.9"]}))
    with pytest.raises(CheckpointError, match=r"no weights '\.\./x'"):
        checkpoint.load(tmp_path, "../x")
    (meta.parent / "diffusion_pytorch_model.ema-0.9.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.load(tmp_path, "ema-0.9")


def test_runs_of_earlier_versions_are_resumed(make_trainer, images, tmp_path):
    """They recorded one decay, and no names of weights."""
    trainer = make_trainer(tmp_path, ema=0.5, ema_std=())
    trainer.step()
    trainer.save()
    folder = checkpoint.newest(tmp_path)
    for name, change in (
        (checkpoint.META, lambda facts: [facts.pop(key) for key in ("weights", "averages")]),
        (checkpoint.TRAINING, lambda facts: facts["options"].update(ema=0.5)),
        (checkpoint.TRAINING, lambda facts: facts["options"].pop("ema_std")),
    ):
        facts = json.loads((folder / name).read_text())
        change(facts)
        (folder / name).write_text(json.dumps(facts))
    resumed = Trainer.resume(tmp_path, images)
    assert resumed.options.decays == (0.5,)
    assert resumed.step() == trainer.step()
    assert same(resumed.ema.state_dict(), trainer.ema.state_dict())


def test_an_average_that_was_not_kept_cannot_be_resumed(make_trainer, images, tmp_path):
    trainer = make_trainer(tmp_path, ema=0.5)
    trainer.save()
    options = dataclasses.replace(trainer.options, ema=(0.5, 0.99))
    with pytest.raises(CheckpointError, match=r"has no weights 'ema-0\.99'"):
        Trainer.resume(tmp_path, images, options)


# After the run.


def test_snapshots_are_even_over_the_run(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, steps=7)
    trainer.run(progress=False)
    kept = snapshots.find(tmp_path)
    assert [(s.step, s.std) for s in kept] == [(n, std) for n in (3, 5, 7) for std in (0.05, 0.1)]
    assert same(kept[-1].read(), trainer.averages.state("std-0.1"))
    assert [step for step in range(1, 4) if snapshots.due(step, 3, 100)] == [1, 2, 3]


def test_a_length_is_reconstructed(make_trainer, tmp_path):
    """Against the average that another run keeps all along, to what the residual explains."""
    make_trainer(tmp_path / "run", snapshots=6).run(progress=False)
    other = make_trainer(ema_std=0.08)
    other.run(progress=False)
    found, combination = post_hoc.reconstruct(tmp_path / "run", 0.08)
    assert (found.step, found.weights) == (6, "std-0.08")
    assert 0 < combination.residual < 0.05
    wanted, start = other.averages.state("std-0.08"), other.network.state_dict()
    near, far = 0.0, 0.0
    for name, value in found.model.state_dict().items():
        near += float((value - wanted[name]).square().sum())
        far += float((start[name] - wanted[name]).square().sum())
    assert near < 0.05**2 * far
    kept, combination = post_hoc.reconstruct(tmp_path / "run", 0.05, step=3)
    assert combination.residual < 1e-6
    snapshot = next(s for s in snapshots.find(tmp_path / "run") if (s.step, s.std) == (3, 0.05))
    for name, value in snapshot.read().items():
        torch.testing.assert_close(kept.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_a_refused_snapshot_is_made_at_the_next_checkpoint(make_trainer, tmp_path, monkeypatch):
    trainer, write = make_trainer(tmp_path, steps=6, snapshots=2, save_every=2), snapshots.write

    def full_at_step_3(out, step, states, dtype):
        if step == 3:
            raise UnwritableError("No space left on device")
        write(out, step, states, dtype)

    monkeypatch.setattr(snapshots, "write", full_at_step_3)
    with pytest.warns(UserWarning, match="No space left on device"):
        trainer.run(progress=False)
    kept = [path.name for path in sorted((tmp_path / "snapshots").iterdir())]
    assert kept == ["step-00000004", "step-00000006"]


def test_snapshots_in_another_dtype(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, snapshot_dtype="float16", snapshots=1)
    trainer.run(progress=False)
    (first, _) = snapshots.find(tmp_path)
    assert {value.dtype for value in first.read().values()} == {torch.float16}
    found, _ = post_hoc.reconstruct(tmp_path, 0.05)
    wanted = trainer.averages.state("std-0.05")["conv_in.weight"]
    assert found.model.conv_in.weight.dtype == torch.float32
    torch.testing.assert_close(found.model.conv_in.weight, wanted, rtol=1e-3, atol=1e-4)


def test_a_run_that_goes_back_keeps_no_later_snapshots(make_trainer, images, tmp_path):
    trainer = make_trainer(tmp_path, save_every=2)
    trainer.run(progress=False)
    for folder in checkpoint.all_steps(tmp_path)[1:]:
        folder.rename(tmp_path / folder.name)
    (tmp_path / "snapshots" / ".step-00000004.1.partial").mkdir()
    resumed = Trainer.resume(tmp_path, images, dataclasses.replace(trainer.options, steps=2))
    resumed.run(progress=False)
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["step-00000002"]


def test_what_cannot_be_reconstructed(make_trainer, tmp_path):
    with pytest.raises(CheckpointError, match="has no snapshots of averages"):
        post_hoc.reconstruct(tmp_path, 0.08)
    make_trainer(tmp_path).run(progress=False)
    with pytest.raises(InputError, match=r"must lie in 0\.001"):
        post_hoc.reconstruct(tmp_path, 0.4)
    with pytest.raises(InputError, match=r"must lie in 1\.\.6, .* got 7"):
        post_hoc.reconstruct(tmp_path, 0.08, step=7)
    (tmp_path / "snapshots" / "step-00000004" / "std-0.1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no std-0\.1\.safetensors"):
        post_hoc.reconstruct(tmp_path, 0.08)


def test_the_mean_of_checkpoints(make_trainer, tmp_path, tiny_checkpoint):
    make_trainer(tmp_path, save_every=2).run(progress=False)
    paths = checkpoint.all_steps(tmp_path)
    found = post_hoc.mean(paths, "raw")
    assert (found.step, found.weights) == (6, "mean-of-3")
    values = [checkpoint.load(path, "raw").model.conv_in.weight.double() for path in paths]
    wanted = (sum(values) / 3).float()
    torch.testing.assert_close(found.model.conv_in.weight, wanted, rtol=1e-6, atol=1e-8)
    checkpoint.save(tiny_checkpoint, tmp_path / "other")
    with pytest.raises(InputError, match="have different networks"):
        post_hoc.mean([*paths, tmp_path / "other"])
    with pytest.raises(InputError, match="no checkpoints"):
        post_hoc.mean([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"ema": ()}, "name no average", id="none"),
        pytest.param({"ema": (0.9, 0.9)}, r"ema has a value twice: \(0.9, 0.9\)", id="twice"),
        pytest.param({"ema": (0.9, 1.0)}, r"ema must lie in \[0, 1\), got 1.0", id="decay"),
        pytest.param({"ema_std": (0.5,)}, "must lie in 0.001", id="std"),
        pytest.param({"snapshots": 0}, "snapshots must be at least 1", id="snapshots"),
        pytest.param({"snapshot_dtype": "int8"}, "unknown snapshot_dtype 'int8'", id="dtype"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(InputError, match=message):
        TrainingOptions(**changes)


def test_a_single_number_is_one_average():
    assert TrainingOptions(ema=0.9).ema == (0.9,)
    assert TrainingOptions(ema=[0.9, 0.99]).ema == (0.9, 0.99)
