"""Several processes train as one does: the same losses, weights and checkpoints."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdiff.checkpoints import checkpoint
from fastdiff.common.errors import InputError, TrainingError
from fastdiff.common.world import World, present

PROGRAM = Path(__file__).with_name("distributed_run.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2]), "OMP_NUM_THREADS": "1"}
PLAIN = ("wrapped", "halved")  # further cases, whose results are those of the case plain
LIMIT = 300  # seconds after which processes hang

spec = importlib.util.spec_from_file_location("distributed_run", PROGRAM)
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)

pytestmark = pytest.mark.usefixtures("one_thread")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def torchrun(*arguments: str) -> tuple[int, str]:
    """Run two processes; the exit code, and what they wrote on standard error."""
    started = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         *arguments],
        env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        said = started.communicate(timeout=LIMIT)[1]
    finally:
        if started.poll() is None:
            started.terminate()  # torchrun then ends its processes, which kill would leave behind
            started.wait()
    return started.returncode, said


@pytest.fixture(scope="module", params=[2, 3], ids=["two", "three"])
def found(request, tmp_path_factory):
    """What each process of a group found."""
    count, folder = request.param, tmp_path_factory.mktemp("processes")
    common = {
        **ENVIRONMENT, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(folder)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        errors = [process.communicate(timeout=LIMIT)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * count, errors
    ranks = [torch.load(folder / f"found-{rank}.pt") for rank in range(count)]
    for rank in ranks:
        rank["folder"] = folder
    return ranks


@pytest.fixture(scope="module")
def alone():
    """The same in one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {
        name: program.results(program.make_trainer(**case)) for name, case in program.CASES.items()
    }
    torch.set_num_threads(threads)


def assert_equal_but_for_rounding(found, wanted):
    """Of tensors by name; Adam's weights and moments.

    Softmax ignores what is added to all keys, so the bias of keys has no gradient but rounding,
    which Adam enlarges to steps of full length.
    """
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if "to_k.bias" not in name:
            apart = (found[name] - value).norm()
            assert apart <= 2e-4 * value.norm(), (name, float(apart / value.norm()))


def made(rank):
    """The cases that processes went through; three go through fewer than two."""
    return [case for case in (*program.CASES, *PLAIN) if case in rank]


def test_any_number_of_processes_and_micro_batches_trains_the_same(found, alone):
    for rank in found:
        for case in made(rank):
            wanted = alone["plain" if case in PLAIN else case]
            assert rank[case]["losses"] == pytest.approx(wanted["losses"], rel=1e-5), case
            assert_equal_but_for_rounding(rank[case]["tensors"], wanted["tensors"])


def test_processes_have_the_same_weights_bit_for_bit(found):
    for name in made(found[0]):
        first, *others = (rank[name] for rank in found)
        for other in others:
            assert other["losses"] == first["losses"]
            assert other["times"] == first["times"]
            for key, value in first["tensors"].items():
                assert torch.equal(other["tensors"][key], value), (name, key)


def test_the_sampler_of_times_sees_all_losses_in_order(found, alone):
    if len(found) > 2:
        pytest.skip("two processes have shown it")
    wanted, got = (x["second moment"]["times"]["losses"] for x in (alone, found[0]))
    assert sum(map(len, wanted)) == 21  # three batches of seven
    assert list(map(len, got)) == list(map(len, wanted))
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_an_error_of_one_process_is_that_of_all(found):
    if len(found) > 2:
        pytest.skip("two processes have shown it")
    assert found[0]["failing write"].startswith("cannot write the checkpoint")
    assert found[0]["not finite"].startswith("the loss is nan at step 1")
    for name in ("failing write", "not finite"):
        assert len({rank[name] for rank in found}) == 1


def test_processes_share_the_images_to_generate(found):
    alone = program.drawn(None)
    for rank in found:
        for name in ("together", "batches"):
            torch.testing.assert_close(rank["drawn"][name], alone[name], rtol=1e-4, atol=1e-4)
        assert rank["drawn"]["evaluations"].tolist() == [2, 2, 2]
        assert "several processes cannot share" in rank["drawn"]["refused"]
    assert alone["refused"] == "none"


def test_processes_share_the_features(found):
    alone = program.featured(None)
    for rank in found:
        for count, wanted in alone.items():
            assert torch.equal(rank["featured"][count]["features"], wanted["features"])
            assert rank["featured"][count]["calls"] < wanted["calls"]


def test_processes_share_the_validation_to_the_last_bit(found):
    alone = program.validated()
    assert len(alone) > 500
    for number, rank in enumerate(found):
        assert torch.equal(rank["validated"], alone)
        wanted = "no memory" if number == 1 else "another process of the run could not measure"
        assert rank["not validated"].startswith(wanted)


