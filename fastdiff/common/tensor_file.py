"""Files of tensors with the permissions that new files have."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors import torch as safetensors
from torch import Tensor


def save_file(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, which those may read whom the umask lets read new files.

    safetensors itself puts in place a file that its owner alone can read, whatever the umask and
    the file before it. Nobody else could then load a checkpoint in a shared folder.

    Args:
        tensors: contiguous tensors that share no memory, by name.
        path: the file; one that exists is replaced, and the new one has its permissions.
        metadata: texts for the file's header.

    Raises:
        OSError, SafetensorError: the file system refused the write. A file that existed before may
            be lost; none is left where there was none.
    """
    existed = path.exists()
    path.touch()  # by the umask, which cannot be asked for without changing it for all threads
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        safetensors.save_file(dict(tensors), path, metadata=dict(metadata) if metadata else None)
        path.chmod(mode)
    except BaseException:
        if not existed:
            path.unlink(missing_ok=True)
        raise
