"""Exporting a student: the file is written under another name, run, compared with the student, and only then gets its own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dfqbench.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from dfqbench.export.verify import Agreement, Batches
    from dfqbench.network import Network
    from dfqbench.quantization.student import Student

Format = Literal["onnx", "torch"]
ENDINGS: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}
RANDOM_PIXELS = 2**22  # of random images, where there are no others


def check_extra() -> None:
    """UserError where the packages are absent that an ONNX file needs."""
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")):
        raise UserError("dfqbench export needs the extra: pip install 'dfqbench[export]'")


def export(student: Student, path: Path, to: Format = "onnx", batches: Batches | None = None) -> list[Agreement]:
    """Writes the student to `path`, for onnxruntime and others (`onnx`) or as a torch.export program (`torch`), and compares their answers.

    batches: gives normalised images, the same at every call; random ones if None. Returns how the file's answers compare, for each way in which it
    was run. Raises UserError where the network cannot be written, and `Rejected` where the answers differ by more than rounding.
    """
    from dfqbench.export.verify import Rejected, random_images

    if to == "onnx":
        check_extra()
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")
    draft = path.with_name(f"{path.name}.rejected")
    about = {key: value if isinstance(value, str) else json.dumps(value) for key, value in getattr(student, "about", {}).items() if value is not None}
    try:
        found = _written(student, draft, to, batches or random_images(student.task, random_count(student)), about)
    except Rejected as error:
        raise Rejected(f"{error}: the file is left as {draft}") from error
    if not all(agreement.passes for agreement in found):
        raise Rejected("\n".join([*map(str, found), f"the file does not answer as the student does: it is left as {draft}"]))
    draft.replace(path)
    return found


def random_count(network: Network) -> int:
    """How many random images a network is checked on."""
    return max(16, min(256, RANDOM_PIXELS // network.task.size**2))


def _written(student: Student, path: Path, to: Format, batches: Batches, about: dict[str, str]) -> list[Agreement]:
    if to == "onnx":
        from dfqbench.export.onnx_file import export_onnx
        from dfqbench.export.onnx_run import verified

        export_onnx(student, path, about)
        return verified(student, path, batches)
    from torch.utils._pytree import tree_leaves

    from dfqbench.export.torch_program import load_program, save_program
    from dfqbench.export.verify import agreements

    save_program(student, path, about)
    loaded = load_program(path)

    def answering(images: Tensor) -> Tensor:
        return student.answer_of(tree_leaves(loaded(images)))

    return agreements(student, {"loaded again": answering}, batches)


def timing(student: Student, path: Path, pairs: int = 30) -> dict[str, Any]:
    """One image on one thread of this CPU, in the ONNX file and in one of the same network in floats: `ratio` (above 1: faster than floats), the
    milliseconds and the bytes of both (`ms`, `bytes`, `float_ms`, `float_bytes`)."""
    from dfqbench.export.onnx_file import export_onnx
    from dfqbench.export.onnx_run import speed_ratio

    floats = path.with_name(f"{path.name}.floats")
    try:
        export_onnx(student, floats, quantized=False)
        ratio, own, other = speed_ratio(path, floats, student.task.image_shape, pairs)
        return {"ratio": ratio, "ms": own, "float_ms": other, "bytes": path.stat().st_size, "float_bytes": floats.stat().st_size}
    finally:
        floats.unlink(missing_ok=True)
