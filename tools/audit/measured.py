"""What is known of one compiled kernel, and what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tools.audit.occupancy import occupancy

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


@dataclass(frozen=True)
class Exemption:
    """Why not all of a kernel's accesses are 128 bits wide, though tensors are aligned.

    Attributes:
        reason: why.
        loads, stores: whether there need be no wide ones.
        tails: whether there are narrow ones beside the wide ones (Triton).
    """

    reason: str
    loads: bool = False
    stores: bool = False
    tails: bool = False


PARAMETERS = Exemption("works on statistics and parameters, no activation", loads=True, stores=True)
SUMS = Exemption("writes sums over pixels, no activation", stores=True)
IMAGES = Exemption("writes two values an image", stores=True)
LOSSES = Exemption("writes a value an image, or for each piece of it", stores=True)
FILLS = Exemption("reads seeds, no activation", loads=True)

UNALIGNED = Exemption(
    "serves tensors that are not aligned, and has a wide sibling", loads=True, stores=True
)

# By language, operation and name. A Triton kernel that touches no activation has to be here, and so
# has a CUDA kernel whose widest load or store is narrow.
EXEMPTIONS = {
    ("triton", "denoising_loss", "_combine"): PARAMETERS,
    ("triton", "denoising_loss_from_seed", "_combine"): PARAMETERS,
    ("triton", "group_norm_silu", "_combine"): PARAMETERS,
    ("triton", "group_norm_silu_backward", "_combine"): PARAMETERS,
    ("triton", "group_norm_silu_backward", "_parameters"): PARAMETERS,
    ("triton", "ema_update", "_ema_update"): Exemption(
        "a tensor's last elements, fewer than 16, move one by one", tails=True
    ),
    ("cuda", "denoising_loss", "combine"): PARAMETERS,
    ("cuda", "denoising_loss", "denoising_loss_kernel"): LOSSES,
    ("cuda", "group_norm_silu", "combine"): PARAMETERS,
    ("cuda", "group_norm_silu", "take_statistics"): SUMS,
    ("cuda", "group_norm_silu_backward", "combine"): PARAMETERS,
    ("cuda", "group_norm_silu_backward", "sum_images"): PARAMETERS,
    ("cuda", "group_norm_silu_backward", "take_sums"): SUMS,
    ("cuda", "philox_normal", "philox_normal_kernel"): FILLS,
    ("cuda", "sampler_step", "sampler_step_image_kernel"): IMAGES,
    ("cuda", "upsample_nearest2x", "channels_first_narrow_kernel"): UNALIGNED,
}
NONE = Exemption("")


def exemption(language: str, operation: str, kernel: str) -> Exemption:
    """What a kernel is exempt from."""
    return EXEMPTIONS.get((language, operation, kernel), NONE)


def problems(found: Sequence[Measured]) -> list[str]:
    """What is wrong: registers that spill, activations that move in less than 128 bits."""
    groups: dict[str, list[str]] = {}
    for one in found:
        for problem in (*_spills(one), *_narrow_in_triton(one)):
            groups.setdefault(f"{one.who}: {problem}", []).append(one.configuration)
    several = (
        f"{problem} ({where[0]}{f', and {len(where) - 1} more' if where[1:] else ''})"
        for problem, where in groups.items()
    )
    return [*several, *_narrow_in_cuda(found)]


def _spills(one: Measured) -> Iterator[str]:
    if one.stack or one.spills:
        yield f"{one.stack} bytes of local memory, {one.spills} accesses to it"


def _narrow_in_triton(one: Measured) -> Iterator[str]:
    for name in one.narrow:
        yield f"{name} bits"
    exempt = exemption(one.language, one.operation, one.kernel)
    touches = one.language != "triton" or one.load or one.store
    if not touches and not (exempt.loads and exempt.stores):
        yield "touches no activation, and is not exempt"


def _narrow_in_cuda(found: Sequence[Measured]) -> Iterator[str]:
    """A kernel is there in every width, a number among its arguments: the widest one counts."""
    widest: dict[tuple[str, ...], tuple[Measured, int, int]] = {}
    for one in found:
        if one.language == "cuda":
            arguments = one.configuration.split(", ")
            key = (one.who, *(text for text in arguments if not re.fullmatch(r"-?\d+u?l*", text)))
            _, load, store = widest.get(key, (one, 0, 0))
            widest[key] = one, max(load, one.load), max(store, one.store)
    for (who, *kinds), (one, load, store) in widest.items():
        exempt = exemption(one.language, one.operation, one.kernel)
        for what, width, fine in (
            ("load", load, exempt.loads),
            ("store", store, exempt.stores),
        ):
            if width < WIDE and not fine:
                yield f"{who} <{', '.join(kinds)}>: its widest {what} has {width} bits"
