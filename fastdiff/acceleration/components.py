"""What a pipeline or model consists of, and which of its modules are compiled.

Classes of diffusers and transformers are known by their names, so that neither is imported: what is
to be accelerated has imported what it needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastdiff.acceleration.obstacles import devices, obstacle, own_obstacle

# Classes of diffusers whose call is compiled as a whole.
UNETS = ("UNet2DModel", "UNet2DConditionModel")
CONTROLNETS = ("ControlNetModel",)
# Autoencoders are not called: their methods encode and decode cut images into slices and tiles, and
# call these two modules.
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "VQModel")
CODERS = ("encoder", "decoder")
SUPPORTED = ", ".join((*UNETS, *CONTROLNETS, *AUTOENCODERS))
# Modules of transformers with some of diffusers around them: what is called, and what computes.
CHECKERS = {"StableDiffusionSafetyChecker": "vision_model"}


@dataclass(frozen=True)
class Part:
    """A module of a pipeline, and what is to become of it.

    Attributes:
        name: its name in the pipeline, such as ``unet`` or ``vae.decoder``.
        kind: the name of its class.
        module: the module, if it is to be compiled; else None.
        text: what is done, or why it is left as it is.
        is_network: whether it is a U-Net, a ControlNet or an autoencoder, in which a call spends
            nearly all of its time.
        is_unet: whether it is a U-Net, of any class.
        options: the backend's options.
    """

    name: str
    kind: str
    module: nn.Module | None
    text: str
    is_network: bool = False
    is_unet: bool = False
    options: Mapping[str, Any] | None = None


def components_of(target: Any) -> dict[str, Any]:
    """The components of a pipeline by name, or a model under an empty name; else TypeError."""
    if isinstance(target, nn.Module):
        return {"": target}
    components = getattr(target, "components", None)
    if isinstance(components, Mapping):
        return {name: value for name, value in components.items() if value is not None}
    raise TypeError(
        "accelerate takes a pipeline of diffusers or a torch.nn.Module, got "
        f"{type(target).__module__}.{type(target).__qualname__}"
    )


def parts_of(components: Mapping[str, Any], precision: str) -> list[Part]:
    """What is to become of each module among a pipeline's components, in their order."""
    return [
        part
        for name, component in components.items()
        if isinstance(component, nn.Module)
        for part in _examine(name, component, precision)
    ]


def _examine(name: str, module: nn.Module, precision: str) -> Iterator[Part]:
    original = getattr(module, "_orig_mod", module)
    kinds = diffusers_classes(original)
    if kinds & {*UNETS, *CONTROLNETS}:
        yield _compiled(name, module, precision, is_unet=bool(kinds & {*UNETS}))
    elif kinds & {*AUTOENCODERS}:
        why = own_obstacle(module)
        if why is not None:
            kind = type(original).__name__
            yield Part(name or kind, kind, None, f"it is {why}", is_network=True)
            return
        for part in CODERS:
            yield _compiled(f"{name}.{part}".lstrip("."), getattr(module, part), precision)
    elif "MultiControlNetModel" in kinds:
        for i, net in enumerate(module.nets):  # type: ignore[arg-type]
            yield from _examine(f"{name}.{i}".lstrip("."), net, precision)
    elif _is_slow_in_float16(module):
        yield _half(name, module, kinds, precision)
    elif not name and not _is_of(original, "diffusers", "transformers") and _convolves(module):
        yield _compiled(type(original).__name__, module, precision)
    else:
        yield Part(name or type(original).__name__, type(original).__name__, None, _why(original),
                   is_unet=_is_unet(original))  # fmt: skip


def _compiled(name: str, module: nn.Module, precision: str, is_unet: bool = False) -> Part:
    """A network, to be compiled unless there is an obstacle."""
    kind = type(getattr(module, "_orig_mod", module)).__name__
    why = obstacle(module)
    if why is not None:
        return Part(name or kind, kind, None, why, is_network=True, is_unet=is_unet)
    if precision == "bf16" and "cuda" in devices(module):
        raise ValueError(
            f'precision "bf16" is for models on a CPU, got {name or kind} on a GPU: convert it by '
            "to(torch.bfloat16)"
        )
    return Part(
        name or kind, kind, module, f"compiled, {_computes_in(module, precision)}",
        is_network=True, is_unet=is_unet, options={"precision": precision},
    )  # fmt: skip


def _half(name: str, module: nn.Module, kinds: set[str], precision: str) -> Part:
    """A text or image encoder in float16 on a CPU, which the backend computes in float32."""
    inner = next((CHECKERS[kind] for kind in CHECKERS if kind in kinds), None)
    part = module if inner is None else getattr(module, inner)
    dotted = name if inner is None else f"{name}.{inner}"
    why = obstacle(part)
    kind = type(part).__name__
    if why is not None:
        return Part(dotted, kind, None, why)
    # It runs once for a prompt or an image: bfloat16 is coarser than float16 and would save little.
    options = {"precision": "strict" if precision == "strict" else "fast"}
    text = f"compiled, {_computes_in(part, options['precision'])}"
    return Part(dotted, kind, part, text, options=options)


def _computes_in(module: nn.Module, precision: str) -> str:
    """In which dtypes a compiled module computes, as a phrase."""
    given = dtypes(module)
    if precision == "bf16":
        inside = {torch.bfloat16}
    else:
        inside = {torch.float32 if dtype == torch.float16 else dtype for dtype in given}
    phrase = f"computes in {_names(inside)}"
    return phrase if inside == given else f"{phrase} (weights in {_names(given)})"


def _names(kinds: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))


def dtypes(module: nn.Module) -> set[torch.dtype]:
    """The floating-point dtypes of a module's parameters."""
    return {p.dtype for p in module.parameters() if p.dtype.is_floating_point}


def diffusers_classes(module: Any) -> set[str]:
    """Names of the classes of diffusers that an object is an instance of."""
    return {c.__name__ for c in type(module).__mro__ if c.__module__.startswith("diffusers.")}


def _is_of(module: nn.Module, *packages: str) -> bool:
    return any(c.__module__.split(".")[0] in packages for c in type(module).__mro__)


def _convolves(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Conv2d) for part in module.modules())


def _is_unet(module: nn.Module) -> bool:
    return any("UNet" in name for name in diffusers_classes(module))


def _is_slow_in_float16(module: nn.Module) -> bool:
    """Whether a module is of transformers, in float16, on a CPU."""
    known = _is_of(module, "transformers")
    return known and torch.float16 in dtypes(module) and devices(module) == {"cpu"}


def _why(module: nn.Module) -> str:
    """Why a module of a class that is not compiled is left as it is."""
    if _is_of(module, "transformers"):
        return "it runs once for each prompt or image"
    if diffusers_classes(module) & {"T2IAdapter", "MultiAdapter"}:
        return "it runs once for each image"
    return f"its class is none of {SUPPORTED}"
