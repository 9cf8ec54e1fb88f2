"""Recognise a checkpoint of any program by its tensors, and load its U-Net.

:func:`load` gives the network of whatever it recognises. ``checkpoint.load`` reads fastdiff's own
checkpoints, which also say on what process a network was trained and what it predicts. The two
meet in :class:`Loaded`, of which ``fastdiff convert`` writes a checkpoint of fastdiff's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastdiff.checkpoints import checkpoint, scheduler_config, torch_file, weight_sets
from fastdiff.checkpoints.folder import damaged, not_finite
from fastdiff.checkpoints.layouts import DIFFUSERS, LAYOUTS, Layout
from fastdiff.common.errors import CheckpointError, memory_refused
from fastdiff.nn import ImageNetwork, UNet2DConfig, UNet2DModel, networks, pretrained
from fastdiff.nn.weight_files import STEM
from fastdiff.nn.wrappers import plain_names
from fastdiff.schedules import NoiseSchedule

_SAFETENSORS = ".safetensors"
_PICKLED = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
_FOLDER_OPTIONS = ("subfolder", "variant", "ignore")  # of UNet2DModel.from_pretrained
_BETAS = "betas"  # latent diffusion's buffer of this name is saved with the weights
_EMA_FOLDER = "unet_ema"  # in which diffusers' training scripts keep the average


@dataclass(frozen=True)
class Loaded:
    """A network and what its checkpoint says of its training.

    Attributes:
        model: on the CPU, in eval mode.
        source: the program and kind of file, in words.
        forward: the schedule of the training; None if the checkpoint does not tell.
        prediction: what the model predicts: eps, x0 or v; None if the checkpoint does not tell.
        variance: of the reverse steps, if the model predicts it: learned or learned_range.
        remarks: what else there is to know, such as weights that were left.
    """

    model: ImageNetwork
    source: str
    forward: NoiseSchedule | None = None
    prediction: str | None = None
    variance: str | None = None
    remarks: tuple[str, ...] = ()


def load(path: str | Path, *, ema: bool = False, **options: Any) -> ImageNetwork:
    """Load the U-Net of a checkpoint of fastdiff, diffusers, or another program.

    The program is recognised by the names of the tensors, whatever the file is called. No file is
    unpickled beyond tensors and plain containers. Nothing is downloaded.

    Args:
        path: a folder of fastdiff or diffusers, the name of a model that comes with fastdiff
            ("digits" or "emoji"), or a file: .safetensors, or anything that torch.save wrote.
        ema: the averaged weights, in a file or a training folder that also has the others.
        **options: facts that the tensors do not tell, such as ``num_head_channels=64``; an error
            says which are missing. For a diffusers folder: subfolder, variant and ignore, as in
            ``UNet2DModel.from_pretrained``.

    Returns:
        The model on the CPU, in eval mode, its parameters in torch's default dtype whatever the
        file's.

    Raises:
        CheckpointError: nothing is there, the file is damaged or of an unknown or unsupported
            program, an option is missing, unknown or wrong, or a file would have to run code to be
            read. The text begins with the path and says what to do.

    Example:
        >>> model = fastdiff.load("digits")
        >>> model(torch.randn(1, 1, 16, 16), 10, torch.tensor([3])).shape
        torch.Size([1, 1, 16, 16])
    """
    if is_own(path):
        if ema or options:
            raise CheckpointError(
                f"{path} is a checkpoint of fastdiff, whose weights are the average and whose "
                "files tell everything: it is loaded without options"
            )
        return checkpoint.load(path).model
    return read(path, ema=ema, options=options).model


def is_own(path: str | Path) -> bool:
    """Whether a path names a checkpoint of fastdiff's: a folder, a training run, or its name."""
    folder = Path(path)
    shipped = str(path) in checkpoint.shipped()
    return shipped or (folder / checkpoint.META).is_file() or checkpoint.newest(folder) is not None


def read(path: str | Path, *, ema: bool, options: Mapping[str, Any]) -> Loaded:
    """A checkpoint of another program; the arguments and errors are those of :func:`load`."""
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, ema, options)
    if not path.exists():
        raise CheckpointError(f"no file or folder {path}")
    return _read_file(path, ema, options)


