"""Which student is meant: a file, a cell's folder, or a cell of a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqbench.errors import UserError
from dfqbench.files import read_json
from dfqbench.store import Store
from dfqbench.teachers.spec import UNTRAINED, ZOOS, parse_teacher

if TYPE_CHECKING:
    from torch import Tensor

    from dfqbench.export.student_file import StoredStudent

NAME = "student.safetensors"


def student_path(given: str | Path, results: str | Path = "results") -> Path:
    """The file that `given` stands for: itself, the one in a cell's folder, or the one of a cell of `results` by its id or its first letters.

    Raises UserError where there is none, and says why where the store knows.
    """
    path = Path(given)
    if path.is_file() or path.suffix == ".safetensors":
        return path
    if path.is_dir():
        folder = path
    else:
        store = Store(results)
        folder = store.folder(store.find(str(given)))
    if (folder / NAME).is_file():
        return folder / NAME
    try:
        result = read_json(folder / "result.json")
    except (ValueError, OSError) as error:
        raise UserError(f"{folder / 'result.json'}: {error}") from None
    if not isinstance(result, dict):
        what = "the cell is not finished" if (folder / "cell.json").is_file() else "it is no cell's folder"
        raise UserError(f"{folder} holds no student: {what}")
    why = (result.get("student") or {}).get("not_kept") or "it was not kept (`store: {students: off}`), or an earlier version ran the cell"
    raise UserError(f"{folder} holds no student: {why}")


def load_student(given: str | Path, results: str | Path = "results") -> StoredStudent:
    """The quantized network of a finished cell: `load_student("3f2a91c04b7d")`, or of a file: `load_student("student.safetensors")`.

    A `torch.nn.Module` in eval mode on the CPU; called with normalised images (N x C x H x W; `.task` says mean, std and size) it gives the answer
    that was evaluated, to the bit on a CPU. Neither the teacher nor its code is needed. `.about` says where it comes from. A detector's `.decode`
    is there where its teacher is a zoo's; else it is the user's code, and stands in no file: set it.
    Raises UserError for what is no student's file, and for one that is damaged or of a later format.
    """
    from dfqbench.export.student_file import load_student_file

    student = load_student_file(student_path(given, results))
    if student.task.kind == "detect":
        cell = student.about.get("cell")
        model = cell["teacher"]["model"] if isinstance(cell, dict) else ""
        if model.partition(":")[0] in ZOOS:
            student.decode = _DecodeOfZoo(model, student.task.classes)
    return student


class _DecodeOfZoo:
    """A zoo's way from a detector's answer to boxes, which no file holds: the network is built when it is first asked for."""

    def __init__(self, model: str, classes: int):
        self.model, self.classes = model, classes
        self.found: Any = None

    def __call__(self, native: Any, height: int, width: int) -> list[dict[str, Tensor]]:
        if self.found is None:
            from dfqbench.teachers.build import build

            self.found = build(parse_teacher({"model": self.model, "weights": UNTRAINED, "classes": self.classes})).network.decode
        boxes: list[dict[str, Tensor]] = self.found(native, height, width)
        return boxes
