"""fastdiff.load: what is recognised, whatever it is in; what is refused, in one line each."""

from __future__ import annotations

import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from ddpm_models import DdimUNet, ScoreSdeUNet
from openai_model import OpenAIUNet, randomized
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastdiff
from fastdiff import schedules
from fastdiff.checkpoints import checkpoint, loading
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.common.errors import CheckpointError
from fastdiff.nn import UNet2DModel

TINY: dict[str, Any] = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1,
    "norm_num_groups": 8, "attention_head_dim": 16,
}  # fmt: skip
# Options of TINY that its tensors do not tell, where they are not UNet2DConfig's defaults.
UNTOLD: dict[str, Any] = {
    "norm_num_groups": 8, "norm_eps": 1e-5, "attention_head_dim": 16, "flip_sin_to_cos": True,
    "freq_shift": 0, "downsample_padding": 1,
}  # fmt: skip


def tiny(**options: Any) -> UNet2DModel:
    return randomized(UNet2DModel(**{**TINY, **options}))


def assert_same(got: nn.Module, wanted: nn.Module) -> None:
    assert got.config == wanted.config
    for name, value in wanted.state_dict().items():
        assert torch.equal(got.state_dict()[name], value), name


def averaged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights that differ from those they stand for: the average of a training."""
    return OrderedDict((name, value + 0.25) for name, value in state.items())


def squashed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As latent diffusion's average: no dots in the names."""
    return {f"model_ema.{name.replace('.', '')}": value for name, value in state.items()}


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return OrderedDict((prefix + name, value) for name, value in state.items())


CONTAINERS = {
    "weights alone": lambda own, ema: own,
    "data parallel": lambda own, ema: prefixed("module.", own),
    "compiled": lambda own, ema: prefixed("_orig_mod.", own),
    "training loop": lambda own, ema: {"model": own, "ema": ema, "step": 3, "opt": {"lr": 1e-4}},
    "named otherwise": lambda own, ema: {"model_state_dict": own, "ema_state_dict": ema},
    "lightning": lambda own, ema: {
        "epoch": 1,
        "state_dict": {
            **prefixed("model.diffusion_model.", own),
            **squashed(prefixed("diffusion_model.", ema)),
            "first_stage_model.weight": torch.zeros(3),
            "betas": schedules.scaled_linear(20).betas.float(),
        },
    },
    "list": lambda own, ema: [own, {"state": {}, "param_groups": [{"lr": 1e-4}]}, 3, 7, ema],
}


@pytest.mark.parametrize("ema", [False, True], ids=["own", "ema"])
@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers(kind: str, ema: bool, tmp_path: Path) -> None:
    own = randomized(OpenAIUNet()).state_dict()
    torch.save(CONTAINERS[kind](own, averaged(own)), tmp_path / "file.pt")
    if ema and kind in ("weights alone", "data parallel", "compiled"):
        with pytest.raises(CheckpointError, match=r"holds no averaged weights.*need no ema"):
            fastdiff.load(tmp_path / "file.pt", num_heads=1, ema=True)
        return
    model = fastdiff.load(tmp_path / "file.pt", num_heads=1, ema=ema)
    wanted = (averaged(own) if ema else own)["out.2.weight"]
    assert torch.equal(model.conv_out.weight, wanted)


def test_score_sde_keeps_its_average_in_a_list(tmp_path: Path) -> None:
    theirs = randomized(ScoreSdeUNet())
    state = prefixed("module.", theirs.state_dict())
    shadow = [parameter.detach() + 0.25 for parameter in theirs.parameters()]
    value = {
        "optimizer": {"state": {}, "param_groups": []},
        "model": state,
        "ema": {"decay": 0.999, "num_updates": 4, "shadow_params": shadow},
        "step": 4,
    }
    torch.save(value, tmp_path / "checkpoint_1.pth")
    facts = {"centered": True, "scale_by_sigma": False}
    own = fastdiff.load(tmp_path / "checkpoint_1.pth", **facts)
    ema = fastdiff.load(tmp_path / "checkpoint_1.pth", **facts, ema=True)
    torch.testing.assert_close(ema.conv_in.weight, own.conv_in.weight + 0.25)
    value["ema"]["shadow_params"] = shadow[:-1]
    torch.save(value, tmp_path / "short.pth")
    with pytest.raises(CheckpointError, match=r"list of \d+ averaged weights for \d+ parameters"):
        fastdiff.load(tmp_path / "short.pth", **facts, ema=True)


