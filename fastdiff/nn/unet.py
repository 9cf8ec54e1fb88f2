"""The U-Net of DDPM and its descendants, with the configs and weights of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.nn import unet_parts
from fastdiff.nn.config import UNet2DConfig
from fastdiff.nn.embeddings import Precomputed, distinct
from fastdiff.nn.frames import as_images, from_images, per_frame
from fastdiff.nn.image_network import ImageNetwork
from fastdiff.nn.input_checks import (
    as_timesteps,
    check_class_labels,
    check_conditioning,
    check_sample,
    with_estimate,
)
from fastdiff.nn.norm import GroupNormSiLU
from fastdiff.nn.precomputable import only_own_code_runs, only_own_layers_run
from fastdiff.nn.resample import convolution


class UNet2DModel(ImageNetwork):
    """Predicts noise, or another target of a diffusion model, from noisy images and timesteps.

    The architecture is that of DDPM (Ho et al. 2020, arXiv:2006.11239) with the options of
    diffusers' class of the same name: both read each other's checkpoints, and their outputs agree.
    With the option ``dimensions`` it is a model of signals [N, C, L] or of videos [N, C, F, H, W].

    Args:
        **options: see :class:`UNet2DConfig`.

    Attributes:
        config: the options, a frozen :class:`UNet2DConfig`.

    Raises:
        ValueError: an unknown option, or a value that is not supported.

    Example:
        >>> model = fastdiff.nn.UNet2DModel(
        ...     in_channels=1,
        ...     out_channels=1,
        ...     block_out_channels=(32, 64),
        ...     down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        ...     up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ... )
        >>> model(torch.randn(4, 1, 28, 28), 10).shape
        torch.Size([4, 1, 28, 28])
    """

    config_class = UNet2DConfig

    def __init__(self, **options: Any) -> None:
        config = UNet2DConfig.from_dict(options)
        super().__init__(config)
        width = config.block_out_channels[0]
        self.conv_in = convolution(config.in_channels, width, config.kernel)
        self.time_proj = unet_parts.time_projection(config)
        self.time_embedding = unet_parts.time_embedding(config)
        self.class_embedding = unet_parts.class_embedding(config)
        self.down_blocks = nn.ModuleList(unet_parts.down_blocks(config))
        self.mid_block = unet_parts.mid_block(config)
        self.up_blocks = nn.ModuleList(unet_parts.up_blocks(config))
        # Embedding channels of each residual block, one list for each level.
        self._emb_channels = [
            [block.time_emb_proj.out_features for block in level.residual_blocks]
            for level in self._levels()
        ]
        self.conv_norm_out = GroupNormSiLU(config.norm_num_groups, width, config.norm_eps)
        self.conv_out = convolution(width, config.out_channels, config.kernel)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return self.conv_in.weight.dtype

    def may_precompute(self) -> bool:
        """Whether a sampling loop may use :meth:`precompute` without a difference in behaviour."""
        return only_own_code_runs(self, UNet2DModel)

    def precompute(
        self, timesteps: Tensor | float, class_labels: Tensor | None = None, batch: int = 1
    ) -> Precomputed:
        """All inputs of the residual blocks that depend on timesteps and class labels.

        A sampling loop calls this once for all its steps, and gives ``forward`` the rows of a step:
        ``model(x, precomputed=model.precompute(timesteps).at(i))``. The result has S * U * P
        numbers, where U is the number of distinct labels. The call may wait for the device.

        Args:
            timesteps: [S], int64 or floating point, or a single number.
            class_labels: as for :meth:`forward`.
            batch: N, the number of class labels; ignored by an unconditional model.

        Returns:
            The projected embeddings, in the model's dtype, or autocast's. P is the sum over the
            residual blocks of C_out, or 2 C_out with scale_shift.

        Raises:
            ValueError: timesteps of a wrong shape, or fractions for a learned embedding; labels
                that are missing, given to an unconditional model, or of a wrong shape or dtype.
            IndexError: a label or a timestep outside its table (CPU tensors).
        """
        check_class_labels(class_labels, batch, self.config)
        index = None
        if class_labels is not None:
            class_labels, index = distinct(class_labels.to(self.device))
        emb = self._embed_time(timesteps).unsqueeze(1)  # [S, 1, D]
        rows = torch.cat(self._project(emb, class_labels), dim=2)
        return Precomputed(rows, index, self.config.time_embedding_type == "fourier")

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | None = None,
        class_labels: Tensor | None = None,
        *,
        precomputed: Tensor | None = None,
        estimate: Tensor | None = None,
    ) -> Tensor:
        """Predict from noisy images.

        Args:
            sample: [N, C, H, W], C being in_channels, or half of them with ``self_condition``; H
                and W divisible by 2 ** (number of levels - 1). With ``dimensions`` 1, [N, C, L], L
                divisible likewise; with 3, [N, C, F, H, W] for any F.
            timestep: a number, or a tensor [N], or [1] or [] for the whole batch. (diffusers drops
                the fraction of a Python float; here it counts.)
            class_labels: int64 [N]; numbers [N] where class_embed_type is timestep; embeddings
                [N, D] where it is identity; None for an unconditional model.
            precomputed: a step of :meth:`precompute`, [N, P] or [1, P], in place of ``timestep``
                and ``class_labels``. Only a model with fourier embeddings then still needs
                ``timestep``, since it divides its output by it.
            estimate: of a self-conditioned model, its last estimate of x0, like ``sample``; zeros
                if there is none yet.

        Returns:
            [N, out_channels, H, W], or the dimensions of ``sample``.

        Raises:
            TypeError: ``precomputed`` is no tensor.
            ValueError: shapes do not fit the model, or the arguments do not fit together.
            IndexError: a label or a timestep outside its table (CPU tensors).
        """
        check_sample(sample, self.config)
        embs = self._embeddings(sample.shape[0], timestep, class_labels, precomputed)
        embs = [per_frame(emb, sample) for emb in embs]
        x = with_estimate(sample, estimate, self.config)
        return self._over_time(self._layers(x, embs), timestep)

    def may_fuse(self) -> bool:
        """Whether a graph of :meth:`layers` may be called in their place and nobody could tell."""
        return not self._checkpointing and only_own_layers_run(self, UNet2DModel)

    def layers(self, x: Tensor, rows: Tensor) -> Tensor:
        """All that ``forward`` computes from images and embeddings, for a fixed size of image.

        Args:
            x: [N, in_channels, H, W], or as in ``forward``.
            rows: [N, P] or [1, P], a step of :meth:`precompute`.

        Returns:
            [N, out_channels, H, W], or the dimensions of x.
        """
        return self._layers(x, per_frame(rows, x).split(self._all_channels, dim=1))

    def through(
        self,
        layers: Callable[[Tensor, Tensor], Tensor],
        sample: Tensor,
        timestep: Tensor | float | None = None,
        class_labels: Tensor | None = None,
        *,
        precomputed: Tensor | None = None,
        estimate: Tensor | None = None,
    ) -> Tensor:
        """``forward``, with ``layers`` computed by something that gives the same."""
        check_sample(sample, self.config)
        embs = self._embeddings(sample.shape[0], timestep, class_labels, precomputed)
        rows = torch.cat(tuple(embs), dim=1) if precomputed is None else precomputed
        x = with_estimate(sample, estimate, self.config)
        return self._over_time(layers(x, rows), timestep)

    def of_embeddings(self) -> list[nn.Module]:
        """The modules that are not called where embeddings are precomputed."""
        roots = [self.time_proj, self.time_embedding, self.class_embedding]
        roots += [
            block.time_emb_proj for level in self._levels() for block in level.residual_blocks
        ]
        return [root for root in roots if root is not None]

    def _layers(self, sample: Tensor, embs: Sequence[Tensor]) -> Tensor:
        """``layers``, of one tensor of embeddings, of each image, for each residual block."""
        frames = sample.shape[2] if self.config.dimensions == 3 else 1
        rest = iter(embs)
        of_levels = iter([list(islice(rest, len(level))) for level in self._emb_channels])
        x = as_images(2 * sample - 1 if self.config.center_input_sample else sample)
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x, kept = self._run(block, x, next(of_levels), frames)
            skips += kept
        if self.mid_block is not None:
            x = self._run(self.mid_block, x, next(of_levels), frames)
        count = self.config.layers_per_block + 1
        for block in self.up_blocks:
            x = self._run(block, x, skips[-count:], next(of_levels), frames)
            del skips[-count:]
        return from_images(self.conv_out(self.conv_norm_out(x)), sample)

    def _over_time(self, out: Tensor, timestep: Tensor | float | None) -> Tensor:
        """The output of a model with fourier embeddings, over its timestep."""
        if self.config.time_embedding_type == "fourier" and timestep is not None:
            t = self._timesteps(timestep)
            out = (out / t.view(-1, *[1] * (out.ndim - 1))).to(out.dtype)
        return out

    def _embeddings(
        self,
        batch: int,
        timestep: Tensor | float | None,
        class_labels: Tensor | None,
        precomputed: Tensor | None,
    ) -> Sequence[Tensor]:
        """The embedding [N or 1, C] of each residual block."""
        channels = self._all_channels
        check_conditioning(batch, timestep, class_labels, precomputed, sum(channels), self.config)
        if precomputed is not None:
            return precomputed.split(channels, dim=1)
        assert timestep is not None
        return self._project(self._embed_time(timestep), class_labels)

    @property
    def _all_channels(self) -> list[int]:
        return [width for level in self._emb_channels for width in level]

    def _project(self, emb: Tensor, class_labels: Tensor | None) -> list[Tensor]:
        """The input [..., C] of each residual block: time embedding [..., D] and labels, projected.

        The labels' embedding is added to the time embedding before.
        """
        if self.class_embedding is not None and class_labels is not None:
            if self.config.class_embed_type == "timestep":
                class_labels = self._time_features(class_labels)
            emb = emb + self.class_embedding(class_labels).to(self.dtype)
        temb = F.silu(emb)
        return [
            block.time_emb_proj(temb) for level in self._levels() for block in level.residual_blocks
        ]

    def _levels(self) -> list[Any]:
        """All levels in the order of the calls."""
        middle = [] if self.mid_block is None else [self.mid_block]
        return [*self.down_blocks, *middle, *self.up_blocks]

    def _embed_time(self, timesteps: Tensor | float) -> Tensor:
        return self.time_embedding(self._time_features(timesteps))

    def _time_features(self, timesteps: Tensor | float) -> Tensor:
        return self.time_proj(self._timesteps(timesteps)).to(self.dtype)

    def _timesteps(self, timestep: Tensor | float) -> Tensor:
        learned = self.config.time_embedding_type == "learned"
        rows = self.config.num_train_timesteps if learned else None
        return as_timesteps(timestep, self.device, rows)
