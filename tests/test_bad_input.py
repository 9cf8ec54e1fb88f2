"""Bad input gets a clear error and nothing is lost: one row a case, whatever module it concerns.

What the command line makes of them stands in tests/cli.
"""

from __future__ import annotations

import errno
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import fastdiff
from fastdiff import NoiseSchedule, data, ops, process, samplers, schedules
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.checkpoint import CONFIG, META, STATE, WEIGHTS
from fastdiff.common.errors import CheckpointError, DataError, InputError
from fastdiff.nn import UNet2DModel
from fastdiff.nn.image_unet import make_unet
from fastdiff.training.trainer import Trainer, TrainingOptions

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.zeros(2, 6, 4, 4)
T2 = torch.zeros(2, dtype=torch.int64)
SEEDS = torch.zeros(2, 2, dtype=torch.int64)
TABLE, STEP = torch.zeros(3, len(samplers.COLUMNS)), torch.tensor(0)
ABAR = torch.full((10,), 0.5)
LINEAR = schedules.linear(10, rescaled=True)
ZERO_SNR = schedules.rescale_zero_terminal_snr(LINEAR)
META_X = X.to("meta")
SPARSE = X.to_sparse()

# (id, call, error, part of its message)
OPERATIONS = [
    ("groups that do not divide", lambda: ops.group_norm_silu(X, 4), ValueError,
     "got 4 groups for 6 channels"),
    ("no groups", lambda: ops.group_norm_silu(X, 0), ValueError, "got 0 groups"),
    ("norm of integers", lambda: ops.group_norm_silu(X.long(), 2), TypeError, "floating point"),
    ("norm of complex numbers", lambda: ops.group_norm_silu(X.cfloat(), 2), TypeError,
     "floating point, got torch.complex64"),
    ("norm without channels", lambda: ops.group_norm_silu(X[0, 0, 0], 2), ValueError,
     r"\[N, C, ...\]"),
    ("norm of a sparse tensor", lambda: ops.group_norm_silu(SPARSE, 2), TypeError,
     "dense tensor, got layout torch.sparse_coo"),
    ("norm of a blocked tensor", lambda: ops.group_norm_silu(X.to_mkldnn(), 2), TypeError,
     "layout torch._mkldnn"),
    ("weight of another dtype", lambda: ops.group_norm_silu(X, 2, torch.ones(6).double()),
     TypeError, "weight must have the dtype of x, torch.float32, got torch.float64"),
    ("weight of another length", lambda: ops.group_norm_silu(X, 2, torch.ones(5)), ValueError,
     r"weight must have shape \(6,\), got \(5,\)"),
    ("weight on another device", lambda: ops.group_norm_silu(META_X, 2, torch.ones(6)),
     ValueError, "weight must be on the device of x, meta, got cpu"),
    ("bias of another dtype", lambda: ops.group_norm_silu(X, 2, None, torch.ones(6).half()),
     TypeError, "bias must have the dtype"),
    ("add of another shape", lambda: ops.group_norm_silu(X, 2, add=X), ValueError,
     r"add must have shape \(2, 6\)"),
    ("scale of another shape", lambda: ops.group_norm_silu(X, 2, scale=torch.ones(6)),
     ValueError, "scale must have shape"),
    ("shift of another shape", lambda: ops.group_norm_silu(X, 2, shift=torch.ones(2, 5)),
     ValueError, "shift must have shape"),
    ("sparse shift", lambda: ops.group_norm_silu(X, 2, shift=torch.ones(2, 6).to_sparse()),
     TypeError, "shift must be a dense tensor"),
    ("residual of another shape", lambda: ops.group_norm_silu(X, 2, residual=X[:1]), ValueError,
     r"residual must have shape \(2, 6, 4, 4\), got \(1, 6, 4, 4\)"),
    ("skip of another size", lambda: ops.group_norm_silu(X, 2, skip=X[..., :2]), ValueError,
     r"skip must have the shape of x but for its channels, .* got \(2, 6, 4, 2\)"),
    ("skip without channels", lambda: ops.group_norm_silu(X, 2, skip=T2), ValueError, "skip must"),
    ("skip of another dtype", lambda: ops.group_norm_silu(X, 2, skip=X.half()), TypeError,
     "skip must have the dtype of x"),
    ("groups of two inputs", lambda: ops.group_norm_silu(X, 6, skip=X[:, :1]), ValueError,
     "got 6 groups for 7 channels"),
    ("statistics of two inputs", lambda: ops.group_norm_silu(X, 2, skip=X, statistics=X),
     ValueError, "statistics and skip cannot both"),
    ("statistics of another shape", lambda: ops.group_norm_silu(X, 2, statistics=X), ValueError,
     r"statistics must have shape \[2, S, 4, 6\]"),
    ("statistics of another dtype", lambda: ops.group_norm_silu(
        X, 2, statistics=torch.ones(2, 1, 4, 6).double()), TypeError, "must be float32"),
    ("bias of another length", lambda: ops.conv_epilogue(X, torch.ones(5)), ValueError,
     r"bias must have shape \(6,\), got \(5,\)"),
    ("embedding of another length", lambda: ops.conv_epilogue(X, None, torch.ones(1, 6)),
     ValueError, r"emb must have shape \(2, 6\)"),
    ("residual of a convolution", lambda: ops.conv_epilogue(X, residual=X[:1]), ValueError,
     "residual must have the shape of x"),
    ("epilogue of integers", lambda: ops.conv_epilogue(X.long()), TypeError, "floating point"),
    ("epilogue of a vector", lambda: ops.conv_epilogue(X[0, 0, 0], statistics=True), ValueError,
     r"\[N, C, ...\]"),
    ("upsampling of a vector", lambda: ops.upsample_nearest2x(X[0]), ValueError,
     r"x must be \[N, C, H, W\], got \(6, 4, 4\)"),
    ("upsampling of integers", lambda: ops.upsample_nearest2x(X.int()), TypeError, "floating"),
    ("averages without parameters", lambda: ops.ema_update([X], [], 0.1), ValueError,
     "as many averages as parameters, got 1 and 0"),
    ("parameters without averages", lambda: ops.ema_update([], [X], 0.1), ValueError,
     "no averages for 1 parameters"),
    ("average of another shape", lambda: ops.ema_update([X], [X[:1]], 0.1), ValueError,
     r"averages\[0\] must have the shape of its parameter, \(1, 6, 4, 4\)"),
    ("average of integers", lambda: ops.ema_update([X.long()], [X], 0.1), TypeError,
     r"averages\[0\] must be floating point"),
    ("weight above 1", lambda: ops.ema_update([X], [X], 1.5), ValueError, "in 0..1, got 1.5"),
    ("weight of an average in float64", lambda: ops.ema_update([X], [X], STEP.double()), TypeError,
     "weight must be a float32 tensor of one element"),
    ("row of noise as int32", lambda: ops.q_sample_from_seed(X, T2, SEEDS, STEP.int(), ABAR, ABAR),
     TypeError, "row must be an int64 tensor of one element"),
    ("seeds of another batch", lambda: ops.q_sample_from_seed(X, T2, SEEDS[:1], STEP, ABAR, ABAR),
     ValueError, r"seed must have shape \(2, 2\)"),
    ("t above, from a seed", lambda: ops.q_sample_from_seed(X, T2 + 10, SEEDS, STEP, ABAR, ABAR),
     IndexError, r"0\.\.9 .* from 10 to 10"),
    ("residual of another dtype", lambda: ops.group_norm_silu(X, 2, residual=X.bfloat16()),
     TypeError, "residual must have the dtype"),
    ("embedding of another shape", lambda: ops.add_time_embedding(X, torch.ones(2, 5)),
     ValueError, r"emb \[N, C\], got \(2, 6, 4, 4\) and \(2, 5\)"),
    ("embedding of another dtype", lambda: ops.add_time_embedding(X, torch.ones(2, 6).half()),
     TypeError, "emb must have the dtype of x"),
    ("embedding on another device", lambda: ops.add_time_embedding(META_X, torch.ones(2, 6)),
     ValueError, "device of x, meta, got cpu"),
    ("embedding added to integers", lambda: ops.add_time_embedding(X.int(), torch.ones(2, 6)),
     TypeError, "floating point, got torch.int32"),
    ("t too large", lambda: ops.q_sample(X, T2 + 10, X, ABAR, ABAR), IndexError,
     r"t must lie in 0\.\.9 .* from 10 to 10"),
    ("t negative", lambda: ops.q_sample(X, T2 - 1, X, ABAR, ABAR), IndexError, "from -1 to -1"),
    ("t of another dtype", lambda: ops.q_sample(X, T2.float(), X, ABAR, ABAR), TypeError,
     "t must be int64, got torch.float32"),
    ("t for another batch", lambda: ops.q_sample(X, T2[:1], X, ABAR, ABAR), ValueError,
     r"t must have shape \(2,\)"),
    ("t on another device", lambda: ops.q_sample(X, T2.to("meta"), X, ABAR, ABAR), ValueError,
     "t must be on the device of x, cpu, got meta"),
    ("noise of another shape", lambda: ops.q_sample(X, T2, X[..., :1], ABAR, ABAR), ValueError,
     "noise must have the shape of x0"),
    ("noise of another dtype", lambda: ops.q_sample(X, T2, X.half(), ABAR, ABAR), TypeError,
     "noise must have the dtype of x0"),
    ("table of another dtype", lambda: ops.q_sample(X, T2, X, ABAR.double(), ABAR), TypeError,
     "sqrt_alphas_cumprod must be torch.float32"),
    ("tables of two lengths", lambda: ops.q_sample(X, T2, X, ABAR, ABAR[:5]), ValueError,
     "sqrt_one_minus_alphas_cumprod must have shape"),
    ("noising of sparse images", lambda: ops.q_sample(SPARSE, T2, X, ABAR, ABAR), TypeError,
     "x0 must be a dense tensor"),
    ("step after the last", lambda: ops.sampler_step(X, X, None, None, TABLE, STEP + 3),
     IndexError, "step must lie|out of range"),
    ("step before the first", lambda: ops.sampler_step(X, X, None, None, TABLE, STEP - 1),
     IndexError, "step must lie|out of range"),
    ("step of another dtype", lambda: ops.sampler_step(X, X, None, None, TABLE, STEP.int()),
     TypeError, "step must be an int64 tensor of one element"),
    ("two steps", lambda: ops.sampler_step(X, X, None, None, TABLE, T2), TypeError, "one element"),
    ("narrow table", lambda: ops.sampler_step(X, X, None, None, TABLE[:, :9], STEP), ValueError,
     r"table must have shape \[R, 18\]"),
    ("table in half precision", lambda: ops.sampler_step(X, X, None, None, TABLE.half(), STEP),
     TypeError, "table must be torch.float32"),
    ("output of another shape", lambda: ops.sampler_step(X, X[:, :5], None, None, TABLE, STEP),
     ValueError, "model_out must have the shape of x"),
    ("output of another dtype", lambda: ops.sampler_step(X, X.double(), None, None, TABLE, STEP),
     TypeError, "model_out must have the dtype of x"),
    ("step noise of another shape", lambda: ops.sampler_step(X, X, None, X[:1], TABLE, STEP),
     ValueError, "noise must have the shape of x"),
    ("history of another shape", lambda: ops.sampler_step(X, X, X, None, TABLE, STEP), ValueError,
     "history must have shape"),
    ("step of integers", lambda: ops.sampler_step(X.long(), X.long(), None, None, TABLE, STEP),
     TypeError, "floating point"),
]  # fmt: skip

