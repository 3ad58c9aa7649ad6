"""onnxruntime's static quantization on real photographs, beside this store's cells: `python .../static_quantization.py PHOTOGRAPHS WEIGHTS`.

PHOTOGRAPHS: the folder of class folders that the cells were evaluated on; WEIGHTS: of timm:tf_efficientnet_lite0. Every seventh photograph, 64 in
all, calibrates; the others are what everything is measured on, cells included (by their correct.npy). Writes static_quantization.csv beside
this file.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import torch
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from dfqbench.data import find_set
from dfqbench.engine.evaluate import normalise
from dfqbench.teachers import parse_teacher
from dfqbench.teachers.build import build

HERE, CALIBRATE, EVERY = Path(__file__).parent, 64, 7


class Photographs(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, images: np.ndarray):
        self.left = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.left, None)
        return None if image is None else {"images": image[None]}


def answers(path: Path, images: np.ndarray, exact: bool) -> np.ndarray:
    """The class of each image. exact: without the fused 8-bit kernels, whose pairs of products saturate on processors without VNNI."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if exact:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"images": batch})[0].argmax(1) for batch in np.array_split(images, max(len(images) // 20, 1))])


def main(photographs: str, weights: str) -> None:
    built = build(parse_teacher({"model": "timm:tf_efficientnet_lite0", "weights": weights, "crop_ratio": 1.0}))
    decoded = find_set(f"imagefolder:{photographs}").decode(built.task)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (built.task.mean, built.task.std))
    assert decoded.pixels is not None
    images = normalise(torch.from_numpy(decoded.pixels), mean, std).contiguous().numpy()
    calibrate = np.zeros(len(images), bool)
    calibrate[np.arange(0, len(images), EVERY)[:CALIBRATE]] = True
    rest, labels = images[~calibrate], decoded.labels[~calibrate]
    rows = []

    def row(name: str, bits: str, right: np.ndarray) -> None:
        rows.append({"what": name, "bits": bits, "top1": round(100 * float(right.mean()), 2), "correct": int(right.sum()), "images": len(right)})
        print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory() as folder:
        plain, ready, made = (Path(folder) / name for name in ("plain.onnx", "ready.onnx", "quantized.onnx"))
        names = {"input_names": ["images"], "output_names": ["logits"], "dynamic_axes": {"images": {0: "n"}, "logits": {0: "n"}}}
        torch.onnx.export(built.network, (torch.from_numpy(images[:1]),), plain, dynamo=False, **names)
        row("teacher", "float", answers(plain, rest, exact=False) == labels)
        quant_pre_process(plain, ready)
        for method in (CalibrationMethod.MinMax, CalibrationMethod.Percentile, CalibrationMethod.Entropy):
            settings = {"quant_format": QuantFormat.QDQ, "per_channel": True, "weight_type": QuantType.QInt8, "activation_type": QuantType.QUInt8}
            quantize_static(ready, made, Photographs(images[calibrate]), calibrate_method=method, **settings)
            row(f"onnxruntime, {method.name}", "w8a8", answers(made, rest, exact=True) == labels)
    for path in sorted(HERE.glob("runs/*/result.json")):
        result = json.loads(path.read_text())
        right = np.unpackbits(np.load(path.with_name("correct.npy")), count=result["images"]).astype(bool)
        cell = result["cell"]
        row(f"{cell['label']}, {cell['protocol']}", cell["bits"], right[~calibrate])
    order = {"teacher": 0, "onnxruntime": 1}
    frame = pd.DataFrame(rows)
    frame["first"] = [order.get(name.split(",")[0], 2) for name in frame["what"]]
    frame.sort_values(["first", "bits", "top1"], ascending=[True, False, False]).drop(columns="first").to_csv(
        HERE / "static_quantization.csv", index=False, lineterminator="\n"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
