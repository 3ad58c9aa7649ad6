"""Evaluation sets: what they hold, how images are prepared, what identifies them, and what is said where something is wrong."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from hashlib import md5
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dfqbench.data import Images, find_set, images, sets
from dfqbench.data import pixels as pixel_files
from dfqbench.data.images import prepare
from dfqbench.errors import Notice, UserError
from dfqbench.task import Task


def task(classes: int = 2, channels: int = 3, size: int = 8, **more: Any) -> Task:
    return Task(classes, channels, size, (0.5,) * channels, (0.25,) * channels, **more)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of 8 x 8 images: 2 cats, 1 dog, 3 eels."""
    root = tmp_path / "animals"
    for seed, name in enumerate(("cat/b.png", "cat/a.png", "dog/x.PNG", "eel/1.png", "eel/deep/3.png", "eel/2.bmp")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise(8, 8, seed).save(root / name)
    return root


def refusal(text: str) -> str:
    with pytest.raises(UserError) as caught:
        find_set(text).digest()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- images kept in a file


def test_a_large_set_is_decoded_once_into_a_file_that_is_mapped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixel_files, "WORTH_KEEPING", 1)
    monkeypatch.setenv("DFQBENCH_PIXELS", str(tmp_path / "kept"))
    plain = np.stack([np.asarray(noise(8, 8, seed)) for seed in (1, 0, 2, 3, 5, 4)])
    found = find_set(f"imagefolder:{folder}")
    first = found.decode(task(classes=3))
    assert isinstance(first.pixels, np.memmap)
    assert np.array_equal(first.pixels, plain)
    assert [p.suffix for p in sorted((tmp_path / "kept").iterdir())] == [".sha256", ".uint8"]

    def forbidden(*_: Any) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(sets, "prepare", forbidden)
    again = found.decode(task(classes=3))
    assert np.array_equal(np.concatenate([batch for batch, _ in again.batches(4)]), plain)
    again.pixels[0] = 0  # type: ignore[index]
    assert np.array_equal(found.decode(task(classes=3)).pixels, plain), "what is done with the array never reaches the file"  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="decoded again"):  # another task, another file
        found.decode(task(classes=3, size=4))
    (file,) = (tmp_path / "kept").glob("*.uint8")
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="damaged: remove it"):
        found.decode(task(classes=3))
    file.with_suffix(".sha256").unlink()  # or is another user's, and closed to us
    monkeypatch.undo()
    monkeypatch.setattr(pixel_files, "WORTH_KEEPING", 1)
    monkeypatch.setenv("DFQBENCH_PIXELS", str(tmp_path / "kept"))
    assert np.array_equal(found.decode(task(classes=3)).pixels, plain)  # type: ignore[arg-type]


@pytest.mark.parametrize("place", ["off", "/proc/nowhere"])
def test_without_a_place_for_them_images_are_decoded_into_memory(folder: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr(pixel_files, "WORTH_KEEPING", 1)
    monkeypatch.setenv("DFQBENCH_PIXELS", place)
    decoded = find_set(f"imagefolder:{folder}").decode(task(classes=3))
    assert decoded.pixels is not None
    assert not isinstance(decoded.pixels, np.memmap)


# --- folders


def test_a_folders_images_come_class_by_class_in_the_order_of_their_paths(folder: Path) -> None:
    found = find_set(f"imagefolder:{folder}")
    assert (found.name, found.classes, found.class_names, len(found)) == ("imagefolder:animals", 3, ["cat", "dog", "eel"], 6)
    decoded = found.decode(task(classes=3))
    assert decoded.labels.tolist() == [0, 0, 1, 2, 2, 2]
    assert decoded.labels.dtype == np.int64
    for pixels, seed in zip(decoded.pixels, (1, 0, 2, 3, 5, 4), strict=True):
        assert np.array_equal(pixels, np.asarray(noise(8, 8, seed)))


def test_numbers_with_gaps_are_indices_of_a_larger_network(tmp_path: Path) -> None:
    for index in (3, 7, 12):
        (tmp_path / f"{index:04}").mkdir()
        noise(8, 8, index).save(tmp_path / f"{index:04}" / "a.png")
    with pytest.warns(Notice, match=r"3 class folders, from 0003 to 0012: their names are class indices, and the other classes have no image"):
        found = find_set(f"imagefolder:{tmp_path}")
    assert (found.classes, found.fits(12), found.fits(13), found.fits(1000)) == (13, False, True, True)
    decoded = found.decode(task(classes=20))
    assert (decoded.labels.tolist(), decoded.classes) == ([3, 7, 12], 20)
    with pytest.raises(UserError, match="has 13 classes, the teacher 12"):
        found.decode(task(classes=12))
    before = found.digest()
    (tmp_path / "0012").rename(tmp_path / "0013")
    with pytest.warns(Notice):
        assert find_set(f"imagefolder:{tmp_path}").digest() != before


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda root: None, "there is no such folder"),
        (lambda root: root.write_text("x"), "this is a file"),
        (lambda root: root.mkdir(), "it is empty; it needs one sub-folder of images per class"),
        (lambda root: (root.mkdir(), noise(8, 8).save(root / "a.png")), "it holds 1 files but no sub-folder"),
        (lambda root: (root / "cat").mkdir(parents=True), "only one class folder, 'cat'"),
        (lambda root: [(root / name).mkdir(parents=True) for name in ("cat", "dog")], "no image in class cat, dog"),
    ],
)
def test_a_folder_that_is_no_set_is_one_line(build: Any, said: str, tmp_path: Path) -> None:
    build(tmp_path / "set")
    message = refusal(f"imagefolder:{tmp_path / 'set'}")
    assert message.startswith(f"image folder {tmp_path / 'set'}: ")
    assert said in message


