"""CIFAR-10 as JPEG: the bytes that libjpeg 9 writes, from an archive in CIFAR's format, and what is said of one that is not."""

from __future__ import annotations

import errno
import io
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from hashlib import md5, sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.fft import dctn

from dfqbench.data import cifar_jpeg, find_set, jpeg
from dfqbench.data.jpeg import encode
from dfqbench.files import read_json

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "data" / "cifar10"
Run = Callable[..., tuple[int, str, str]]
COUNT = 20  # images in each of the six batches


def pillow(image: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=75, subsampling="4:2:0")
    return file.getvalue()


def photographs(count: int, seed: int = 0) -> Any:
    """Smooth, coloured, 32 x 32: what is left of noise after it was made larger."""
    small = np.random.default_rng(seed).integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)) for image in small])


# --- files


def test_real_images_become_the_files_of_the_studies() -> None:
    if not REAL.is_dir():
        pytest.skip("no lossless CIFAR-10 images here to compare with the studies' files")
    real, files = np.load(REAL / "cifar10_lossless_test761.npz"), np.load(REAL / "cifar10_jpegq75_test_scans.npz")
    header, scans, offsets = files["header"].tobytes(), files["scans"].tobytes(), files["offsets"]
    labels = real["y_test"].astype(int)
    # the first 761 of the archive: by class, and within a class one after the other
    places = [1000 * label + (labels[:i] == label).sum() for i, label in enumerate(labels)]
    assert len(labels) == 761
    for content, i in zip(encode(real["x_test"]), places, strict=True):
        assert content == header + scans[offsets[i] : offsets[i + 1]] + b"\xff\xd9"


def test_the_bytes_are_those_of_the_encoder_that_was_compared_with_the_studies_files() -> None:
    """Where the real images are not."""
    images = np.random.default_rng(3).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    images[30:] = images[30:] // 4 + 90  # smoother ones
    assert sha256(b"".join(encode(images))).hexdigest() == "210bbdd47741c50bcf8967a65e7cf818900c6233417b0cb89aa1931f3f444c0a"


@pytest.mark.parametrize("shift", [(0, 0, 0), (60, 0, -80)], ids=["grey", "one colour"])
def test_where_colour_does_not_change_the_bytes_are_those_of_every_libjpeg(shift: tuple[int, int, int]) -> None:
    grey = np.random.default_rng(1).integers(80, 180, (20, 32, 48, 1))
    grey[:5] = (grey[:5] - 130) // 20 + 130  # few coefficients, long runs of zeros
    grey[5:10, :16] = 100
    images = (grey + np.array(shift)).astype(np.uint8)
    assert encode(images) == [pillow(image) for image in images]
    assert any(b"\xff\x00" in content for content in encode(images)), "a byte of 255 was among them"


def test_colours_are_those_of_the_picture() -> None:
    for content, image in zip(encode(photographs(8)), photographs(8), strict=True):
        ours, theirs = (np.asarray(Image.open(io.BytesIO(file))).astype(float) for file in (content, pillow(image)))
        assert np.abs(ours - image).mean() < np.abs(theirs - image).mean() + 0.2


@pytest.mark.parametrize("points", [8, 16])
def test_the_transforms_are_the_cosine_transforms_low_frequencies(points: int) -> None:
    blocks = np.random.default_rng(2).integers(0, 256, (50, points, points))
    exact = dctn(blocks - 128.0, axes=(1, 2), norm="ortho")[:, :8, :8] * 8 * 8 / points
    assert np.abs(jpeg._transformed(blocks) - exact).max() < 1.5


def test_sides_must_be_multiples_of_16() -> None:
    with pytest.raises(ValueError, match="24 x 32 pixels: multiples of 16"):
        encode(np.zeros((1, 24, 32, 3), np.uint8))


def test_the_digest_is_that_of_the_studies_cells() -> None:
    for study in ("cifar10-jpeg", "cifar10-jpeg-study", "cifar10-jpeg-bf16"):
        cells = sorted((ROOT / "results" / "reference" / study / "runs").glob("*/cell.json"))
        assert {read_json(cell)["identity"]["evaluation"] for cell in cells} == {cifar_jpeg.DIGESTS["test"]}


