"""Sets with masks and boxes: layouts, how images are made to fit, what is damaged, and that evaluation brings answers back to the stored pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dfqbench.data import find_set
from dfqbench.data.dense import fitted, placed
from dfqbench.engine.evaluate import evaluate_task
from dfqbench.errors import Notice, UserError
from dfqbench.network import Teacher
from dfqbench.task import Task

GREY: dict[str, Any] = {"channels": 3, "size": 16, "mean": (0.5,) * 3, "std": (0.25,) * 3, "width": 24}
SEGMENT, DETECT = Task(classes=3, kind="segment", **GREY), Task(classes=2, kind="detect", **GREY)


def test_images_keep_their_aspect_and_what_fits_is_not_touched() -> None:
    whole = Image.fromarray(np.arange(16 * 24 * 3, dtype=np.uint8).reshape(16, 24, 3))
    assert np.array_equal(fitted(whole, SEGMENT), np.asarray(whole))
    assert placed(32, 32, SEGMENT) == placed(32, 32, SEGMENT)
    at = placed(32, 32, SEGMENT)
    assert (at.inner_height, at.inner_width) == (16, 16)
    padded = fitted(Image.new("RGB", (32, 32), (10, 20, 30)), SEGMENT)
    assert padded.shape == (16, 24, 3)
    assert (padded[:, :16] == [10, 20, 30]).all()
    assert (padded[:, 16:] == 128).all()  # the mean colour
    assert (placed(10, 100, SEGMENT).inner_height, placed(10, 100, SEGMENT).inner_width) == (2, 24)


class Says(nn.Module):
    """The class of a pixel, or what is at a position, is in the image's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1, bias=False)
        self.layer.weight.data = torch.eye(3)[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu()


def masks(root: Path, sizes: list[tuple[int, int]], layout: tuple[str, str] = ("images", "masks")) -> list[np.ndarray]:
    made = []
    for i, (height, width) in enumerate(sizes):
        mask = np.random.default_rng(i).integers(0, 3, (height // 4, width // 4)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
        pixels = (255 * np.eye(3, dtype=np.uint8)[mask]).astype(np.uint8)
        mask[:4, :4] = 255
        for folder, content, mode in ((layout[0], pixels, "RGB"), (layout[1], mask, "L")):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(content, mode).save(root / folder / f"{i:03}.png")
        made.append(mask)
    return made


@pytest.mark.parametrize("layout", [("images", "masks"), ("img", "lab"), ("JPEGImages", "SegmentationClass")])
def test_a_network_that_sees_the_classes_is_right_everywhere(tmp_path: Path, layout: tuple[str, str]) -> None:
    masks(tmp_path, [(16, 24), (32, 48), (64, 48)], layout)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    found = find_set(f"segmentation:{tmp_path}")
    assert (found.kind, found.classes, found.class_names, len(found)) == ("segment", 3, ["a", "b", "c"], 3)
    found.check_files()
    teacher = Teacher(Says(), SEGMENT)
    scored = evaluate_task(teacher, found.decode(SEGMENT), SEGMENT).scores()
    assert scored["metric"] == "miou"
    assert scored["per_class"].keys() == {"a", "b", "c"}
    assert scored["images"] == 3
    assert scored["pixel_accuracy"] > 90  # borders of cells are blurred where an image was made smaller
    exact = tmp_path / "exact"
    masks(exact, [(16, 24)], layout)
    assert evaluate_task(teacher, find_set(f"segmentation:{exact}").decode(SEGMENT), SEGMENT).value == 100


def test_labels_beyond_the_teachers_classes_are_void_and_that_is_said(tmp_path: Path) -> None:
    masks(tmp_path, [(16, 24)])
    mask = np.asarray(Image.open(tmp_path / "masks/000.png")).copy()
    mask[8:] = 3
    Image.fromarray(mask).save(tmp_path / "masks/000.png")
    found = find_set(f"segmentation:{tmp_path}")
    assert found.classes == 4
    with pytest.warns(Notice, match="the teacher has 3 classes: pixels of 3 are not scored"):
        found.check(SEGMENT)
    evaluation = evaluate_task(Teacher(Says(), SEGMENT), found.decode(SEGMENT), SEGMENT)
    assert evaluation.value == 100
    assert int(evaluation.per_image["confusion"][0, :, 1].sum()) == int((mask < 3).sum())  # type: ignore[union-attr]


def test_masks_without_the_last_of_the_teachers_classes(tmp_path: Path) -> None:
    """They do not say how many classes there are; a list of names does."""
    masks(tmp_path, [(16, 24)])
    mask = np.asarray(Image.open(tmp_path / "masks/000.png")).copy()
    mask[mask == 2] = 255
    Image.fromarray(mask).save(tmp_path / "masks/000.png")
    found = find_set(f"segmentation:{tmp_path}")
    assert found.classes == 2
    with pytest.warns(Notice, match="the largest value in its masks is 1, the teacher has 3 classes"):
        found.check(SEGMENT)
    scored = evaluate_task(Teacher(Says(), SEGMENT), found.decode(SEGMENT), SEGMENT).scores()
    assert scored["per_class"] == {"0": 100.0, "1": 100.0, "2": None}
    (tmp_path / "classes.txt").write_text("a\nb\n")
    assert not find_set(f"segmentation:{tmp_path}").fits(3)


def test_nothing_to_score_is_one_line(tmp_path: Path) -> None:
    masks(tmp_path, [(16, 24)])
    Image.new("L", (24, 16), 255).save(tmp_path / "masks/000.png")
    with pytest.raises(UserError, match="no pixel of the evaluation set"):
        evaluate_task(Teacher(Says(), SEGMENT), find_set(f"segmentation:{tmp_path}").decode(SEGMENT), SEGMENT)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda root: (root / "masks/000.png").unlink(), "has no image"),
        (lambda root: Image.new("RGB", (24, 16)).save(root / "masks/000.png"), "no mask of class indices"),
        (lambda root: Image.new("L", (24, 17)).save(root / "masks/000.png"), "24 x 17 pixels, its image 24 x 16"),
        (lambda root: (root / "masks").rename(root / "other"), "there is no folder of masks"),
        (lambda root: Image.new("RGB", (24, 16)).save(root / "images/000.bmp"), "have one name"),
    ],
)
def test_what_is_wrong_with_masks_is_one_line(tmp_path: Path, spoil: Any, said: str) -> None:
    masks(tmp_path, [(16, 24), (16, 24)])
    (tmp_path / "images/zzz.png").write_bytes((tmp_path / "images/000.png").read_bytes())
    (tmp_path / "masks/yyy.png").write_bytes((tmp_path / "masks/000.png").read_bytes())
    if "no image" not in said:
        (tmp_path / "images/zzz.png").unlink()
        (tmp_path / "masks/yyy.png").unlink()
    spoil(tmp_path)
    with pytest.raises(UserError, match=said):
        find_set(f"segmentation:{tmp_path}").check_files()