LIBRARY = [
    ("unknown backend", lambda: fastdiff.backend("tpu"), ValueError, "unknown backend 'tpu'"),
    ("betas outside (0, 1]", lambda: NoiseSchedule(torch.tensor([0.5, 1.5])), ValueError,
     r"\(0, 1\]"),
    ("unknown schedule", lambda: schedules.make("quadratic"), ValueError, "unknown schedule"),
    ("schedule of no steps", lambda: schedules.cosine(0), ValueError, "at least 1, got 0"),
    ("t beyond the schedule", lambda: process.q_sample(LINEAR, X, T2 + 10, X), IndexError,
     r"0\.\.9"),
    ("eps at zero SNR", lambda: process.to_x0(ZERO_SNR, X, T2 + 9, X), ValueError,
     "zero signal-to-noise"),
    ("unknown prediction", lambda: process.target(LINEAR, X, T2, X, "epsilon"), ValueError,
     "unknown prediction kind 'epsilon'"),
    ("more steps than T", lambda: samplers.DDIM(LINEAR, 11), ValueError, r"1\.\.10 .* got 11"),
    ("more DDPM steps than T", lambda: samplers.DDPM(LINEAR, 11), ValueError, "got 11"),
    ("no sampling steps", lambda: samplers.DDIM(LINEAR, 0), ValueError, "got 0"),
    ("unknown sampler", lambda: samplers.make("rk45", LINEAR, 5), ValueError, "unknown sampler"),
    ("unknown grid", lambda: samplers.DDIM(LINEAR, 5, grid="even"), ValueError, "unknown grid"),
    ("unknown option of a sampler", lambda: samplers.DDIM(LINEAR, 5, spacing="leading"), TypeError,
     "'spacing'"),
    ("unknown variance", lambda: samplers.DDPM(LINEAR, variance="big"), ValueError, "variance"),
    ("eta above 1", lambda: samplers.DDIM(LINEAR, 5, eta=2), ValueError, "got 2"),
    ("eps sampler at zero SNR", lambda: samplers.DDPM(ZERO_SNR), ValueError, "zero signal"),
    ("sampling one dimension",
     lambda: fastdiff.sample(lambda x, t: x, samplers.DDIM(LINEAR, 2), (4,)), ValueError,
     r"shape must be \[N, C, ...\], got \(4,\)"),
    ("model output that does not fit",
     lambda: fastdiff.sample(
         lambda x, t: x[:, :1], samplers.DDIM(LINEAR, 2), (1, 2, 4, 4), progress=False),
     ValueError, r"got \(1, 1, 4, 4\)"),
    ("unknown block", lambda: UNet2DModel(down_block_types=("MagicBlock2D",) * 4), ValueError,
     "MagicBlock2D"),
    ("unknown option of the U-Net", lambda: UNet2DModel(depth=3), ValueError, "depth"),
    ("image too small for the U-Net", lambda: make_unet(6), InputError, "divisible by 4, got 6"),
    ("training for no steps", lambda: TrainingOptions(steps=0), InputError, "got 0"),
    ("images without a batch", lambda: data.ImageSet(X[0]), DataError, r"\[N, C, S, S\]"),
    ("unknown split", lambda: data.digits("dev"), DataError, "unknown split 'dev'"),
    ("no checkpoint", lambda: checkpoint.load("no/such/folder"), CheckpointError,
     "no such folder"),
]  # fmt: skip


