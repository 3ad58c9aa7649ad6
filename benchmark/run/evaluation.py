"""Measures a kept student again, and says whether it answers as its cell did."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dfqbench.analysis.records import Counts, counts_of, read_correct
from dfqbench.data import find_set
from dfqbench.engine.device import products_in, use_device
from dfqbench.engine.evaluate import DenseEvaluation, Evaluation, evaluate_task
from dfqbench.engine.exits import early_exits
from dfqbench.errors import Notice, UserError
from dfqbench.export.find import load_student, student_path
from dfqbench.files import read_json
from dfqbench.metrics import metric_of
from dfqbench.store import Store
from dfqbench.store.cache import cache_folder
from dfqbench.store.provenance import provenance
from dfqbench.sweep.cell import without_data
from dfqbench.teachers.own import function_of

OF_ROUNDING = ("device_name", "torch", "cpu_capability", "threads")  # of provenance: where the last bits of a logit come from


@dataclass(frozen=True)
class Measured:
    """A student's file on an evaluation set.

    result: as a cell's result.json, of what a file knows. per_image: packed bits of right images, in the set's order; of dense tasks their counts.
    against_cell: what its cell's own result says beside it, a line; "" where no such result is at hand.
    """

    path: Path
    set_name: str
    result: dict[str, Any]
    per_image: NDArray[np.uint8] | Counts
    against_cell: str


def measure(given: str, set_name: str, results: Path, device_name: str = "auto", batch_size: int = 500, decode: str | None = None) -> Measured:
    """Evaluates the student of a file or a cell as `run` does: same batches, same precision. Raises UserError for what cannot be.

    decode: of a detector, whose file has none, the function that makes boxes, as FILE.py:NAME or package.module:NAME.
    """
    path, device = student_path(given, results), use_device(device_name)
    student = load_student(path)
    if student.task.kind == "detect" and student.decode is None:
        if decode is None:
            raise UserError(f"{path} is a detector's, and keeps no code: give the function that makes boxes of its answer, --decode FILE.py:NAME")
        student.decode = function_of(decode)
    found = find_set(set_name)
    found.check(student.task)
    cell: dict[str, Any] = student.about.get("cell") or {}
    precision = cell.get("precision", "fp32")
    images = found.decode(student.task)

    def smaller(size: int) -> None:
        warnings.warn(f"out of memory: tried again with batches of {size}", Notice)

    if precision == "tf32" and device.type != "cuda":
        warnings.warn(f"trained in tf32, which only a GPU has: on {device} it computes in fp32", Notice)
    with products_in(precision):
        evaluation = evaluate_task(student, images, student.task, device, precision, batch_size, smaller)
        exits = early_exits(student, images, student.task, device, precision, batch_size) if student.task.exits > 1 else None
    packed = np.packbits(evaluation.correct) if isinstance(evaluation, Evaluation) else None
    per_image = counts_of(evaluation.metric, evaluation.per_image) if isinstance(evaluation, DenseEvaluation) else np.packbits(evaluation.correct)
    digest = found.digest(cache_folder())
    identity = {**cell.get("identity", {}), "evaluation": digest}
    named = {"name": found.name, "classes": found.classes, "images": len(found)}
    result = {
        "id": cell.get("id", path.name),
        "cell": {**_unknown(path, student), **cell, "identity": identity, "evaluation": named},
        **evaluation.scores(),
        **({"exits": exits} if exits else {}),
        "steps": student.about.get("steps"),
        "last_epoch": student.about.get("last_epoch"),
        "teacher": {evaluation.metric: None},
        "provenance": provenance(device),
    }
    return Measured(path, found.name, result, per_image, _against(path, cell, results, digest, result, packed, provenance(device)))


def _unknown(path: Path, student: Any) -> dict[str, Any]:
    """What stands for a cell's record in a file that was saved by hand."""
    teacher = {"label": student.traced.meta.get("network", ""), "weights_sha256": ""}
    return {"label": path.name, "method": path.name, "teacher": teacher, "bits": str(student.bits), "seed": "-", "protocol": student.protocol.name}