def coco(root: Path) -> dict[str, Any]:
    content: dict[str, Any] = {
        "images": [{"id": 7, "file_name": "b.png", "height": 32, "width": 48}, {"id": 3, "file_name": "a.png", "height": 16, "width": 24}],
        "categories": [{"id": 5, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 5, "bbox": [8, 8, 16, 16], "area": 256, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0, 0, 8, 8], "area": 64, "iscrowd": 1},
        ],
    }
    root.mkdir(parents=True, exist_ok=True)
    for entry in content["images"]:
        Image.new("RGB", (entry["width"], entry["height"])).save(root / entry["file_name"])
    (root / "instances.json").write_text(json.dumps(content))
    return content


def test_coco_and_voc_say_the_same(tmp_path: Path) -> None:
    content = coco(tmp_path / "coco")
    found = find_set(f"coco:{tmp_path / 'coco'}")
    assert (found.kind, found.class_names, len(found)) == ("detect", ["dog", "cat"], 2)
    boxes = found.target(1)  # type: ignore[attr-defined]  # images by id
    assert boxes.boxes.tolist() == [[8, 8, 24, 24], [0, 0, 8, 8]]
    assert boxes.labels.tolist() == [1, 0]
    assert boxes.ignored.tolist() == [False, True]
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    for entry in content["images"]:
        objects = ""
        for each in content["annotations"]:
            x, y, w, h = each["bbox"]
            corners = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
            if each["image_id"] == entry["id"]:
                named = f"<name>{names[each['category_id']]}</name><difficult>{each['iscrowd']}</difficult>"
                objects += f"<object>{named}<bndbox>{corners}</bndbox></object>"
        size = f"<size><width>{entry['width']}</width><height>{entry['height']}</height></size>"
        for folder in ("Annotations", "JPEGImages"):
            (tmp_path / "voc" / folder).mkdir(parents=True, exist_ok=True)
        stem = Path(entry["file_name"]).stem
        (tmp_path / f"voc/Annotations/{stem}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
        Image.new("RGB", (entry["width"], entry["height"])).save(tmp_path / f"voc/JPEGImages/{stem}.png")
    (tmp_path / "voc/classes.txt").write_text("dog\ncat\n")
    voc = find_set(f"voc-detection:{tmp_path / 'voc'}")
    assert voc.class_names == ["dog", "cat"]
    same = voc.target(1)  # type: ignore[attr-defined]
    assert all(np.array_equal(getattr(same, name), getattr(boxes, name)) for name in ("boxes", "labels", "ignored"))


@pytest.mark.parametrize(("labels", "indices"), [(2, [1, 0]), (6, [5, 2]), (5, [4, 1]), (3, None), (4, None), (7, None)])
def test_category_ids_are_the_classes_of_a_teacher_that_has_more(tmp_path: Path, labels: int, indices: list[int] | None) -> None:
    """torchvision's detectors of COCO: 91 classes of which the first is not used (RetinaNet), or is the background that is taken off (SSD)."""
    coco(tmp_path)
    found, task = find_set(f"coco:{tmp_path}"), Task(classes=labels, kind="detect", **GREY)
    assert found.fits(labels) == (indices is not None)
    if indices is None:
        with pytest.raises(UserError, match=f"2 classes, the teacher {labels}"):
            found.decode(task)
        return
    images = found.decode(task)
    assert images.targets is not None
    assert images.targets(1).labels.tolist() == indices
    assert [images.class_names[index] for index in indices] == ["cat", "dog"]
    if labels > 2:
        with pytest.warns(Notice, match=rf"cat \(id 5\) is class {indices[0]} of 0 to {labels - 1}"):
            found.check(task)


class Points(nn.Module):
    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.classes, self.boxes = nn.Conv2d(3, classes, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.classes(x), self.boxes(x)


def test_boxes_come_back_to_the_pixels_of_the_stored_image(tmp_path: Path) -> None:
    """The image of 32 x 48 is shown at half its size: there its box is half as large."""
    coco(tmp_path)
    network = Points()
    box, nothing = torch.tensor([[4.0, 4.0, 12.0, 12.0]]), {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0)}
    network.decode = lambda answer, height, width: [nothing, {"boxes": box, "scores": torch.ones(1), "labels": torch.ones(1)}]  # type: ignore[assignment]
    scored = evaluate_task(Teacher(network, DETECT), find_set(f"coco:{tmp_path}").decode(DETECT), DETECT).scores()
    assert (scored["ap"], scored["boxes"], scored["images"]) == (100.0, 1, 2)
    assert scored["per_class"] == {"dog": None, "cat": 100.0}


def test_a_detector_with_more_classes_than_categories(tmp_path: Path) -> None:
    """Two boxes on image 1; that of the class between two ids is wrong, and no class that results speak of."""
    coco(tmp_path)
    network, task = Points(6), Task(classes=6, kind="detect", **GREY)
    boxes = torch.tensor([[4.0, 4.0, 12.0, 12.0]] * 2)
    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0)}
    one = {"boxes": boxes, "scores": torch.tensor([0.9, 0.8]), "labels": torch.tensor([3, 5])}
    network.decode = lambda answer, height, width: [nothing, one]  # type: ignore[assignment]
    scored = evaluate_task(Teacher(network, task), find_set(f"coco:{tmp_path}").decode(task), task).scores()
    assert scored["per_class"] == {"dog": None, "cat": 100.0}
    one["labels"] = torch.tensor([3, 6])
    with pytest.raises(UserError, match="decode says class 6, classes are 0 to 5"):
        evaluate_task(Teacher(network, task), find_set(f"coco:{tmp_path}").decode(task), task)


