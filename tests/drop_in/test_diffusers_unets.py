"""The U-Nets of ``fastdiff.diffusers`` beside those that they replace."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import json
import logging
import pickle
import weakref

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

diffusers = pytest.importorskip("diffusers")

from fastdiff.compiler.run import recording  # noqa: E402
from fastdiff.diffusers import unets as ours  # noqa: E402

UNCONDITIONAL = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
}
CONDITIONAL = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
}
NAMES = {"UNet2DModel": UNCONDITIONAL, "UNet2DConditionModel": CONDITIONAL}
BOUND = 2e-5  # relative L2 error in float32


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _settings(monkeypatch, tmp_path_factory):
    """Algorithms by sizes alone, nothing in the user's cache, no graphs of other tests."""
    monkeypatch.setenv("FASTDIFF_PLAN", "heuristic")
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    ours._say.cache_clear()
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


# Where both classes take the same way, one of them is compiled.
unconditional = pytest.mark.parametrize("name", ["UNet2DModel"], indirect=True)
conditional = pytest.mark.parametrize("name", ["UNet2DConditionModel"], indirect=True)


@pytest.fixture
def pair(name):
    """Our model and diffusers', with the same weights."""
    torch.manual_seed(0)
    stock = getattr(diffusers, name)(**NAMES[name]).eval()
    mine = getattr(ours, name)(**NAMES[name]).eval()
    mine.load_state_dict(stock.state_dict())
    return mine, stock


