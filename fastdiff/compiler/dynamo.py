"""What is asked of Dynamo beyond what it gives a backend: its guards, and how much it compiles.

All of it is private to PyTorch. Where a version has it in another form nothing is done: a model is
then compiled more often than it need be, or a notice is missing.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch._dynamo import config, eval_frame
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import GlobalStateSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import TracingContext

DEFAULT_REGION = -1  # of a code's graphs: those of all that do not ask for one of their own


def set_guards() -> None:
    """Let the graph that is being compiled serve any number of threads, but no other derivatives.

    Dynamo guards the number of threads with all other settings of the process, gradients and
    autocast among them, so that each number would take one of the few graphs that a function may
    have. Here its guard gives way to one of the other settings alone: the choice of algorithms and
    the recorded lists look up the threads at every call. Forward-mode differentiation, which it
    does not guard, is guarded: the fused operations have no tangents.
    """
    context = TracingContext.try_get()
    if context is None:
        return
    guards = context.guards_context.dynamo_guards
    for guard in guards:
        if guard.create_fn is GuardBuilder.GLOBAL_STATE:
            guard.create_fn = _guard_other_settings
    guards.add(GlobalStateSource().make_guard(GuardBuilder.DUAL_LEVEL))


def _guard_other_settings(builder: Any, guard: Any) -> None:
    """What ``GuardBuilder.GLOBAL_STATE`` does, but for the threads."""
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


def is_last_graph() -> str | None:
    """The name of the function that is being compiled, if it may have no graph after this one."""
    try:
        code = InstructionTranslator.current_tx().output.root_tx.f_code
    except AttributeError:
        return None
    last = graphs(code) + 1 == config.recompile_limit
    return f"{code.co_name} ({_place(code)})" if last else None


def graphs(code: CodeType) -> int:
    """How many graphs Dynamo keeps for a function."""
    of_region = getattr(eval_frame, "_get_cache_entries_for_region", None)
    if of_region is not None:
        return len(of_region(code, DEFAULT_REGION))
    return len(eval_frame._debug_get_cache_entry_list(code))


def full(model: Callable[..., Any]) -> list[str]:
    """The functions of a model that may have no further graph, by name, place and number."""
    parts = list(model.modules()) if isinstance(model, nn.Module) else [model]
    codes: dict[CodeType, str] = {}
    for part in parts:
        function: Any = part.forward if isinstance(part, nn.Module) else part
        for found in (function, inspect.unwrap(function)):
            code = getattr(found, "__code__", None)
            if code is not None:
                codes[code] = f"{getattr(found, '__qualname__', code.co_name)} ({_place(code)})"
    return [
        f"{name} has {graphs(code)}"
        for code, name in codes.items()
        if graphs(code) >= config.recompile_limit
    ]


def apart() -> dict[str, Any]:
    """Options of ``torch.compile`` that keep its graphs apart from all others of a function."""
    known = inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if "isolate_recompiles" in known else {}


def why_off() -> list[str]:
    """Why Dynamo compiles nothing at all."""
    reasons = []
    if config.disable:
        reasons.append("Dynamo is off (TORCHDYNAMO_DISABLE or torch._dynamo.config.disable)")
    stance = getattr(getattr(eval_frame, "_stance", None), "stance", "default")
    if stance != "default":
        reasons.append(f"torch.compiler.set_stance({stance!r}) is in force")
    return reasons


def _place(code: CodeType) -> str:
    return f"{code.co_filename}:{code.co_firstlineno}"
