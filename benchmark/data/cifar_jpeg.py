"""CIFAR-10 as JPEG files: from the public archive to the image folder on which the studies in results/reference were measured."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import shutil
import sys
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dfqbench.data.images import Labels, Pixels
from dfqbench.data.jpeg import encode
from dfqbench.data.sets import ImageFolder
from dfqbench.errors import UserError

ARCHIVE, ARCHIVE_MD5 = "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"
BATCHES = {"test": ("test_batch",), "train": tuple(f"data_batch_{number}" for number in range(1, 6))}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PER_BATCH = 10_000
LARGEST_BATCH = 2**26  # bytes; the public ones have 31 million
QUALITY = 75
AT_ONCE = 500  # images that are encoded together
# of an `imagefolder:` of each split: that of the studies' cells, and that of the images their teacher was trained on
DIGESTS = {
    "test": "93c18df15dcd7f2ef78f49d43379cdc403d05c56d112e3fafb42a835b6045421",
    "train": "66b50a81551eeb729e136fc6ff7eda12470ee95ff43999ecbdfcc987ba63ecaa",
}


@dataclass(frozen=True)
class Split:
    """A folder of images that was written, with the digest that `imagefolder:` gives it and the one that was expected."""

    folder: Path
    images: int
    digest: str
    expected: str


def cifar10_as_jpeg(out: Path, archive: Path, progress: Callable[[str], None] = print) -> list[Split]:
    """Write OUT/{test,train}/<class>/<index>.jpg, quality 75, 4:2:0; an image's index counts class by class, within a class as in the archive.

    `archive` is CIFAR-10's public archive for Python. OUT appears when all is written. Raises UserError where it exists, where the archive is
    damaged, lacks a batch or is another one, and where the files cannot be written; then nothing is left.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already: give the name of a new folder")
    content = {split: _read(archive, names) for split, names in BATCHES.items()}
    found = _md5(archive)
    if found != ARCHIVE_MD5:
        raise UserError(f"{archive} can be read, but is not the public {ARCHIVE}: its md5 is {found}, not {ARCHIVE_MD5}")
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        for split, (pixels, labels) in content.items():
            progress(f"{out / split}: {len(labels)} images")
            _write(part / split, pixels, labels)
        part.rename(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; nothing is left of it") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    folders = {split: ImageFolder(split, out / split) for split in content}
    return [Split(folder.root, len(folder), folder.digest(), DIGESTS[split]) for split, folder in folders.items()]


def download(folder: Path) -> Path:
    """The archive in `folder`, brought there by torchvision where it is not. Raises UserError where it cannot be had."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_url

    try:
        with contextlib.redirect_stdout(sys.stderr):
            download_url(CIFAR10.url, str(folder), ARCHIVE, ARCHIVE_MD5)
    except Exception as error:  # URLError, OSError, RuntimeError: torchvision does not wrap them
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{ARCHIVE} is not in {folder} and could not be downloaded ({why}): name it with --archive FILE") from error
    return folder / ARCHIVE


def _write(folder: Path, pixels: Pixels, labels: Labels) -> None:
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    order = np.argsort(labels, kind="stable")
    for start in range(0, len(order), AT_ONCE):
        for index, content in enumerate(encode(pixels[order[start : start + AT_ONCE]], QUALITY), start):
            (folder / CLASSES[labels[order[index]]] / f"{index:05d}.jpg").write_bytes(content)


def _read(archive: Path, names: tuple[str, ...]) -> tuple[Pixels, Labels]:
    """N x 32 x 32 x 3 and N of the archive's batches with these names, one after the other."""
    found: dict[str, tuple[Pixels, Labels]] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = Path(member.name).name
                if name in names and member.isfile():
                    if member.size > LARGEST_BATCH:
                        raise UserError(f"{archive}: {member.name} has {member.size} bytes: this is no batch of CIFAR-10")
                    file = tar.extractfile(member)
                    assert file is not None
                    found[name] = _batch(file.read(), f"{archive}: {member.name}")
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{archive} cannot be read to its end ({error}): download {ARCHIVE} again") from error
    except OSError as error:
        raise UserError(f"{archive} cannot be read ({error.strerror or error})") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"{archive} has no {', '.join(missing)}: {ARCHIVE} is expected, CIFAR-10's archive for Python")
    pixels, labels = zip(*(found[name] for name in names), strict=True)
    return np.concatenate(pixels), np.concatenate(labels)


def _batch(content: bytes, where: str) -> tuple[Pixels, Labels]:
    """A batch is a pickled dictionary: `data`, N x 3072 uint8 (red, green, blue, each row by row), and `labels`, a list of N class indices."""
    try:
        batch = _Arrays(io.BytesIO(content), encoding="latin1").load()
        data, labels = batch["data"], np.array(batch["labels"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:  # a damaged pickle raises whatever it runs into
        raise UserError(f"{where} is no batch of CIFAR-10 ({type(error).__name__}: {error})") from error
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (PER_BATCH, 3 * 32 * 32):
        raise UserError(f"{where}: {PER_BATCH} images of 3072 bytes are expected, not {getattr(data, 'shape', type(data).__name__)}")
    if labels.shape != (PER_BATCH,) or labels.dtype.kind != "i" or labels.min() < 0 or labels.max() >= len(CLASSES):
        raise UserError(f"{where}: {PER_BATCH} labels from 0 to {len(CLASSES) - 1} are expected")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels.astype(np.int64)


class _Arrays(pickle.Unpickler):
    """Arrays and plain values; whatever else a pickle names is refused before it is called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return super().find_class("numpy._core.multiarray", name)
        raise UserError(f"its pickle calls {module}.{name}: nothing was run, only arrays and plain values are read")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