def test_files_that_are_no_images_are_left_out_aloud(folder: Path) -> None:
    (folder / "dog" / "notes.txt").write_text("x")
    (folder / "dog" / ".hidden").write_text("x")
    with pytest.warns(UserWarning, match=r"1 files are no images and left out, the first is .*notes\.txt"):
        assert len(find_set(f"imagefolder:{folder}")) == 6


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_damaged_image_is_named(folder: Path, in_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not in_memory:
        monkeypatch.setattr(images, "available_memory", lambda: 0)
    damaged = folder / "eel" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    with pytest.raises(UserError, match=rf"^{damaged} cannot be read as an image"):
        list(find_set(f"imagefolder:{folder}").decode(task(classes=3)).batches(2))
    damaged.write_bytes(b"hello")
    with pytest.raises(UserError, match=rf"^{damaged} cannot be read as an image"):
        list(find_set(f"imagefolder:{folder}").decode(task(classes=3)).batches(2))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


def scribbled(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-400:-100] = np.random.default_rng(0).integers(0, 256, 300, dtype=np.uint8).tobytes()
    path.write_bytes(content)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def deep(path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(path, "PNG")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(
    ("kind", "damage"),
    [(kind, damage) for kind in ("jpg", "png", "tif", "webp") for damage in (cut, emptied, deep)] + [("png", scribbled), ("jpg", scribbled)],
)
def test_a_damaged_image_anywhere_in_a_folder_is_named_before_anything_is_trained(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = folder / "eel" / f"9.{kind}"
    whole = Image.fromarray(np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole.save(bad)
    find_set(f"imagefolder:{folder}").check_files(tmp_path / "cache")
    damage(bad)
    with pytest.raises(UserError) as caught:
        find_set(f"imagefolder:{folder}").check_files(tmp_path / "cache")
    assert str(caught.value).startswith(f"{bad} ")
    assert "\n" not in str(caught.value)
    whole.save(bad)
    monkeypatch.setattr(sets, "open_image", lambda *_, **__: pytest.fail("what was found whole is looked at again"))
    os.utime(bad, ns=(5, 5))
    find_set(f"imagefolder:{folder}").check_files(tmp_path / "cache")


def test_several_damaged_images_are_counted(folder: Path) -> None:
    for path in (folder / "eel").glob("*.*"):
        path.write_bytes(b"hello")
    with pytest.raises(UserError, match=r"eel/1.png cannot be read as an image .*; 1 more of 6 images cannot be read either"):
        find_set(f"imagefolder:{folder}").check_files()


def test_sixteen_bit_images_are_refused_rather_than_clipped(folder: Path) -> None:
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(folder / "dog" / "x.PNG")
    with pytest.raises(UserError, match="more than 8 bits per value"):
        find_set(f"imagefolder:{folder}").decode(task(classes=3))


def test_a_teacher_with_other_classes_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="evaluation set imagefolder:animals has 3 classes, the teacher 10"):
        find_set(f"imagefolder:{folder}").decode(task(classes=10))


# --- preparing an image


def test_an_image_of_the_right_size_is_not_touched() -> None:
    image = noise(8, 8)
    assert np.array_equal(prepare(image, task()), np.asarray(image))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("width", "height", "size", "shorter"),
    [(50, 37, 24, 27), (37, 50, 24, 27), (31, 31, 64, 64), (60, 45, 29, 34), (41, 33, 33, 33), (50, 40, 299, 342)],
)
def test_images_are_prepared_as_torchvision_does(interpolation: str, width: int, height: int, size: int, shorter: int) -> None:
    from torchvision import transforms

    image = noise(width, height)
    mode = transforms.InterpolationMode(interpolation)
    reference = transforms.Compose([transforms.Resize(shorter, mode), transforms.CenterCrop(size)])
    prepared = prepare(image, task(size=size, crop_ratio=size / shorter, interpolation=interpolation))
    assert np.array_equal(prepared, np.asarray(reference(image)))


def test_images_get_the_teachers_channels() -> None:
    grey, colour = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)), noise(8, 8)
    assert np.array_equal(prepare(grey, task())[..., 2], np.asarray(grey))
    assert np.array_equal(prepare(colour, task(channels=1))[..., 0], np.asarray(colour.convert("L")))
    assert prepare(colour.convert("RGBA"), task()).shape == (8, 8, 3)
    with pytest.raises(UserError, match="the teacher takes 4"):
        prepare(colour, task(channels=4))


