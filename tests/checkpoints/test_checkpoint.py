"""Checkpoints: written whole or not at all, read back exactly, refused when they are foreign."""

from __future__ import annotations

import errno
import json
import os
import pickle
import stat
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdiff import NoiseSchedule, sample, samplers, schedules, sde
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.checkpoint import CONFIG, META, STATE, TRAINING, WEIGHTS
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.common.errors import CheckpointError, InputError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A checkpoint with training state, on disk."""
    state = ({"moment": torch.arange(3.0)}, {"options": {"lr": 0.5}})
    checkpoint.save(tiny_checkpoint, tmp_path / "saved", state=state)
    return tmp_path / "saved"


def edit(path: Path, **changes):
    """Change keys of a JSON file; None deletes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


# Round trips.


def test_what_is_written_is_read_back(tiny_checkpoint, folder):
    found = checkpoint.load(folder)
    for name, value in tiny_checkpoint.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value), name
    assert torch.equal(found.forward.betas, tiny_checkpoint.forward.betas)
    for name in ("prediction", "classes", "step", "seed", "dataset", "image_size", "channels"):
        assert getattr(found, name) == getattr(tiny_checkpoint, name), name
    assert not found.model.training
    assert found.model.dtype == torch.float32
    assert sorted(entry.name for entry in folder.iterdir()) == sorted(
        [CONFIG, WEIGHTS, META, STATE, TRAINING]
    )


def test_training_state_is_read_back(folder):
    tensors, facts = checkpoint.read_state(folder)
    assert tensors["moment"].tolist() == [0, 1, 2]
    assert facts["options"] == {"lr": 0.5}
    assert checkpoint.read_facts(folder) == facts


def test_diffusers_reads_it(tiny_checkpoint, folder, generator):
    theirs = diffusers.UNet2DModel.from_pretrained(folder)
    x = torch.randn(2, 1, 8, 8, generator=generator)
    labels = torch.tensor([0, 2])
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(x, 10, labels).sample,
            tiny_checkpoint.model(x, 10, labels),
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_an_export_holds_the_dtype_and_no_training_state(tiny_checkpoint, tmp_path, dtype):
    checkpoint.export(tiny_checkpoint, tmp_path / "shared", dtype)
    assert {v.dtype for v in load_file(tmp_path / "shared" / WEIGHTS).values()} == {dtype}
    assert tiny_checkpoint.model.dtype == torch.float32
    found = checkpoint.load(tmp_path / "shared")
    assert found.model.dtype == torch.float32
    for name, value in tiny_checkpoint.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value.to(dtype).float()), name
    with pytest.raises(CheckpointError, match=r"cannot be resumed: it has no training\.json"):
        checkpoint.read_facts(tmp_path / "shared")
    with pytest.raises(CheckpointError, match="it has no training_state"):
        checkpoint.read_state(tmp_path / "shared")


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(schedules.linear(30, 1e-3, 0.1), id="options"),
        pytest.param(schedules.scaled_linear(30, rescaled=True), id="rescaled"),
        pytest.param(schedules.make("sigmoid", 30, zero_terminal_snr=True), id="zero-snr"),
        pytest.param(schedules.shifted_cosine(30, image_size=128), id="shifted_cosine"),
        pytest.param(schedules.sigmoid_abar(30, tau=0.9), id="sigmoid_abar"),
        pytest.param(NoiseSchedule(torch.linspace(0.1, 0.3, 7)), id="betas"),
        pytest.param(NoiseSchedule(torch.linspace(0.1, 0.3, 7), name="linear"), id="misnamed"),
        pytest.param(
            NoiseSchedule(torch.linspace(0.1, 0.3, 7), name="cosine", options={"mood": 1}),
            id="unknown-option",
        ),
        pytest.param(schedules.make("linear", 30, rescale_timesteps=True), id="labels"),
        pytest.param(
            NoiseSchedule(torch.linspace(0.1, 0.3, 7), rescale_timesteps=True), id="betas-labels"
        ),
        pytest.param(schedules.cosine(100).respaced(torch.arange(0, 100, 7)), id="respaced"),
    ],
)
def test_every_schedule_survives_exactly(schedule, tiny_checkpoint, tmp_path):
    tiny_checkpoint.forward = schedule
    checkpoint.save(tiny_checkpoint, tmp_path / "saved")
    read = checkpoint.load(tmp_path / "saved").forward
    assert torch.equal(read.betas, schedule.betas)
    assert read.rescale_timesteps == schedule.rescale_timesteps


