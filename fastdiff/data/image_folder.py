"""List the image files of a folder, by class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastdiff.common.errors import DataError
from fastdiff.data.file_names import as_text

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)


def find(root: Path) -> dict[str, list[Path]]:
    """The image files of each class; without classes, all image files under the key "".

    Args:
        root: the folder; see :func:`fastdiff.data.folder`.

    Raises:
        DataError: there are no images, there are images both beside and in sub-folders, a
            sub-folder has no images, or a folder cannot be listed.
    """
    try:
        direct = [entry for entry in _visible(root) if _is_image(entry)]
        below = {
            entry.name: list(_images(entry, (root.resolve(),))) for entry in _class_folders(root)
        }
    except OSError as error:
        where = error.filename or root
        raise DataError(f"cannot list the folder {where}: {error.strerror or error}") from None
    if direct and any(below.values()):
        raise DataError(
            f"{root} has images both in itself and in sub-folders; "
            "put either every image into a sub-folder named after its class, or no image"
        )
    if not direct and not any(below.values()):
        raise DataError(f"{root} has no images (looked for {', '.join(sorted(SUFFIXES))})")
    if direct:
        return {"": direct}
    for name, files in below.items():
        if not files:
            raise DataError(f"the class folder {root / name} has no images")
    return below


def class_names(folder: str | Path) -> tuple[str, ...]:
    """The names of the classes of a folder of images, without a look at the images.

    For a folder that does not exist there are none; :func:`find` raises for it.
    """
    root = Path(folder)
    return tuple(as_text(f.name) for f in _class_folders(root)) if root.is_dir() else ()


def _class_folders(root: Path) -> list[Path]:
    return [entry for entry in _visible(root) if entry.is_dir()]


def _visible(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))


def _is_image(path: Path) -> bool:
    """Whether a path has the suffix of an image; a link to nothing is an error when it is read."""
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def _images(root: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """Image files in ``root`` and below, in sorted order.

    A link to one of the folders ``above`` is skipped, since following it would never end.
    """
    real = root.resolve()
    if real in above:
        return
    for entry in _visible(root):
        if entry.is_dir():
            yield from _images(entry, (*above, real))
        elif _is_image(entry):
            yield entry