def test_latent_diffusion_tells_its_schedule(tmp_path: Path) -> None:
    own = randomized(OpenAIUNet()).state_dict()
    torch.save(CONTAINERS["lightning"](own, averaged(own)), tmp_path / "model.ckpt")
    loaded = loading.read(tmp_path / "model.ckpt", ema=False, options={"num_heads": 1})
    assert loaded.forward is not None
    torch.testing.assert_close(
        loaded.forward.betas, schedules.scaled_linear(20).betas, rtol=1e-6, atol=0
    )
    assert any("also has averaged weights" in remark for remark in loaded.remarks)
    assert any("tensors of other parts were left" in remark for remark in loaded.remarks)


@pytest.mark.parametrize(
    "betas", [torch.tensor(3.0), torch.tensor([2.0]), torch.tensor([1, 2])], ids=str
)
def test_betas_that_are_no_schedule(betas: Tensor, tmp_path: Path) -> None:
    state = prefixed("model.diffusion_model.", randomized(OpenAIUNet()).state_dict())
    torch.save({"state_dict": {**state, "betas": betas}}, tmp_path / "model.ckpt")
    loaded = loading.read(tmp_path / "model.ckpt", ema=False, options={"num_heads": 1})
    assert loaded.forward is None


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_forms_of_files(form: str, tmp_path: Path) -> None:
    theirs = randomized(DdimUNet())
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.ckpt")
    if form == "safetensors":
        save_file(theirs.state_dict(), path)
    else:
        torch.save(theirs.state_dict(), path, _use_new_zipfile_serialization=form == "zip")
    assert torch.equal(fastdiff.load(path).conv_in.weight, theirs.conv_in.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_parameters_are_float32_whatever_the_file_holds(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.save(randomized(DdimUNet()).to(dtype).state_dict(), tmp_path / "weights.pt")
    model = fastdiff.load(tmp_path / "weights.pt")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_file_may_be_deleted_afterwards(tmp_path: Path) -> None:
    """The weights are copies, not the mapped file."""
    torch.save(randomized(DdimUNet()).state_dict(), tmp_path / "weights.pt")
    model = fastdiff.load(tmp_path / "weights.pt")
    before = model.conv_in.weight.clone()
    (tmp_path / "weights.pt").write_bytes(b"")
    assert torch.equal(model.conv_in.weight, before)


# Folders.


def test_own_checkpoints(tmp_path: Path) -> None:
    model = tiny()
    written = Checkpoint(model, schedules.linear(100), "eps")
    checkpoint.save(written, tmp_path / "own")
    checkpoint.save(written, checkpoint.step_folder(tmp_path / "run", 3))
    assert_same(fastdiff.load(tmp_path / "own"), model)
    assert_same(fastdiff.load(str(tmp_path / "run")), model)
    assert fastdiff.load("digits").config == checkpoint.load("digits").model.config
    with pytest.raises(CheckpointError, match="is loaded without options"):
        fastdiff.load("digits", ema=True)
    with pytest.raises(CheckpointError, match="is loaded without options"):
        fastdiff.load(tmp_path / "own", num_heads=1)


def test_folders_of_diffusers(tmp_path: Path) -> None:
    model, average = tiny(), tiny()
    average.conv_in.weight.data += 1
    model.save_pretrained(tmp_path / "unet")
    average.save_pretrained(tmp_path / "unet_ema")
    assert_same(fastdiff.load(tmp_path / "unet"), model)
    assert_same(fastdiff.load(tmp_path), model)  # as a pipeline
    assert_same(fastdiff.load(tmp_path, ema=True), average)
    assert_same(fastdiff.load(tmp_path, subfolder="unet_ema"), average)
    with pytest.raises(CheckpointError, match="takes no option 'num_heads', but subfolder"):
        fastdiff.load(tmp_path, num_heads=1)


def test_pickled_weights_of_diffusers(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    assert_same(fastdiff.load(tmp_path), model)
    assert_same(fastdiff.load(path.with_suffix(".bin")), model)


def test_weights_of_diffusers_without_their_config(tmp_path: Path) -> None:
    model = tiny(num_class_embeds=3)
    save_file(model.state_dict(), tmp_path / "some.safetensors")
    with pytest.raises(CheckpointError, match="do not tell norm_num_groups, norm_eps, attention_"):
        fastdiff.load(tmp_path / "some.safetensors")
    got = fastdiff.load(tmp_path / "some.safetensors", **UNTOLD, sample_size=8)
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 871]), torch.tensor([0, 2])
    with torch.no_grad():
        assert torch.equal(got(x, t, labels), model(x, t, labels))
    with pytest.raises(CheckpointError, match="has in_channels 1 by its tensors, not 3"):
        fastdiff.load(tmp_path / "some.safetensors", **UNTOLD, in_channels=3)
    with pytest.raises(CheckpointError, match="takes no option 'heads'"):
        fastdiff.load(tmp_path / "some.safetensors", **UNTOLD, heads=3)


@pytest.mark.parametrize(
    ("shape", "untold"),
    [
        ({"resnet_time_scale_shift": "scale_shift"}, {}),
        (
            {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8},
            {"attn_norm_num_groups": 8},
        ),
        ({"time_embedding_type": "fourier"}, {}),
        ({"time_embedding_type": "learned", "num_train_timesteps": 1000}, {}),
        ({"class_embed_type": "timestep"}, {}),
        ({"mid_block_type": None}, {}),
        ({"add_attention": False}, {}),
        (
            {"downsample_type": "resnet", "upsample_type": "resnet",
             "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
             "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D")},
            {},
        ),
    ],
    ids=["scale_shift", "middle norm", "fourier", "learned", "class timestep", "no middle",
         "no middle attention", "resnet"],
)  # fmt: skip
def test_tensors_tell_the_rest(
    shape: dict[str, Any], untold: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny(**shape)
    torch.save(model.state_dict(), tmp_path / "some.pt")
    got = fastdiff.load(tmp_path / "some.pt", **UNTOLD, **untold)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 871])
    labels = torch.tensor([1.0, 5.0]) if "class_embed_type" in shape else None
    with torch.no_grad():
        assert torch.equal(got(x, t, labels), model(x, t, labels))


