"""The options for guidance away from a weaker model, and for projected guidance."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.trained_model import Checkpoint
from fastdiff.cli.parsing import named_value
from fastdiff.common.errors import InputError
from fastdiff.common.model import Model
from fastdiff.guidance import perturbed_attention, smoothed_energy

PERTURBATIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "pag": perturbed_attention,
    "seg": smoothed_energy,
}


def add_arguments(command: argparse.ArgumentParser) -> None:
    """--guidance-mode, --guidance-option, --autoguidance and --perturb."""
    command.add_argument(
        "--guidance-mode",
        choices=("cfg", "apg"),
        default="cfg",
        help="how --guidance is applied: as it is, or by adaptive projected guidance",
    )
    command.add_argument(
        "--guidance-option",
        action="append",
        default=[],
        type=named_value,
        metavar="NAME=VALUE",
        help="an option of apg: eta=0, norm=5 or momentum=-0.5; may be repeated",
    )
    weaker = command.add_mutually_exclusive_group()
    weaker.add_argument(
        "--autoguidance",
        type=Path,
        metavar="CHECKPOINT",
        help="--guidance is away from this weaker model, of the same process and classes: one that "
        "was trained less, or is smaller",
    )
    weaker.add_argument(
        "--perturb",
        choices=tuple(PERTURBATIONS),
        help="--guidance is away from the model itself with perturbed attention (pag) or blurred "
        "attention (seg) in its middle block",
    )


def contrast(args: argparse.Namespace, model: Checkpoint, device: torch.device) -> dict[str, Any]:
    """The keywords weaker and projection of ``Checkpoint.generate``.

    Raises:
        InputError: a weaker model that does not fit, or options without --guidance-mode apg.
    """
    if args.guidance_option and args.guidance_mode != "apg":
        raise InputError("--guidance-option is for --guidance-mode apg")
    weaker: Model | None = None
    if args.autoguidance is not None:
        other = checkpoint.load(args.autoguidance)
        model.check_weaker(other)
        weaker = other.model.to(device)
    elif args.perturb is not None:
        try:
            weaker = PERTURBATIONS[args.perturb](model.model)
        except (TypeError, ValueError) as error:
            raise InputError(f"--perturb {args.perturb}: {error}") from None
    projection = dict(args.guidance_option) if args.guidance_mode == "apg" else None
    return {"weaker": weaker, "projection": projection}


def contrast_facts(args: argparse.Namespace) -> dict[str, Any]:
    """The options for JSON."""
    autoguidance = None if args.autoguidance is None else str(args.autoguidance)
    return {
        "guidance_mode": args.guidance_mode,
        "guidance_options": dict(args.guidance_option),
        "autoguidance": autoguidance,
        "perturb": args.perturb,
    }
