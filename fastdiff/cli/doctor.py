"""Report what fastdiff runs on here, and check every operation against float64.

The exit code is 1 if an operation fails its check.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy
import torch

from fastdiff.checkpoints import checkpoint
from fastdiff.cli.output import print_json
from fastdiff.cli.parsing import add_json_argument
from fastdiff.common.version import __version__
from fastdiff.ops import backend, selfcheck
from fastdiff.ops.backend import describe, extension, isa, missing


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of ``fastdiff doctor``."""
    add_json_argument(command)


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Print the facts and the checks, and return the exit code."""
    facts, records = _facts(), selfcheck.run()
    for name in ("triton", "cuda"):
        if facts["backends"].get(name, "") is None:
            with backend.backend(name):
                records += selfcheck.run("cuda")
    passed = all(record.ok for record in records)
    if args.json:
        print_json({**facts, "ok": passed, "self_check": [asdict(record) for record in records]})
    else:
        _print(facts, records)
    return 0 if passed else 1


def _facts() -> dict[str, Any]:
    return {
        "fastdiff": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_compiled_against": None if extension is None else extension.torch_version,
        "numpy": numpy.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "backends": missing(),  # for each the reason why it cannot run, or None
        **describe(),
        "instruction_sets": [] if extension is None else list(extension.instruction_sets),
        "bfloat16_products": None if extension is None else _products(),
        "models": list(checkpoint.shipped()),
    }


def _sets(built: Sequence[str]) -> str:
    """Which instruction sets were compiled for and which runs, and what is missed by that."""
    emulated = "AMX" if extension.emulates_tiles else None
    names = [f"{name} (emulated, for tests)" if name == emulated else name for name in built]
    text = f"built for {', '.join(names)}; {isa()} runs"
    best = torch.backends.cpu.get_cpu_capability()
    if isa() == "DEFAULT" and best in ("AVX2", "AVX512"):
        text += f"; {best} would be faster: reinstall fastdiff on this machine to build for it"
    return text


def _products() -> str:
    """What multiplies bfloat16 here, and why it is not tiles."""
    why_not = extension.why_no_tiles()
    if isa() == "AMX":
        return "by emulated tiles, slowly" if extension.emulates_tiles else "by tiles (AMX)"
    if isa() == "AVX512_BF16":
        return f"by dot products (AVX512_BF16); {why_not}"
    return f"in float32: neither tiles nor dot products run; {why_not}"


def _print(facts: dict[str, Any], records: Sequence[selfcheck.Record]) -> None:
    against = facts["torch_compiled_against"]
    built = "" if against is None else f" (the extension was compiled against {against})"
    print("fastdiff {fastdiff}, Python {python}, numpy {numpy}, {platform}".format(**facts))
    print(f"torch {facts['torch']}{built}")
    for name, reason in facts["backends"].items():
        print(f"backend {name:<10} {'runs' if reason is None else f'missing: {reason}'}")
    print("runs by default    {backend}, {isa}, {threads} threads".format(**facts))
    if facts["instruction_sets"]:
        print(f"instruction sets   {_sets(facts['instruction_sets'])}")
        print(f"bfloat16 products  {_products()}")
    print(f"shipped models     {', '.join(facts['models']) or 'none'}")
    print("self-check against float64:")
    print(f"  {'operation':<24} {'':<23} {'error':>8} {'allowed':>8} {'time':>9}")
    for record in records:
        kind = f"{record.backend} {record.layout} {record.dtype}"
        error = "-" if record.max_error is None else f"{record.max_error:.1e}"
        spent = "-" if record.microseconds is None else f"{record.microseconds:.0f} us"
        verdict = "ok" if record.ok else f"FAILED {record.reason}".rstrip()
        print(
            f"  {record.operation:<24} {kind:<23} {error:>8} {record.tolerance:>8.1e} {spent:>9}"
            f"  {verdict}"
        )
