"""Bytes, speed and answers of exported students on this CPU: `python results/reference/export/measure.py CIFAR10 PHOTOGRAPHS WEIGHTS...`.

CIFAR10, PHOTOGRAPHS: folders with images of 32 and of 224 pixels. WEIGHTS: of cifar:resnet20 and of timm:tf_efficientnet_lite0. Students are rounded
(method `round`: ranges from batch norms, n = 3), since weights change neither bytes nor seconds. Writes table.csv and table.md beside this file.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import torch
from PIL import Image

from dfqbench.engine.evaluate import normalise
from dfqbench.export.export import export, timing
from dfqbench.export.onnx_run import has_vnni
from dfqbench.export.verify import Batches
from dfqbench.network import Teacher
from dfqbench.quantization import PROTOCOLS, Bits
from dfqbench.quantization.student import Student
from dfqbench.store.provenance import provenance
from dfqbench.task import Task
from dfqbench.teachers import parse_teacher
from dfqbench.teachers.build import build

PAIRS = 100
IMAGES = 200  # of each folder, at most


def images_of(folder: str, task: Task) -> Batches:
    """An even choice of a folder's images, normalised."""
    files = sorted(Path(folder).rglob("*.jpg"))
    files = files[:: -(-len(files) // IMAGES)]
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (task.mean, task.std))

    def batches() -> Iterator[torch.Tensor]:
        for start in range(0, len(files), 50):
            pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files[start : start + 50]])
            yield normalise(torch.from_numpy(pixels), mean, std)

    return batches


def main(cifar: str, photographs: str, *weights: str) -> None:
    rows = []
    networks = (("cifar:resnet20", cifar), ("timm:tf_efficientnet_lite0", photographs))
    for (model, images), file in zip(networks, weights, strict=True):
        built = build(parse_teacher({"model": model, "weights": file, "crop_ratio": 1.0}))
        for protocol, bits in (("hardware", "w8a8"), ("lineage", "w4a4")):
            student = Student(Teacher(built.network, built.task), PROTOCOLS[protocol], Bits.parse(bits))
            student.set_ranges_from_bn(3.0)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "a.onnx"
                found = export(student, path, batches=images_of(images, built.task))
                for agreement in found:
                    print(model, protocol, bits, agreement, flush=True)
                timed = timing(student, path, PAIRS)
            off, shipped = (int((~agreement.differs).sum()) for agreement in found)
            rows.append({
                "network": model.partition(":")[2],
                "pixels": built.task.size,
                "protocol": protocol,
                "bits": bits,
                "bytes": timed["bytes"],
                "float_bytes": timed["float_bytes"],
                "ms": round(timed["ms"], 2),
                "float_ms": round(timed["float_ms"], 2),
                "times_as_fast": round(timed["ratio"], 2),
                "images": len(found[0].moved),
                "equal_off": off,
                "equal_shipped": shipped,
            })  # fmt: skip
    frame, here = pd.DataFrame(rows), Path(__file__).parent
    frame.to_csv(here / "table.csv", index=False)
    on = provenance(torch.device("cpu"))
    vnni = "with" if has_vnni() else "without"
    packages = f"onnxruntime {onnxruntime.__version__}, torch {torch.__version__.partition('+')[0]}"
    measured = f"One image on one thread, median of {PAIRS} pairs taken in turn, on {on['device_name']} {vnni} VNNI; {packages}."
    (here / "table.md").write_text(f"{frame.to_markdown(index=False)}\n\n{measured}\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
