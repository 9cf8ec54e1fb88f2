"""Where the time of a call goes: torch.profiler's events, each with its part of the call.

A few calls are recorded, of which the median call is reported. An operation, with all that it
calls, belongs to a part by its name and by the phase of the call that it runs in. Other operations
are "rest", and the time between the operations is Python's; so the parts sum to the call. The time
of calls without the profiler is reported too.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.tables import markdown
from benchmarks.turns.report import number

CALL = "benchmarks call"
BETWEEN, REST = "between the operations", "rest"
LISTED = 12  # number of operations of the rest that are listed
PHASES = ("data", "forward", "backward", "optimizer", "ema")  # ranges of a training step
REGIONS = (*PHASES, "train step")  # that no operation stands for

PartOf = Callable[[str, str], "str | None"]  # an operation's name and its phase -> its part


def measure(call: Callable[[], object], calls: int, part_of: PartOf) -> dict[str, Any]:
    """Milliseconds of each part of a call.

    Args:
        call: what is measured.
        calls: number of recorded calls.
        part_of: the part of an operation, by its name and phase; "" is outside all phases. None
            where the operation is to be divided into those that it calls.
    """

    def milliseconds() -> float:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    milliseconds()
    unrecorded = statistics.median(milliseconds() for _ in range(calls))
    recorded = []  # whole, parts and rest of each call, in microseconds
    for root in record(call, calls, shapes=False):  # recording shapes takes time
        parts, rest = Counter[str](), Counter[str]()
        _add(root, "", part_of, parts, rest)
        recorded.append((root.time_range.elapsed_us(), parts, rest))
    recorded.sort(key=lambda one: one[0])
    whole, parts, rest = recorded[len(recorded) // 2]
    return {
        "unrecorded": unrecorded,
        "recorded": whole / 1e3,
        "parts": {name: us / 1e3 for name, us in parts.items()},
        "rest": {name: us / 1e3 for name, us in rest.most_common(LISTED)},
    }


def record(call: Callable[[], object], calls: int, *, shapes: bool) -> list[Any]:
    """The profiler's event of each call, with the events inside the call as its children."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=shapes) as recorded:
        for _ in range(calls + 1):
            with record_function(CALL):
                call()
    roots = [e for e in recorded.events() if e.name == CALL and e.cpu_parent is None]
    if len(roots) != calls + 1:
        raise RuntimeError(f"torch.profiler recorded {len(roots)} of {calls + 1} calls")
    return roots[1:]  # the first warms the profiler up


def _add(event: Any, phase: str, part_of: PartOf, parts: Counter[str], rest: Counter[str]) -> None:
    """Add an event's microseconds to its part; if it has none, its children's to their parts."""
    elapsed = event.time_range.elapsed_us()
    named = event.name.removeprefix("fastdiff::")  # as fastdiff's own ranges are called
    region = named in REGIONS or "::" not in event.name
    phase = named if named in PHASES else phase
    part = part_of(event.name, phase)
    if part is not None:
        parts[part] += elapsed
        return
    own = elapsed - sum(child.time_range.elapsed_us() for child in event.cpu_children)
    if event.cpu_children and region:
        parts[BETWEEN] += own
    else:
        parts[REST] += own
        rest[event.name] += own
    for child in event.cpu_children:
        _add(child, phase, part_of, parts, rest)


def by_beginning(parts: dict[str, tuple[str, ...]], name: str) -> str | None:
    """The first part that has a beginning of an operation's name."""
    return next((part for part, begins in parts.items() if name.startswith(begins)), None)


def parts_table(taken: dict[str, Any]) -> str:
    """What :func:`measure` returns: a row a part, the largest first, and what they sum to."""
    whole, bare = taken["recorded"], taken["unrecorded"]
    parts = sorted(taken["parts"].items(), key=lambda item: -item[1])
    rows = [[name, f"{ms:.2f}", f"{ms / whole:.1%}"] for name, ms in parts]
    rows.append(["sum", f"{sum(ms for _, ms in parts):.2f}", ""])
    rows.append(["the call, recorded", f"{whole:.2f}", ""])
    rows.append(["the call, not recorded", f"{bare:.2f}", f"{bare / whole:.1%}"])
    return markdown([["part", "ms", "share"], *rows])


def rest_table(taken: dict[str, Any]) -> str:
    """The operations of no part that take most of the time; nothing if there are none."""
    rest = [[f"`{name}`", number(ms, "{:.2f}")] for name, ms in taken["rest"].items()]
    return "The rest:\n\n" + markdown([["operation", "ms"], *rest]) if rest else ""
