"""Which argument of a kernel each access to global memory goes to, and how wide it is.

Machine code has the widths but not the arguments, which is why this follows the addresses in the
PTX that it is made of: an address is a sum, one of whose terms comes from a pointer among the
parameters. Where none does, the pointer itself was read from memory (a table of tensors), and the
access is counted for that table.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import NamedTuple


class Widths(NamedTuple):
    """Widths in bits of the accesses through one parameter; empty where there are none."""

    loads: set[int]
    stores: set[int]


_ENTRY = re.compile(r"\.entry\s+\w+\s*\((.*?)\)", re.S)
_PARAMETER = re.compile(r"\.param\s+(?:\.\w+\s+|\d+\s+)*?(\w+)(?:\[\d+\])?\s*(?:,|$)", re.M)
_REGISTER = re.compile(r"%(?!ctaid|tid|ntid|nctaid|laneid|warpid|clock)\w+")
_STATEMENT = re.compile(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+([^;]*);", re.M)
_LOADED = "loaded:"  # marks the register whose memory a value was read from


def widths(ptx: str, pointers: set[int]) -> dict[int | None, Widths]:
    """Accesses by the number of the parameter, for a file with one kernel; None: of no parameter.

    Args:
        ptx: the text.
        pointers: the numbers of the parameters that are pointers.
    """
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise ValueError("no kernel in this PTX")
    names = {
        name: number
        for number, name in enumerate(_PARAMETER.findall(entry[1]))
        if number in pointers
    }
    sources, accesses = _read(ptx[entry.end() :], names)
    found: dict[int | None, Widths] = defaultdict(lambda: Widths(set(), set()))
    for kind, address, width in accesses:
        direct, indirect = _origins(address, sources)
        numbers: set[int | None] = {*(direct or indirect)} or {None}
        for number in numbers:
            getattr(found[number], kind).add(width)
    return dict(found)


def _read(
    body: str, names: dict[str, int]
) -> tuple[dict[str, set[str | int]], list[tuple[str, str, int]]]:
    """Where each register comes from (registers and pointer parameters), and the accesses."""
    sources: dict[str, set[str | int]] = defaultdict(set)
    accesses = []
    for opcode, operands in _STATEMENT.findall(body):
        parts = opcode.split(".")
        if parts[:2] == ["ld", "param"]:
            register, name = _REGISTER.search(operands), re.search(r"\[(\w+)", operands)
            if register and name and name[1] in names and parts[-1] in ("b64", "u64", "s64"):
                sources[register[0]].add(names[name[1]])
        elif parts[0] in ("ld", "st", "atom", "red") and "global" in parts:
            address = re.search(r"\[\s*(%\w+)", operands)
            if address is None:
                continue
            width = _width(parts)
            if parts[0] != "st" and parts[0] != "red":
                accesses.append(("loads", address[1], width))
                for register in _REGISTER.findall(operands[: address.start()]):
                    sources[register].add(_LOADED + address[1])
            if parts[0] != "ld":
                accesses.append(("stores", address[1], width))
        elif parts[0] == "cp" and "global" in parts:  # cp.async [shared], [global], bytes
            pointers = re.findall(r"\[\s*(%\w+)", operands)
            size = re.search(r"\],\s*(?:0x)?(\d+)", operands[operands.rfind("[") :])
            if len(pointers) == 2 and size:
                accesses.append(("loads", pointers[1], 8 * int(size[1])))
        elif parts[0] not in ("ld", "st", "setp", "bra", "bar"):
            registers = _REGISTER.findall(operands)
            targets = 1
            if operands.lstrip().startswith("{"):
                targets = len(_REGISTER.findall(operands[: operands.index("}")]))
            for target in registers[:targets]:
                sources[target].update(registers[targets:])
    return sources, accesses


def _width(parts: list[str]) -> int:
    count = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)), 1)
    return count * int(re.sub(r"\D", "", parts[-1].replace("x2", "")))


def _origins(address: str, sources: dict[str, set[str | int]]) -> tuple[set[int], set[int]]:
    """Parameters that a register's value comes from: by arithmetic, and through memory."""
    direct: set[int] = set()
    indirect: set[int] = set()
    seen = set()
    todo = [(address, direct)]
    while todo:
        register, into = todo.pop()
        if (register, into is direct) in seen:
            continue
        seen.add((register, into is direct))
        for source in sources.get(register, ()):
            if isinstance(source, int):
                into.add(source)
            elif source.startswith(_LOADED):
                todo.append((source.removeprefix(_LOADED), indirect))
            else:
                todo.append((source, into))
    return direct, indirect
