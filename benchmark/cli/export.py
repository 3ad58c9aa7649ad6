"""dfqbench export: the quantized network of a cell as a file that other runtimes read."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfqbench.cli.options import DEFAULT_RESULTS, Results, Threads, one_of
from dfqbench.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from dfqbench.export.verify import Batches
    from dfqbench.task import Task


def export(
    student: Annotated[
        str, typer.Argument(metavar="CELL_OR_FILE", help="A finished cell's id, or as many of its first letters as no other has; or a file.")
    ],
    to: Annotated[str, typer.Option("--to", help="onnx, or torch: a torch.export program.")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="The file to write; default: CELL_OR_FILE's name with .onnx or .pt2, in this folder.")] = None,
    on: Annotated[
        str | None, typer.Option("--on", help="Compare answers on this evaluation set, as in a config; default: on images of random pixels.")
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Compare on the first so many images of --on; default: on all.")] = None,
    time: Annotated[bool, typer.Option("--time", help="Also time the ONNX file beside the same network in floats, on one thread.")] = False,
    results: Results = DEFAULT_RESULTS,
    threads: Threads = None,
) -> None:
    """Write a quantized network for onnxruntime and others, run the file, and compare its answers with the network's own."""
    from dfqbench.export.export import ENDINGS, check_extra, timing
    from dfqbench.export.export import export as write

    one_of("--to", to, ENDINGS)
    if to == "onnx":
        check_extra()
    elif time:
        raise UserError("--time is of --to onnx: what is timed runs in onnxruntime")
    if out is not None and out.suffix in set(ENDINGS.values()) - {ENDINGS[to]}:  # type: ignore[index]
        raise UserError(f"--out {out}: a file of --to {to} ends with {ENDINGS[to]}")  # type: ignore[index]
    if images is not None and on is None:
        raise UserError("--images is of --on: it says how many images of the set are looked at")
    import torch

    from dfqbench.export.find import load_student, student_path
    from dfqbench.export.verify import Rejected

    if threads is not None:
        torch.set_num_threads(threads)
    source = student_path(student, results)
    loaded = load_student(source)
    name = source.parent.name if source.name == "student.safetensors" else source.stem
    path = out or Path(f"{name or 'student'}{ENDINGS[to]}")  # type: ignore[index]
    batches = images_of(on, loaded.task, images) if on is not None else None
    print(f"answers compared on {on or 'images of random pixels'}")
    try:
        for agreement in write(loaded, path, to, batches):  # type: ignore[arg-type]
            print(agreement)
    except Rejected as rejected:
        for line in str(rejected).splitlines():
            print(f"dfqbench: {line}", file=sys.stderr)
        raise typer.Exit(1) from None
    print(f"written to {path}: {path.stat().st_size / 1e6:.2f} MB")
    if to == "onnx":
        from dfqbench.export.onnx_run import advice, outputs_of

        print(f"outputs: {', '.join(outputs_of(path))}")
        for line in advice(path):
            print(line)
    if time:
        found = timing(loaded, path)
        print(f"one image on one thread: {found['ms']:.2f} ms, in floats {found['float_ms']:.2f} ms: {found['ratio']:.2f} times as fast")
        print(f"in floats {found['float_bytes'] / 1e6:.2f} MB: {found['float_bytes'] / found['bytes']:.1f} times as large")


def images_of(name: str, task: Task, limit: int | None = None, batch_size: int = 100) -> Batches:
    """The images of an evaluation set, normalised as `task` says; of at most `limit` images."""
    import torch

    from dfqbench.data import find_set
    from dfqbench.engine.evaluate import normalise

    decoded = find_set(name).decode(task)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (task.mean, task.std))

    def batches() -> Iterator[Tensor]:
        left = limit if limit is not None else len(decoded)
        for pixels, _ in decoded.batches(batch_size):
            if left <= 0:
                return
            yield normalise(torch.from_numpy(pixels[:left]), mean, std)
            left -= len(pixels)

    return batches
