"""The U-Net's configuration: diffusers' names and defaults, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from types import UnionType
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

DIFFUSERS_VERSION = "0.42.0"  # the version of diffusers whose format is read and written

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")

_CHOICES: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional", "fourier", "learned"),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "act_fn": ("silu", "swish"),
    "dimensions": (1, 2, 3),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None, "timestep", "identity"),
}
_POSITIVE = (
    "sample_size", "in_channels", "out_channels", "time_embedding_dim", "block_out_channels",
    "layers_per_block", "mid_block_scale_factor", "attention_head_dim", "norm_num_groups",
    "attn_norm_num_groups", "norm_eps", "num_class_embeds", "num_train_timesteps",
)  # fmt: skip


@dataclass(frozen=True)
class UNet2DConfig:
    """The options of a :class:`~fastdiff.nn.UNet2DModel`; names as in diffusers 0.42.

    ``dimensions`` is fastdiff's own. Without it, as in every config.json of diffusers, it is 2.

    Attributes:
        sample_size: height and width of the images; length of signals; or frames, height and width
            of videos. It is recorded only: the model takes any size that its levels can halve.
        in_channels: channels of the input; with ``self_condition`` those of the images and of the
            estimate together.
        out_channels: channels of the output.
        center_input_sample: first map the input from [0, 1] to [-1, 1].
        time_embedding_type: positional (sinusoidal), fourier (random features of log t; the output
            is then divided by t) or learned (a table of num_train_timesteps rows).
        time_embedding_dim: length D of the embedding; None is 4 * block_out_channels[0].
        freq_shift: of the sinusoidal embedding, see ``SinusoidalProjection``.
        flip_sin_to_cos: cosines before sines in the sinusoidal embedding.
        down_block_types: kind of each level on the way down, from full resolution on.
        mid_block_type: UNetMidBlock2D, or None for no middle block.
        up_block_types: kind of each level on the way up, from the coarsest on.
        block_out_channels: channels of each level.
        layers_per_block: residual blocks in each level on the way down; on the way up there is one
            more.
        mid_block_scale_factor: divisor of the residual sums in the middle block.
        downsample_padding: 1, or 0 to pad the right and bottom only.
        downsample_type: conv or resnet, for AttnDownBlock2D.
        upsample_type: conv or resnet, for AttnUpBlock2D.
        dropout: probability of dropout in every residual block.
        act_fn: silu, also called swish.
        attention_head_dim: channels of a head, one number for all levels or one for each, from full
            resolution on (which diffusers cannot read); None for a single head.
        norm_num_groups: groups of every GroupNorm.
        attn_norm_num_groups: groups of the norm before the middle block's attention; None is
            norm_num_groups, or no such norm with scale_shift.
        norm_eps: of every GroupNorm.
        resnet_time_scale_shift: default adds the time embedding; scale_shift scales and shifts by
            it.
        add_attention: whether the middle block has attention.
        class_embed_type: None (a table of num_class_embeds rows, if set), timestep (labels are
            embedded as timesteps are) or identity (labels are embeddings already).
        num_class_embeds: number of classes; None for an unconditional model.
        num_train_timesteps: rows of a learned time embedding.
        self_condition: the input is x_t and behind it, as further channels, the network's last
            estimate of x0 (Chen et al. 2022, arXiv:2208.04202). diffusers has no such option: its
            class reads the weights, with a warning, as those of a network of ``in_channels``, and
            its caller has to put the two together.
        dimensions: of a sample besides its channels. 2: images [C, H, W]. 1: signals [C, L], by
            convolutions of 3 along L. 3: videos [C, F, H, W], by the model of images on each frame
            and attention over the frames (factorised space-time, arXiv:2204.03458).

    Raises:
        ValueError: a value of the wrong type, out of range or not supported, or values that do not
            fit together.
    """

    sample_size: int | tuple[int, ...] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", *["AttnDownBlock2D"] * 3)
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = (*["AttnUpBlock2D"] * 3, "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | tuple[int, ...] | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None
    self_condition: bool = False
    dimensions: int = 2

    network: ClassVar[str] = "UNet2DModel"  # the class that it describes

    def __post_init__(self) -> None:
        check_types(self)
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        check_positive(self, _POSITIVE)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.self_condition and self.in_channels % 2:
            raise ValueError(
                "with self_condition half of in_channels are the estimate's, "
                f"got {self.in_channels}"
            )
        self._check_sample_size()
        self._check_levels()
        self._check_embedding()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UNet2DConfig:
        """From the contents of a config.json; keys that begin with _ are skipped.

        Raises:
            ValueError: a key that is no option, or a value that the class refuses.
        """
        return cls(**checked_options(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json, which diffusers reads as well if the model is 2D."""
        values = asdict(self)
        # An unknown key would have diffusers warn of every model.
        if not self.self_condition:
            del values["self_condition"]
        if self.dimensions == 2:
            del values["dimensions"]
        return {"_class_name": self.network, "_diffusers_version": DIFFUSERS_VERSION, **values}

    @property
    def image_channels(self) -> int:
        """Channels of the images, without those of an estimate."""
        return self.in_channels // 2 if self.self_condition else self.in_channels

    @property
    def embedding_channels(self) -> int:
        """Length D of the time embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def attention_levels(self) -> tuple[int, ...]:
        """The levels with attention on the way down; level 0 has the full resolution."""
        kinds = enumerate(self.down_block_types)
        return tuple(level for level, kind in kinds if "Attn" in kind)

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width of the convolutions; a signal is an image with one row."""
        return (1, 3) if self.dimensions == 1 else (3, 3)

    def _check_sample_size(self) -> None:
        size = self.sample_size
        if isinstance(size, tuple) and len(size) != self.dimensions:
            raise ValueError(
                f"sample_size must be one number, or {self.dimensions} for samples of "
                f"dimensions={self.dimensions}, got {size}"
            )

    def _check_levels(self) -> None:
        levels = len(self.block_out_channels)
        for name, kinds in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            value = getattr(self, name)
            if len(value) != levels or not levels:
                raise ValueError(
                    f"{name} must name one block for each of the {levels} block_out_channels, "
                    f"got {len(value)}"
                )
            for kind in value:
                _check_choice(name, block_kind(kind), kinds)
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups must divide every one of block_out_channels, "
                    f"got {self.norm_num_groups} groups for {width} channels"
                )
        if self.block_out_channels[-1] % (self.attn_norm_num_groups or 1):
            raise ValueError(
                f"attn_norm_num_groups must divide the last of block_out_channels, "
                f"got {self.attn_norm_num_groups} groups for {self.block_out_channels[-1]} channels"
            )
        if self.dimensions == 3 and not self._attention_levels():
            raise ValueError(
                "a model of videos needs a level with attention, through which frames see each "
                f"other, got down_block_types {self.down_block_types}"
            )
        dims = self.attention_head_dim
        if isinstance(dims, tuple) and len(dims) != levels:
            raise ValueError(
                f"attention_head_dim must be one number, or one for each of the {levels} "
                f"block_out_channels, got {dims}"
            )
        for level in self._attention_levels():
            width, dim = self.block_out_channels[level], self.head_dim(level) or 1
            if dim > width:
                raise ValueError(
                    f"attention_head_dim must not exceed the channels of a level with attention, "
                    f"got {dim} for {width} channels"
                )

    def head_dim(self, level: int) -> int | None:
        """Channels of a head at a level, 0 having the full resolution; None for a single head."""
        dims = self.attention_head_dim
        return dims[level] if isinstance(dims, tuple) else dims

    def _attention_levels(self) -> list[int]:
        levels = range(len(self.block_out_channels))
        down, up = self.down_block_types, self.up_block_types[::-1]
        found = [level for level in levels if "Attn" in down[level] + up[level]]
        middle = [levels[-1]] if self.mid_block_type and self.add_attention else []
        return found + middle

    def _check_embedding(self) -> None:
        width = self.block_out_channels[0]
        if self.time_embedding_type == "positional" and width // 2 <= self.freq_shift:
            raise ValueError(
                f"freq_shift must be below half of block_out_channels[0], {width // 2}, "
                f"got {self.freq_shift}"
            )
        if self.time_embedding_type == "learned" and self.num_train_timesteps is None:
            raise ValueError("time_embedding_type 'learned' needs num_train_timesteps, got None")