@pytest.mark.parametrize(
    ("forward", "prediction", "options"),
    [
        pytest.param(sde.VP(0.2, 15.0), "v", {}, id="vp"),
        pytest.param(sde.SubVP(), "score", {"objective": "dsm"}, id="subvp"),
        pytest.param(sde.LinearLogSNR(9, -9), "eps", {"objective": "dsm"}, id="linear-log-snr"),
        pytest.param(sde.CosineLogSNR(shift=-2), "v", {"objective": "dsm"}, id="cosine-log-snr"),
        pytest.param(sde.VP(smallest=2e-3, trained_from=1e-4), "eps", {}, id="times"),
        pytest.param(sde.VE(0.02, 30.0), "ncsn", {"objective": "ncsn", "levels": 12}, id="ncsn"),
        pytest.param(sde.VE(label_by="sigma"), "score", {}, id="ve-sigma"),
        pytest.param(sde.EDM(0.01, 40.0, 0.7), "edm", {}, id="edm"),
        pytest.param(schedules.flow(30, shift=3.0), "flow", {}, id="flow"),
        pytest.param(schedules.flow(30, label_by="timestep"), "flow", {}, id="flow-by-timestep"),
        pytest.param(schedules.cosine(30), "eps", {"variance": "fixed_large"}, id="fixed_large"),
    ],
)
def test_every_process_survives_exactly(forward, prediction, options, tiny_unet, tmp_path):
    written = Checkpoint(tiny_unet(), forward, prediction, **options)
    checkpoint.save(written, tmp_path / "saved")
    found = checkpoint.load(tmp_path / "saved")
    assert vars(found.forward).keys() == vars(forward).keys()
    if isinstance(forward, sde.SDE):
        assert found.forward.smallest == forward.smallest
        assert found.forward.trained_from == forward.trained_from
    assert repr(found.forward) == repr(forward)
    for name in ("prediction", "objective", "variance", "levels"):
        assert getattr(found, name) == getattr(written, name), name


def test_a_flow_from_before_its_labels_keeps_them(tiny_unet, tmp_path):
    """Its network was told the timestep, 0..T-1, whatever the shift."""
    checkpoint.save(Checkpoint(tiny_unet(), schedules.flow(30, 3.0), "flow"), tmp_path / "a")
    meta = json.loads((tmp_path / "a" / META).read_text())
    assert meta["forward"]["options"].pop("label_by") == "sigma"
    (tmp_path / "a" / META).write_text(json.dumps(meta))
    forward = checkpoint.load(tmp_path / "a").forward
    assert repr(forward) == "FlowSchedule(num_timesteps=30, shift=3.0, label_by='timestep')"
    edit(tmp_path / "a" / META, forward={"name": "flow", "options": {
        "num_timesteps": 30, "shift": 3.0, "label_by": 5}})  # fmt: skip
    with pytest.raises(CheckpointError, match="unknown label_by 5, wanted one of sigma, timestep"):
        checkpoint.load(tmp_path / "a")


