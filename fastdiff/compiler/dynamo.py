"""Private interfaces of Dynamo: its guards, its limit of graphs, and whether it is switched off.

Where a version of PyTorch lacks an interface, nothing is done: a model is then compiled more often
than necessary, or a warning is missing.
"""

from __future__ import annotations

import inspect
import json
import weakref
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch._dynamo import config, eval_frame
from torch._dynamo.guards import DeletedGuardManagerWrapper, GuardBuilder
from torch._dynamo.source import GlobalStateSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import CompileContext, TracingContext

DEFAULT_REGION = -1  # Dynamo's number for all graphs that are not compiled with isolation
MOST_GRAPHS = 64  # of one function that are kept; the least recently used is dropped first


def set_guards() -> None:
    """Let the graph being compiled serve any number of threads, but no hooks that come later.

    One guard of Dynamo compares all settings of the process: gradients, autocast, and the number of
    threads. Each number of threads would take one of the few graphs that a function may have. That
    guard is replaced by one of all settings but the threads, which the choice of algorithms and the
    recorded lists look up at every call.

    By default Dynamo does not notice a hook that is registered on a part of a compiled model, and
    leaves it out without a word. Its guard against that is put in force. A guard against
    forward-mode differentiation is added, because Dynamo has none and the fused operations have no
    forward-mode derivative.
    """
    context = TracingContext.try_get()
    if context is None:
        return
    guards = context.guards_context.dynamo_guards
    for guard in guards:
        if guard.create_fn is GuardBuilder.GLOBAL_STATE:
            guard.create_fn = _guard_other_settings
        elif guard.create_fn is getattr(GuardBuilder, "EMPTY_NN_MODULE_HOOKS_DICT", None):
            guard.create_fn = GuardBuilder.SEQUENCE_LENGTH
    guards.add(GlobalStateSource().make_guard(GuardBuilder.DUAL_LEVEL))


def _guard_other_settings(builder: Any, guard: Any) -> None:
    """``GuardBuilder.GLOBAL_STATE`` without the number of threads."""
    try:
        compiled = builder.check_fn_manager.output_graph.global_state_guard
        settings = json.loads(compiled.__getstate__())
        states: dict[int, Any] = {settings["num_threads"]: compiled}

        def holds(_: Any) -> bool:
            threads = torch.get_num_threads()
            state = states.get(threads)
            if state is None:
                state = type(compiled)()
                state.__setstate__(json.dumps({**settings, "num_threads": threads}))
                states[threads] = state
            return bool(state.check())

        reason = ["GLOBAL_STATE changed (grad_mode, autocast, default_dtype or the like)"]
        builder.guard_manager.root.add_lambda_guard(holds, reason, guard.user_stack)
    except (AttributeError, KeyError, TypeError, ValueError):
        GuardBuilder.GLOBAL_STATE(builder, guard)


def make_room(backend: Callable[..., Any]) -> str | None:
    """Keep the function being compiled below Dynamo's limits, however many graphs it has had.

    Beyond a limit Dynamo runs the function without any graph, and says so in its log alone. A model
    gets a graph for each set of adapters, and each kind of sizes and arguments; and models share
    the count, since all modules of a class have one ``forward``. So this backend's graphs are kept
    out of Dynamo's count. There are at most ``MOST_GRAPHS`` of them for each function: to compile
    one more drops the one that was used least recently.

    Args:
        backend: the graphs that it has made are kept out of the count and dropped; no others are.

    Returns:
        The function's name, if it has reached the limit for want of a private interface; else None.
    """
    try:
        code = InstructionTranslator.current_tx().output.root_tx.f_code
    except AttributeError:
        return None
    try:
        made = [entry for entry in _graphs(code) if _backend_of(entry) is backend]
        for entry in made:
            entry.guard_manager.id_matched_objs = _UNCOUNTED
        for entry in [entry for entry in made if entry.code is not None][MOST_GRAPHS - 1 :]:
            dropped = DeletedGuardManagerWrapper(f"fastdiff keeps {MOST_GRAPHS} graphs")
            dropped.id_matched_objs = _UNCOUNTED
            entry.guard_manager.extra_state.invalidate(entry, dropped)
        # The other limit counts dropped graphs too, and attempts to make one.
        attempts: Any = CompileContext.current_compile_id().frame_compile_id  # type: ignore[union-attr]
        config.accumulated_recompile_limit = max(
            config.accumulated_recompile_limit, attempts + 2, len(_graphs(code)) + 2
        )
    except (AttributeError, TypeError):
        pass
    last = graph_count(code) + 1 == config.recompile_limit
    return f"{code.co_name} ({_place(code)})" if last else None


# Dynamo counts a graph for a call if the graph's objects are the call's: this name is in no call.
_UNCOUNTED: dict[str, Any] = {"a graph of fastdiff": weakref.ref(make_room)}


def _graphs(code: CodeType) -> list[Any]:
    """Dynamo's entries for the graphs of a function, the latest used first, dropped ones last."""
    return eval_frame._debug_get_cache_entry_list(code)


def _backend_of(entry: Any) -> Any:
    """The function that compiled a graph, without what ``torch.compile`` puts around it."""
    return getattr(entry.backend, "compiler_fn", entry.backend)


def graph_count(code: CodeType) -> int:
    """How many graphs of a function count towards ``recompile_limit``."""
    of_region = getattr(eval_frame, "_get_cache_entries_for_region", None)
    entries = _graphs(code) if of_region is None else of_region(code, DEFAULT_REGION)
    return sum(entry.guard_manager.id_matched_objs is not _UNCOUNTED for entry in entries)


def functions_at_limit(model: Callable[..., Any]) -> list[str]:
    """Name, place and number of graphs of each function of a model that may have no more graphs."""
    parts = list(model.modules()) if isinstance(model, nn.Module) else [model]
    codes: dict[CodeType, str] = {}
    for part in parts:
        function: Any = part.forward if isinstance(part, nn.Module) else part
        for unwrapped in (function, inspect.unwrap(function)):
            code = getattr(unwrapped, "__code__", None)
            if code is not None:
                name = getattr(unwrapped, "__qualname__", code.co_name)
                codes[code] = f"{name} ({_place(code)})"
    return [
        f"{name} has {graph_count(code)}"
        for code, name in codes.items()
        if graph_count(code) >= config.recompile_limit
    ]


def isolation_options() -> dict[str, Any]:
    """Options of ``torch.compile`` whose graphs do not count towards a function's other graphs."""
    known = inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if "isolate_recompiles" in known else {}


def why_off() -> list[str]:
    """The reasons why Dynamo compiles nothing at all; empty if it compiles."""
    reasons = []
    if config.disable:
        reasons.append("Dynamo is off (TORCHDYNAMO_DISABLE or torch._dynamo.config.disable)")
    stance = getattr(getattr(eval_frame, "_stance", None), "stance", "default")
    if stance != "default":
        reasons.append(f"torch.compiler.set_stance({stance!r}) is in force")
    return reasons


def _place(code: CodeType) -> str:
    return f"{code.co_filename}:{code.co_firstlineno}"
