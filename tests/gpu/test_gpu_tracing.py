"""torch.compile on CUDA tensors: the kernels themselves stand in the graph, without a break."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdiff.ops.gpu import operations

pytest.importorskip("triton")
READ = {"x", "x0", "grad", "model_out", "prediction", "seed", "table"}
SCRIPT = Path(__file__).with_name("traced_operations.py")


@pytest.fixture(scope="module")
def traced():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", [name for name in operations if name != "ema_update"])
def test_the_compiler_sees_the_kernels_and_what_they_write(traced, name) -> None:
    found = traced[name]
    assert found["kernels"]
    assert not found["opaque"]
    for kernel, written in found["kernels"]:
        assert written, kernel  # every kernel writes something, and not everything it is given
        assert not READ & set(written), kernel
