"""Processes that divide a network among themselves train it as one process does."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastdiff.checkpoints import checkpoint
from fastdiff.common.errors import InputError
from fastdiff.training import Trainer, TrainingOptions
from fastdiff.training.snapshots import find as find_snapshots

PROGRAM = Path(__file__).with_name("sharded_run.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2]), "OMP_NUM_THREADS": "1"}
LIMIT = 300  # seconds after which processes hang

spec = importlib.util.spec_from_file_location("sharded_run", PROGRAM)
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)

pytestmark = pytest.mark.usefixtures("one_thread")


def started(count: int, *arguments: str) -> tuple[list[int], list[str]]:
    """Run ``count`` processes of the program: their exit codes, and their standard errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        **ENVIRONMENT, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), *arguments],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        errors = [process.communicate(timeout=LIMIT)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors


@pytest.fixture(scope="module", params=[2, 3], ids=["two", "three"])
def found(request, tmp_path_factory):
    """What each process of a group found."""
    folder = tmp_path_factory.mktemp("shards")
    codes, errors = started(request.param, str(folder))
    assert codes == [0] * request.param, errors
    ranks = [torch.load(folder / f"found-{rank}.pt") for rank in range(request.param)]
    for rank in ranks:
        rank["folder"] = folder
    return ranks


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same in one process, which has everything whole; and the run that it leaves."""
    folder = tmp_path_factory.mktemp("alone")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cases = {n: program.results(program.make_trainer(**case)) for n, case in program.CASES.items()}
    trainer = program.make_trainer(out=folder / "whole", keep=9)
    trainer.run(progress=False)
    torch.set_num_threads(threads)
    return {**cases, "folder": folder}


def assert_equal_but_for_rounding(found, wanted):
    """Of tensors by name; Adam's weights and moments.

    Softmax ignores what is added to all keys, so the bias of keys has no gradient but rounding,
    which Adam enlarges to steps of full length.
    """
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if "to_k.bias" not in name:
            assert found[name].shape == value.shape, name
            apart = (found[name] - value).norm()
            assert apart <= 2e-4 * value.norm(), (name, float(apart / value.norm()))


def test_losses_gradients_and_weights_are_those_of_one_process(found, alone):
    for case in set(program.CASES) & found[0].keys():
        wanted, (first, *others) = alone[case], [rank[case] for rank in found]
        for ours, theirs in zip(first["losses"], wanted["losses"], strict=True):
            assert ours == pytest.approx(theirs, rel=2e-5), case
        assert_equal_but_for_rounding(first["tensors"], wanted["tensors"])
        for other in others:
            assert other["losses"] == first["losses"]
            assert not other["tensors"]
            assert not other["validation"]
        for name, value in wanted["validation"].items():
            assert first["validation"][name] == pytest.approx(value, rel=1e-3), (case, name)


def test_a_process_keeps_its_share_of_weights_moments_and_averages(found):
    for rank in found:
        own, whole = rank["kept"]
        assert own < 1.25 * whole / len(found)  # rows are not divided evenly, and padded
    assert sum(rank["kept"][0] for rank in found) >= found[0]["kept"][1]


def test_what_has_no_effect_is_said_once_by_the_first_process(found):
    first, *others = ([s for s in rank["said"] if "with shard" in s] for rank in found)
    assert all("weights are not in channels_last" in said for said in first)
    assert len(first) == sum(  # of each trainer
        case.get("channels_last", True)
        for case in program.CASES.values()
        if len(found) == 2 or not case
    )
    assert not any(others)


def test_the_files_of_a_run_are_those_of_one_process(found, alone):
    ours, theirs = found[0]["folder"] / "whole", alone["folder"] / "whole"
    files = {
        str(path.relative_to(theirs))
        for path in theirs.rglob("*")
        if path.suffix in (".safetensors", ".json", ".png", ".jsonl")
    }
    assert {name for name in files if not (ours / name).exists()} == set()
    for name in sorted(name for name in files if name.endswith("safetensors")):
        assert_equal_but_for_rounding(load_file(ours / name), load_file(theirs / name))
    assert len(find_snapshots(ours)) == len(find_snapshots(theirs)) == 2
    lines = [json.loads(line) for line in (ours / "losses.jsonl").open()]
    assert [("validation_loss" in line) for line in lines] == [False, True, False, True]
    assert found[0]["grids"] == [4]
    assert not any(rank["grids"] for rank in found[1:])


def test_a_resumed_run_ends_bit_for_bit_as_one_without_interruption(found):
    if len(found) > 2:
        pytest.skip("two processes have shown it")
    whole, half = (checkpoint.newest(found[0]["folder"] / name) for name in ("whole", "half"))
    assert whole.name == half.name == "step-00000004"
    for path in sorted(whole.glob("*.safetensors")):
        assert (half / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_run_in_shards_is_continued_without_them_by_several_processes_and_by_one(found):
    trainer = Trainer.resume(
        found[0]["folder"] / "whole",
        program.images(),
        TrainingOptions(**{**program.OPTIONS.__dict__, "steps": 6}),
    )
    assert trainer.finished_steps == 4
    assert trainer.shards is None
    losses = [trainer.step() for _ in range(2)]
    for rank in found:
        assert rank["continued"] == pytest.approx(losses, rel=1e-4)


def test_an_error_of_one_process_is_that_of_all(found):
    if len(found) > 2:
        pytest.skip("two processes have shown it")
    assert [rank["not finite"] for rank in found] == [found[0]["not finite"]] * 2
    assert found[0]["not finite"].startswith("the loss is nan at step 1")
    assert found[0]["wrapped"].endswith("neither compiled nor in a wrapper, got DataParallel")


def test_a_process_that_is_killed_ends_the_others(tmp_path):
    codes, errors = started(2, str(tmp_path), "killed")
    assert codes == [3, -9], errors
    said = (tmp_path / "said").read_text()
    assert re.fullmatch(
        r"process 1 \(PID \d+ on .*\) of the run ended, so process 0 cannot .*", said
    )


def test_one_process_has_nothing_to_divide():
    with pytest.raises(InputError, match="this is the only one: start several by torchrun"):
        program.make_trainer(shard=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimizer": "muon"}, "muon, which needs whole matrices; wanted one of adamw, adam, sgd"),
        ({"on_oom": "halve"}, "shard has no on_oom halve"),
    ],
)
def test_options_that_shards_cannot_have_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        TrainingOptions(shard=True, **options)
