"""dfqbench speed: steps per second, and what a run costs beside them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dfqbench.cli.options import Device, Threads, console_of
from dfqbench.errors import UserError


def speed(
    methods: Annotated[str, typer.Option(help="Names with commas between.")] = "gdfq,acq,zaq,lrq,gznq",
    network: Annotated[str, typer.Option(help="A model as in a config, like pytorchcv:resnet18; its weights do not matter.")] = "cifar:resnet20",
    batch_size: Annotated[int, typer.Option(min=2)] = 200,
    preset: Annotated[str | None, typer.Option(help="The methods' own set of settings, like imagenet; no default budget.")] = None,
    device: Device = "auto",
    threads: Threads = None,
    precisions: Annotated[str, typer.Option(help="fp32, bf16, and on a GPU tf32; with commas between.")] = "fp32,bf16",
    rounds: Annotated[int, typer.Option(min=1, help="How often all contenders take their turn.")] = 3,
    seconds: Annotated[float, typer.Option(min=0, help="About how long a turn is.")] = 5.0,
    out: Annotated[Path | None, typer.Option(readable=False, help="Write the figures here too; `auto`: results/speed/DEVICE.json.")] = None,
    overheads: Annotated[
        bool,
        typer.Option("--overheads", help="Instead: planning, start of a worker, memory; into results/speed/overheads-DEVICE.json."),
    ] = False,
) -> None:
    """Measure steps per second of methods, next to a textbook loop, a competent eager loop and the device's floor."""
    from dfqbench.errors import nearest

    if overheads:
        _overheads(device, threads, rounds, out)
        return

    wanted = methods.split(",")
    given = precisions.split(",")
    for precision in given:
        if precision not in ("fp32", "tf32", "bf16"):
            raise UserError(f"--precisions {precision!r}: {nearest(precision, ('fp32', 'tf32', 'bf16'))}")
    import torch

    from dfqbench.engine.device import use_device
    from dfqbench.files import write_json
    from dfqbench.method.registry import find_method
    from dfqbench.method.settings import without_default
    from dfqbench.run.pretrain import check_writable
    from dfqbench.speed import steps
    from dfqbench.speed.estimate import network_of
    from dfqbench.store.provenance import provenance
    from dfqbench.teachers import UNTRAINED, parse_teacher
    from dfqbench.teachers.build import build
    from dfqbench_methods.textbook import loops

    for name in wanted:
        if needed := without_default(find_method(name).Config):
            raise UserError(f"--methods {name}: it has settings without a default: {', '.join(needed)}")
    presets = {known for name in wanted for known in find_method(name).Config.presets}
    if preset is not None and preset not in presets:
        raise UserError(f"--preset {preset!r}: {nearest(preset, presets)}")
    if threads is not None:
        torch.set_num_threads(threads)
    where = use_device(device)
    if "tf32" in given and where.type == "cpu":
        raise UserError("--precisions tf32: a CPU has none")
    built = build(parse_teacher({"model": network, "weights": UNTRAINED}))
    stand = steps.Stand(built.network, built.task, batch_size, where, network_of(network), preset)
    textbooks = loops() if network.startswith("cifar:") else {}  # they are written for these networks
    say = console_of(stderr=True).print
    found = provenance(where)
    path = Path("results/speed") / f"{steps.file_name(found)}.json" if str(out) == "auto" else out
    if path is not None:
        check_writable(path)
    rows = []
    try:
        for row in steps.measure(wanted, textbooks, stand, given, rounds, seconds, say):
            rows.append(row)
            if path is not None:  # after every row: a run that is cut short keeps what it has
                write_json(path, steps.record(rows, stand, " ".join(["dfqbench", *sys.argv[1:]]), found))
    except KeyboardInterrupt:
        say("stopped; what was measured so far:")
    _print_speeds(rows)
    if path is not None and rows:
        print(f"written to {path}")


def _overheads(device: str, threads: int | None, rounds: int, out: Path | None) -> None:
    import os

    import torch

    from dfqbench.engine.device import use_device
    from dfqbench.files import write_json
    from dfqbench.run.pretrain import check_writable
    from dfqbench.speed import overheads, steps
    from dfqbench.speed.estimate import OVERHEADS
    from dfqbench.store.provenance import provenance

    if threads is not None:
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that are measured
    where = use_device(device)
    on = provenance(where)
    path = Path("results/speed") / f"{OVERHEADS}{steps.file_name(on)}.json" if out is None or str(out) == "auto" else out
    check_writable(path)
    found: list[overheads.Overhead] = []
    for overhead in overheads.measure(str(where), rounds, console_of(stderr=True).print):
        found.append(overhead)
        write_json(path, overheads.record(found, " ".join(["dfqbench", *sys.argv[1:]]), on))
        clock, processor = overhead.seconds
        limit = f", wanted: {overhead.wanted:g} s" if overhead.wanted is not None else ""
        resident = ", ".join(f"{mb} MB after {step}" for step, mb in overhead.notes.get("resident_mb", {}).items())
        print(f"{overhead.what}: {clock:.2f} s by the clock, {processor:.2f} s of the processor{limit}{resident and f'; {resident}'}")
    print(f"written to {path}")


def _print_speeds(rows: list) -> None:  # type: ignore[type-arg]
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for heading in ("method", "phase", "loop", "", "widths", "steps/s", "x textbook", "of floor", "spread"):
        shown.add_column(heading, justify="right" if heading in ("widths", "steps/s", "x textbook", "of floor", "spread") else "left", no_wrap=True)
    for r in rows:
        against = f"{r.against:.2f}" if r.against else "-"
        floor = f"{r.floor / r.seconds:.0%}" if r.floor else "-"
        shown.add_row(r.method, r.phase, r.contender, r.precision, str(r.widths), f"{1 / r.seconds:.2f}", against, floor, f"{r.spread:.2f}")
    console = console_of()
    console.print(shown)
    console.print(
        "steps/s: of each bit width; x textbook: times the speed of the textbook loop; of floor: least possible seconds / seconds", highlight=False
    )