def test_a_signal_to_one_process_ends_all_after_the_same_step(found):
    wanted = {"signal": signal.SIGTERM, "step": program.STOP}
    assert [rank["signalled"] for rank in found] == [wanted] * len(found)
    assert found[0]["folders"] == [f"step-{program.STOP:08d}"]
    assert found[0]["whole"] == program.STOP


def test_a_run_is_resumed_by_any_number_of_processes(found):
    """Some processes made the first steps and the next; one alone does the same."""
    whole = program.make_trainer(steps=50)
    for _ in range(program.STOP + 1):
        whole.step()
    wanted = {name: p.detach() for name, p in whole.network.named_parameters()}
    for rank in found:
        assert_equal_but_for_rounding(rank["resumed"], wanted)


@pytest.mark.parametrize("found", [2], ids=["two"], indirect=True)
def test_torchrun_carries_on_after_a_process_was_killed(found, tmp_path):
    """In mid-step. The run ends as one that was never interrupted, bit for bit."""
    assert [rank["command"] for rank in found] == [0, 0]
    code, said = torchrun("--max-restarts", "1", str(PROGRAM), str(tmp_path), "killed")
    assert code == 0, said
    lines = [line for line in said.splitlines() if line.startswith("fastdiff: error")]
    assert len(lines) == 1, said
    assert re.search(r"process 1 \(PID \d+ on .*\) of the run ended, so process 0 cannot", lines[0])
    whole, parts = found[0]["folder"] / "command", tmp_path / "command"
    assert "steps 3..8; 2 processes" in said
    for name in ("losses.jsonl", "samples"):
        assert (parts / name).exists()
    steps = [json.loads(line)["step"] for line in (parts / "losses.jsonl").open()]
    assert steps == list(range(1, 9))
    for file in (checkpoint.WEIGHTS, checkpoint.STATE):
        ours, theirs = (checkpoint.newest(run) / file for run in (parts, whole))
        assert ours.name == theirs.name
        assert ours.read_bytes() == theirs.read_bytes(), file


def test_shares_are_joined_in_order(found):
    for rank in found:
        assert rank["joined"].tolist() == list(range(8))


@pytest.mark.parametrize(("total", "count"), [(7, 3), (2, 3), (0, 2), (8, 4)])
def test_shares_are_disjoint_and_complete(total, count):
    shares = [World(rank, count).share(total) for rank in range(count)]
    assert shares[0][0] == 0
    assert shares[-1][1] == total
    assert all(a[1] == b[0] for a, b in itertools.pairwise(shares))
    sizes = [stop - start for start, stop in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_micro_batches_change_nothing_but_rounding(parts, alone):
    found = program.results(program.make_trainer(accumulate=parts))
    assert found["losses"] == pytest.approx(alone["plain"]["losses"], rel=1e-5)
    assert_equal_but_for_rounding(found["tensors"], alone["plain"]["tensors"])


def test_micro_batches_without_memory_are_halved(alone):
    trainer = program.make_trainer(on_oom="halve")
    with pytest.warns(UserWarning, match="micro-batches of .* do not fit") as warned:
        found = program.refused(trainer, most=2, rank=0)
    said = [str(warning.message) for warning in warned]
    assert [re.search(r"batches of (\d) .* up to (\d)", text).groups() for text in said] == [
        ("7", "4"), ("4", "2"),
    ]  # fmt: skip
    assert "Tried to allocate 8 GiB" in said[0]
    assert found["losses"] == pytest.approx(alone["plain"]["losses"], rel=1e-5)
    assert_equal_but_for_rounding(found["tensors"], alone["plain"]["tensors"])


@pytest.mark.filterwarnings("ignore:fastdiff. micro-batches")
def test_an_image_without_memory_ends_the_run():
    with pytest.raises(TrainingError, match="a single image does not fit"):
        program.refused(program.make_trainer(on_oom="halve"), most=0, rank=0)


def test_without_halving_the_error_is_raised():
    with pytest.raises(torch.OutOfMemoryError):
        program.refused(program.make_trainer(), most=2, rank=0)


def test_micro_batches_of_no_image_are_refused():
    with pytest.raises(InputError, match=r"batch of 7 images .* 1 processes in 8 micro-batches"):
        program.make_trainer(accumulate=8)


def test_processes_without_a_group_are_refused(monkeypatch):
    """Each would train alone, and write over what the others wrote."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="torchrun started 2 processes"):
        present()
