"""What the U-Nets of this package share: they are saved, read, and computed with less memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdiff.nn import pretrained
from fastdiff.nn.pretrained import NetworkConfig

if TYPE_CHECKING:
    from typing_extensions import Self


class ImageNetwork(nn.Module):
    """A network of images, or of other samples, that is described by a configuration.

    Attributes:
        config_class: the class of the configuration.
        config: the options, frozen.
    """

    config_class: ClassVar[type[Any]]

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config: Any = config
        self._checkpointing = False

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        """Channels and sizes of an input; None if ``config.sample_size`` does not tell all."""
        size, channels = self.config.sample_size, self.config.image_channels
        if isinstance(size, tuple):
            return (channels, *size)
        if size is None or self.config.dimensions == 3:  # one number is no number of frames
            return None
        return (channels, *[size] * self.config.dimensions)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        subfolder: str | None = None,
        variant: str | None = None,
        ignore: Collection[str] = (),
    ) -> Self:
        """Read a model that this class has saved, or diffusers' of the same name, in eval mode.

        Args:
            folder: a folder with config.json and diffusion_pytorch_model.safetensors, or its shards
                and their index; or a pipeline with such a folder named unet. Nothing is downloaded,
                and nothing is unpickled.
            subfolder: a folder inside ``folder`` to read instead, such as unet_ema.
            variant: of the weights, such as fp16, which is part of their files' names. None reads
                the weights without a variant. If there are only weights of one variant, None reads
                those, with a warning.
            ignore: keys of config.json to skip although they are no options of this class and may
                change the result.

        Returns:
            The model on the CPU, its parameters in torch's default dtype whatever the file's.

        Raises:
            FileNotFoundError: the folder or one of the files is missing; the text says what the
                folder holds instead.
            ValueError: the config is not supported, the weights do not fit it, or an index of
                shards is damaged. A key of config.json that is no option is refused unless it
                cannot change the result: keys of diffusers' EMAModel, and values None and False,
                are skipped with a warning.
            SafetensorError: a file of weights is damaged.
        """
        path = pretrained.model_folder(Path(folder), subfolder)
        config = pretrained.read_config(path, ignore, cls.config_class)
        return cls.from_weights(config, pretrained.read_weights(path, variant))

    @classmethod
    def from_weights(cls, config: NetworkConfig, weights: Mapping[str, Tensor]) -> Self:
        """A model with given weights, in eval mode; nothing is drawn from the random generator.

        Args:
            config: the options.
            weights: a tensor for every name of the ``state_dict``, of any floating point dtype.

        Returns:
            The model on the CPU, its parameters copies in torch's default dtype.

        Raises:
            ValueError: a name that is missing or additional, or a shape that does not fit.
        """
        with torch.device("meta"), pretrained.NoInitialisation():
            model = cls(**config.to_dict())
        pretrained.check_names_and_shapes(weights, model.state_dict())
        # As to_empty does; that computes empty_like in Python, which imports sympy for it.
        model._apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device="cpu"))
        model.load_state_dict(dict(weights))
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and diffusion_pytorch_model.safetensors, as diffusers does.

        Args:
            folder: created if it is missing. Files of these names in it are replaced, and an index
                of shards, which would be read in their place, is deleted.
        """
        pretrained.write(Path(folder), self.config, self.state_dict())

    def normalise_weights(self) -> None:
        """What is done to the weights after each update of them: nothing in most networks."""

    def of_embeddings(self) -> list[nn.Module]:
        """The modules of what depends on times and labels alone, which are called before blocks."""
        return []

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the blocks' inputs for the backward pass, and recompute the activations."""
        self._checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep every activation for the backward pass (the default)."""
        self._checkpointing = False

    def _run(self, block: nn.Module, *args: Any) -> Any:
        if self._checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)
