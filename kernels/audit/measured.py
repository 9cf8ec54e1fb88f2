"""What is known of one compiled kernel, and what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastdiff.kernels.audit.occupancy import occupancy

WIDE = 128  # bits


@dataclass(frozen=True)
class Measured:
    """A kernel in one configuration, for one architecture.

    Attributes:
        language: ``triton`` or ``cuda``.
        operation, kernel, arch: which it is.
        configuration: the first case that has it compiled; in CUDA the template's arguments.
        threads: of a block. registers: of a thread.
        shared: bytes of a block; in CUDA without what a launch adds.
        stack, spills: bytes of local memory, and instructions on it. None are wanted.
        load, store: bits of the narrowest access to an activation (Triton), of the widest access
            to global memory (CUDA); 0 where there is none.
        narrow: activations that are accessed in less than 128 bits (Triton).
        cases: how many cases have it compiled.
    """

    language: str
    operation: str
    kernel: str
    arch: int
    configuration: str
    threads: int
    registers: int
    shared: int
    stack: int
    spills: int
    load: int
    store: int
    narrow: tuple[str, ...] = ()
    cases: int = 1

    @property
    def occupancy(self) -> float:
        """Warps that an SM holds, as a part of those it has room for."""
        return occupancy(self.arch, self.threads, self.registers, self.shared)

    @property
    def who(self) -> str:
        """Its name in a message."""
        return f"{self.language} {self.operation} {self.kernel} sm_{self.arch}"


class Exemption:
    """Why a kernel has no wide loads, no wide stores or neither."""

    def __init__(self, reason: str, loads: bool = True, stores: bool = True):
        self.reason, self.loads, self.stores = reason, loads, stores


PARAMETERS = Exemption("works on statistics and parameters, no activation")
SUMS = Exemption("writes sums of channels, no activation", loads=False)
FILLS = Exemption("reads seeds, no activation", stores=False)

# A kernel that touches no activation in one direction or both has to be here, by language,
# operation and name.
EXEMPTIONS: dict[tuple[str, str, str], Exemption] = {}


def problems(found: Sequence[Measured]) -> list[str]:
    """What is wrong: registers that spill, activations that move in less than 128 bits."""
    return [*_spills(found), *_narrow_in_triton(found), *_narrow_in_cuda(found)]


def _spills(found: Iterable[Measured]) -> Iterable[str]:
    for one in found:
        if one.stack or one.spills:
            yield (
                f"{one.who} ({one.configuration}): {one.stack} bytes of local memory, "
                f"{one.spills} accesses to it"
            )


def _narrow_in_triton(found: Iterable[Measured]) -> Iterable[str]:
    for one in found:
        if one.language != "triton":
            continue
        for name in one.narrow:
            yield f"{one.who} ({one.configuration}): {name} bits"
        exempt = EXEMPTIONS.get((one.language, one.operation, one.kernel))
        if not one.load and not one.store and not (exempt and exempt.loads and exempt.stores):
            yield f"{one.who} ({one.configuration}): touches no activation, and is not exempt"


def _narrow_in_cuda(found: Iterable[Measured]) -> Iterable[str]:
    """A kernel is there in every width, a number among its arguments: the widest one counts."""
    widest: dict[tuple[str, ...], tuple[Measured, int, int]] = {}
    for one in found:
        if one.language == "cuda":
            arguments = one.configuration.split(", ")
            key = (one.who, *(text for text in arguments if not re.fullmatch(r"-?\d+u?l*", text)))
            _, load, store = widest.get(key, (one, 0, 0))
            widest[key] = one, max(load, one.load), max(store, one.store)
    for (who, *kinds), (one, load, store) in widest.items():
        exempt = EXEMPTIONS.get((one.language, one.operation, one.kernel))
        for what, width, fine in (
            ("load", load, exempt and exempt.loads),
            ("store", store, exempt and exempt.stores),
        ):
            if width < WIDE and not fine:
                yield f"{who} <{', '.join(kinds)}>: its widest {what} has {width} bits"
