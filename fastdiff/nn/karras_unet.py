"""EDM2's network, whose layers keep the magnitude of activations and of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.nn.embeddings import Precomputed, distinct
from fastdiff.nn.image_network import ImageNetwork
from fastdiff.nn.input_checks import (
    as_timesteps,
    check_class_labels,
    check_conditioning,
    check_sample,
)
from fastdiff.nn.karras_blocks import CosineAttention, DecoderBlock, EncoderBlock, KarrasBlock
from fastdiff.nn.karras_config import KarrasUNetConfig
from fastdiff.nn.magnitude_preserving import (
    MPConv2d,
    MPEmbedding,
    MPFourier,
    MPLinear,
    MPWeight,
    mp_cat,
    mp_silu,
    mp_sum,
)
from fastdiff.nn.precomputable import only_own_code_runs, only_own_layers_run


class KarrasUNet(ImageNetwork):
    """Predicts a target of a diffusion model from noisy images and a time.

    Karras et al. 2024, arXiv:2312.02696, config G: EDM2. Weights are normalised, layers preserve
    magnitudes and have no biases, and the only norm is that of pixels on the way down. It is the
    raw network F: its preconditioning is that of the process ``fastdiff.sde.EDM`` with the
    prediction "edm", whose label log(sigma) / 4 is the time that it is given.

    The output is 0 before training, since its gain is. A training must call
    :meth:`normalise_weights` after each update, as ``fastdiff.training.Trainer`` does.

    Args:
        **options: see :class:`KarrasUNetConfig`.

    Attributes:
        config: the options, a frozen :class:`KarrasUNetConfig`.

    Raises:
        ValueError: an unknown option, or a value that is not supported.

    Example:
        >>> model = fastdiff.nn.KarrasUNet(
        ...     block_out_channels=(32, 64), attention_levels=(1,), attention_head_dim=32
        ... )
        >>> model(torch.randn(4, 3, 32, 32), torch.tensor(0.5)).shape
        torch.Size([4, 3, 32, 32])
    """

    config_class = KarrasUNetConfig

    def __init__(self, **options: Any) -> None:
        config = KarrasUNetConfig.from_dict(options)
        super().__init__(config)
        widths = config.block_out_channels
        channels = config.embedding_channels or max(widths)
        noise = config.noise_channels or widths[0]
        self.fourier = MPFourier(noise, config.time_scale)
        self.noise_embedding = MPLinear(noise, channels)
        self.class_embedding: MPEmbedding | None = None
        if config.num_class_embeds is not None:
            self.class_embedding = MPEmbedding(config.num_class_embeds, channels)
        # A channel of ones stands for the biases that the layers have not.
        self.conv_in = MPConv2d(config.in_channels + 1, widths[0], 3)
        self.encoder = nn.ModuleList(_encoder(config, channels))
        self.decoder = nn.ModuleList(_decoder(config, channels))
        self.conv_out = MPConv2d(widths[0], config.out_channels, 3)
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.embedding_gains = nn.Parameter(torch.zeros(len(self._blocks())))
        self.uncertainty_fourier: MPFourier | None = None
        self.uncertainty_out: MPLinear | None = None
        if config.uncertainty_channels is not None:
            self.uncertainty_fourier = MPFourier(config.uncertainty_channels, config.time_scale)
            self.uncertainty_out = MPLinear(config.uncertainty_channels, 1)
        self._block_channels = [block.embedding.weight.shape[0] for block in self._blocks()]
        self.normalise_weights()

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.out_gain.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return self.out_gain.dtype

    def normalise_weights(self) -> None:
        """Divide every weight by its magnitude, as must be done after each update (eq. 66).

        The network computes the same, to rounding, with such weights as with any multiple of them.
        """
        for part in self.modules():
            if isinstance(part, MPWeight):
                part.normalise()

    def may_precompute(self) -> bool:
        """Whether a sampling loop may use :meth:`precompute` without a difference in behaviour."""
        return only_own_code_runs(self, KarrasUNet)

    def precompute(
        self, timesteps: Tensor | float, class_labels: Tensor | None = None, batch: int = 1
    ) -> Precomputed:
        """All inputs of the blocks that depend on times and class labels.

        A sampling loop calls this once for all its steps, and gives ``forward`` the rows of a step.

        Args:
            timesteps: [S], int64 or floating point, or a single number.
            class_labels: as for :meth:`forward`.
            batch: N, the number of class labels; ignored by an unconditional model.

        Returns:
            The gains of the channels, in the model's dtype, or autocast's. P is the sum over the
            blocks of their channels.

        Raises:
            ValueError: timesteps of a wrong shape; labels that are missing, given to an
                unconditional model, or of a wrong shape or dtype.
            IndexError: a label outside the table (CPU tensors).
        """
        check_class_labels(class_labels, batch, self.config)
        index = None
        if class_labels is not None:
            class_labels, index = distinct(class_labels.to(self.device))
        noise = self._embed_time(timesteps).unsqueeze(1)  # [S, 1, D]
        return Precomputed(torch.cat(self._gains(noise, class_labels), dim=2), index)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | None = None,
        class_labels: Tensor | None = None,
        *,
        precomputed: Tensor | None = None,
    ) -> Tensor:
        """Predict from noisy images.

        Args:
            sample: [N, in_channels, H, W]; H and W divisible by 2 ** (number of levels - 1).
            timestep: a number, or a tensor [N], or [1] or [] for the whole batch.
            class_labels: int64 [N]; None for an unconditional model.
            precomputed: a step of :meth:`precompute`, [N, P] or [1, P], in place of ``timestep``
                and ``class_labels``.

        Returns:
            [N, out_channels, H, W].

        Raises:
            TypeError: ``precomputed`` is no tensor.
            ValueError: shapes do not fit the model, or the arguments do not fit together.
            IndexError: a label outside the table (CPU tensors).
        """
        check_sample(sample, self.config)
        return self._layers(
            sample, self._embeddings(sample.shape[0], timestep, class_labels, precomputed)
        )

    def uncertainty(self, timestep: Tensor | float) -> Tensor:
        """The logarithm of the loss that is to be expected at a time, u(sigma) of eq. 21.

        It is for training loops of one's own, which minimise loss / exp(u) + u: each time then
        counts in proportion to its loss. ``fastdiff.training.Trainer`` does not train it.

        Args:
            timestep: as for :meth:`forward`.

        Returns:
            float32 [S], or [1] for a number.

        Raises:
            ValueError: the model has none, or a timestep of a wrong shape.
        """
        if self.uncertainty_fourier is None or self.uncertainty_out is None:
            raise ValueError("the model has no uncertainty: its config has no uncertainty_channels")
        features = self.uncertainty_fourier(as_timesteps(timestep, self.device, None))
        return self.uncertainty_out(features.to(self.dtype)).squeeze(1).float()

    def may_fuse(self) -> bool:
        """Whether a graph of :meth:`layers` may be called in their place and nobody could tell."""
        return not self._checkpointing and only_own_layers_run(self, KarrasUNet)

    def layers(self, x: Tensor, rows: Tensor) -> Tensor:
        """All that ``forward`` computes from images and embeddings, for a fixed size of image.

        Args:
            x: [N, in_channels, H, W].
            rows: [N, P] or [1, P], a step of :meth:`precompute`.

        Returns:
            [N, out_channels, H, W].
        """
        return self._layers(x, rows.split(self._block_channels, dim=1))

    def through(
        self,
        layers: Callable[[Tensor, Tensor], Tensor],
        sample: Tensor,
        timestep: Tensor | float | None = None,
        class_labels: Tensor | None = None,
        *,
        precomputed: Tensor | None = None,
    ) -> Tensor:
        """``forward``, with ``layers`` computed by something that gives the same."""
        check_sample(sample, self.config)
        embs = self._embeddings(sample.shape[0], timestep, class_labels, precomputed)
        return layers(sample, torch.cat(tuple(embs), dim=1) if precomputed is None else precomputed)

    def of_embeddings(self) -> list[nn.Module]:
        """The modules that are not called where embeddings are precomputed."""
        parts = [self.fourier, self.noise_embedding, self.class_embedding]
        parts += [block.embedding for block in self._blocks()]
        return [part for part in parts if part is not None]

    def _layers(self, sample: Tensor, gains: Sequence[Tensor]) -> Tensor:
        """``layers``, of the gains [N or 1, C] of each block."""
        rest = iter(gains)
        x = self.conv_in(torch.cat([sample, torch.ones_like(sample[:, :1])], dim=1))
        skips = [x]
        for block in self.encoder:
            x = self._run(block, x, next(rest))
            skips.append(x)
        for block, reads in zip(self.decoder, _reads_skip(self.config), strict=True):
            if reads:
                x = mp_cat(x, skips.pop(), self.config.concat_balance)
            x = self._run(block, x, next(rest))
        return self.conv_out(x, self.out_gain)

    def _embeddings(
        self,
        batch: int,
        timestep: Tensor | float | None,
        class_labels: Tensor | None,
        precomputed: Tensor | None,
    ) -> Sequence[Tensor]:
        """The gains [N or 1, C] of each block."""
        channels = self._block_channels
        check_conditioning(batch, timestep, class_labels, precomputed, sum(channels), self.config)
        if precomputed is not None:
            return precomputed.split(channels, dim=1)
        assert timestep is not None
        return self._gains(self._embed_time(timestep), class_labels)

    def _embed_time(self, timesteps: Tensor | float) -> Tensor:
        features = self.fourier(as_timesteps(timesteps, self.device, None))
        return self.noise_embedding(features.to(self.dtype))

    def _gains(self, noise: Tensor, class_labels: Tensor | None) -> list[Tensor]:
        """What each block multiplies its channels by: [..., C], of the embedded time [..., D]."""
        emb = noise
        if self.class_embedding is not None and class_labels is not None:
            of_classes = self.class_embedding(class_labels).to(noise.dtype)
            noise, of_classes = torch.broadcast_tensors(noise, of_classes)
            emb = mp_sum(noise, of_classes, self.config.label_balance)
        emb = mp_silu(emb)
        gains = self.embedding_gains.unbind()
        return [
            block.embedding(emb, gain) + 1
            for block, gain in zip(self._blocks(), gains, strict=True)
        ]

    def _blocks(self) -> list[Any]:
        """All blocks in the order of the calls."""
        return [*self.encoder, *self.decoder]


def _encoder(config: KarrasUNetConfig, channels: int) -> Iterator[KarrasBlock]:
    """The blocks of the way down."""
    before = config.block_out_channels[0]
    for level, width in enumerate(config.block_out_channels):
        if level:
            yield EncoderBlock(before, before, down=True, **_options(config, before, channels))
        for _ in range(config.layers_per_block):
            options = _options(config, width, channels, attends=level in config.attention_levels)
            yield EncoderBlock(before, width, down=False, **options)
            before = width


def _decoder(config: KarrasUNetConfig, channels: int) -> Iterator[KarrasBlock]:
    """The blocks of the way up, beginning at the coarsest level."""
    widths = config.block_out_channels
    skips = [widths[0]]
    for level, width in enumerate(widths):
        skips += ([widths[level - 1]] if level else []) + [width] * config.layers_per_block
    before = widths[-1]
    for level, width in reversed(list(enumerate(widths))):
        if level == len(widths) - 1:
            for attends in (True, False):
                options = _options(config, before, channels, attends=attends)
                yield DecoderBlock(before, before, up=False, **options)
        else:
            yield DecoderBlock(before, before, up=True, **_options(config, before, channels))
        for _ in range(config.layers_per_block + 1):
            options = _options(config, width, channels, attends=level in config.attention_levels)
            yield DecoderBlock(before + skips.pop(), width, up=False, **options)
            before = width


def _reads_skip(config: KarrasUNetConfig) -> list[bool]:
    """For each block of the way up whether it reads a skip."""
    levels = len(config.block_out_channels)
    found = []
    for level in range(levels):
        found += [False] * (1 if level else 2) + [True] * (config.layers_per_block + 1)
    return found


def _options(
    config: KarrasUNetConfig, width: int, channels: int, *, attends: bool = False
) -> dict[str, Any]:
    """The options of a block of ``width`` channels."""
    attention: nn.Module = nn.Identity()
    if attends:
        attention = CosineAttention(
            width, head_dim=config.attention_head_dim, balance=config.attention_balance
        )
    return {
        "embedding_channels": channels,
        "dropout": config.dropout,
        "balance": config.residual_balance,
        "attention": attention,
        "clip": config.clip,
    }