@pytest.mark.parametrize(
    ("forward", "times"),
    [
        pytest.param(sde.VP(), (1e-3, 1e-3), id="vp"),
        pytest.param(sde.SubVP(), (1e-3, 1e-3), id="subvp"),
        pytest.param(sde.VE(), (1e-5, 1e-5), id="ve"),
    ],
)
def test_older_checkpoints_keep_the_times_of_their_training(forward, times, tiny_unet, tmp_path):
    """Those without a record of it were trained from the time on at which sampling stops."""
    checkpoint.save(Checkpoint(tiny_unet(), forward, "eps"), tmp_path / "saved")
    described = json.loads((tmp_path / "saved" / META).read_text())["forward"]
    for name in ("smallest", "trained_from"):
        del described["options"][name]
    edit(tmp_path / "saved" / META, forward=described)
    found = checkpoint.load(tmp_path / "saved").forward
    assert (found.smallest, found.trained_from) == times


def test_a_learned_variance_survives(tiny_unet, tmp_path):
    model = tiny_unet(learned_variance=True)
    checkpoint.save(Checkpoint(model, schedules.cosine(9), "eps", objective="vlb"), tmp_path / "a")
    assert checkpoint.load(tmp_path / "a").diffusion().objective.variance == "learned_range"
    edit(tmp_path / "a" / META, objective="ddpm")
    with pytest.raises(CheckpointError, match="channels and variance is 1, out_channels is 2"):
        checkpoint.load(tmp_path / "a")


def test_a_view_of_another_process_is_not_written(tiny_checkpoint, tmp_path):
    tiny_checkpoint.forward = sde.Straight()
    with pytest.raises(InputError, match="cannot record the forward process Straight"):
        checkpoint.save(tiny_checkpoint, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_known_by_its_newest_checkpoint(tiny_checkpoint, tmp_path):
    assert checkpoint.newest(tmp_path) is None
    for step in (5, 20, 100):
        tiny_checkpoint.step = step
        checkpoint.save(tiny_checkpoint, checkpoint.step_folder(tmp_path, step))
    (tmp_path / "checkpoints" / "step-notes").mkdir()
    (tmp_path / "checkpoints" / ".step-00000200.1.partial").mkdir()
    assert [path.name for path in checkpoint.all_steps(tmp_path)] == [
        "step-00000005",
        "step-00000020",
        "step-00000100",
    ]
    assert checkpoint.load(tmp_path).step == 100
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000020",
        "step-00000100",
        "step-notes",
    ]


# Writing: all or nothing.


def test_an_existing_folder_is_left_alone(tiny_checkpoint, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match="exists already"):
        checkpoint.save(tiny_checkpoint, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS, META, STATE, TRAINING])
def test_a_full_disk_leaves_what_was_there(file, tiny_checkpoint, tmp_path, monkeypatch):
    """Whichever file does not fit: the old checkpoint stays the newest, and is whole."""
    old, new = (checkpoint.step_folder(tmp_path, step) for step in (1, 2))
    state = ({"moment": torch.zeros(2)}, {})
    checkpoint.save(tiny_checkpoint, old, state=state)
    write_text = Path.write_text

    def full_text(path, text, *args, **kwargs):
        if path.name == file:
            write_text(path, text[:10], *args, **kwargs)
            no_space()
        return write_text(path, text, *args, **kwargs)

    def full_tensors(tensors, path, *args, **kwargs):
        if Path(path).name == file:
            Path(path).write_bytes(b"half")
            no_space()
        save_file(tensors, path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full_text)
    monkeypatch.setattr("fastdiff.checkpoints.checkpoint.save_file", full_tensors)
    monkeypatch.setattr("fastdiff.nn.pretrained.save_file", full_tensors)
    with pytest.raises(CheckpointError, match=r"step-00000002: No space left on device"):
        checkpoint.save(tiny_checkpoint, new, state=state)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [old.name]
    assert checkpoint.newest(tmp_path) == old
    assert checkpoint.load(tmp_path).classes == tiny_checkpoint.classes
    checkpoint.save(tiny_checkpoint, new, state=state)  # once there is space again
    assert checkpoint.newest(tmp_path) == new


