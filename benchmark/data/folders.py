"""Folders of images on a disk: classes and their order, files, and what is wrong with either."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dfqbench.errors import UserError

IMAGE_FILES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"))


def stamp(path: Path, root: Path) -> list[Any]:
    """What changes when a file changes, without reading it. Raises UserError where it cannot be asked."""
    try:
        status = path.stat()
        if not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    except OSError as error:
        raise unreadable(path, error) from None
    return [str(path.relative_to(root)), status.st_size, status.st_mtime_ns]


def class_folders(root: Path) -> list[str]:
    try:
        if not root.is_dir():
            raise UserError(f"image folder {root}: there is no such folder" if not root.exists() else f"image folder {root}: this is a file")
        inside = [entry for entry in root.iterdir() if not entry.name.startswith(".")]
        folders = sorted(entry.name for entry in inside if entry.is_dir())
        nowhere = [entry for entry in inside if entry.is_symlink() and not entry.exists()]
    except OSError as error:
        raise unreadable(root, error) from None
    if nowhere:
        raise UserError(f"image folder {root}: {nowhere[0]} is a link to {os.readlink(nowhere[0])}, which is not there")
    if not folders:
        what = "it is empty" if not inside else f"it holds {len(inside)} files but no sub-folder"
        raise UserError(f"image folder {root}: {what}; it needs one sub-folder of images per class")
    if len(folders) < 2:
        raise UserError(f"image folder {root}: only one class folder, {folders[0]!r}; two or more are needed")
    return folders


def class_order(folders: list[str]) -> tuple[list[str], list[str]]:
    """(the order that is taken, the other one): as numbers where all names are whole numbers, as text elsewhere."""
    as_text = sorted(folders)
    as_numbers = sorted(as_text, key=lambda name: [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))])
    return (as_numbers, as_text) if are_numbers(folders) else (as_text, as_numbers)


def are_numbers(names: list[str]) -> bool:
    return all(re.fullmatch(r"[0-9]+", name) for name in names)


def files_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """(image files, other files) in a class's folder and below, sorted by path; hidden files count as neither."""
    found = sorted(path for path in _walk(folder) if not path.name.startswith("."))
    return [path for path in found if path.suffix.lower() in IMAGE_FILES], [path for path in found if path.suffix.lower() not in IMAGE_FILES]


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:  # os.walk would leave the folder out without a word
        raise unreadable(folder, error) from None

    for place, _, names in os.walk(folder, onerror=refuse, followlinks=True):
        for name in names:
            yield Path(place, name)


def unreadable(path: Path, error: OSError) -> UserError:
    if path.is_symlink() and isinstance(error, FileNotFoundError):
        return UserError(f"{path} is a link to {os.readlink(path)}, which is not there")
    return UserError(f"{error.filename or path} cannot be read ({error.strerror})")


def by_stem(folder: Path) -> dict[str, Path]:
    """The images in a folder and below. UserError where two have one name: which is meant?"""
    found: dict[str, Path] = {}
    for path in files_below(folder)[0]:
        if found.setdefault(path.stem, path) is not path:
            raise UserError(f"{found[path.stem]} and {path} have one name, and images are told apart by it")
    return found


def lines_of(file: Path) -> list[str]:
    """The lines of a text file that is there; their first words for VOC's lists."""
    if not file.is_file():
        return []
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [line.split()[0] for line in lines] if file.parent.parent.name == "ImageSets" else lines


def sha256_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise unreadable(path, error) from error
