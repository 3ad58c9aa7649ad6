"""One call from a trained network to its quantized copy, without any data: a sweep of one cell, in a store like any other."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from dfqbench.engine.device import settings_kept
from dfqbench.errors import UserError
from dfqbench.export.find import load_student
from dfqbench.quantization import Bits
from dfqbench.run.options import Options, StopFlag
from dfqbench.run.progress import Progress, make_progress
from dfqbench.run.runner import run_sweep
from dfqbench.store import Store
from dfqbench.store.cache import cache_folder
from dfqbench.sweep.load import LoadedSweep, span_sweep
from dfqbench.sweep.schema import Selection, unseen_images
from dfqbench.teachers.in_memory import in_memory

if TYPE_CHECKING:
    from torch import nn

    from dfqbench.export.student_file import StoredStudent
    from dfqbench.sweep.cell import Cell
    from dfqbench.teachers import InMemory

AUTO: list[Any] = ["round", "zeroq", {"gznq": {"images": 256, "synthesis_iterations": 500}}]  # what `auto` tries: none of them trains the student


def quantize(
    network: nn.Module,
    *,
    size: int | None = None,
    classes: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    method: str = "gznq",
    bits: str = "w8a8",
    protocol: str | dict[str, Any] = "hardware",
    seed: int = 0,
    folder: str | Path | None = None,
    device: str = "auto",
    progress: bool = True,
    selection: dict[str, Any] | None = None,
    allocate: str | dict[str, Any] | None = None,
    **settings: Any,
) -> StoredStudent:
    """A quantized copy of a trained network, made without any data.

    size (pixels a side), classes, mean and std (per channel, of images scaled to [0, 1]) say what the network was trained on; each may also be an
    attribute of the network. method: one that `dfqbench methods list` shows, with its own settings as further arguments (`epochs=40`); or `auto`,
    which tries round, zeroq and gznq (256 images, 500 steps) and keeps the one with the lowest KL to the network. folder: a results folder; called
    again with the same arguments, it goes on where it was interrupted, or answers at once. selection: what makes the images to score on, as in a
    config. allocate: an allocator (`"pareto"`, `{"dnq": {"updates": 40}}`) that gives each layer a width of its own; the weights of `bits`, such as
    "w3.5a8", are then the average, and it chooses on as many images as are scored on, of another seed.

    Returns the student as `load_student` does, with `.score`: its agreement with the network (percent) and KL (nats) on synthetic images that
    nothing was trained on, and the same of plain rounding. `.save(PATH)` and `.export(PATH)` write it. The network itself stays as it is.
    Raises UserError for what cannot be, KeyboardInterrupt after Ctrl-C (what is done is kept in `folder`).
    """
    held = in_memory(network, size=size, classes=classes, mean=mean, std=std)
    content = content_of(held.card.label, method, bits, protocol, seed, selection, settings, allocate)
    with _folder(folder) as place, torch.random.fork_rng(), settings_kept():
        shown = make_progress(Console(quiet=not progress))
        return quantized(spanned(content, shown.say, networks={held.card.label: held}), Store(place, writable=True), device, shown)


def content_of(
    teacher: str | dict[str, Any],
    method: str,
    bits: str,
    protocol: str | dict[str, Any],
    seed: int,
    selection: dict[str, Any] | None,
    settings: dict[str, Any],
    allocate: str | dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The sweep, as a config file would hold it."""
    if method == "auto" and settings:
        raise UserError(f"method auto: {', '.join(settings)}: settings are of one method; name it")
    methods: list[Any] = AUTO if method == "auto" else [{method: settings}]
    made = {"selection": selection} if selection else {}
    return {
        "name": "quantize",
        "teachers": [teacher],
        "evaluate": "none",
        "methods": methods,
        "bits": [_budget(bits, allocate) if allocate else bits],
        "seeds": [seed],
        "protocol": protocol,
    } | made


def _budget(bits: str, allocate: str | dict[str, Any]) -> dict[str, Any]:
    average = Bits.parse(bits, average=True)
    return {"average_weight_bits": average.weights, "activations": average.activations, "allocate": allocate}


def spanned(
    content: dict[str, Any],
    say: Callable[[str], None],
    plugins: list[str] | None = None,
    networks: Mapping[str, InMemory] | None = None,
    images: int = 64,
) -> LoadedSweep:
    """The sweep of `content_of`. Of the methods that `auto` tries, those that the network is not made for are left out, and told.

    images: how many to score on, where the content does not say which.
    """

    def span(methods: list[Any], **changes: Any) -> LoadedSweep:
        return span_sweep({**content, "methods": methods, **changes}, Path("quantize"), "", cache_folder(), plugins, networks)

    if "selection" not in content:
        any_kind = unseen_images(images, "zeroq")
        try:  # images of asked classes say most about a student, but not every network has what they are made with
            span([{"gznq": {}}], selection=any_kind)
            content = {**content, "selection": unseen_images(images)}
        except UserError:
            content = {**content, "selection": any_kind}
    if not isinstance(content["bits"][0], str):
        choosing = content["selection"]
        content = {**content, "allocation": {**choosing, "seed": choosing.get("seed", Selection.model_fields["seed"].default) + 1000}}
    if content["methods"] is not AUTO:
        return span(content["methods"])
    fit, refused = [], []
    for method in AUTO:
        try:
            span([method])
            fit.append(method)
        except UserError as why:
            refused.append(why)
    if not fit:
        raise refused[0]
    for refusal in refused:
        say(f"left out: {refusal}")
    return span(fit)


def quantized(loaded: LoadedSweep, store: Store, device: str, progress: Progress) -> StoredStudent:
    """Runs what is missing of the sweep's cells (of one teacher at one width), and loads the student with the lowest KL."""
    try:
        with StopFlag().installed() as stop:
            summary = run_sweep(loaded, store, Options(device, retry_failed=True), progress, stop)
    finally:
        progress.stop()
    if summary.interrupted:
        raise KeyboardInterrupt
    found = [result for cell in loaded.cells if (result := store.result(cell.id)) is not None]
    if not found:
        raise UserError(_why(loaded.cells, store))
    best = min(found, key=lambda result: float(result["kl"]))
    if len(loaded.cells) > 1:
        for result in sorted(found, key=lambda result: float(result["kl"])):
            chosen = " (kept)" if result is best else ""
            progress.say(f"{result['cell']['label']}: KL {result['kl']:.3g} nats, agreement {result['agreement']:.2f} %{chosen}")
    student = load_student(best["id"], store.root)
    student.score = {key: best[key] for key in ("agreement", "kl", "images", "plain_rounding")} | {"made": best["cell"]["evaluation"]["made"]}
    return student


def _why(cells: list[Cell], store: Store) -> str:
    failures = [failure for cell in cells if (failure := store.failure(cell.id)) is not None]
    said = "; ".join(f"{failure['kind']}: {(failure['message'].splitlines() or [''])[0]}" for failure in failures)
    return f"no student was made: {said or 'another process is at work on it'}"


@contextlib.contextmanager
def _folder(given: str | Path | None) -> Iterator[Path]:
    if given is not None:
        yield Path(given)
        return
    with tempfile.TemporaryDirectory(prefix="dfqbench-") as folder:
        yield Path(folder)
