"""dfqbench run, plan, select and pretrain: what computes on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dfqbench.cli.options import DEFAULT_RESULTS, Config, Device, Plugins, Results, Threads, console_of, load, one_of
from dfqbench.errors import UserError


def run(
    config: Config,
    results: Results = DEFAULT_RESULTS,
    device: Device = "auto",
    threads: Threads = None,
    checkpoint_every: Annotated[float, typer.Option(min=0, help="Seconds between checkpoints.")] = 300.0,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed cells again.")] = False,
    wandb: Annotated[str | None, typer.Option(help="online, offline or off; default: as the config says.")] = None,
    graphs: Annotated[
        bool | None,
        typer.Option("--graphs/--no-graphs", help="Replay steps as CUDA graphs, or do not. Unsaid: on a GPU, if a short check passes."),
    ] = None,
    streams: Annotated[
        bool, typer.Option("--streams", help="Replay the students of a bundle at the same time. Takes more of a GPU's memory.")
    ] = False,
    plugin: Plugins = None,
) -> None:
    """Run every cell of a sweep that is not done yet; Ctrl-C saves, the same command goes on."""
    console = console_of()
    if wandb is not None:
        one_of("--wandb", wandb, ("online", "offline", "off"))
    store, loaded = load(config, results, plugin, writable=True)
    import torch

    from dfqbench.run.options import Options, StopFlag
    from dfqbench.run.progress import make_progress
    from dfqbench.run.runner import run_sweep

    if threads is not None:
        torch.set_num_threads(threads)
    progress = make_progress(console)
    try:
        with StopFlag().installed() as stop:
            options = Options(device, checkpoint_every, retry_failed, wandb=wandb, graphs=graphs, streams=streams)
            summary = run_sweep(loaded, store, options, progress, stop)
    finally:
        progress.stop()
    counts = {"done": summary.done, "failed": summary.failed, "failed earlier": summary.failed_earlier, "left": summary.left}
    console.print(", ".join(f"{number} {name}" for name, number in counts.items() if number or name == "done"), highlight=False)
    if summary.interrupted:
        console.print("stopped; the state is saved, the same command goes on from there", highlight=False)
        raise typer.Exit(130 if stop.signal == 2 else 143)
    console.print(f"table: dfqbench table {config}" + ("" if results == DEFAULT_RESULTS else f" --results {results}"), highlight=False)
    if summary.failed or summary.failed_earlier:
        raise typer.Exit(1)


def plan(config: Config, results: Results = DEFAULT_RESULTS, plugin: Plugins = None) -> None:
    """Say for each cell of a sweep whether it is done, stale, failed, running or missing, what will run together, and about how long it will take."""
    store, loaded = load(config, results, plugin)
    from dfqbench.run.status import Status, statuses
    from dfqbench.speed.estimate import Speeds, hours_anywhere, in_words, read_speed_files
    from dfqbench.sweep.cell import Bundle, bundles

    finished, damaged = store.results()
    states, lines, left = statuses(loaded.cells, store, finished), [], []
    measured, skipped = read_speed_files(store.speed_folders())
    known = [speeds for device in ("cuda", "cpu") if (speeds := Speeds(finished, device, measured)).known]
    for number, bundle in enumerate(bundles(loaded.cells), 1):
        to_do = Bundle(tuple(cell for cell in bundle.cells if states[cell.id].status is not Status.DONE))
        expected = ""
        if to_do.cells:
            left.append(to_do)
            expected = in_words(to_do, known)
        lines.append(typer.style(f"bundle {number}: {bundle}" + (f": {expected}" if expected else ""), bold=True))
        for cell in bundle.cells:
            state = states[cell.id]
            why = f" ({state.why})" if state.why else ""
            lines.append(f"  {cell.id}  {cell.width}  {state.status.value}{why}")
    counts = {status: sum(s.status is status for s in states.values()) for status in Status}
    lines.append(f"{len(loaded.cells)} cells: " + ", ".join(f"{n} {status.value}" for status, n in counts.items() if n))
    lines += loaded.remarks
    lines += [f"what is not done: {line}" for line in (hours_anywhere(left, known) if left else [])]
    typer.echo("\n".join(lines))  # at once: a console that is asked line by line takes seconds for a large sweep
    for line in [*damaged, *skipped]:
        print(f"skipped: {line}", file=sys.stderr)


def select(
    config: Config,
    results: Results = DEFAULT_RESULTS,
    device: Device = "auto",
    threads: Threads = None,
    output: Annotated[str, typer.Option("--format", help="text or csv (with the last value of everything that was logged).")] = "text",
    plugin: Plugins = None,
) -> None:
    """Compare settings without real data: mean KL between teacher and student on synthetic images that no cell trained on.

    The config's `selection` says which images; records are kept in RESULTS/selections/NAME, and what is there is not run again.
    """
    if output not in ("text", "csv"):
        raise UserError(f"--format {output!r}: text or csv")
    console = console_of()
    store, loaded = load(config, results, plugin, writable=True)
    import torch

    from dfqbench.engine.lockstep import Interrupted
    from dfqbench.run.options import StopFlag
    from dfqbench.run.progress import Progress, make_progress
    from dfqbench.run.selection import SHOWN, selected, selection_frame

    if threads is not None:
        torch.set_num_threads(threads)
    progress = Progress(console_of(stderr=True)) if output == "csv" else make_progress(console)
    records: list[dict[str, Any]] = []
    try:
        with StopFlag().installed() as stop:
            records.extend(selected(loaded, store, device, progress, stop))
    except Interrupted:
        raise typer.Exit(130 if stop.signal == 2 else 143) from None
    finally:
        progress.stop()
    frame = selection_frame(records)
    if output == "csv":
        frame.to_csv(sys.stdout, index=False)
    else:
        print(frame.iloc[:, :SHOWN].to_string(index=False, float_format="{:.4f}".format))


def pretrain(
    source: Annotated[str, typer.Argument(help="Training images: digits, digit-scenes-segment, digit-scenes-detect, or imagefolder:PATH.")],
    out: Annotated[Path, typer.Option(readable=False, help="The .safetensors file to write.")],
    model: Annotated[str | None, typer.Option(help="A CIFAR ResNet; default: cifar:resnet20, on scenes scenes:segment or scenes:detect.")] = None,
    test: Annotated[str | None, typer.Option(help="Evaluation set to test on at the end; digits has its own test split.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: what suits the source.")] = None,
    seed: int = 0,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
) -> None:
    """Train a teacher: a CIFAR ResNet on a folder of images or on the digits, or a small network for dense tasks on scenes of digits."""
    if precision not in ("fp32", "bf16"):
        raise UserError(f"--precision {precision!r}: fp32 or bf16")
    from dfqbench.engine.device import use_device
    from dfqbench.run import pretrain as training

    training.pretrain(
        model,
        source,
        out,
        epochs=epochs,
        seed=seed,
        device=use_device(device),
        test=test,
        precision=precision,  # type: ignore[arg-type]
        overwrite=overwrite,
    )