# --- archives


class Python2(pickle._Pickler):  # type: ignore[name-defined, misc]
    """Writes bytes as the text of Python 2, in which CIFAR-10 was published."""

    def save_text(self, text: bytes) -> None:
        self.write(b"T" + struct.pack("<i", len(text)) + text)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_text}  # type: ignore[attr-defined]


def batch(images: Any, labels: Any) -> bytes:
    file = io.BytesIO()
    data = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
    Python2(file, 2).dump({b"batch_label": b"of a test", b"data": data, b"labels": labels})
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


LABELS = {name: np.random.default_rng(i).permutation(COUNT) % 10 for i, name in enumerate(sum(cifar_jpeg.BATCHES.values(), ()))}
IMAGES = {name: photographs(COUNT, i) for i, name in enumerate(LABELS)}


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes an archive in CIFAR-10's format, with files added or (None) left out; its md5 counts as the public one's."""

    def write(**changes: bytes | None) -> Path:
        path = tmp_path / "cifar-10-python.tar.gz"
        content = {name: batch(IMAGES[name], LABELS[name].tolist()) for name in LABELS} | {"readme.html": b"hello"} | changes
        with tarfile.open(path, "w:gz") as tar:
            for name, held in content.items():
                if held is not None:
                    member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                    member.size = len(held)
                    tar.addfile(member, io.BytesIO(held))
        monkeypatch.setattr(cifar_jpeg, "ARCHIVE_MD5", md5(path.read_bytes()).hexdigest())
        return path

    monkeypatch.setattr(cifar_jpeg, "PER_BATCH", COUNT)
    monkeypatch.setattr(cifar_jpeg, "AT_ONCE", 7)
    return write


def test_an_archive_becomes_a_folder_class_by_class(archive: Callable[..., Path], tmp_path: Path, dfqbench: Run) -> None:
    out = tmp_path / "set"
    code, said, err = dfqbench("data", "cifar10-jpeg", out, "--archive", archive())
    assert (code, err) == (0, "")
    images = np.concatenate([IMAGES[name] for name in cifar_jpeg.BATCHES["train"]])
    labels = np.concatenate([LABELS[name] for name in cifar_jpeg.BATCHES["train"]])
    order = np.argsort(labels, kind="stable")
    written = sorted((out / "train").rglob("*.jpg"), key=lambda path: path.name)
    assert [path.name for path in written] == [f"{i:05d}.jpg" for i in range(5 * COUNT)]
    assert [path.parent.name for path in written] == [cifar_jpeg.CLASSES[label] for label in labels[order]]
    assert [path.read_bytes() for path in written] == encode(images[order])
    found = find_set(f"imagefolder:{out / 'test'}")
    assert found.class_names == list(cifar_jpeg.CLASSES)
    assert f"{out / 'test'}: 20 images, sha256 {found.digest()[:12]}, NOT equal to (93c18df15dcd) the images of the studies" in said
    assert "accuracies on other images cannot be compared" in said
    assert {path.name for path in tmp_path.iterdir()} == {"cifar-10-python.tar.gz", "set"}


def test_equal_images_are_said_to_be(archive: Callable[..., Path], tmp_path: Path, dfqbench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    dfqbench("data", "cifar10-jpeg", tmp_path / "set", "--archive", archive())
    digests = {split: find_set(f"imagefolder:{tmp_path / 'set' / split}").digest() for split in cifar_jpeg.DIGESTS}
    monkeypatch.setattr(cifar_jpeg, "DIGESTS", digests)
    code, said, _ = dfqbench("data", "cifar10-jpeg", tmp_path / "again", "--archive", archive())
    assert code == 0
    assert said.count("equal to the images of the studies") == 2
    assert "NOT" not in said
    assert "compared" not in said


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch harmed",)


def odd(images: Any = IMAGES["test_batch"], labels: Any = None) -> bytes:
    return batch(images, LABELS["test_batch"].tolist() if labels is None else labels)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data_batch_3": None}, " has no data_batch_3: cifar-10-python.tar.gz is expected"),
        ({"test_batch": pickle.dumps({"data": Evil()}, 2)}, ": cifar-10-batches-py/test_batch: its pickle calls posix.system: nothing was run"),
        ({"test_batch": b"hello"}, ": cifar-10-batches-py/test_batch is no batch of CIFAR-10 (UnpicklingError: "),
        ({"test_batch": pickle.dumps({"labels": []}, 2)}, "is no batch of CIFAR-10 (KeyError: 'data')"),
        ({"test_batch": odd(images=photographs(3))}, ": 20 images of 3072 bytes are expected, not (3, 3072)"),
        ({"test_batch": odd(labels=[10] * COUNT)}, ": 20 labels from 0 to 9 are expected"),
        ({"test_batch": odd(labels=[0] * 19)}, ": 20 labels from 0 to 9 are expected"),
        ({"test_batch": odd(labels=[b"cat"] * COUNT)}, ": 20 labels from 0 to 9 are expected"),
        ({"test_batch": b"." * (2**26 + 1)}, "test_batch has 67108865 bytes: this is no batch of CIFAR-10"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_in_an_archive_is_one_line(
    changes: Any, said: str, archive: Callable[..., Path], tmp_path: Path, dfqbench: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = archive(**changes)
    code, _, err = dfqbench("data", "cifar10-jpeg", tmp_path / "set", "--archive", path)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"dfqbench: {path}")
    assert said in err
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda whole: whole[: len(whole) // 2], "cannot be read to its end (Compressed file ended"),
        (lambda whole: b"hello", "cannot be read to its end (not a gzip file)"),
        (lambda whole: whole + b"\0", "can be read, but is not the public cifar-10-python.tar.gz: its md5 is "),
        (lambda whole: None, "cannot be read (No such file or directory)"),
    ],
    ids=["truncated", "no archive", "another one", "missing"],
)
def test_what_is_no_public_archive_is_one_line(content: Any, said: str, archive: Callable[..., Path], tmp_path: Path, dfqbench: Run) -> None:
    path = archive()
    changed = content(path.read_bytes())
    path.unlink() if changed is None else path.write_bytes(changed)
    code, _, err = dfqbench("data", "cifar10-jpeg", tmp_path / "set", "--archive", path)
    assert (code, err.count("\n")) == (2, 1)
    assert f"dfqbench: {path} {said}" in err
    assert not (tmp_path / "set").exists()


def test_a_folder_that_exists_is_left_alone(archive: Callable[..., Path], tmp_path: Path, dfqbench: Run) -> None:
    (tmp_path / "set").mkdir()
    code, _, err = dfqbench("data", "cifar10-jpeg", tmp_path / "set", "--archive", archive())
    assert (code, err) == (2, f"dfqbench: {tmp_path / 'set'} exists already: give the name of a new folder\n")
    assert not list((tmp_path / "set").iterdir())


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2, "dfqbench: SET cannot be written: No space left on device; nothing is left of it\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=["full disk", "Ctrl-C"],
)
def test_what_was_not_finished_is_not_there(
    error: BaseException, code: int, said: str, archive: Callable[..., Path], tmp_path: Path, dfqbench: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = archive(), []

    def fails_later(self: Path, content: bytes) -> int:
        calls.append(self)
        if len(calls) == 50:  # the test set is whole then
            raise error
        return len(content)

    monkeypatch.setattr(Path, "write_bytes", fails_later)
    got = dfqbench("data", "cifar10-jpeg", tmp_path / "set", "--archive", path)
    assert (got[0], got[2]) == (code, said.replace("SET", str(tmp_path / "set")))
    assert list(tmp_path.iterdir()) == [path]


def test_without_a_network_the_option_is_named(tmp_path: Path, dfqbench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError("no network")

    monkeypatch.setenv("DFQBENCH_DATA", str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.utils.download_url", fails)
    code, _, err = dfqbench("data", "cifar10-jpeg", tmp_path / "set")
    assert code == 2
    assert f"cifar-10-python.tar.gz is not in {tmp_path} and could not be downloaded (OSError: no network): name it with --archive FILE" in err
