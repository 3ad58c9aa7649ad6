"""A store of any size in the store's own format, made up: for tests of tables, plots and the report, and to measure how long they take.

python tests/synthetic_store.py FOLDER CELLS IMAGES
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from dfqbench.files import write_atomically, write_json
from dfqbench.quantization import PROTOCOLS, Bits
from dfqbench.store import Store
from dfqbench.sweep.allocation import Allocation
from dfqbench.sweep.cell import Cell, EvaluationCard
from dfqbench.task import Task
from dfqbench.teachers import TeacherCard

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("gdfq", {}),
    ("round", {}),
    ("acq", {}),
    ("acq", {"matching_weight": 0.0}),
    ("acq", {"adversarial_weight": 0.0}),
    ("acq", {"condition": "none", "consistency_weight": 0.0}),
    ("zaq", {}),
    ("lrq", {}),
    ("gznq", {}),
    ("zeroq", {}),
]
WIDTHS = ("w8a8", "w6a6", "w5a5", "w4a4", "w3a3")
SEEDS = 5
EPOCHS = 40
SKILL = {"gdfq": 1.0, "round": -4.0, "acq": 1.5, "zaq": -1.0, "lrq": 1.2, "gznq": -2.0, "zeroq": -3.0}


def teacher_card(number: int) -> TeacherCard:
    task = Task(classes=10, channels=3, size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    name = f"resnet{20 + 12 * number}"
    return TeacherCard(name, f"cifar:{name}", f"{name}.safetensors", f"{number:064x}", None, task, 270_000)


def cells(count: int) -> Iterator[Cell]:
    """Spans methods, widths and seeds first, then teachers, then protocols and precisions."""
    made = 0
    for number, ((protocol, precision), teacher) in enumerate(product(product(("lineage", "hardware"), ("fp32", "bf16")), range(10))):
        card = EvaluationCard("made-up", f"{number:064x}", 10, 1000)
        for (method, changed), width, seed in product(VARIANTS, WIDTHS, range(SEEDS)):
            if made == count:
                return
            made += 1
            config = {"epochs": EPOCHS, "iterations": 200, "batch_size": 64, "milestones": [100, 200], **changed}
            yield Cell(
                method, 1, config, teacher_card(teacher), card, PROTOCOLS[protocol], Bits.parse(width), seed, precision,  # type: ignore[arg-type]
                shares_synthesis=True, changed=changed, fidelity="code", plugin="built in 000000000000",
            )  # fmt: skip


def write_cell(store: Store, cell: Cell, images: int = 1000, evaluated: bool = True, **changes: Any) -> dict[str, Any]:
    """All files of one finished cell; accuracies depend on the cell alone, so that a store can be made twice."""
    random = np.random.default_rng(int(cell.id, 16))
    teacher_top1 = 92.0
    bits = cell.bits.weights
    loss = {8: 0.2, 6: 1.0, 5: 3.0, 4: 8.0, 3: 20.0}[bits] - SKILL[cell.method] * (8 - bits) * 0.4 + 2 * len(cell.changed)
    share = np.clip((teacher_top1 - loss + random.normal(0, 0.4)) / 100, 0.1, 1)
    easy = np.random.default_rng(0).random(images)  # what is hard is hard for all
    correct = easy + random.normal(0, 0.05, images) < share
    top1 = float(correct.mean() * 100)
    folder = store.folder(cell.id)
    curve = top1 - 15 * np.exp(-np.arange(1, EPOCHS + 1) / 8) + random.normal(0, 0.3, EPOCHS)
    rows = [
        {"epoch": e, "phase": "train", "loss": round(2 * 0.9**e + 0.1, 5), "student_lr": 1e-4, "top1": round(float(curve[e - 1]), 2)}
        for e in range(1, EPOCHS + 1)
    ]
    rows[-1]["top1"] = top1
    if not evaluated:
        rows = [{k: v for k, v in row.items() if k != "top1"} for row in rows[:-1]] + rows[-1:]
    if cell.method != "round":
        text = ",".join(rows[-1]) + "\n" + "".join(",".join(str(row.get(k, "")) for k in rows[-1]) + "\n" for row in rows)
        write_atomically(folder / "history.csv", text)
    buffer = io.BytesIO()
    np.save(buffer, np.packbits(correct))
    write_atomically(folder / "correct.npy", buffer.getvalue())
    write_atomically(folder / "log.txt", f"2026-01-01 00:00:00 started\n2026-01-01 01:00:00 done: top-1 {top1:.2f} %\n")
    write_json(folder / "cell.json", cell.record())
    best = max(rows, key=lambda row: row.get("top1", 0)) if cell.method != "round" else {"epoch": 0, "top1": top1}
    scores = {"top1": teacher_top1, "top5": 99.0, "correct": 920, "images": images, "loss": 0.3}
    result = {
        "id": cell.id,
        "cell": cell.record(),
        "top1": top1,
        "top5": min(99.5, top1 + 10),
        "correct": int(correct.sum()),
        "images": images,
        "loss": 1.0,
        "best": {"epoch": best["epoch"], "top1": best["top1"]},
        "evaluations": EPOCHS,
        "last_epoch": 0 if cell.method == "round" else EPOCHS,
        "steps": 0 if cell.method == "round" else EPOCHS * 200,
        "teacher": {"teacher": cell.record()["teacher"], "evaluation": cell.record()["evaluation"], **scores},
        "student_state": f"{int(cell.id, 16):064x}",
        "left_float": [],
        "warnings": [],
        "seconds": {"own": 0.1 if cell.method == "round" else 100 + 10 * SKILL[cell.method], "shared": 200 * (cell.method != "round"), "bundle": []},
        "provenance": {
            "git": "0" * 40, "packages": {"torch": "2.14.1"}, "python": "3.11.7", "device": "cuda", "device_name": "a GPU", "threads": 1,
            "cpu_capability": "AVX512", "cores": 2, "host": "00000000", "slurm_job": None,
        },
        "finished": 1.7e9,
    } | changes  # fmt: skip
    write_json(folder / "result.json", result)
    return result


UNSEEN: dict[str, Any] = {"images": {"zeroq": {"images": 64}}, "seed": 1000, "count": 64}


def without_data(cell: Cell) -> Cell:
    """The same cell with `evaluate: none`."""
    return replace(cell, evaluation=EvaluationCard("none", "none 0123456789ab", 10, 64, "zeroq, seed 1000", UNSEEN))


def write_without_data(store: Store, cell: Cell, kl: float = 0.5, **changes: Any) -> dict[str, Any]:
    """All files of one finished cell that has no evaluation set: right is what its teacher says."""
    folder, made = store.folder(cell.id), write_cell(store, cell, cell.evaluation.images)
    if (folder / "history.csv").exists():
        write_atomically(folder / "history.csv", (folder / "history.csv").read_text().replace("top1", "agreement", 1))
    scores: dict[str, Any] = {"metric": "agreement", "agreement": made["top1"], "kl": kl, "plain_rounding": {"agreement": 50.0, "kl": 0.75}}
    best = {"epoch": made["best"]["epoch"], "agreement": made["best"]["top1"]}
    teacher = {name: made["teacher"][name] for name in ("teacher", "evaluation")} | {"metric": "agreement"}
    result = {name: value for name, value in made.items() if name not in ("top1", "top5", "loss")}
    result |= scores | {"unseen_sha256": "ab" * 32, "best": best, "teacher": teacher} | changes
    write_json(folder / "result.json", result)
    return result


def write_failure(store: Store, cell: Cell, kind: str = "Diverged", **known: Any) -> None:
    """All files of a cell that ended without a result."""
    store.write_cell(cell.record())
    store.write_failure(cell.id, kind, "diverged: the loss is nan in epoch 5" if kind == "Diverged" else "out of luck", "", **known)


def sizes(cell: Cell) -> dict[str, Any]:
    """As results of this version have them: a ResNet-20's, roughly."""
    bits, macs = cell.bits, 40_551_040
    student = {"bytes": 16_000 + 33_500 * bits.weights, "weight_bits": float(bits.weights), "macs": macs, "bops": macs * bits[0] * bits[1]}
    return {"teacher": {"bytes": 1_084_392, "weight_bits": 32.0, "macs": macs, "bops": macs * 1024}, "student": student}


