"""How programs name the weights of their U-Nets: tables, and what their tensors tell."""

from __future__ import annotations

from fastdiff.checkpoints.layouts.ddim_unet import DDIM
from fastdiff.checkpoints.layouts.diffusers_unet import DIFFUSERS
from fastdiff.checkpoints.layouts.layout import Layout
from fastdiff.checkpoints.layouts.openai_unet import OPENAI
from fastdiff.checkpoints.layouts.score_sde_unet import SCORE_SDE
from fastdiff.checkpoints.layouts.unreadable import UNREADABLE

__all__ = ["DIFFUSERS", "LAYOUTS", "Layout"]

LAYOUTS: tuple[Layout, ...] = (OPENAI, DDIM, SCORE_SDE, DIFFUSERS, *UNREADABLE)
