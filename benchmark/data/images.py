"""Decoded images: prepared as a teacher's task says, held in memory or, where they would not fit, streamed by threads that decode ahead."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dfqbench.errors import UserError
from dfqbench.task import Task

MEMORY_SHARE = 1 / 3  # of the available memory; above it images are streamed
CHUNK = 64  # images that a thread decodes at a time

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


class Images:
    """Images of one size with their labels, in the set's order. `batches` is the same whether they are in memory or streamed.

    `labels` is N; `pixels` is N x H x W x C uint8, or None where the images are streamed.
    """

    def __init__(
        self,
        read: Callable[[int], Pixels],
        labels: Labels,
        shape: tuple[int, int, int],
        classes: int,
        in_memory: bool | None = None,
        keep: Callable[[tuple[int, ...], Callable[[Pixels], None]], Pixels | None] | None = None,
    ):
        """`read(i)` gives image i as H x W x C of `shape`; `in_memory=None` looks at the memory that is available.

        `keep(shape, decode)` may give all images from a file that is mapped into memory, which `decode` fills the first time.
        """
        self.labels = labels
        self.targets: Callable[[int], Any] | None = None  # of dense sets, whose labels are places in the set: what belongs to image i
        self.class_names: list[str] = []
        self.classes = classes
        self.shape = shape
        self._read = read
        self.pixels = keep((len(labels), *shape), self._decode_into) if keep else None
        if self.pixels is not None:
            return
        fits = len(labels) * int(np.prod(shape)) <= available_memory() * MEMORY_SHARE
        self.pixels = self._decode_all() if (fits if in_memory is None else in_memory) else None

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size: int) -> Iterator[tuple[Pixels, Labels]]:
        """(n x H x W x C uint8, n labels) with n = batch_size, less in the last one. Can be called again."""
        if self.pixels is None:
            yield from self._stream(batch_size)
            return
        for start in range(0, len(self), batch_size):
            yield self.pixels[start : start + batch_size], self.labels[start : start + batch_size]

    def _decode_all(self) -> Pixels:
        pixels = np.empty((len(self), *self.shape), np.uint8)
        self._decode_into(pixels)
        return pixels

    def _decode_into(self, pixels: Pixels) -> None:
        def decode(start: int) -> None:
            for index in range(start, min(start + CHUNK, len(self))):
                pixels[index] = self._read(index)

        pool = ThreadPoolExecutor(threads())
        try:
            for done in [pool.submit(decode, start) for start in range(0, len(self), CHUNK)]:
                done.result()
        finally:  # after an error the rest is not worth decoding
            pool.shutdown(cancel_futures=True)

    def _stream(self, batch_size: int) -> Iterator[tuple[Pixels, Labels]]:
        """Two batches are decoded ahead of the one that is in use."""
        pool = ThreadPoolExecutor(threads())
        waiting: deque[Future[Pixels]] = deque()
        submitted = 0
        try:
            for start in range(0, len(self), batch_size):
                stop = min(start + batch_size, len(self))
                for index in range(submitted, min(stop + 2 * batch_size, len(self))):
                    waiting.append(pool.submit(self._read, index))
                submitted = max(submitted, min(stop + 2 * batch_size, len(self)))
                yield np.stack([waiting.popleft().result() for _ in range(stop - start)]), self.labels[start:stop]
        finally:
            pool.shutdown(cancel_futures=True)


def prepare(image: Image.Image, task: Task) -> Pixels:
    """One image as H x W x C uint8: grey or RGB, the shorter side resized to size / crop_ratio, the centre cropped.

    Rounds as torchvision and timm do (resized sides down, the crop's corner to the nearest pixel), so that their accuracies can be met.
    An image whose shorter side is right already is not resampled.
    """
    image = in_colours_of(task, image)
    # The tiny addition undoes the rounding of a ratio such as 299/342.
    shorter = int(task.size / task.crop_ratio + 1e-6)
    width, height = image.size
    if min(width, height) != shorter:
        width, height = (shorter, int(shorter * height / width)) if width <= height else (int(shorter * width / height), shorter)
        image = image.resize((width, height), Image.Resampling[task.interpolation.upper()])
    left, top = round((width - task.size) / 2), round((height - task.size) / 2)
    if (width, height) != (task.size, task.size):
        image = image.crop((left, top, left + task.size, top + task.size))
    return np.asarray(image).reshape(task.size, task.size, task.channels)


def in_colours_of(task: Task, image: Image.Image) -> Image.Image:
    """Grey or RGB, as the teacher takes it; UserError for other channels."""
    mode = {1: "L", 3: "RGB"}.get(task.channels)
    if mode is None:
        raise UserError(f"image files give 1 or 3 channels, the teacher takes {task.channels}")
    return image if image.mode == mode else image.convert(mode)


def open_image(path: Path, coarsely: bool = False) -> Image.Image:
    """UserError that names the file where it cannot be decoded, or has more than 8 bits per value (PIL would clip those).

    Coarsely, a JPEG is read to its end and decoded at an eighth of its size: as sure to find damage, in half the time.
    """
    try:
        with Image.open(path) as image:
            if coarsely:
                image.draft(None, (1, 1))
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # PIL calls a damaged PNG a SyntaxError
        raise UserError(f"{path} cannot be read as an image ({error})") from error
    if image.mode.startswith(("I", "F")):
        raise UserError(f"{path} has more than 8 bits per value (mode {image.mode}); only 8-bit images are evaluated here")
    return image


def available_memory() -> int:
    """Bytes that this process may still take: what the machine has left, or a container's or job's limit where that is lower."""
    left = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                left.append(int(line.split()[1]) * 1024)
    except OSError:
        pass  # not Linux
    left += [max(limit - used, 0) for limit, used in _cgroup_limits()]
    return min(left)


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of every control group around this process: version 2, or the memory controller of version 1, which Slurm also uses."""
    try:
        groups = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return
    for group in groups:
        _, controllers, inside = group.split(":", 2)
        if controllers == "":
            root, limit_name, used_name = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit_name, used_name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = root / inside.lstrip("/")
        for place in (folder, *folder.parents):
            if not place.is_relative_to(root):
                break
            try:
                yield int((place / limit_name).read_text(encoding="ascii")), int((place / used_name).read_text(encoding="ascii"))
            except (OSError, ValueError):
                continue  # no limit at this level ("max"), or not visible from inside a container


def threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