# --- memory and streams


def numbered(count: int, in_memory: bool) -> Images:
    return Images(lambda i: np.full((2, 2, 1), i % 251, np.uint8), np.arange(count, dtype=np.int64), (2, 2, 1), classes=count, in_memory=in_memory)


@pytest.mark.parametrize("batch_size", [1, 7, 100, 1000])
def test_streamed_and_held_images_are_the_same(batch_size: int) -> None:
    held, streamed = numbered(203, True), numbered(203, False)
    assert held.pixels is not None
    assert streamed.pixels is None
    for _ in range(2):
        pairs = list(zip(held.batches(batch_size), streamed.batches(batch_size), strict=True))
        assert sum(len(labels) for (_, labels), _ in pairs) == 203
        for (pixels, labels), (other_pixels, other_labels) in pairs:
            assert np.array_equal(pixels, other_pixels)
            assert np.array_equal(labels, other_labels)
            assert np.array_equal(pixels[:, 0, 0, 0], labels % 251)


def test_images_stream_where_they_would_take_more_than_a_third_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = find_set("digits")
    needed = 599 * 8 * 8
    monkeypatch.setattr(images, "available_memory", lambda: 3 * needed)
    assert digits.decode(task(classes=10, channels=1)).pixels is not None
    monkeypatch.setattr(images, "available_memory", lambda: 3 * needed - 1)
    assert digits.decode(task(classes=10, channels=1)).pixels is None


def test_a_stream_holds_three_batches_at_most_and_ends_when_it_is_left() -> None:
    read: list[int] = []
    lock = threading.Lock()

    def count(i: int) -> Any:
        with lock:
            read.append(i)
        return np.zeros((2, 2, 1), np.uint8)

    before = threading.active_count()
    stream = Images(count, np.zeros(1000, np.int64), (2, 2, 1), 2, in_memory=False).batches(10)
    next(stream)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert len(read) <= 40
    assert threading.active_count() == before


def test_available_memory_is_that_of_this_machine() -> None:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**20 < images.available_memory() <= physical


# --- identity


def test_the_digest_is_of_the_images_and_not_of_their_place(folder: Path, tmp_path: Path) -> None:
    first = find_set(f"imagefolder:{folder}").digest()
    folder.rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    assert find_set(f"imagefolder:{moved}").digest() == first
    (moved / "dog" / "x.PNG").rename(moved / "dog" / "y.PNG")
    assert find_set(f"imagefolder:{moved}").digest() == first
    (moved / "cat" / "b.png").rename(moved / "dog" / "b.png")  # the same images in the same order, one under another class
    assert find_set(f"imagefolder:{moved}").digest() != first


def test_one_changed_byte_changes_the_digest(folder: Path) -> None:
    first = find_set(f"imagefolder:{folder}").digest()
    file = folder / "eel" / "2.bmp"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert find_set(f"imagefolder:{folder}").digest() != first


def test_a_remembered_digest_is_used_until_a_file_changes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dfqbench.data import sets

    cache = tmp_path / "cache"
    first = find_set(f"imagefolder:{folder}").digest(cache)
    computed: list[int] = []
    real = sets.content_digest
    monkeypatch.setattr(sets, "content_digest", lambda *given: computed.append(1) or real(*given))
    assert find_set(f"imagefolder:{folder}").digest(cache) == first
    assert not computed
    os.utime(folder / "dog" / "x.PNG", ns=(1, 1))
    assert find_set(f"imagefolder:{folder}").digest(cache) == first
    assert len(computed) == 1
    noise(8, 8, 99).save(folder / "dog" / "x.PNG")
    assert find_set(f"imagefolder:{folder}").digest(cache) != first


# --- digits


def test_digits_are_split_into_disjoint_balanced_parts() -> None:
    from sklearn.datasets import load_digits

    digits, loaded = find_set("digits"), load_digits()
    plain = task(classes=10, channels=1, size=8)
    train, test = digits.decode(plain, "train"), digits.decode(plain)
    assert (len(train), len(test), len(digits)) == (1198, 599, 599)
    together = np.concatenate([train.pixels, test.pixels])[..., 0]
    assert np.array_equal(together, np.rint(loaded.images * 255 / 16).astype(np.uint8))
    assert np.array_equal(np.concatenate([train.labels, test.labels]), loaded.target)
    assert not {image.tobytes() for image in train.pixels} & {image.tobytes() for image in test.pixels}
    assert np.bincount(test.labels).min() >= 55


