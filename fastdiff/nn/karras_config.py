"""The configuration of EDM2's network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from fastdiff.nn.config import check_positive, check_types, checked_options

_BALANCES = ("label_balance", "concat_balance", "residual_balance", "attention_balance")
_POSITIVE = (
    "sample_size", "in_channels", "out_channels", "block_out_channels", "layers_per_block",
    "attention_head_dim", "noise_channels", "embedding_channels", "num_class_embeds", "clip",
    "time_scale", "uncertainty_channels",
)  # fmt: skip


@dataclass(frozen=True)
class KarrasUNetConfig:
    """The options of a :class:`~fastdiff.nn.KarrasUNet`; the defaults are EDM2's, size S.

    Attributes:
        sample_size: height and width of the images. It is recorded only: the model takes any size
            that its levels can halve.
        in_channels: channels of the input.
        out_channels: channels of the output.
        block_out_channels: channels of each level, from full resolution on.
        layers_per_block: blocks in each level on the way down; on the way up there is one more.
        attention_levels: the levels whose blocks have attention; level 0 has the full resolution.
            The first block of the way up always has it.
        attention_head_dim: channels of a head.
        noise_channels: features of the time; None is block_out_channels[0].
        embedding_channels: length D of the embedding; None is the most of block_out_channels.
        num_class_embeds: number of classes; None for an unconditional model.
        dropout: probability of dropout in every block.
        label_balance: share of the class in the embedding, see ``mp_sum``.
        concat_balance: share of the skip where it is concatenated, see ``mp_cat``.
        residual_balance: share of the convolutions in a block's sum.
        attention_balance: share of the attention in its sum.
        clip: the result of a block is clipped to +-clip; None for no clipping.
        time_scale: factor of the time before its embedding, whose frequencies are those of a
            standard normal variable: 1 suits the label of EDM's process, log(sigma) / 4.
        uncertainty_channels: features of the time for the logarithm of the loss that is to be
            expected (``KarrasUNet.uncertainty``); None for a model without it.

    Raises:
        ValueError: a value of the wrong type or out of range, or values that do not fit together.
    """

    sample_size: int | None = None
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (192, 384, 576, 768)
    layers_per_block: int = 3
    attention_levels: tuple[int, ...] = (2, 3)
    attention_head_dim: int = 64
    noise_channels: int | None = None
    embedding_channels: int | None = None
    num_class_embeds: int | None = None
    dropout: float = 0.0
    label_balance: float = 0.5
    concat_balance: float = 0.5
    residual_balance: float = 0.3
    attention_balance: float = 0.3
    clip: float | None = 256.0
    time_scale: float = 1.0
    uncertainty_channels: int | None = None

    network: ClassVar[str] = "KarrasUNet"  # the class that it describes
    dimensions: ClassVar[int] = 2
    class_embed_type: ClassVar[None] = None  # the classes have a table
    time_embedding_type: ClassVar[str] = "random"
    self_condition: ClassVar[bool] = False  # the input is the images alone

    @property
    def image_channels(self) -> int:
        """Channels of the images."""
        return self.in_channels

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, _POSITIVE)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        for name in _BALANCES:
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in (0, 1), got {getattr(self, name)}")
        levels = len(self.block_out_channels)
        if not levels:
            raise ValueError("block_out_channels must name at least one level, got ()")
        wrong = [level for level in self.attention_levels if not 0 <= level < levels]
        if wrong:
            raise ValueError(
                f"attention level {wrong[0]} does not exist: there are 0..{levels - 1}"
            )
        for level in {*self.attention_levels, levels - 1}:
            width = self.block_out_channels[level]
            if width % self.attention_head_dim:
                raise ValueError(
                    "attention_head_dim must divide the channels of each level with attention, "
                    f"got {self.attention_head_dim} for {width} channels"
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> KarrasUNetConfig:
        """From the contents of a config.json; keys that begin with _ are skipped.

        Raises:
            ValueError: a key that is no option, or a value that the class refuses.
        """
        return cls(**checked_options(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json."""
        return {"_class_name": self.network, **asdict(self)}
