"""Decoded images of a large set, kept in a memory-mapped file: decoded once, shared by all processes of a machine, checked by hash.

The folder is DFQBENCH_PIXELS, or `pixels` in the cache folder; DFQBENCH_PIXELS=off keeps nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL

from dfqbench.errors import UserError
from dfqbench.files import temporary_name
from dfqbench.store.cache import cache_folder
from dfqbench.task import Task

Pixels = npt.NDArray[np.uint8]
WORTH_KEEPING = 2**28  # bytes; smaller sets are decoded in seconds
BLOCK = 2**24


def pixels_folder() -> Path | None:
    """Where decoded images are kept; None where they are not."""
    given = os.environ.get("DFQBENCH_PIXELS")
    return None if given == "off" else Path(given) if given else cache_folder() / "pixels"


def kept(digest: Callable[[], str], task: Task, split: str, shape: tuple[int, ...], decode: Callable[[Pixels], None]) -> Pixels | None:
    """The images of a set (`digest`) as a task wants them, N x H x W x C, from the file if it is there, else decoded into it by `decode`.

    None where the set is small, or the folder cannot be read or written: the caller then decodes into memory. Raises UserError for a damaged file.
    """
    folder, size = pixels_folder(), int(np.prod(shape))
    if folder is None or size < WORTH_KEEPING:
        return None
    key = [digest(), split, task.as_dict(), list(shape), PIL.__version__]
    path = folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.uint8"
    temporary = temporary_name(path)
    try:
        found = _opened(path, shape)  # another user's may be closed to us
        if found is not None:
            return found
        folder.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is told now, not by a signal while a page is written
        pixels = np.memmap(temporary, np.uint8, "r+", shape=shape)
        decode(pixels)
        pixels.flush()
        _hash_file(path).write_text(_sha256(temporary), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        return None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return _opened(path, shape)


def _opened(path: Path, shape: tuple[int, ...]) -> Pixels | None:
    if not path.exists():
        return None
    if _sha256(path) != _hash_file(path).read_text(encoding="utf-8"):
        raise UserError(f"{path} is damaged: remove it, and the images are decoded again")
    # copy on write: nothing that is done with the array reaches the file
    return np.memmap(path, np.uint8, "c", shape=shape)


def _hash_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
