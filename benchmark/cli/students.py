"""dfqbench evaluate: the quantized network of a cell, measured again."""

from __future__ import annotations

from typing import Annotated

import typer

from dfqbench.cli.options import DEFAULT_RESULTS, Device, Plugins, Results, Threads

OnSet = Annotated[str, typer.Option("--on", help="An evaluation set, as in a config: cifar10, imagenet:ROOT, imagefolder:PATH, ...")]


def evaluate(
    student: Annotated[
        str, typer.Argument(metavar="CELL_OR_FILE", help="A finished cell's id, or as many of its first letters as no other has; or a file.")
    ],
    on: OnSet,
    results: Results = DEFAULT_RESULTS,
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
    for line in in_words(measure(student, on, results, device)):
        print(line)
