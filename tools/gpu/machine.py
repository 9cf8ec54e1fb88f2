"""What this machine has for the report, and what it lacks: ``python -m tools.gpu.machine``.

In a process of its own, since a broken driver may hang or end the process that asks for a device.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from tools.build import common, cuda


@dataclass
class Machine:
    """What was found, by name, and for what was not found the reason."""

    found: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def look(self, name: str, how: Callable[[], str]) -> None:
        """Note what ``how`` returns, or what it raises as the reason why there is none."""
        try:
            self.found[name] = how()
        except Exception as error:  # whatever is wrong with a machine belongs into the report
            self.missing[name] = str(error) or type(error).__name__


def machine() -> Machine:
    """Look at everything that a stage may need."""
    here = Machine()
    here.found["python"] = f"{platform.python_version()} ({sys.executable})"
    here.found["processors"] = f"{os.cpu_count()}, {platform.machine()}"
    for name in ("torch", "triton", "pytest", "hypothesis", "pytest-benchmark", "ninja"):
        here.look(name, lambda name=name: importlib.metadata.version(name))  # type: ignore[misc]
    here.look("pytest-xdist", lambda: importlib.metadata.version("pytest-xdist"))
    here.look("device", _device)
    here.look("nvcc", lambda: f"{cuda.toolkit().version} ({cuda.toolkit().nvcc})")
    here.look("compiler", common.compiler)
    for name in ("compute-sanitizer", "ncu"):
        here.look(name, lambda name=name: _program(name))  # type: ignore[misc]
    return here


def _device() -> str:
    import torch

    if torch.version.cuda is None:
        raise RuntimeError(f"torch {torch.__version__} is a build without CUDA")
    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} finds no CUDA device")
    properties = torch.cuda.get_device_properties(0)
    return (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    )


def _program(name: str) -> str:
    toolkits = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    places = [None, *(f"{toolkit}/bin" for toolkit in toolkits if toolkit)]
    found = next(filter(None, (shutil.which(name, path=place) for place in places)), None)
    if found is None:
        raise FileNotFoundError(f"{name} is neither on the PATH nor with the CUDA toolkit")
    return found


if __name__ == "__main__":
    print(json.dumps(asdict(machine())))