def test_config_beside_a_single_file_is_read(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / "other.safetensors")
    assert_same(fastdiff.load(tmp_path / "other.safetensors"), model)
    with pytest.raises(CheckpointError, match=r"has a config\.json beside it, and so takes no opt"):
        fastdiff.load(tmp_path / "other.safetensors", norm_eps=1e-5)


# What is refused.


class Tempter:
    """Whatever unpickles this calls ``print``."""

    def __reduce__(self) -> Any:
        return (print, ("unpickled",))


class Hyperparameters:
    """A class of a training program."""


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("value", "named"),
    [(Tempter(), "print"), (Hyperparameters(), r"test_loading\.Hyperparameters")],
    ids=["function", "class"],
)
def test_nothing_else_is_unpickled(
    value: Any, named: str, legacy: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {"state_dict": DdimUNet().state_dict(), "hyper_parameters": value}
    torch.save(state, tmp_path / "a.ckpt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=f"wants to call {named} when it is unpickled"):
        fastdiff.load(tmp_path / "a.ckpt")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_are_refused(protocol: int, tmp_path: Path) -> None:
    """All but protocol 2, that of torch.save, before torch reads them."""
    content = pickle.dumps({"ema": Hyperparameters()}, protocol=protocol)
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"test_loading\.Hyperparameters when it is unp"):
        fastdiff.load(tmp_path / "a.pkl")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": 1}, protocol=protocol))
    with pytest.raises(CheckpointError, match=r"is damaged|is a pickle, but not of torch"):
        fastdiff.load(tmp_path / "a.pkl")


def test_networks_of_edm_are_refused(tmp_path: Path) -> None:
    """A pickle that names what theirs name, written by a process that has such a module."""
    code = (
        "import pickle, sys, types\n"
        "for name in ('torch_utils', 'torch_utils.persistence'):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "module = sys.modules['torch_utils.persistence']\n"
        "exec('def _reconstruct_persistent_obj(meta): pass', module.__dict__)\n"
        "class Net:\n"
        "    def __reduce__(self): return module._reconstruct_persistent_obj, ({},)\n"
        f"pickle.dump({{'ema': Net()}}, open({str(tmp_path / 'edm.pkl')!r}, 'wb'))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(CheckpointError, match=r"persistence\._rec.*a network of EDM or EDM2.*samp"):
        fastdiff.load(tmp_path / "edm.pkl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a pointer of Git LFS"),
        (b"<!DOCTYPE html>", "is damaged, or no file of torch.save or safetensors"),
        (b"\x80\x02", "is damaged"),
        (b"\x80\x02}q\x00.", "is damaged"),
    ],
    ids=["empty", "lfs", "html", "short pickle", "other pickle"],
)
def test_files_of_other_kinds(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as refused:
        fastdiff.load(tmp_path / "a.pt")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_truncated_files(form: str, share: float, tmp_path: Path) -> None:
    state, path = DdimUNet().state_dict(), tmp_path / "a.pt"
    if form == "safetensors":
        path = tmp_path / "a.safetensors"
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="damaged") as refused:
        fastdiff.load(path)
    assert "\n" not in str(refused.value)


