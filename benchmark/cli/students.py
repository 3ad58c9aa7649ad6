"""dfqbench quantize and evaluate: one network quantized without a sweep; the quantized network of a cell, measured again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dfqbench.cli.options import DEFAULT_RESULTS, Device, Plugins, Results, Threads, console_of
from dfqbench.errors import UserError
from dfqbench.yaml_file import value_of

OnSet = Annotated[str, typer.Option("--on", help="An evaluation set, as in a config: cifar10, imagenet:ROOT, imagefolder:PATH, ...")]


def quantize(
    network: Annotated[
        str, typer.Argument(metavar="NETWORK", help="A zoo's (timm:efficientnet_lite0), path/to/file.py:factory or package.module:factory.")
    ],
    to: Annotated[Path, typer.Option("--to", readable=False, help="The file to write: .onnx, .pt2 or .safetensors.")],
    weights: Annotated[str | None, typer.Option(help="A .safetensors, .pth or .pt file; default: the zoo's or the factory's.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of the square input image in pixels; default: as the zoo says.")] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes; default: as the zoo says.")] = None,
    mean: Annotated[str | None, typer.Option(help="Of images scaled to [0, 1], a number per channel: 0.485,0.456,0.406.")] = None,
    std: Annotated[str | None, typer.Option(help="As --mean.")] = None,
    method: Annotated[str, typer.Option(help="A method, or auto: tries round, zeroq and gznq.")] = "gznq",
    bits: Annotated[str, typer.Option(help="Bit widths of weights and activations.")] = "w8a8",
    allocate: Annotated[
        str | None, typer.Option(help="An allocator: each layer has a width of its own, and --bits (like w3.5a8) says the average of weights.")
    ] = None,
    protocol: Annotated[str, typer.Option(help="Quantization rules: hardware, lineage, or a YAML file.")] = "hardware",
    settings: Annotated[list[str] | None, typer.Option("--set", help="A setting of the method, NAME=VALUE; may be given again.")] = None,
    seed: int = 0,
    images: Annotated[int, typer.Option(min=2, help="Synthetic images to score on, which nothing is trained on.")] = 64,
    results: Results = DEFAULT_RESULTS,
    device: Device = "auto",
    threads: Threads = None,
    plugin: Plugins = None,
) -> None:
    """Quantize one network without any data and write the file; Ctrl-C saves, the same command goes on."""
    endings = (".onnx", ".pt2", ".safetensors")
    if to.suffix not in endings:
        raise UserError(f"--to {to}: the name must end with {', '.join(endings[:-1])} or {endings[-1]}")
    if not to.parent.is_dir():
        raise UserError(f"--to {to}: there is no folder {to.parent}")
    if to.suffix == ".onnx":
        from dfqbench.export.export import check_extra

        check_extra()
    given = {"model": network, "weights": weights, "size": size, "classes": classes, "mean": _numbers("--mean", mean), "std": _numbers("--std", std)}
    teacher = {key: value for key, value in given.items() if value is not None}
    console = console_of()
    import torch

    from dfqbench.export.verify import Rejected
    from dfqbench.run.progress import make_progress
    from dfqbench.run.quantize import content_of, quantized, spanned
    from dfqbench.store import Store

    if threads is not None:
        torch.set_num_threads(threads)
    content = content_of(teacher, method, bits, protocol, seed, None, _settings(settings or []), value_of(allocate or "null"))
    progress = make_progress(console)
    student = quantized(spanned(content, progress.say, plugin, images=images), Store(results, writable=True), device, progress)
    if to.suffix == ".safetensors":
        student.save(to)
    else:
        try:
            for line in student.export(to):
                print(line)
        except Rejected as rejected:
            raise UserError(str(rejected)) from None
    print(f"written to {to}: {to.stat().st_size / 1e6:.2f} MB; cell {student.about['cell']['id']} in {results}")


def _numbers(option: str, given: str | None) -> list[float] | None:
    try:
        return None if given is None else [float(part) for part in given.split(",")]
    except ValueError:
        raise UserError(f"{option} {given!r}: a number per channel, with commas between, like 0.485,0.456,0.406") from None


def _settings(given: list[str]) -> dict[str, Any]:
    """NAME=VALUE, with values as YAML has them."""
    found = {}
    for setting in given:
        name, sign, value = setting.partition("=")
        if not sign or not name:
            raise UserError(f"--set {setting!r}: NAME=VALUE is expected, like images=640")
        found[name] = value_of(value)
    return found


def evaluate(
    student: Annotated[
        str, typer.Argument(metavar="CELL_OR_FILE", help="A finished cell's id, or as many of its first letters as no other has; or a file.")
    ],
    on: OnSet,
    results: Results = DEFAULT_RESULTS,
    decode: Annotated[
        str | None, typer.Option(metavar="FILE.py:NAME", help="Of a detector: the function that makes boxes of what its head says.")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    plugin: Plugins = None,
) -> None:
    """Measure a quantized network again, and say whether it gets the same images right as when its cell ended."""
    import torch

    from dfqbench.method.registry import load_plugin
    from dfqbench.run.evaluation import in_words, measure

    for file in plugin or ():
        load_plugin(file)
    if threads is not None:
        torch.set_num_threads(threads)
    for line in in_words(measure(student, on, results, device, decode=decode)):
        print(line)