def test_a_failing_flush_is_a_failed_write(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.save(tiny_checkpoint, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


FOLDER_ERRORS = ("EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EACCES", "EPERM", "EBADF", "EISDIR")


@pytest.mark.parametrize("call", ["fsync", "open"])
@pytest.mark.parametrize("name", FOLDER_ERRORS)
def test_a_file_system_that_flushes_no_folders(
    name, call, tiny_checkpoint, tmp_path, monkeypatch, caplog
):
    """CIFS, FUSE and shared folders: the checkpoint is there as soon as they have time."""
    refuse_folders(monkeypatch, call, getattr(errno, name))
    with caplog.at_level("INFO", "fastdiff"):
        checkpoint.save(tiny_checkpoint, tmp_path / "new")
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "new").step == 7
    assert f"{tmp_path} is written, but cannot be flushed" in caplog.text


@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EDQUOT"])
def test_errors_of_the_disk_stay_errors(name, tiny_checkpoint, tmp_path, monkeypatch):
    number = getattr(errno, name)
    refuse_folders(monkeypatch, "fsync", number)
    with pytest.raises(CheckpointError, match=f"cannot write the .*: {os.strerror(number)}"):
        checkpoint.save(tiny_checkpoint, tmp_path / "new")


def refuse_folders(monkeypatch, call, number):
    """Let os.fsync or os.open fail for folders."""
    real = getattr(os, call)

    def refusing(target, *args, **kwargs):
        exists = not isinstance(target, (str, os.PathLike)) or os.path.exists(target)
        if exists and stat.S_ISDIR(os.stat(target).st_mode):
            raise OSError(number, os.strerror(number))
        return real(target, *args, **kwargs)

    monkeypatch.setattr(os, call, refusing)


@pytest.mark.parametrize("name", ["EINVAL", "ENOTSUP"])
def test_a_file_system_that_flushes_nothing(name, tiny_checkpoint, tmp_path, monkeypatch):
    def refusing(descriptor):
        raise OSError(getattr(errno, name), "no")

    monkeypatch.setattr("os.fsync", refusing)
    checkpoint.save(tiny_checkpoint, tmp_path / "new")
    assert checkpoint.load(tmp_path / "new").step == 7


def test_a_file_that_may_not_be_opened_stays_an_error(tiny_checkpoint, tmp_path, monkeypatch):
    def refusing(path, *args):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("os.open", refusing)
    with pytest.raises(CheckpointError, match="Permission denied"):
        checkpoint.save(tiny_checkpoint, tmp_path / "new")


def test_old_checkpoints_that_cannot_be_deleted_are_left(tiny_checkpoint, tmp_path, monkeypatch):
    for step in (1, 2):
        checkpoint.save(tiny_checkpoint, checkpoint.step_folder(tmp_path, step))

    def busy(folder):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr("shutil.rmtree", busy)
    with pytest.warns(UserWarning, match=r"cannot delete the old .*step-00000001: Device or"):
        checkpoint.prune(tmp_path, 1)
    assert len(checkpoint.all_steps(tmp_path)) == 2


def test_what_a_killed_process_left_is_no_obstacle(tiny_checkpoint, tmp_path):
    """Process ids come again, in containers soon."""
    import os

    partial = tmp_path / f".saved.{os.getpid()}.partial"
    partial.mkdir()
    (partial / META).write_text("{")
    checkpoint.save(tiny_checkpoint, tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        pytest.param(torch.nan, torch.float32, id="NaN"),
        pytest.param(1e6, torch.float16, id="too-large-for-float16"),
    ],
)
def test_broken_weights_are_not_written(value, dtype, tiny_checkpoint, tmp_path):
    with torch.no_grad():
        tiny_checkpoint.model.conv_in.weight[0, 0, 0, 0] = value
    with pytest.raises(CheckpointError, match=r"conv_in\.weight is not finite"):
        checkpoint.save(tiny_checkpoint, tmp_path / "saved", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


# Reading: nothing foreign, nothing damaged, nothing unpickled.


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def poison(path):
    """Weights of the right names and shapes, one of them NaN."""
    tensors = load_file(path)
    tensors["conv_in.bias"][0] = torch.nan
    save_file(tensors, path)


def drop_a_weight(path):
    tensors = load_file(path)
    del tensors["conv_out.bias"]
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda f: truncate(f / WEIGHTS), "damaged or no safetensors", id="truncated"),
        pytest.param(
            lambda f: (f / WEIGHTS).write_bytes(b""), r"no safetensors file \(0 bytes\)", id="empty"
        ),
        pytest.param(
            lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 64), "no safetensors", id="other bytes"
        ),
        pytest.param(lambda f: (f / WEIGHTS).unlink(), "it has no diffusion_pytorch", id="weights"),
        pytest.param(lambda f: (f / CONFIG).unlink(), r"it has no config\.json", id="config"),
        pytest.param(lambda f: (f / META).unlink(), r"it has no fastdiff\.json", id="meta"),
        pytest.param(lambda f: poison(f / WEIGHTS), r"conv_in\.bias has NaN", id="NaN"),
        pytest.param(
            lambda f: drop_a_weight(f / WEIGHTS), r"conv_out\.bias is missing", id="missing weight"
        ),
        pytest.param(
            lambda f: edit(f / CONFIG, down_block_types=["DownBlock2D", "MagicBlock2D"]),
            "MagicBlock2D",
            id="unknown block",
        ),
        pytest.param(
            lambda f: edit(f / CONFIG, _class_name="UNet2DConditionModel"),
            "describes a UNet2DConditionModel",
            id="another class",
        ),
        pytest.param(lambda f: edit(f / CONFIG, window_size=7), "window_size", id="unknown option"),
        pytest.param(
            lambda f: edit(f / CONFIG, block_out_channels=[8, 24]),
            "cannot build the model",
            id="other widths",
        ),
        pytest.param(
            lambda f: edit(f / CONFIG, sample_size=16),
            "image_size is 8, sample_size is 16",
            id="another size",
        ),
        pytest.param(
            lambda f: edit(f / CONFIG, sample_size=None),
            "image_size is 8, sample_size is None",
            id="no size",
        ),
        pytest.param(
            lambda f: edit(f / META, classes=["a", "b"]),
            "classes is 2, num_class_embeds is 3",
            id="fewer classes",
        ),
        pytest.param(lambda f: edit(f / META, format=99), "format 99", id="newer format"),
        pytest.param(lambda f: edit(f / META, format=None), "format None", id="no format"),
        pytest.param(lambda f: edit(f / META, step="many"), "'step' must be a int", id="step"),
        pytest.param(lambda f: edit(f / META, prediction="w"), "kind 'w'", id="prediction"),
        pytest.param(lambda f: edit(f / META, objective="gan"), "objective 'gan'", id="objective"),
        pytest.param(lambda f: edit(f / META, objective="dsm"), "dsm needs an SDE", id="another"),
        pytest.param(lambda f: edit(f / META, levels="ten"), "'levels' must be a int", id="levels"),
        pytest.param(
            lambda f: edit(f / META, objective="hybrid"),
            "channels and variance is 2, out_channels is 1",
            id="too few channels",
        ),
        pytest.param(
            lambda f: edit(f / META, forward={"name": "vp", "options": {}}),
            "both a 'schedule' and a 'forward' process",
            id="two processes",
        ),
        pytest.param(
            lambda f: edit(f / META, schedule=None), "'schedule' must be a dict", id="no process"
        ),
        *(
            pytest.param(
                lambda f, forward=forward: edit(f / META, schedule=None, forward=forward),
                message,
                id=message,
            )
            for forward, message in (
                ("vp", "'forward' must be a dict, got 'vp'"),
                ({"name": 3, "options": {}}, "'name' must be a str, got 3"),
                ({"name": "vp"}, "'options' must be a dict, got None"),
                ({"name": "vq", "options": {}}, "unknown forward process 'vq'"),
                ({"name": "vp", "options": {"beta_min": 1}}, "beta_min, beta_max, got beta_min"),
                (
                    {"name": "ve", "options": {"sigma_min": 1, "sigma_max": 2, "trained_from": 2}},
                    "wanted 0 < trained_from <= smallest < 1, got trained_from 2",
                ),
                ({"name": "ve", "options": {}}, "has the options sigma_min, sigma_max, got none"),
                (
                    {"name": "ve", "options": {"sigma_min": "x", "sigma_max": 2}},
                    "'sigma_min' must be a number, got 'x'",
                ),
                (
                    {"name": "ve", "options": {"sigma_min": 3, "sigma_max": 2}},
                    "unusable forward process: wanted 0 < sigma_min < sigma_max",
                ),
                (
                    {"name": "flow", "options": {"num_timesteps": 2.5, "shift": 1}},
                    "'num_timesteps' must be a whole number, got 2.5",
                ),
            )
        ),
        pytest.param(
            lambda f: edit(
                f / META, schedule={"name": "zigzag", "num_timesteps": 9, "options": {}}
            ),
            "unusable schedule: unknown schedule 'zigzag'",
            id="unknown schedule",
        ),
        pytest.param(
            lambda f: edit(f / META, schedule={"name": "linear", "num_timesteps": 9}),
            "'options' must be a dict",
            id="schedule without options",
        ),
        pytest.param(
            lambda f: edit(
                f / META, schedule={"name": "cosine", "num_timesteps": 9, "options": {"k": 1}}
            ),
            "unusable schedule",
            id="unknown schedule option",
        ),
        pytest.param(
            lambda f: edit(f / META, schedule={"name": "mine", "betas": [0.1, "x"]}),
            "unusable schedule",
            id="betas of words",
        ),
        pytest.param(lambda f: (f / META).write_text("{"), "is not JSON", id="half a JSON"),
        pytest.param(lambda f: (f / META).write_text("[1]"), "JSON object", id="JSON list"),
        pytest.param(lambda f: (f / META).write_bytes(b"\xff\xfe"), "is not JSON", id="not text"),
    ],
)
def test_damaged_and_foreign_checkpoints(damage, message, folder):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda f: truncate(f / STATE), "damaged or no safetensors", id="truncated"),
        pytest.param(lambda f: edit(f / TRAINING, format=2), "format 2", id="newer format"),
        pytest.param(lambda f: (f / TRAINING).write_text(""), "is not JSON", id="empty"),
    ],
)
def test_damaged_training_state(damage, message, folder):
    damage(folder)
    checkpoint.load(folder)  # sampling needs none of it
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read_state(folder)