def block_kind(name: str) -> str:
    """A block type without the prefix of diffusers' first releases (UNetResDownBlock2D)."""
    return name.removeprefix("UNetRes")


def checked_options(config: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The options in the contents of a config.json; keys that begin with _ are skipped.

    Raises:
        ValueError: a key that is no option of the class ``config``.
    """
    options = {key: value for key, value in values.items() if not key.startswith("_")}
    unknown = sorted(set(options) - {field.name for field in fields(config)})
    if unknown:
        raise ValueError(f"{config.network} has no option {', '.join(unknown)}")
    return options


def check_types(config: Any) -> None:
    """ValueError unless every option has its annotated type; lists become tuples in place."""
    kind: Any = type(config)
    hints = _hints(kind)
    for field in fields(config):
        name, hint = field.name, hints[field.name]
        value = getattr(config, name)
        if isinstance(value, list):
            value = tuple(value)
            object.__setattr__(config, name, value)
        if not _fits(value, hint):
            wanted = hint.__name__ if isinstance(hint, type) else hint
            raise ValueError(f"{name} must be {wanted}, got {value!r}")


def check_positive(config: Any, names: Iterable[str]) -> None:
    """ValueError unless the numbers of these options are positive and finite, or None."""
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not 0 < number < math.inf:
                raise ValueError(f"{name} must be positive, got {value!r}")


@cache
def _hints(config: type[Any]) -> dict[str, Any]:
    return get_type_hints(config)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has the annotated type; an int is also a float, but a bool is no int."""
    if isinstance(hint, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        items = get_args(hint)
        if not isinstance(value, tuple):
            return False
        if items[-1] is Ellipsis:
            return all(_fits(item, items[0]) for item in value)
        return len(value) == len(items) and all(map(_fits, value, items))
    return type(value) is hint or (hint is float and type(value) is int)


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        wanted = ", ".join(map(repr, choices))
        raise ValueError(f"unsupported {name} {value!r}, supported are {wanted}")