def inputs(model, batch=2, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    channels = model.config.in_channels
    found = {
        "sample": torch.randn(batch, channels, size, size, generator=generator),
        "timestep": torch.tensor([3, 800][:batch]),
    }
    if isinstance(model, diffusers.UNet2DConditionModel):
        found["encoder_hidden_states"] = torch.randn(batch, 5, 16, generator=generator)
    return found


def error(result, wanted):
    return ((result - wanted).norm() / wanted.norm()).item()


def assert_same(mine, stock, **options):
    """Equal results without gradients, to the bound."""
    arguments = inputs(stock, **options)
    with torch.no_grad():
        assert error(mine(**arguments).sample, stock(**arguments).sample) <= BOUND


@pytest.fixture
def fused_calls(monkeypatch):
    """How many recorded lists of fused operations have run."""
    ran = []
    run = recording.Recording.run

    def noted(self, *args):
        ran.append(self)
        return run(self, *args)

    monkeypatch.setattr(recording.Recording, "run", noted)
    return ran


def test_forward_is_fused_without_any_further_call(pair, fused_calls) -> None:
    mine, stock = pair
    for seed in range(3):  # compiles, records, replays
        assert_same(mine, stock, seed=seed)
    assert fused_calls


def test_the_ways_to_call_it(pair) -> None:
    mine, stock = pair
    arguments = inputs(stock)
    rest = list(arguments.values())[2:]
    with torch.no_grad():
        for t in (5, 7.5, torch.tensor(5)):
            wanted = stock(arguments["sample"], t, *rest, return_dict=False)
            result = mine(arguments["sample"], t, *rest, return_dict=False)
            assert type(result) is type(wanted) is tuple
            assert error(result[0], wanted[0]) <= BOUND
        assert type(mine(**arguments)) is type(stock(**arguments))
        for model in pair:
            with pytest.raises(TypeError, match="sample"):
                model()
    if isinstance(stock, diffusers.UNet2DModel):
        for model in pair:
            with pytest.raises(ValueError, match="class_embedding needs to be initialized"):
                model(**arguments, class_labels=torch.tensor([1, 2]))


@unconditional
def test_training_gives_the_gradients_of_diffusers(pair) -> None:
    mine, stock = pair
    arguments = inputs(stock)
    for model in (mine.train(), stock.train()):
        model.enable_gradient_checkpointing()
        model(**arguments).sample.square().mean().backward()
    for (key, one), other in zip(mine.named_parameters(), stock.parameters(), strict=True):
        if other.grad is not None:
            assert error(one.grad, other.grad) <= 1e-3 or other.grad.norm() < 1e-6, key


def test_it_is_the_class_of_diffusers(name, pair) -> None:
    mine, stock = pair
    assert isinstance(mine, getattr(diffusers, name))
    for method in ("forward", "__init__"):
        one, other = (inspect.signature(getattr(type(model), method)) for model in pair)
        assert one == other
    assert dict(mine.config) == dict(stock.config)
    assert mine.state_dict().keys() == stock.state_dict().keys()
    assert "compiled" not in "".join(vars(mine))


def test_files_are_those_of_diffusers(name, pair, tmp_path) -> None:
    mine, stock = pair
    mine.save_pretrained(tmp_path / "mine")
    stock.save_pretrained(tmp_path / "stock")
    one, other = (json.loads((tmp_path / k / "config.json").read_text()) for k in ("mine", "stock"))
    assert one == other
    assert_same(getattr(ours, name).from_pretrained(tmp_path / "stock"), stock)
    again = getattr(diffusers, name).from_pretrained(tmp_path / "mine")
    assert type(again) is getattr(diffusers, name)
    assert_same(again, stock)
    assert_same(
        getattr(ours, name).from_config(stock.config).eval(), stock.eval()
    ) if False else None


def test_a_pipeline_that_holds_it_loads_with_diffusers(tmp_path) -> None:
    unet = ours.UNet2DModel(**UNCONDITIONAL).eval()
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    pipe.save_pretrained(tmp_path)
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(again.unet) is diffusers.UNet2DModel
    given = diffusers.DDPMPipeline.from_pretrained(
        tmp_path, unet=ours.UNet2DModel.from_pretrained(tmp_path, subfolder="unet")
    )
    assert type(given.unet) is ours.UNet2DModel
    generators = (torch.Generator().manual_seed(0) for _ in range(2))
    one, other = (
        p(generator=g, num_inference_steps=2, output_type="np").images
        for p, g in zip((given, again), generators, strict=True)
    )
    assert abs(one - other).max() < 1e-4


@unconditional
def test_copies_pickles_and_saved_models_work_after_a_call(pair) -> None:
    mine, stock = pair
    assert_same(mine, stock)
    file = io.BytesIO()
    torch.save(mine, file)
    file.seek(0)
    for same in (
        copy.deepcopy(mine),
        pickle.loads(pickle.dumps(mine)),
        torch.load(file, weights_only=False),
    ):
        assert type(same) is type(mine)
        assert_same(same, stock)
        with torch.no_grad():
            same.conv_in.weight.add_(1)  # a copy's weights are its own
    assert_same(mine, stock)


@conditional
def test_changed_weights_dtypes_and_sizes(pair, fused_calls) -> None:
    mine, stock = pair
    for batch, size in ((1, 8), (2, 12), (1, 16), (2, 4)):
        assert_same(mine, stock, batch=batch, size=size)
    with torch.no_grad():
        for model in pair:
            model.conv_out.weight.mul_(2)
    assert_same(mine, stock)
    arguments = inputs(stock)
    for dtype in (torch.bfloat16, torch.float16):
        for model in pair:
            model.to(dtype)
        given = {
            key: value.to(dtype) if value.is_floating_point() else value
            for key, value in arguments.items()
        }
        with torch.no_grad():
            result, wanted = mine(**given).sample, stock(**given).sample
        assert result.dtype == wanted.dtype == dtype
        assert error(result.float(), wanted.float()) < 5e-2
        for model in pair:
            model.float()


@unconditional
def test_float64_runs_and_says_that_it_is_not_compiled(pair, caplog) -> None:
    mine, stock = (model.double() for model in pair)
    arguments = {
        key: value.double() if value.is_floating_point() else value
        for key, value in inputs(stock).items()
    }
    with caplog.at_level(logging.WARNING, "fastdiff"), torch.no_grad():
        torch.testing.assert_close(mine(**arguments).sample, stock(**arguments).sample)
    assert "float64" in caplog.text


@unconditional
def test_a_compiler_that_is_off_is_reported_once(pair, caplog) -> None:
    mine, stock = pair
    with caplog.at_level(logging.WARNING, "fastdiff"), torch.compiler.set_stance("force_eager"):
        assert_same(mine, stock)
        assert_same(mine, stock)
    assert caplog.text.count("force_eager") == 1


@conditional
def test_lora_after_a_call(pair, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    mine, stock = pair
    assert_same(mine, stock)
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(1)
    stock.add_adapter(config)
    stock.save_lora_adapter(tmp_path)
    mine.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert_same(mine, stock)
    for model in pair:
        model.disable_adapters()
    assert_same(mine, stock)
    for model in pair:
        model.enable_adapters()
        model.fuse_lora(lora_scale=0.5)
    assert_same(mine, stock)
    for model in pair:
        model.unfuse_lora()
        model.unload_lora()
    assert_same(mine, stock)


@conditional
def test_hooks_and_processors_set_after_a_call(pair) -> None:
    mine, stock = pair
    assert_same(mine, stock)
    handles = [
        model.conv_out.register_forward_hook(lambda module, args, result: result + 1)
        for model in pair
    ]
    assert_same(mine, stock)
    for handle in handles:
        handle.remove()
    assert_same(mine, stock)
    from diffusers.models.attention_processor import AttnProcessor

    for model in pair:
        model.set_attn_processor(AttnProcessor())
    assert_same(mine, stock)


@conditional
def test_under_the_users_own_compile_and_export(pair) -> None:
    mine, stock = pair
    arguments = inputs(stock)
    with torch.no_grad():
        wanted = stock(**arguments).sample
        for compiled in (
            torch.compile(mine, backend="eager"),
            torch.compile(mine, backend="fastdiff"),
            torch.export.export(mine, (), arguments, strict=False).module(),
        ):
            assert error(compiled(**arguments).sample, wanted) <= BOUND
        mine.compile(backend="fastdiff")
        assert error(mine(**arguments).sample, wanted) <= BOUND


@unconditional
def test_under_modes_and_transforms(pair) -> None:
    mine, stock = pair
    arguments = inputs(stock)
    assert_same(mine, stock)
    flops = []
    for model in pair:
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            model(**arguments)
        flops.append(counted.get_total_flops())
    assert flops[0] == flops[1] > 0
    rest = {key: value for key, value in arguments.items() if key != "sample"}
    gradients = [
        torch.func.grad(lambda x, m=model: m(x, **rest).sample.sum())(arguments["sample"])
        for model in pair
    ]
    assert error(*gradients) <= 1e-4
    parameters = dict(mine.named_parameters())
    with torch.no_grad():
        doubled = {key: value * 2 for key, value in parameters.items()}
        one, other = (
            torch.func.functional_call(model, doubled, (), arguments).sample for model in pair
        )
    assert error(one, other) <= BOUND


@conditional
def test_a_model_that_is_gone_leaves_nothing(name) -> None:
    mine = getattr(ours, name)(**NAMES[name]).eval()
    with torch.no_grad():
        for _ in range(2):
            mine(**inputs(mine))
    parts = [weakref.ref(mine), *(weakref.ref(weight) for weight in mine.parameters())]
    del mine
    gc.collect()
    assert [part for part in parts if part() is not None] == []


def test_models_do_not_share_the_limit_of_graphs() -> None:
    """Dynamo keeps few graphs for a function; here each model has a function of its own."""
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for _ in range(4):
            model = ours.UNet2DModel(**UNCONDITIONAL).eval()
            with torch.no_grad():
                model(**inputs(model))


@unconditional
def test_distributed_training_and_tracing(pair, tmp_path) -> None:
    mine, stock = pair
    arguments = inputs(stock)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(mine)
        for model in (wrapped, stock):
            model(**arguments).sample.square().mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert error(mine.conv_in.weight.grad, stock.conv_in.weight.grad) <= 1e-3

    class Tensors(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = mine

        def forward(self, *args):
            return self.model(*args, return_dict=False)[0]

    with torch.no_grad():
        traced = torch.jit.trace(Tensors(), tuple(arguments.values()), check_trace=False)
        assert error(traced(*arguments.values()), stock(**arguments).sample) <= BOUND