def rows(table):
    return [pytest.param(*row[1:], id=row[0]) for row in table]


@pytest.mark.parametrize(("call", "error", "message"), rows(OPERATIONS))
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_operations(backend, call, error, message):
    """The same error whatever runs the operation."""
    with fastdiff.backend(backend), pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(("call", "error", "message"), rows(LIBRARY))
def test_library(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Files. Each row damages a folder of images or a training run, and says what reading it raises.


@pytest.fixture
def run(tiny_unet, tmp_path):
    """A folder of images and a training run with one checkpoint."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(2):
        Image.new("L", (8, 8), 60 * i).save(pictures / f"{i}.png")
    images = data.folder(pictures, 8, grayscale=True, progress=False)
    trainer = Trainer(
        tiny_unet(),
        schedules.cosine(10),
        images,
        TrainingOptions(steps=2, batch_size=2, save_every=1, sample_every=0),
        prediction="v",
        out=tmp_path / "out",
    )
    trainer.step()
    trainer.save()
    return SimpleNamespace(
        pictures=pictures, images=images, trainer=trainer, out=tmp_path / "out",
        folder=checkpoint.step_folder(tmp_path / "out", 1),
    )  # fmt: skip


def read_pictures(run):
    return data.folder(run.pictures, 8, progress=False)


def load(run):
    return checkpoint.load(run.out)


def resume(run):
    return Trainer.resume(run.out, run.images)


def empty(run):
    for path in run.pictures.iterdir():
        path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-50])


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FILES = [
    ("empty folder", empty, read_pictures, DataError, "has no images"),
    ("unreadable image", lambda r: (r.pictures / "1.png").write_text("words"), read_pictures,
     DataError, r"cannot read the image .*1\.png"),
    ("truncated image", lambda r: cut(r.pictures / "1.png"), read_pictures, DataError,
     r"cannot read the image .*1\.png"),
    ("truncated checkpoint", lambda r: cut(r.folder / WEIGHTS), load, CheckpointError,
     "damaged or no safetensors"),
    ("checkpoint without weights", lambda r: (r.folder / WEIGHTS).unlink(), load,
     CheckpointError, "not a complete checkpoint"),
    ("pickled weights", lambda r: (r.folder / WEIGHTS).rename(r.folder / "pytorch_model.bin"),
     load, CheckpointError, "not a complete checkpoint"),
    ("foreign folder", lambda r: (r.folder / META).unlink(), load, CheckpointError,
     r"cannot read .*fastdiff\.json"),
    ("foreign model", lambda r: edit(r.folder / CONFIG, _class_name="AutoencoderKL"), load,
     CheckpointError, "describes a AutoencoderKL"),
    ("unknown block in a config",
     lambda r: edit(r.folder / CONFIG, up_block_types=["AttnUpBlock2D", "SkipUpBlock2D"]), load,
     CheckpointError, "SkipUpBlock2D"),
    ("newer format", lambda r: edit(r.folder / META, format=2), load, CheckpointError, "format 2"),
    ("truncated training state", lambda r: cut(r.folder / STATE), resume, CheckpointError,
     "training_state.safetensors is damaged: its SHA-256"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "read", "error", "message"), rows(FILES))
def test_files(damage, read, error, message, run):
    read(run)  # sound, until it is damaged
    damage(run)
    with pytest.raises(error, match=message):
        read(run)


def test_a_full_disk(run, monkeypatch):
    """The old checkpoint survives, whole, and nothing half-written stays."""

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    run.trainer.step()
    with monkeypatch.context() as patch:
        patch.setattr("fastdiff.checkpoints.checkpoint.save_file", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            run.trainer.save()
    assert [path.name for path in run.folder.parent.iterdir()] == [run.folder.name]
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before
    assert resume(run).finished_steps == 1


def test_a_batch_of_no_images_is_no_bad_input():
    none = X[:0]
    assert ops.group_norm_silu(none, 2).shape == none.shape
    assert ops.add_time_embedding(none, torch.ones(0, 6)).shape == none.shape
    assert ops.q_sample(none, T2[:0], none, ABAR, ABAR).shape == none.shape
    assert ops.sampler_step(none, none, None, none, TABLE, STEP).shape == none.shape