def _read_folder(folder: Path, ema: bool, options: Mapping[str, Any]) -> Loaded:
    """A model folder or a pipeline of diffusers."""
    if wrong := [name for name in options if name not in _FOLDER_OPTIONS]:
        raise CheckpointError(
            f"{folder} is a folder, whose config.json tells the architecture: it takes no option "
            f"{wrong[0]!r}, but {', '.join(_FOLDER_OPTIONS)}"
        )
    if ema:
        options = {"subfolder": _EMA_FOLDER, **options}
    part = pretrained.model_folder(folder, options.get("subfolder"))
    if not (part / pretrained.CONFIG).is_file():
        files = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
        if files and not ema:
            raise CheckpointError(f"{folder} has no config.json, but {files[-1]}: give that file")
    pickled = part / f"{STEM}.bin"
    model: ImageNetwork
    try:
        if pickled.is_file() and not any(part.glob(f"{STEM}*{_SAFETENSORS}*")):
            config = pretrained.read_config(part, options.get("ignore", ()))
            tensors = _picked(torch_file.read(pickled), pickled, ema=False)
            torch_file.check_tensors(tensors, pickled)
            model = _built(config, pretrained.current_names(tensors, pickled), pickled)
        else:
            model = networks.from_pretrained(folder, **options)
    except SafetensorError as error:
        raise CheckpointError(f"{part} has damaged weights: {error}") from None
    except CheckpointError:
        raise
    except (ValueError, TypeError, OSError) as error:
        raise CheckpointError(f"cannot load a model from {folder}: {error}") from None
    _check_finite(model, part)
    program = "diffusers" if isinstance(model, UNet2DModel) else "fastdiff"
    return _with_scheduler(model, f"a {model.config.network} of {program}", folder)


def _with_scheduler(model: ImageNetwork, source: str, folder: Path) -> Loaded:
    """A model with what a scheduler beside it says, if there is one that can be read."""
    path = scheduler_config.find(folder)
    if path is None:
        return Loaded(model, source)
    try:
        training = scheduler_config.read(path)
    except CheckpointError as error:
        return Loaded(model, source, remarks=(str(error),))
    return Loaded(model, source, training.forward, training.prediction, training.variance)


def _read_file(path: Path, ema: bool, options: Mapping[str, Any]) -> Loaded:
    """One file of weights, of any program in ``layouts.LAYOUTS``."""
    safe = path.suffix == _SAFETENSORS
    value = _read_safetensors(path) if safe else torch_file.read(path)
    tensors = plain_names(_picked(value, path, ema=ema))
    layout, prefix = _recognised(path, tensors)
    state = {name[len(prefix) :]: x for name, x in tensors.items() if name.startswith(prefix)}
    betas = {name: tensors[name] for name in (_BETAS,) if name in tensors}
    if not safe:
        torch_file.check_tensors({**betas, **state}, path)
    try:
        config, ours = _converted(path, layout, state, options)
    except CheckpointError as error:
        raise CheckpointError(f"{path}, of {layout.name}, {error}") from None
    model = _built(config, ours, path)
    _check_finite(model, path)
    remarks = []
    if not ema and weight_sets.has_average(value):
        remarks.append("the file also has averaged weights (ema)")
    if len(state) < len(tensors):
        remarks.append(f"{len(tensors) - len(state)} tensors of other parts were left")
    return Loaded(model, layout.name, _schedule(betas), remarks=tuple(remarks))


def _picked(value: Any, path: Path, *, ema: bool) -> dict[str, Tensor]:
    """The weights in the object of a file; see ``weight_sets.pick``."""
    try:
        return weight_sets.pick(value, ema=ema)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, error) from None


def _recognised(path: Path, tensors: Mapping[str, Tensor]) -> tuple[Layout, str]:
    """The layout of the weights, and what stands before its names."""
    for layout in LAYOUTS:
        prefix = layout.prefix(tensors)
        if prefix is not None:
            return layout, prefix
    names = ", ".join(list(tensors)[:3])
    raise CheckpointError(
        f"{path} holds weights of an unknown network ({names}, ...). Known are "
        f"{'; '.join(layout.name for layout in LAYOUTS)}"
    )


def _converted(
    path: Path, layout: Layout, state: Mapping[str, Tensor], options: Mapping[str, Any]
) -> tuple[UNet2DConfig, dict[str, Tensor]]:
    """Configuration and weights by our names, from config.json if that is beside the weights."""
    if layout is DIFFUSERS and (path.parent / pretrained.CONFIG).is_file():
        if options:
            raise CheckpointError("has a config.json beside it, and so takes no options")
        try:
            config = pretrained.read_config(path.parent)
            return config, pretrained.current_names(state, path)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
    layout.check(options)
    return layout.convert(state, options)


def _built(config: UNet2DConfig, tensors: Mapping[str, Tensor], path: Path) -> UNet2DModel:
    try:
        return UNet2DModel.from_weights(config, tensors)
    except (ValueError, RuntimeError) as error:  # RuntimeError: sizes beyond 64 bits, or memory
        raise CheckpointError(f"{path}: {memory_refused(error) or error}") from None


def _check_finite(model: ImageNetwork, path: Path) -> None:
    if name := not_finite(model.state_dict()):
        raise CheckpointError(f"{path}: {name} has NaN or infinity")


def _schedule(betas: Mapping[str, Tensor]) -> NoiseSchedule | None:
    """The schedule that latent diffusion saves with the weights; None without one."""
    value = betas.get(_BETAS)
    if value is None or not value.is_floating_point():
        return None
    try:
        return NoiseSchedule(value)
    except ValueError:  # not a schedule, whatever else it is
        return None
