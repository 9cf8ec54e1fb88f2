"""The folders that diffusers itself writes load, and give the outputs of diffusers' own class."""

from __future__ import annotations

import json
import warnings

import diffusers
import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from unet_cases import TINY, inputs, randomized

from fastdiff.nn import UNet2DModel

INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def theirs():
    return randomized(diffusers.UNet2DModel(**TINY)).eval()


@torch.no_grad()
def assert_same(ours, theirs):
    sample, t, _ = inputs(TINY)
    expected = theirs(sample, t, return_dict=False)[0]
    assert expected.std() > 0.05
    torch.testing.assert_close(ours(sample, t), expected, atol=1e-5, rtol=0)


def quietly(*arguments, **options):
    """``from_pretrained`` where nothing is to be warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return UNet2DModel.from_pretrained(*arguments, **options)


def test_an_average_of_the_weights(theirs, tmp_path):
    """The training script's unet_ema: the model's options beside those of the average."""
    average = EMAModel(
        theirs.parameters(), decay=0.9999, model_cls=diffusers.UNet2DModel,
        model_config=theirs.config,
    )  # fmt: skip
    average.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["decay"] == 0.9999
    message = r"skipped: decay \(0\.9999\), inv_gamma \(1\.0\), min_decay \(0\.0\), optimiz"
    with pytest.warns(UserWarning, match=message) as caught:
        ours = UNet2DModel.from_pretrained(tmp_path)
    assert [warning.filename for warning in caught] == [__file__]
    assert_same(ours, theirs)
    assert_same(
        quietly(tmp_path, ignore=sorted(set(described) - set(ours.config.to_dict()))), theirs
    )


@pytest.mark.parametrize("variant", [None, "fp16", "non_ema"])
def test_shards(variant, theirs, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="20KB", variant=variant)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same(quietly(tmp_path, variant=variant), theirs)


@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_a_variant(variant, theirs, tmp_path):
    theirs.save_pretrained(tmp_path, variant=variant)
    assert_same(quietly(tmp_path, variant=variant), theirs)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["file", "shards"])
def test_the_only_variant_is_loaded_with_a_warning(options, theirs, tmp_path):
    theirs.save_pretrained(tmp_path, variant="fp16", **options)
    with pytest.warns(UserWarning, match="variant fp16 only, which were loaded") as caught:
        ours = UNet2DModel.from_pretrained(tmp_path)
    assert [warning.filename for warning in caught] == [__file__]
    assert_same(ours, theirs)


def test_weights_in_half_precision(theirs, tmp_path):
    theirs.half().save_pretrained(tmp_path, variant="fp16")
    ours = quietly(tmp_path, variant="fp16")
    assert ours.dtype == torch.float32
    assert_same(ours, theirs.float())


def test_each_variant_is_told_from_the_others(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    other = randomized(diffusers.UNet2DModel(**TINY), seed=5).eval()
    other.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert_same(quietly(tmp_path), theirs)
    assert_same(quietly(tmp_path, variant="fp16"), other)
    with pytest.raises(FileNotFoundError, match=r"it has weights without a variant"):
        UNet2DModel.from_pretrained(tmp_path, variant="bf16")


def test_the_name_of_an_index_that_diffusers_gave_earlier(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="20KB", variant="fp16")
    today = tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json"
    for name in (
        "diffusion_pytorch_model.safetensors.fp16.index.json",
        "diffusion_pytorch_model.fp16.safetensors.index.json",
    ):
        today = today.rename(tmp_path / name)
        assert_same(quietly(tmp_path, variant="fp16"), theirs)


@pytest.fixture
def pipeline(theirs, tmp_path):
    """A pipeline's folder with an average of the network beside the network."""
    whole = diffusers.DDPMPipeline(theirs, diffusers.DDPMScheduler())
    whole.save_pretrained(tmp_path / "whole")
    randomized(diffusers.UNet2DModel(**TINY), seed=5).save_pretrained(
        tmp_path / "whole" / "unet_ema", max_shard_size="20KB"
    )
    return tmp_path / "whole"


def test_a_pipeline(theirs, pipeline):
    assert_same(quietly(pipeline), theirs)
    assert_same(quietly(str(pipeline), subfolder="unet"), theirs)
    assert_same(
        quietly(pipeline, subfolder="unet_ema"),
        diffusers.UNet2DModel.from_pretrained(pipeline, subfolder="unet_ema"),
    )


def test_a_checkpoint_of_the_training_script(theirs, pipeline):
    """It has the parts of a pipeline, but no model_index.json."""
    (pipeline / "model_index.json").unlink()
    assert_same(quietly(pipeline), theirs)


def test_a_pipeline_with_a_file_config_json_of_its_own(theirs, pipeline):
    """The Hub has such files, to count downloads by."""
    (pipeline / "config.json").write_text("{}")
    assert_same(quietly(pipeline), theirs)


def test_a_pipeline_whose_network_is_in_its_root(theirs, pipeline):
    """As in google/ddpm-cifar10-32."""
    for file in (pipeline / "unet").iterdir():
        file.rename(pipeline / file.name)
    assert_same(quietly(pipeline), theirs)


def test_a_pipeline_without_a_network_of_this_kind(pipeline):
    (pipeline / "unet").rename(pipeline / "transformer")
    message = r"no config\.json in .*whole, which is a pipeline without a part named unet; these "
    with pytest.raises(FileNotFoundError, match=message + r"parts .*: transformer, unet_ema"):
        UNet2DModel.from_pretrained(pipeline)
    config = pipeline / "transformer" / "config.json"
    config.write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(ValueError, match="describes a UNet2DConditionModel, wanted a UNet2DModel"):
        UNet2DModel.from_pretrained(pipeline, subfolder="transformer")
    with pytest.raises(FileNotFoundError, match=r"no folder .*whole/vae to read a model from"):
        UNet2DModel.from_pretrained(pipeline, subfolder="vae")


@pytest.mark.parametrize("sharded", [False, True], ids=["file", "shards"])
def test_pickled_weights_are_converted_as_the_error_says(sharded, theirs, tmp_path):
    options = {"max_shard_size": "20KB"} if sharded else {}
    theirs.save_pretrained(tmp_path, safe_serialization=False, **options)
    message = "pickled weights, which are never read.*To convert weights that you trust: (.*)$"
    with pytest.raises(FileNotFoundError, match=message) as caught:
        UNet2DModel.from_pretrained(tmp_path)
    if not sharded:
        import safetensors.torch  # noqa: F401 (the text calls it)

        exec(str(caught.value).rpartition("To convert weights that you trust: ")[2])
        assert_same(quietly(tmp_path), theirs)


def test_what_is_saved_over_shards_is_what_is_read(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    other = randomized(UNet2DModel(**TINY), seed=5).eval()
    other.save_pretrained(tmp_path)
    for model in (quietly(tmp_path), diffusers.UNet2DModel.from_pretrained(tmp_path)):
        assert torch.equal(model.conv_in.weight, other.conv_in.weight)
    assert load_file(tmp_path / "diffusion_pytorch_model.safetensors").keys() == set(
        other.state_dict()
    )
