"""Read files that torch.save wrote (.pt, .pth, .ckpt, .bin) without running code from them.

Such a file holds a pickle, which names the functions that rebuild its contents, and a pickle that
anyone may have written can name any function. ``torch.load(weights_only=True)`` calls only those
that rebuild tensors and plain containers, and refuses the file otherwise.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.common.errors import CheckpointError, memory_refused

_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
_LFS_POINTER = b"version https://git-lfs"
# Modules whose classes in a pickle tell which program wrote it.
_EDM_MODULES = ("torch_utils.persistence", "dnnlib")

_EDM_ADVICE = (
    "; this is a network of EDM or EDM2, whose pickle holds Python source code to run. Its layers "
    "(SongUNet, DhariwalUNet, magnitude-preserving layers) are none of UNet2DModel's, so no "
    "conversion helps: load it with its authors' code, and sample from that module with fastdiff"
)
_ADVICE = (
    "; if you trust the file, load it with the program that wrote it, and save only its tensors: "
    "torch.save(model.state_dict(), 'weights.pt')"
)


def read(path: Path) -> Any:
    """What torch.save was given: containers, tensors on the CPU, numbers and strings.

    Tensors of a file in torch's present format are mapped, so that an optimizer's state beside the
    weights is never read.

    Raises:
        CheckpointError: there is no such file; it is damaged or of another format; it holds
            anything but tensors and plain containers, whose class or function the text names; or
            an archive would unpack to more than its own size.
    """
    if not path.is_file():
        raise CheckpointError(f"no file {path}")
    try:
        zipped = zipfile.is_zipfile(path)
        reason = None if zipped else _no_pickle(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    if zipped:
        _check_archive(path)
    elif reason:
        raise CheckpointError(f"{path} {reason}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} {_why_refused(str(error))}") from None
    except Exception as error:  # damaged bytes lead anywhere in torch's reader
        if isinstance(error, MemoryError) or memory_refused(error):
            raise
        raise CheckpointError(f"{path} is damaged: {_line(error)}") from None


def check_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """CheckpointError unless the tensors are plain, and no larger in memory than in the file.

    Sparse, quantized and other special tensors are no weights of a U-Net. A tensor of stride 0, or
    many that share their memory, takes few bytes in a file and many once it is copied.
    """
    for name, value in tensors.items():
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise CheckpointError(f"{path} has {name}, which is no plain tensor of numbers")
    size, available = sum(value.nbytes for value in tensors.values()), path.stat().st_size
    if size > available:
        raise CheckpointError(
            f"{path} has {available} bytes, but its weights would unpack to {size}: tensors in it "
            "repeat or share their memory, which the weights of a network do not"
        )


def _check_archive(path: Path) -> None:
    """CheckpointError for a zip archive that torch.save cannot have written."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is damaged: {_line(error)}") from None
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise CheckpointError(
            f"{path} is a zip archive with compressed entries ({packed[0]}): torch.save never "
            "compresses, so it is another kind of archive"
        )
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(f"{path} is damaged: its entries are larger than the file")
    if any(entry.filename.endswith("constants.pkl") for entry in entries):
        raise CheckpointError(f"{path} is a TorchScript archive, which holds a program to run")
    if not any(entry.filename.endswith("data.pkl") for entry in entries):
        raise CheckpointError(f"{path} is a zip archive, but not of torch.save: it has no data.pkl")


def _no_pickle(path: Path) -> str | None:
    """Why torch.save cannot have written a file that is no archive; None if it can.

    Such a file is a pickle of protocol 2, which begins with the bytes 0x80 and 2.
    """
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if not start:
        return "is empty"
    if start == _LFS_POINTER:
        return "is a pointer of Git LFS, not the file itself: fetch it with git lfs pull"
    if start[0] != 0x80:
        return "is damaged, or no file of torch.save or safetensors"
    if start[1:2] != b"\x02":
        name = _first_global(path)
        return _refusal(name) if name else "is a pickle, but not of torch.save"
    return None


def _first_global(path: Path) -> str | None:
    """The first function or class that a pickle names, found without running any of it."""
    strings: list[str] = []
    try:
        with path.open("rb") as file:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "GLOBAL":
                    return str(argument).replace(" ", ".")
                if opcode.name == "STACK_GLOBAL":
                    return ".".join(strings[-2:])
                if isinstance(argument, str):
                    strings.append(argument)
    except (ValueError, IndexError, OverflowError):  # damaged
        pass
    return None


def _why_refused(text: str) -> str:
    """The reason of the restricted unpickler, in one line."""
    match = _GLOBAL.search(text)
    if match is None:
        return f"is damaged, or no file of torch.save: {_line(text)}"
    return _refusal(match[1])


def _refusal(name: str) -> str:
    """The error for a file whose pickle names a function or class."""
    advice = _EDM_ADVICE if name.startswith(_EDM_MODULES) else _ADVICE
    return f"wants to call {name} when it is unpickled, which can run any code{advice}"


def _line(error: object) -> str:
    """The first line that says something, at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:200]