def test_an_answer_that_is_not_finite_gives_no_boxes(tmp_path: Path) -> None:
    coco(tmp_path)
    network = Points()
    network.classes.weight.data.fill_(torch.nan)
    seen = []

    def decode(answer: Any, height: int, width: int) -> list[dict[str, Tensor]]:
        seen.extend(bool(torch.isfinite(part).all()) for part in answer)
        box = {"boxes": torch.tensor([[4.0, 4.0, 12.0, 12.0]]), "scores": torch.ones(1), "labels": torch.ones(1)}
        return [box] * len(answer[0])

    network.decode = decode  # type: ignore[assignment]
    assert evaluate_task(Teacher(network, DETECT), find_set(f"coco:{tmp_path}").decode(DETECT), DETECT).value == 0
    assert seen
    assert all(seen)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content.pop("categories"), "not in COCO's format"),
        (lambda content: content["images"][0].update(file_name="none.png"), "there is no image 'none.png'"),
        (lambda content: content["images"][0].update(height=33), "its annotation says 48 x 33"),
    ],
)
def test_what_is_wrong_with_boxes_is_one_line(tmp_path: Path, change: Any, said: str) -> None:
    content = coco(tmp_path)
    change(content)
    (tmp_path / "instances.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        find_set(f"coco:{tmp_path}").check_files()


def test_the_digest_sees_every_box_also_where_there_are_many(tmp_path: Path) -> None:
    content = coco(tmp_path)
    one = content["annotations"][0]
    content["annotations"] = [{**one, "id": i, "bbox": [i % 20, i // 20, 8, 8]} for i in range(600)]
    (tmp_path / "instances.json").write_text(json.dumps(content))
    cache = tmp_path / "cache"
    before = find_set(f"coco:{tmp_path}").digest(cache)
    assert find_set(f"coco:{tmp_path}").digest(cache) == before
    content["annotations"][300]["bbox"][2] = 9
    (tmp_path / "instances.json").write_text(json.dumps(content))
    assert find_set(f"coco:{tmp_path}").digest(cache) != before
