"""The emulation of CUDA in tools/emulation: it computes what a device would, and sees mistakes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.build.common import CSRC
from tools.emulation import emulated

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the emulation is built with Linux's tools"
)
SELFTEST = Path(__file__).with_name("selftest.cu")
MODES = ("none", "thread")  # fibers; threads of the system, under ThreadSanitizer


@pytest.fixture(params=MODES)
def selftest(request):
    """A function that runs a kernel of selftest.cu and gives what it printed."""
    program = emulated.build_driver(request.param, source=SELFTEST)

    def run(name: str) -> str:
        done = subprocess.run(
            [program, name], capture_output=True, text=True, timeout=60, check=False
        )
        return done.stdout + done.stderr

    return run


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


def test_shuffles_and_ballots_exchange_between_lanes(selftest) -> None:
    found = torch.tensor(numbers(selftest("exchange"))).view(2, 32, 6)
    lanes = torch.arange(32)
    votes = sum(1 << lane for lane in range(0, 32, 3)) - (1 << 32)  # as a signed number
    expected = [
        lanes ^ 3,
        torch.where(lanes + 5 < 32, lanes + 5, lanes),
        torch.where(lanes >= 5, lanes - 5, lanes),
        torch.full((32,), 40 % 32),
        torch.where(lanes % 8 + 3 < 8, lanes + 3, lanes),
        torch.full((32,), votes if votes >= -(1 << 31) else votes + (1 << 32)),
    ]
    for warp in found:
        for column, values in enumerate(expected):
            torch.testing.assert_close(warp[:, column], values.float(), rtol=1e-5, atol=0)


def test_votes(selftest) -> None:
    assert numbers(selftest("votes")) == [1 + 4 + 16] * 96


def test_halves_of_a_warp_exchange_by_themselves(selftest) -> None:
    assert numbers(selftest("halves")) == [2] * 16 + [16] * 16


def test_barriers_make_shared_memory_seen(selftest) -> None:
    assert numbers(selftest("rotate")) == [(i + 1) % 256 + 2 for i in range(256)]


def test_shared_memory_is_nan_before_each_block(selftest) -> None:
    assert numbers(selftest("fresh")) == [3] * 300


def test_sums_over_a_block(selftest) -> None:
    assert numbers(selftest("sums")) == [95 * 96 / 2 + 96] * 96


def test_traffic_is_counted_by_width(selftest) -> None:
    # Of 1, 2, 4, 8, 16 bytes: two blocks of 16 threads, and one more element each.
    reads = writes = [0, 2, 0, 0, 32]
    assert numbers(selftest("copy")) == [*reads, *writes, 1]


def test_sixteen_bit_floats_round_to_the_nearest_even() -> None:
    program = emulated.build_driver("none", source=SELFTEST)
    found = subprocess.run([program, "round_trip"], capture_output=True, text=True).stdout
    half = [1, 1 + 2**-9, 65504, float("inf"), 0, 2**-24]
    bfloat = [1, 1 + 2**-6, float(torch.tensor(3.4e38).bfloat16())]
    assert numbers(found) == pytest.approx([*half, *bfloat], rel=1e-5)


MISTAKES = {
    "some_wait": "threads wait for others that never come: 40 at selftest.cu:",
    "wait_apart": "threads of a block are at different barriers",
    "lane_missing": "threads wait for others that never come: 31 at selftest.cu:",
    "masks_differ": "lanes that meet name different masks|wait for others that never come",
    "outside_mask": r"a shuffle reads lane \d+, not in its mask",
    "misaligned": "load of 16 bytes at an address of remainder 4",
    "misaligned_store": "store of 8 bytes at an address of remainder 4",
    "no_dynamic": "the launch gives no dynamic shared memory",
    "large_block": "a block of 1025 threads",
    "large_grid": "a grid of 1 x 65536 x 1 blocks is too large",
    "large_shared": r"\d+ bytes of shared memory are too many",
}


@pytest.mark.parametrize(("name", "message"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistake_is_an_error(selftest, name, message) -> None:
    found = selftest(name)
    assert found.startswith("error: ")
    assert re.search(message, found)


def test_a_shuffle_orders_no_memory_and_a_barrier_does() -> None:
    program = emulated.build_driver("thread", source=SELFTEST)

    def races(name: str) -> bool:
        done = subprocess.run([program, name], capture_output=True, text=True)
        return "ThreadSanitizer: data race" in done.stderr

    assert races("shuffle_for_barrier")
    assert not races("warp_barrier")
    assert not races("rotate")


def assert_clean(program, *operations) -> None:
    done = subprocess.run([program, *operations], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_kernels_have_no_data_race() -> None:
    assert_clean(emulated.build_driver("thread"))


@pytest.mark.slow
def test_kernels_stay_within_their_memory() -> None:
    assert_clean(emulated.build_driver("address"))


def test_a_removed_barrier_is_a_data_race(tmp_path) -> None:
    """Or nothing above would show anything."""
    text = (CSRC / "cuda" / "conv_epilogue.cu").read_text()
    without, count = re.subn(r"(held\.put\([^;]*;\s*)__syncthreads\(\);", r"\1", text)
    assert count == 1
    changed = tmp_path / "conv_epilogue.cu"
    changed.write_text(without)
    program = emulated.build_driver("thread", changed=changed)
    done = subprocess.run([program, "conv_epilogue"], capture_output=True, text=True)
    assert "ThreadSanitizer: data race" in done.stderr