def make_store(root: Path, count: int, images: int = 1000, sized: bool = False) -> Store:
    """sized: with sizes, which results of earlier versions lack."""
    store = Store(root, writable=True)
    for cell in cells(count):
        write_cell(store, cell, images, **{"size": sizes(cell)} if sized else {})
    return store


CHOSEN = [("pareto", 1, "pareto"), ("dnq", 1, "dnq"), ("dnq", 2, "dnq(updates=2)")]  # allocator, a setting, what tables say
BITS = {"conv1": 5, "layer1.0.conv1": 2, "linear": 8, "quantizers.relu": 3}  # of layers, and of an activation


def write_budgets(root: Path, plain: bool = True) -> Store:
    """gdfq and round at w4a4 and w3a3, seeds 0 and 1, with what CHOSEN chose; plain: and with equal widths."""
    store = Store(root, writable=True)
    chosen = [Allocation(name, 1, {"n": n}, False, text, images="0" * 12, pool={}) for name, n, text in CHOSEN]
    costs = {"cost": 0.1, "uniform_cost": 0.4, "unseen_cost": 0.125, "unseen_uniform_cost": 0.5}
    entries = {name: 9 if name.startswith("quantizers.") else 100 for name in BITS}
    for cell in cells(100):
        if cell.method not in ("gdfq", "round") or cell.changed or cell.bits.weights > 4 or cell.seed > 1:
            continue
        if plain:
            write_cell(store, cell, 100, size=sizes(cell))
        for allocation in chosen:
            its = replace(cell, allocation=allocation, changed={"allocate": allocation.text})
            made = {"allocator": allocation.allocator, "bits": BITS, "entries": entries, "average_weight_bits": 2.98, **costs}
            write_cell(store, its, 100, size=sizes(its), allocation=made)
    return store


if __name__ == "__main__":
    make_store(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