class Bomb:
    """What a malicious pickle would do when it is loaded."""

    exploded = False

    def __reduce__(self):
        return (setattr, (Bomb, "exploded", True))


def test_nothing_is_ever_unpickled(folder):
    """Beside the weights a .bin is passed over; in their place, it is refused unread."""
    pickled = pickle.dumps(Bomb())
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "training_state.pt"):
        (folder / name).write_bytes(pickled)
    checkpoint.load(folder)
    checkpoint.read_state(folder)
    (folder / WEIGHTS).write_bytes(pickled)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        checkpoint.load(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"it has no diffusion_pytorch_model\.safetensors"):
        checkpoint.load(folder)
    assert not Bomb.exploded
    pickle.loads(pickled)
    assert Bomb.exploded  # the bomb was a real one


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        checkpoint.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="not a fastdiff checkpoint"):
        checkpoint.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="not a fastdiff checkpoint"):
        checkpoint.load(tmp_path / "file")


def test_a_shipped_name_wins_over_a_folder(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(checkpoint, "PRETRAINED", folder.parent)
    monkeypatch.chdir(tmp_path)
    assert checkpoint.shipped() == ("saved",)
    assert checkpoint.resolve("saved") == folder
    assert checkpoint.resolve("./saved") == Path("./saved")
    with pytest.raises(CheckpointError, match=r"no shipped model has that name \(saved\)"):
        checkpoint.load("digits-of-old")


# Sampling from a checkpoint.


def draw(found: Checkpoint, **options):
    sampler = samplers.DDIM(found.forward, 2, prediction=found.prediction)
    seeded = torch.Generator().manual_seed(0)
    return found.sample(sampler, generator=seeded, progress=False, **options)


def test_samples_of_classes(tiny_checkpoint):
    drawn = draw(tiny_checkpoint, labels=[0, 1, 2, 1])
    assert drawn.shape == (4, 1, 8, 8)
    assert drawn.is_contiguous()
    assert torch.equal(draw(tiny_checkpoint, labels=[0, 1, 2, 1]), drawn)
    other = draw(tiny_checkpoint, labels=[0, 2, 2, 1])
    assert not torch.equal(other[1], drawn[1])
    torch.testing.assert_close(other[0], drawn[0])
    assert draw(tiny_checkpoint, labels=[]).shape == (0, 1, 8, 8)
    assert draw(tiny_checkpoint, labels=[0, 1, 2], batch_size=2).shape == (3, 1, 8, 8)


def test_samples_of_an_unconditional_model(tiny_unet):
    found = Checkpoint(tiny_unet(), schedules.cosine(10), "v")
    assert draw(found, count=3).shape == (3, 1, 8, 8)
    assert draw(found, count=0).shape == (0, 1, 8, 8)
    for options in ({"labels": [0]}, {"labels": [0, 0], "count": 2}):
        with pytest.raises(InputError, match="unconditional"):
            draw(found, **options)


def test_a_model_with_a_null_class_can_be_guided(tiny_unet, tmp_path):
    found = Checkpoint(
        tiny_unet(num_classes=3), schedules.cosine(10), "v", ("a", "b"), null_class=True
    )
    checkpoint.save(found, tmp_path / "saved")
    found = checkpoint.load(tmp_path / "saved")
    assert (found.classes, found.null_class) == (("a", "b"), True)
    plain, guided = (draw(found, labels=[0, 1], guidance=scale) for scale in (1.0, 3.0))
    assert not torch.equal(plain, guided)
    sampler = samplers.DDIM(found.forward, 2, prediction="v")
    x_T = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    by_hand = sample(
        found.model, sampler, x_T.shape, x_T=x_T, guidance=3.0, progress=False,
        cond={"class_labels": torch.tensor([0, 1])},
        uncond={"class_labels": torch.tensor([2, 2])},
    )  # fmt: skip
    torch.testing.assert_close(guided, by_hand)
    with pytest.raises(InputError, match=r"class 2 does not exist: the model has 0\.\.1"):
        draw(found, labels=[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"labels": [0], "guidance": 2.0}, "trained with label dropout", id="guided"),
        pytest.param({}, "say which classes", id="no labels"),
        pytest.param({"labels": [3]}, r"class 3 does not exist: .* 0\.\.2", id="too large"),
        pytest.param({"labels": [0, -1]}, "class -1 does not exist", id="negative"),
        pytest.param({"labels": [0, 1], "count": 3}, "3 images .* 2 labels", id="count"),
        pytest.param({"labels": [0], "batch_size": 0}, "0 at a time", id="batch size"),
    ],
)
def test_what_cannot_be_sampled(options, message, tiny_checkpoint):
    with pytest.raises(InputError, match=message):
        draw(tiny_checkpoint, **options)


def test_a_negative_count(tiny_unet):
    with pytest.raises(InputError, match="cannot generate -1 images"):
        draw(Checkpoint(tiny_unet(), schedules.cosine(10), "v"), count=-1)