def test_flipped_bytes_never_crash(tmp_path: Path) -> None:
    """Any byte of the archive's ends or of the pickle may be wrong; the answer is one error."""
    torch.save(DdimUNet(layers=1).state_dict(), tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randint(0, 4000, (40,), generator=generator).tolist()
    places = [*offsets, *(len(content) - 1 - offset for offset in offsets)]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 0x55
        (tmp_path / "b.pt").write_bytes(bytes(changed))
        with suppress(CheckpointError):
            fastdiff.load(tmp_path / "b.pt")


def test_archives_that_unpack_to_more_than_they_are(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10_000_000))
    with pytest.raises(CheckpointError, match="zip archive with compressed entries"):
        fastdiff.load(tmp_path / "bomb.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(CheckpointError, match=r"not of torch\.save: it has no data\.pkl"):
        fastdiff.load(tmp_path / "other.pt")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/data.pkl", b"")
        archive.writestr("script/constants.pkl", b"")
    with pytest.raises(CheckpointError, match="is a TorchScript archive"):
        fastdiff.load(tmp_path / "script.pt")


def test_tensors_that_repeat_themselves(tmp_path: Path) -> None:
    """A terabyte in a few bytes: stride 0. It is refused before anything is allocated."""
    state = DdimUNet().state_dict()
    state["conv_in.weight"] = torch.zeros(1).expand(2**20, 3, 300, 300)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"would unpack to \d{12,}"):
        fastdiff.load(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "value",
    [torch.eye(4).to_sparse(), torch.zeros(32, 3, 3, 3, device="meta")],
    ids=["sparse", "meta"],
)
def test_tensors_that_are_no_numbers(value: Tensor, tmp_path: Path) -> None:
    state = {**DdimUNet().state_dict(), "conv_in.weight": value}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"has conv_in\.weight, which is no plain tensor"):
        fastdiff.load(tmp_path / "a.pt")


def test_sizes_beyond_all_memory(tmp_path: Path) -> None:
    """Widths that no tensor of the file has to pay for: it has no elements."""
    state = DdimUNet(multipliers=(1,), layers=1, attention=()).state_dict()
    for name in ("down.0.block.0.conv1.weight", "conv_in.weight"):
        state[name] = torch.zeros(2**40, 0)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError):
        fastdiff.load(tmp_path / "a.pt")


def test_first_of_two_networks(tmp_path: Path) -> None:
    """One file with two networks gives the first, whatever the hashes of the names."""
    first = randomized(DdimUNet()).state_dict()
    both = {**prefixed("b.", first), **prefixed("a.", averaged(first))}
    torch.save(both, tmp_path / "a.pt")
    assert torch.equal(fastdiff.load(tmp_path / "a.pt").conv_in.weight, first["conv_in.weight"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(3), "holds no weights of a network, but a Tensor"),
        ([1, 2], "holds no weights of a network, but a list"),
        ({"a": 1, "b": 2}, "but a dictionary with a, b"),
        ({}, "but a dictionary with nothing"),
        ({1: torch.zeros(1)}, "but a dictionary with 1"),
    ],
    ids=["tensor", "list", "numbers", "nothing", "numbered"],
)
def test_objects_without_weights(value: Any, message: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        fastdiff.load(tmp_path / "a.pt")


def test_paths_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no file or folder .*nowhere"):
        fastdiff.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json in"):
        fastdiff.load(tmp_path)
    torch.save({}, tmp_path / "model-3.pt")
    with pytest.raises(CheckpointError, match=r"has no config.json, but model-3\.pt: give that fi"):
        fastdiff.load(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(CheckpointError, match="describes a UNet2DConditionModel, wanted a UNet2DM"):
        fastdiff.load(tmp_path)