def test_digits_are_resampled_to_the_teachers_size_and_channels() -> None:
    decoded = find_set("digits").decode(task(classes=10, channels=3, size=32))
    assert decoded.pixels.shape == (599, 32, 32, 3)
    assert np.array_equal(decoded.pixels[..., 0], decoded.pixels[..., 2])
    small = find_set("digits").decode(task(classes=10, channels=1, size=8)).pixels[7, ..., 0]
    assert np.array_equal(decoded.pixels[7, ..., 0], np.asarray(Image.fromarray(small).resize((32, 32), Image.Resampling.BILINEAR)))


def test_a_split_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="evaluation set digits has no split 'val', only 'train' and 'test'"):
        find_set("digits").decode(task(classes=10), "val")
    with pytest.raises(UserError, match="has no split 'train', only the folder itself"):
        find_set(f"imagefolder:{folder}").decode(task(classes=3), "train")


# --- names


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("digit", "unknown evaluation set 'digit': did you mean 'digits'? known: cifar10, cifar100, coco, digit-scenes-detect"),
        ("digits:/somewhere", "'digits' comes with scikit-learn and takes no folder"),
        ("imagefolder", "write imagefolder:PATH"),
    ],
)
def test_a_wrong_name_is_answered(text: str, said: str) -> None:
    assert said in refusal(text)


def test_imagenet_is_found_by_its_folder_the_folder_above_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(1000):
        (tmp_path / "val" / f"n{index:08d}").mkdir(parents=True)
        (tmp_path / "val" / f"n{index:08d}" / "a.JPEG").write_bytes(b"")
    for text in (f"imagenet:{tmp_path}", f"imagenet:{tmp_path / 'val'}"):
        assert (find_set(text).name, find_set(text).classes) == ("imagenet", 1000)
    monkeypatch.delenv("IMAGENET", raising=False)
    assert "set the environment variable IMAGENET" in refusal("imagenet")
    monkeypatch.setenv("IMAGENET", str(tmp_path))
    assert len(find_set("imagenet")) == 1000


def test_a_folder_that_is_not_all_of_imagenet_is_refused(folder: Path, tmp_path: Path) -> None:
    assert "'cat' is no WordNet id" in refusal(f"imagenet:{folder}")
    for name in ("n00000001", "n00000002"):
        (tmp_path / "part" / name).mkdir(parents=True)
        noise(8, 8).save(tmp_path / "part" / name / "a.png")
    assert "but: 2 class folders" in refusal(f"imagenet:{tmp_path / 'part'}")


@pytest.fixture
def cifar_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as torchvision keeps CIFAR-10, with 20 random test images; its checksums are told to torchvision."""
    from torchvision import datasets

    base = tmp_path / "cifar" / "cifar-10-batches-py"
    base.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    files = {"test_batch": {"data": pixels, "labels": list(range(10)) * 2}, "batches.meta": {"label_names": [f"class {i}" for i in range(10)]}}
    sums = {}
    for name, content in files.items():
        (base / name).write_bytes(pickle.dumps(content))
        sums[name] = md5((base / name).read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": sums["batches.meta"]})
    return tmp_path / "cifar"


def test_cifar_is_read_from_torchvisions_folder(cifar_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFQBENCH_DATA", str(cifar_root))
    found = find_set("cifar10")
    decoded = found.decode(task(classes=10, size=32))
    stored = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    assert np.array_equal(decoded.pixels, stored.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    assert decoded.labels.tolist() == list(range(10)) * 2
    assert found.class_names[3] == "class 3"
    assert found.digest(tmp_path / "cache") == find_set(f"cifar10:{cifar_root}").digest()


def test_a_failed_download_of_cifar_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fail)
    said = refusal(f"cifar100:{tmp_path}")
    assert f"evaluation set 'cifar100' is not in {tmp_path} and could not be downloaded (OSError: no route to host)" in said
    assert "DFQBENCH_DATA" in said


def test_listing_a_set_and_a_remembered_digest_need_no_torch(folder: Path, tmp_path: Path) -> None:
    find_set("digits").digest(tmp_path / "cache")
    program = (
        "import sys, pathlib; from dfqbench.data import find_set\n"
        f"assert find_set({f'imagefolder:{folder}'!r}).digest()\n"
        f"assert find_set('digits').digest(pathlib.Path({str(tmp_path / 'cache')!r}))\n"
        "assert not {'torch', 'torchvision', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2], timeout=60)
