"""A compiled model in a process that is forked after its use, as data loaders do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastdiff.ops.backend import extension, isa

SCRIPT = """
import os, torch
import fastdiff
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1),
).bfloat16().eval()
x = torch.randn(1, 3, 16, 16).bfloat16()
net = torch.compile(model, backend="fastdiff")
with torch.no_grad():
    wanted = [net(x) for _ in range(3)][-1]
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # as PyTorch's workers: OpenMP's threads are the parent's
        os._exit(0 if torch.equal(net(x), wanted) else 3)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert torch.equal(net(x), wanted)
print("child", status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
@pytest.mark.parametrize(
    "wanted", ["best", *(["AMX"] if extension and "AMX" in extension.instruction_sets else [])]
)
def test_a_model_after_a_fork(wanted, tmp_path) -> None:
    """Also by tiles, whose permission a child inherits and whose configuration it does not need."""
    chosen = isa() if wanted == "best" else wanted
    environment = {**os.environ, "FASTDIFF_PLAN": "heuristic", "FASTDIFF_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        env={**environment, "FASTDIFF_ISA": chosen if chosen != "none" else ""},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.stdout == "child 0\n", done.stderr[-2000:]
