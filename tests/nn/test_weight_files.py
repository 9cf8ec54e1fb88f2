"""Model folders that someone else made, by mistake or on purpose: indices, names and keys."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from unet_cases import TINY, randomized

from fastdiff.nn import UNet2DModel
from fastdiff.nn.weight_files import INDEX, WEIGHTS

CONFIG = "config.json"
SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]


@pytest.fixture
def saved(tmp_path):
    randomized(UNet2DModel(**TINY)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(saved):
    """The same model in two shards."""
    tensors = load_file(saved / WEIGHTS)
    (saved / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    for shard, part in zip(SHARDS, parts, strict=True):
        save_file({name: tensors[name] for name in part}, saved / shard)
    weight_map = {n: s for s, part in zip(SHARDS, parts, strict=True) for n in part}
    write_index(saved, {"metadata": {}, "weight_map": weight_map})
    return saved


def read_index(folder):
    return json.loads((folder / INDEX).read_text())


def write_index(folder, value):
    (folder / INDEX).write_text(json.dumps(value))


def test_shards(sharded):
    loaded = UNet2DModel.from_pretrained(sharded).state_dict()
    for name, value in randomized(UNet2DModel(**TINY)).state_dict().items():
        assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors", "/etc/secret.safetensors", "part/secret.safetensors", "..",
        "..\\secret.safetensors", "secret.bin", "secret.safetensors\n", "\0.safetensors", "",
        INDEX, CONFIG, 7, None, ["secret.safetensors"],
    ],
    ids=repr,
)  # fmt: skip
def test_an_index_does_not_lead_out_of_its_folder(name, sharded):
    """Nor to anything but a safetensors file."""
    save_file({"conv_in.bias": torch.zeros(8)}, sharded.parent / "secret.safetensors")
    index = read_index(sharded)
    index["weight_map"]["conv_in.bias"] = name
    write_index(sharded, index)
    with pytest.raises(ValueError, match=r"conv_in\.bias must be in a \.safetensors file beside"):
        UNet2DModel.from_pretrained(sharded)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[]", "must hold a JSON object, got list"),
        ("{}", "must have a weight_map"),
        ('{"weight_map": {}}', "must have a weight_map"),
        ('{"weight_map": ["a"]}', "must have a weight_map"),
        ("[" * 100_000, "is not JSON"),
        (
            f'{{"weight_map": {{"a": "{SHARDS[0]}", "a": "{SHARDS[1]}"}}}}',
            "has the key 'a' twice",
        ),
    ],
    ids=["empty", "list", "no map", "empty map", "list for a map", "deep", "twice"],
)
def test_damaged_indices(text, message, sharded):
    (sharded / INDEX).write_text(text)
    with pytest.raises(ValueError, match=message):
        UNet2DModel.from_pretrained(sharded)


def test_an_index_and_its_shards_must_agree(sharded):
    index = read_index(sharded)
    names = index["weight_map"]
    moved = {**index, "weight_map": {**names, "conv_in.bias": SHARDS[1]}}
    write_index(sharded, moved)
    with pytest.raises(ValueError, match=rf"{SHARDS[1]} lacks conv_in\.bias, against {INDEX}$"):
        UNet2DModel.from_pretrained(sharded)
    write_index(sharded, {**index, "weight_map": {**names, "more": SHARDS[1], "most": SHARDS[1]}})
    with pytest.raises(ValueError, match=rf"{SHARDS[1]} lacks more and 1 more, against"):
        UNet2DModel.from_pretrained(sharded)
    twice = load_file(sharded / SHARDS[1]) | {"conv_in.bias": torch.zeros(8)}
    save_file(twice, sharded / SHARDS[1])
    write_index(sharded, index)
    with pytest.raises(ValueError, match=rf"{SHARDS[1]} also holds conv_in\.bias, against"):
        UNet2DModel.from_pretrained(sharded)


def test_missing_and_damaged_shards(sharded):
    whole = (sharded / SHARDS[1]).read_bytes()
    (sharded / SHARDS[1]).write_bytes(whole[:-10])
    with pytest.raises(SafetensorError, match=rf"^{SHARDS[1]}: "):
        UNet2DModel.from_pretrained(sharded)
    (sharded / SHARDS[1]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no {SHARDS[1]} in .*, which {INDEX} names"):
        UNet2DModel.from_pretrained(sharded)
    (sharded / SHARDS[1]).mkdir()
    with pytest.raises(FileNotFoundError, match=rf"no {SHARDS[1]} in"):
        UNet2DModel.from_pretrained(sharded)
    (sharded / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=f"it has shards of the weights, but no {INDEX}"):
        UNet2DModel.from_pretrained(sharded)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ([], {}, f"no {WEIGHTS} in .*model$"),
        (["weights.bin", "a.ckpt"], {}, "it has a.ckpt, weights.bin: pickled weights"),
        (["model.pt"], {"variant": "fp16"}, "no diffusion_pytorch_model.fp16.safetensors in .*pt"),
        (["unet.safetensors"], {}, "it has unet.safetensors: rename it"),
        (
            [f"diffusion_pytorch_model.{v}.safetensors" for v in ("fp16", "bf16")], {},
            "it has the variants bf16, fp16: say variant='bf16'",
        ),
        (
            ["diffusion_pytorch_model.fp16.safetensors"], {"variant": "bf16"},
            "it has the variants fp16: say variant='fp16'",
        ),
    ],
    ids=["nothing", "pickled", "pickled, variant", "other name", "two variants", "other variant"],
)  # fmt: skip
def test_what_is_there_instead(names, options, message, saved):
    (saved / WEIGHTS).unlink()
    for name in names:
        (saved / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=message):
        UNet2DModel.from_pretrained(saved, **options)


@pytest.mark.parametrize("variant", ["", "../fp16", "a/b", "a.b", "a\\b"])
def test_variants_that_are_none(variant, saved):
    with pytest.raises(ValueError, match="variant must be a part of a file's name"):
        UNet2DModel.from_pretrained(saved, variant=variant)


def test_a_file_in_place_of_a_folder(saved):
    with pytest.raises(FileNotFoundError, match=r"is a file: give the folder that it is in"):
        UNet2DModel.from_pretrained(saved / WEIGHTS)


def test_weights_of_integers_are_refused(saved):
    """Those of a quantized model would be taken for numbers."""
    tensors = load_file(saved / WEIGHTS)
    tensors["conv_in.bias"] = tensors["conv_in.bias"].to(torch.int8)
    save_file(tensors, saved / WEIGHTS)
    with pytest.raises(ValueError, match=r"conv_in\.bias must be floating point, got torch\.int8"):
        UNet2DModel.from_pretrained(saved)


def test_an_attention_under_two_names_is_refused(saved):
    tensors = load_file(saved / WEIGHTS)
    name = next(name for name in tensors if name.endswith("to_q.bias"))
    tensors[name.replace("to_q", "query")] = tensors[name] + 1
    save_file(tensors, saved / WEIGHTS)
    with pytest.raises(ValueError, match="under their old and new names both"):
        UNet2DModel.from_pretrained(saved)


# Keys of config.json.


def add(folder, **keys):
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, **keys}))


def test_keys_that_cannot_change_the_result_are_passed_over(saved):
    add(saved, decay=0.99, newer=None, other=False, _commit_hash="12")
    message = r"options of UNet2DModel and were skipped: decay \(0\.99\), newer \(None\), other"
    with pytest.warns(UserWarning, match=message):
        model = UNet2DModel.from_pretrained(saved)
    assert model.config == UNet2DModel(**TINY).config


@pytest.mark.parametrize("value", [True, 0, 1, "", "rms", [], {"a": 1}, 1.5], ids=repr)
def test_keys_that_may_change_the_result_are_refused_unless_named(value, saved):
    add(saved, newer=value, other=None)
    message = r"no option newer \(.*\), which may change .* pass ignore=\('newer',\)$"
    with pytest.raises(ValueError, match=message):
        UNet2DModel.from_pretrained(saved)
    model = UNet2DModel.from_pretrained(saved, ignore=("newer", "other"))  # without a warning
    assert model.config == UNet2DModel(**TINY).config


def test_long_values_are_cut_short(saved):
    add(saved, quantization_config={str(i): "x" * 100 for i in range(100)})
    with pytest.raises(ValueError, match=r"quantization_config \(\{") as caught:
        UNet2DModel.from_pretrained(saved)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("ignore", [["dropout"], "newer"])
def test_only_foreign_keys_can_be_ignored(ignore, saved):
    with pytest.raises(ValueError, match="must hold keys that are no options of the model, got"):
        UNet2DModel.from_pretrained(saved, ignore=ignore)


def test_the_class_itself_takes_no_foreign_options():
    with pytest.raises(ValueError, match="no option decay"):
        UNet2DModel(**TINY, decay=0.99)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[" * 100_000, "is not JSON"), ('{"dropout": 0.1, "dropout": 0.2}', "'dropout' twice")],
    ids=["deep", "twice"],
)
def test_strange_json(text, message, saved):
    (saved / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=message):
        UNet2DModel.from_pretrained(saved)
