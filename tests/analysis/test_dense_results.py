"""From a sweep of a segmentation network and of a detector to tables, plots, a report and comparisons in their own metrics."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    size, mean, std, classes = (16, 24), (0.5,) * 3, (0.25,) * 3, 3

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.classify, self.locate = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.body(self.norm(self.stem(x)).relu()).relu()
        return self.classify(x) if self.kind == "segment" else (self.classify(x), self.locate(x))

    def decode(self, answer, height, width):
        classes, boxes = answer
        found = []
        for scores, box in zip(classes.flatten(2), boxes.flatten(2)):
            score, label = scores.sigmoid().max(0)
            best = score.topk(20).indices
            low = box[:2, best].abs().T * 4
            found.append({"boxes": torch.cat([low, low + 4 + box[2:, best].abs().T * 8], 1), "scores": score[best], "labels": label[best]})
        return found

def segmenter(): return Net("segment")
def detector(): return Net("detect")
decoded = Net("detect").decode
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dense")
    (root / "net.py").write_text(NETWORK)
    draw = np.random.default_rng(0)
    annotations: list[dict[str, Any]] = []
    for i in range(6):
        for folder, pixels in (("images", draw.integers(0, 256, (16, 24, 3), np.uint8)), ("masks", draw.integers(0, 3, (16, 24), np.uint8))):
            (root / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(root / folder / f"{i}.png")
        annotations += [{"id": 10 * i + c, "image_id": i, "category_id": c, "bbox": [2, 2 + c, 8, 6], "area": 48, "iscrowd": 0} for c in range(3)]
    images = [{"id": i, "file_name": f"images/{i}.png", "height": 16, "width": 24} for i in range(6)]
    categories = [{"id": c, "name": f"kind {c}"} for c in range(3)]
    (root / "boxes.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "factory", "data", "key", "name"),
    [("segment", "segmenter", "segmentation:{}", "miou", "mIoU"), ("detect", "detector", "coco:{}/boxes.json", "ap", "AP")],
)
def test_all_speak_the_metric_of_the_task(
    place: Path,
    tmp_path: Path,
    sweep_file: Callable[..., Path],
    dfqbench: Callable[..., tuple[int, str, str]],
    kind: str,
    factory: str,
    data: str,
    key: str,
    name: str,
) -> None:
    teacher = {"model": f"{place}/net.py:{factory}", "kind": kind}
    gaussian = {"gaussian": {}, "label": "noise"}
    config = sweep_file(teachers=[teacher], evaluate=data.format(place), methods=["round", gaussian], bits=["w8a8"], evaluate_every=1)
    store = tmp_path / "r"
    code, out, err = dfqbench("run", config, "--results", store)
    assert code == 0, out + err
    assert f": {name} " in out + err
    results = [json.loads(path.read_text()) for path in sorted(store.glob("runs/*/result.json"))]
    for result in results:
        assert result["metric"] == key
        assert "top1" not in result
        assert not {"top1"} & result["teacher"].keys()
        assert 0 <= result[key] <= 100
    code, out, _ = dfqbench("plan", config, "--results", store)
    assert (code, "2 cells: 2 done" in out, "damaged" in out) == (0, True, False), out
    code, out, _ = dfqbench("table", "--results", store)
    assert (code, f"% {name}, protocol" in out, f"{name} in %" in out, "top-1" in out) == (0, True, True, False)
    assert "not compared" not in out
    lines = list(csv.DictReader(io.StringIO(dfqbench("table", "--results", store, "--format", "csv")[1])))
    assert {float(line[key]) for line in lines} == {result[key] for result in results}
    assert all(line["top1"] == "" for line in lines)
    latex = dfqbench("table", "--results", store, "--format", "latex")[1]
    assert f"{name} (\\%)" in latex
    assert "op-1" not in latex
    ids = [result["id"] for result in results]
    code, out, _ = dfqbench("compare", *ids, "--results", store)
    assert (code, "paired bootstrap" in out, "McNemar" in out, f"({name}, 6 images)" in out) == (0, True, False, True)
    shutil.copy(store / "runs" / ids[1] / "student.safetensors", tmp_path / "other.safetensors")
    on = ["--on", data.format(place), *(["--decode", f"{place}/net.py:decoded"] if kind == "detect" else [])]
    code, of_files, err = dfqbench("compare", ids[0], tmp_path / "other.safetensors", "--results", store, *on)
    assert (code, err) == (0, "")
    (line,) = [line for line in out.splitlines() if line.startswith("first - second")]
    assert line in of_files.splitlines()
    assert dfqbench("plot", "--results", store)[0] == 0
    assert f"{name} (%)" in (store / "figures/accuracy.svg").read_text() or (store / "figures/accuracy.png").exists()
    assert dfqbench("report", "--results", store)[0] == 0
    assert f'"metric":"{name}"' in next(iter(store.glob("*.html"))).read_text()
    decode = ["--decode", f"{place}/net.py:decode_nothing"] if kind == "detect" else []
    code, out, err = dfqbench("evaluate", ids[0], "--on", data.format(place), "--results", store, *decode)
    if kind == "detect":
        assert (code, "there is no function 'decode_nothing'" in err) == (2, True)
    else:
        assert (code, f"{name} {results[0][key]:.2f} %" in out) == (0, True)


def test_a_damaged_file_of_counts_takes_part_in_no_comparison(tmp_path: Path) -> None:
    from dfqbench.analysis.records import read_counts

    confusion = np.array([[[5, 6, 7], [1, 2, 3]]], np.int32)
    np.savez(tmp_path / "per_image.npz", confusion=confusion)
    right = {"metric": "miou", "images": 1, "top1": 100 * (5 / 8 + 1 / 4) / 2}
    assert np.array_equal(read_counts(tmp_path / "per_image.npz", right), confusion)  # type: ignore[arg-type]
    for change in ({"top1": 50.0}, {"images": 2}, {"metric": "ap"}):
        assert read_counts(tmp_path / "per_image.npz", right | change) is None
    (tmp_path / "per_image.npz").write_bytes(b"PK damaged")
    assert read_counts(tmp_path / "per_image.npz", right) is None
