"""The fused operations; each checks its arguments and runs on the chosen backend."""

from __future__ import annotations

from fastdiff.common.checks import check_timesteps
from fastdiff.ops.adamw_update import adamw_update, gradient_norm
from fastdiff.ops.add_time_embedding import add_time_embedding
from fastdiff.ops.attention import attention
from fastdiff.ops.conv2d import conv2d, conv2d_pack
from fastdiff.ops.conv2d_weight_gradient import conv2d_weight_gradient
from fastdiff.ops.conv_epilogue import conv_epilogue
from fastdiff.ops.denoising_loss import denoising_loss, denoising_loss_from_seed
from fastdiff.ops.ema_update import ema_update
from fastdiff.ops.geglu import geglu
from fastdiff.ops.group_norm_coefficients import channel_statistics, group_norm_coefficients
from fastdiff.ops.group_norm_silu import group_norm_silu
from fastdiff.ops.norm_backward import norm_backward
from fastdiff.ops.philox_normal import philox_normal
from fastdiff.ops.q_sample import q_sample, q_sample_from_seed
from fastdiff.ops.sampler_step import new_history, sampler_step, sampler_step_for
from fastdiff.ops.upsample_nearest2x import upsample_nearest2x

__all__ = [
    "adamw_update",
    "add_time_embedding",
    "attention",
    "channel_statistics",
    "check_timesteps",
    "conv2d",
    "conv2d_pack",
    "conv2d_weight_gradient",
    "conv_epilogue",
    "denoising_loss",
    "denoising_loss_from_seed",
    "ema_update",
    "geglu",
    "gradient_norm",
    "group_norm_coefficients",
    "group_norm_silu",
    "new_history",
    "norm_backward",
    "philox_normal",
    "q_sample",
    "q_sample_from_seed",
    "sampler_step",
    "sampler_step_for",
    "upsample_nearest2x",
]
