"""What the machine code of a kernel shows: registers, shared memory, spills, widths of accesses.

Read with NVIDIA's cuobjdump and nvdisasm, those of Triton's wheel or those on the PATH.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tools.audit.occupancy import SHARED_OF_THE_SYSTEM


class NotCheckedError(Exception):
    """Something cannot be checked here; the text says what is missing or what failed."""


class Code(NamedTuple):
    """A kernel's machine code: counts and widths.

    ``loads`` and ``stores`` count the instructions on global memory by their width in bits. A
    spill is any use of local memory: registers that did not suffice, or an array of the source's.
    """

    name: str  # as in the binary, mangled
    threads: int  # of a block: what it is built for, at most
    registers: int  # of a thread
    shared: int  # static, bytes of a block
    stack: int  # bytes of local memory of a thread
    spills: int  # instructions on local memory
    loads: dict[int, int]
    stores: dict[int, int]


_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_SECTION = re.compile(r"^//-+ \.(text|nv\.info)\.(\S+)", re.MULTILINE)
_THREADS = re.compile(
    r"EIATTR_(?:MAX_THREADS|REQNTID)\b.*?" + r"\.word\s+0x([0-9a-f]+)\s+.*?" * 3, re.S
)
_OPCODE = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9]*)((?:\.\w+)*)", re.M
)
_LOADS = {"LDG", "LDGSTS", "LD"}
_STORES = {"STG", "ST"}
_BOTH = {"ATOM", "ATOMG", "RED", "REDG"}
_LOCAL = {"LDL", "STL"}


def inspect(cubin: bytes, arch: int) -> list[Code]:
    """Every kernel of a binary for ``arch``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = run(tool("cuobjdump"), "--dump-resource-usage", str(path))
        listing = run(tool("nvdisasm"), str(path))
    reserved = SHARED_OF_THE_SYSTEM if arch >= 90 else 0  # counted from Hopper on
    sections = _sections(listing)
    found = []
    for name, registers, stack, shared, local in _USAGE.findall(usage):
        loads, stores, spills = accesses(sections["text", name])
        found.append(
            Code(
                name=name,
                threads=_threads(sections.get(("nv.info", name), "")),
                registers=int(registers),
                shared=max(int(shared) - reserved, 0),
                stack=int(stack) + int(local),
                spills=spills,
                loads=loads,
                stores=stores,
            )
        )
    return found


def accesses(text: str) -> tuple[dict[int, int], dict[int, int], int]:
    """Loads and stores of global memory by width in bits, and instructions on local memory."""
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    local = 0
    for opcode, modifiers in _OPCODE.findall(text):
        local += opcode in _LOCAL
        if opcode in _LOADS | _BOTH:
            loads[_width(modifiers)] += 1
        if opcode in _STORES | _BOTH:
            stores[_width(modifiers)] += 1
    return dict(loads), dict(stores), local


def _width(modifiers: str) -> int:
    for part in modifiers.split("."):
        if part in ("64", "128", "256"):
            return int(part)
        if part in ("U8", "S8", "U16", "S16"):
            return int(part[1:])
    return 32


def _threads(info: str) -> int:
    found = _THREADS.search(info)
    if not found:
        return 1024
    x, y, z = (int(value, 16) for value in found.groups())
    return x * y * z


def _sections(listing: str) -> dict[tuple[str, str], str]:
    heads = list(_SECTION.finditer(listing))
    ends = [*(head.start() for head in heads), len(listing)][1:]
    return {
        (head[1], head[2]): listing[head.end() : end]
        for head, end in zip(heads, ends, strict=bool(heads))
    }


@cache
def tool(name: str) -> str:
    """The path of cuobjdump or nvdisasm.

    Raises:
        NotCheckedError: it is neither in Triton's wheel nor on the PATH.
    """
    try:
        from triton import knobs

        path = getattr(knobs.nvidia, name).path
    except (ImportError, AttributeError, RuntimeError):
        path = shutil.which(name)
    if not path or not Path(path).exists():
        raise NotCheckedError(
            f"{name} not found: it comes with Triton's wheel and with the CUDA toolkit"
        )
    return str(path)


def run(*command: str, folder: str | None = None) -> str:
    """What a command prints, run in ``folder``; NotCheckedError if it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise NotCheckedError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
    return done.stdout