def _against(
    path: Path, cell: dict[str, Any], results: Path, digest: str, ours: dict[str, Any], packed: NDArray[np.uint8] | None, here: dict[str, Any]
) -> str:
    """The cell's own result, from the file's folder or the store, image by image."""
    for folder in [path.parent, *([Store(results).folder(cell["id"])] if "id" in cell else [])]:
        try:
            kept = read_json(folder / "result.json")
        except (ValueError, OSError) as error:
            return f"{folder / 'result.json'}: {error}"
        if not isinstance(kept, dict) or kept.get("id") != cell.get("id"):
            continue
        if without_data(kept["cell"]):
            made = kept["cell"]["evaluation"].get("made", "unknown")
            on = f"{kept['images']} synthetic images ({made})"
            return (
                f"cell {kept['id']} was scored without data: agreement with its teacher {kept['agreement']:.2f} %, KL {kept['kl']:.3g} nats, on {on}"
            )
        if kept["cell"]["identity"]["evaluation"] != digest:
            return f"cell {kept['id']} was evaluated on another set ({kept['cell']['evaluation']['name']})"
        if packed is None:
            key = metric_of(ours).key
            return f"cell {kept['id']}: {metric_of(ours).name} {kept[key]:.4f} % when it ended, {ours[key]:.4f} % now"
        theirs = read_correct(folder / "correct.npy", kept)
        if theirs is None:
            return f"{folder / 'correct.npy'}: missing or damaged: only {kept['correct']} correct images are known of cell {kept['id']}"
        return f"cell {kept['id']}: {_difference(packed, theirs, kept, here)}"
    return ""


def _difference(ours: NDArray[np.uint8], theirs: NDArray[np.uint8], kept: dict[str, Any], here: dict[str, Any]) -> str:
    gained, lost = (int(np.bitwise_count(a & ~b).sum()) for a, b in ((ours, theirs), (theirs, ours)))
    if not gained and not lost:
        return f"the same {kept['correct']} of {kept['images']} images right as when it ended"
    told = [{**kind, "torch": kind["packages"].get("torch")} for kind in (kept["provenance"], here)]
    differs = [f"{key} {told[0].get(key)} then, {told[1].get(key)} now" for key in OF_ROUNDING if told[0].get(key) != told[1].get(key)]
    return f"{gained} images right that were wrong, {lost} wrong that were right" + (f" ({'; '.join(differs)})" if differs else "")


def exits_in_words(exits: dict[str, Any]) -> list[str]:
    """Of early exits, a line for each and one for each confidence at which images leave."""
    each = [
        f"exit {i + 1}: top-1 {top1:.2f} %, {macs / 1e6:.1f} M MACs" for i, (top1, macs) in enumerate(zip(exits["top1"], exits["macs"], strict=True))
    ]
    sure = [
        f"leaving at {at['confidence']:.0%} confidence: {' / '.join(f'{share:.1f}' for share in at['shares'])} % by exit, "
        f"top-1 {at['top1']:.2f} %, {at['macs'] / 1e6:.1f} M MACs on average"
        for at in exits["leaving"]
    ]
    return each + sure


def in_words(measured: Measured) -> list[str]:
    """Lines for a terminal."""
    result, cell = measured.result, measured.result["cell"]
    seed = "" if cell["seed"] == "-" else f" seed {cell['seed']}"
    metric = metric_of(result)
    if metric.key != "top1":
        beside = "".join(f", {name} {result[key]:.2f} %" for key, name in metric.beside.items())
        scored = f"{metric.name} {result[metric.key]:.2f} % ({result['images']} images){beside}"
    else:
        top5 = "" if result["top5"] is None else f", top-5 {result['top5']:.2f} %"
        scored = f"top-1 {result['top1']:.2f} % ({result['correct']} of {result['images']}){top5}"
    lines = [
        f"{measured.path}: {cell['label']} {cell['teacher']['label']} {cell['bits']}{seed}",
        f"{measured.set_name}: {scored}",
    ]
    lines += exits_in_words(result["exits"]) if "exits" in result else []
    return [*lines, *([measured.against_cell] if measured.against_cell else [])]
