"""dfqbench: the command line. Heavy imports happen inside the commands that need them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmark import cli_lists, cli_methods, cli_results
from benchmark.cli_methods import Plugins
from benchmark.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from benchmark.store import Store
    from benchmark.sweep import LoadedSweep

app = typer.Typer(
    name="dfqbench",
    help="Benchmark data-free quantizers: methods x networks x bit widths x seeds, measured and tabulated.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cli_methods.app, name="methods")

Config = Annotated[str, typer.Argument(help="A sweep: a YAML file, or the name of a shipped one (quickstart, cifar10, ...).")]
Results = Annotated[Path, typer.Option("--results", envvar="DFQBENCH_RESULTS", help="The results folder.")]
DEFAULT_RESULTS = Path("results")


@app.command()
def run(
    config: Config,
    results: Results = DEFAULT_RESULTS,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")] = None,
    checkpoint_every: Annotated[float, typer.Option(min=0, help="Seconds between checkpoints.")] = 300.0,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed cells again.")] = False,
    wandb: Annotated[str | None, typer.Option(help="online, offline or off; default: as the config says.")] = None,
    graphs: Annotated[bool, typer.Option("--graphs", help="Replay steps as CUDA graphs where a method allows it; never tried on a GPU yet.")] = False,
    plugin: Plugins = None,
) -> None:
    """Run every cell of a sweep that is not done yet; Ctrl-C saves, the same command goes on."""
    console = _console()
    if wandb is not None:
        cli_results.one_of("--wandb", wandb, ("online", "offline", "off"))
    store, loaded = _load(config, results, plugin, writable=True)
    import torch

    from benchmark.progress import make_progress
    from benchmark.runner import Options, StopFlag, run_sweep

    if threads is not None:
        torch.set_num_threads(threads)
    progress = make_progress(console)
    try:
        with StopFlag().installed() as stop:
            summary = run_sweep(loaded, store, Options(device, checkpoint_every, retry_failed, wandb=wandb, graphs=graphs), progress, stop)
    finally:
        progress.stop()
    parts = [f"{summary.done} done", f"{summary.failed} failed" if summary.failed else "", f"{summary.left} left" if summary.left else ""]
    console.print(", ".join(filter(None, parts)), highlight=False)
    if summary.interrupted:
        console.print("stopped; the state is saved, the same command goes on from there", highlight=False)
        raise typer.Exit(130 if stop.signal == 2 else 143)
    console.print(f"table: dfqbench table {config}" + ("" if results == DEFAULT_RESULTS else f" --results {results}"), highlight=False)
    if summary.failed:
        raise typer.Exit(1)


@app.command()
def plan(config: Config, results: Results = DEFAULT_RESULTS, plugin: Plugins = None) -> None:
    """Say for each cell of a sweep whether it is done, stale, failed, running or missing, what will run together, and about how long it will take."""
    store, loaded = _load(config, results, plugin)
    from benchmark.cell import Bundle, bundles
    from benchmark.hours import Speeds, hours_anywhere, in_words, read_speed_files
    from benchmark.status import Status, statuses

    finished, _ = store.results()
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
            lines.append(f"  {cell.id}  {cell.bits}  {state.status.value}{why}")
    counts = {status: sum(s.status is status for s in states.values()) for status in Status}
    lines.append(f"{len(loaded.cells)} cells: " + ", ".join(f"{n} {status.value}" for status, n in counts.items() if n))
    lines += [f"what is not done: {line}" for line in (hours_anywhere(left, known) if left else [])]
    typer.echo("\n".join(lines))  # at once: a console that is asked line by line takes seconds for a large sweep
    for line in skipped:
        print(f"skipped: {line}", file=sys.stderr)


@app.command()
def select(
    config: Config,
    results: Results = DEFAULT_RESULTS,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")] = None,
    output: Annotated[str, typer.Option("--format", help="text or csv (with the last value of everything that was logged).")] = "text",
    plugin: Plugins = None,
) -> None:
    """Compare settings without real data: mean KL between teacher and student on synthetic images that no cell trained on.

    The config's `selection` says which images; records are kept in RESULTS/selections/NAME, and what is there is not run again.
    """
    if output not in ("text", "csv"):
        raise UserError(f"--format {output!r}: text or csv")
    console = _console()
    store, loaded = _load(config, results, plugin, writable=True)
    import torch

    from benchmark.engine import Interrupted
    from benchmark.progress import Progress, make_progress
    from benchmark.runner import StopFlag
    from benchmark.selection import SHOWN, selected, selection_frame

    if threads is not None:
        torch.set_num_threads(threads)
    progress = Progress(_console(stderr=True)) if output == "csv" else make_progress(console)
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


@app.command()
def submit(
    config: Config,
    profile: Annotated[str, typer.Option(help="How to run jobs: a YAML file, or a shipped profile (gpu, cpu, preemptible, test-cluster).")],
    results: Results = DEFAULT_RESULTS,
    local: Annotated[bool, typer.Option("--local", help="Run the same plan in processes of this machine.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the sbatch scripts and the expected hours; submit nothing.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Also the cells that failed.")] = False,
    plugin: Plugins = None,
) -> None:
    """Submit what a sweep still lacks to Slurm, and return at once; again: only what is missing and not queued or running."""
    from slurm import commands

    commands.submit(config, profile, results, local=local, dry_run=dry_run, retry_failed=retry_failed, plugins=plugin or [])


@app.command()
def status(
    config: Config,
    results: Results = DEFAULT_RESULTS,
    watch: Annotated[bool, typer.Option("--watch", help="Keep showing it until nothing moves any more; Ctrl-C ends it.")] = False,
    plugin: Plugins = None,
) -> None:
    """Show each cell of a sweep: done, running (how far, how fast, where), queued, pre-empted, failed, lost or missing."""
    from slurm import commands

    commands.status(config, results, watch=watch, plugins=plugin or [])


@app.command()
def cancel(config: Config, results: Results = DEFAULT_RESULTS) -> None:
    """End the Slurm jobs of a sweep, and only those; what they have done is kept."""
    from slurm import commands

    commands.cancel(config, results)


app.command()(cli_results.table)
app.command()(cli_results.compare)
app.command()(cli_results.plot)
app.command()(cli_results.report)
app.command()(cli_results.merge)
app.add_typer(cli_results.wandb_app, name="wandb")


@app.command()
def speed(
    methods: Annotated[str, typer.Option(help="Names with commas between.")] = "gdfq,acq,zaq,lrq,gznq",
    network: Annotated[str, typer.Option(help="A model as in a config, like pytorchcv:resnet18; its weights do not matter.")] = "cifar:resnet20",
    batch_size: Annotated[int, typer.Option(min=2)] = 200,
    preset: Annotated[str | None, typer.Option(help="The methods' own set of settings, like imagenet; no default budget.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")] = None,
    precisions: Annotated[str, typer.Option(help="fp32, bf16 or both.")] = "fp32,bf16",
    rounds: Annotated[int, typer.Option(min=1, help="How often all contenders take their turn.")] = 3,
    seconds: Annotated[float, typer.Option(min=0, help="About how long a turn is.")] = 5.0,
    out: Annotated[Path | None, typer.Option(help="Write the figures here too; `auto`: results/speed/DEVICE.json.")] = None,
    overheads: Annotated[
        bool,
        typer.Option("--overheads", help="Instead: planning, start of a worker, memory; into results/speed/overheads-DEVICE.json."),
    ] = False,
) -> None:
    """Measure steps per second of methods, next to a textbook loop, a competent eager loop and the device's floor."""
    from benchmark.errors import nearest

    if overheads:
        _overheads(device, threads, rounds, out)
        return

    wanted = methods.split(",")
    given = precisions.split(",")
    for precision in given:
        if precision not in ("fp32", "bf16"):
            raise UserError(f"--precisions {precision!r}: {nearest(precision, ('fp32', 'bf16'))}")
    import torch

    from benchmark import speed as stopwatch
    from benchmark.engine import check_device
    from benchmark.hours import network_of
    from benchmark.provenance import provenance
    from benchmark.registry import find_method
    from benchmark.store import write_json
    from benchmark.teachers import UNTRAINED, parse_teacher
    from benchmark.teachers.zoo import build
    from methods.textbook import loops

    presets = {known for name in wanted for known in find_method(name).Config.presets}
    if preset is not None and preset not in presets:
        raise UserError(f"--preset {preset!r}: {nearest(preset, presets)}")
    if threads is not None:
        torch.set_num_threads(threads)
    where = check_device(device)
    built = build(parse_teacher({"model": network, "weights": UNTRAINED}))
    stand = stopwatch.Stand(built.network, built.task, batch_size, where, network_of(network), preset)
    textbooks = loops() if network.startswith("cifar:") else {}  # they are written for these networks
    say = _console(stderr=True).print
    found = provenance(where)
    path = Path("results/speed") / f"{stopwatch.file_name(found)}.json" if str(out) == "auto" else out
    rows = []
    try:
        for row in stopwatch.measure(wanted, textbooks, stand, given, rounds, seconds, say):
            rows.append(row)
            if path is not None:  # after every row: a run that is cut short keeps what it has
                write_json(path, stopwatch.record(rows, stand, " ".join(["dfqbench", *sys.argv[1:]]), found))
    except KeyboardInterrupt:
        say("stopped; what was measured so far:")
    _print_speeds(rows)
    if path is not None and rows:
        print(f"written to {path}")


def _overheads(device: str, threads: int | None, rounds: int, out: Path | None) -> None:
    import os

    import torch

    from benchmark import overheads, speed
    from benchmark.engine import check_device
    from benchmark.hours import OVERHEADS
    from benchmark.provenance import provenance
    from benchmark.store import write_json

    if threads is not None:
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that are measured
    where = check_device(device)
    on = provenance(where)
    path = Path("results/speed") / f"{OVERHEADS}{speed.file_name(on)}.json" if out is None or str(out) == "auto" else out
    found: list[overheads.Overhead] = []
    for overhead in overheads.measure(str(where), rounds, _console(stderr=True).print):
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
    console = _console()
    console.print(shown)
    console.print(
        "steps/s: of each bit width; x textbook: times the speed of the textbook loop; of floor: least possible seconds / seconds", highlight=False
    )


@app.command()
def pretrain(
    source: Annotated[str, typer.Argument(help="Training images: digits, or imagefolder:PATH (one sub-folder per class).")],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    model: Annotated[str, typer.Option(help="A CIFAR ResNet: cifar:resnet20, 32, 44 or 56.")] = "cifar:resnet20",
    test: Annotated[str | None, typer.Option(help="Evaluation set to test on at the end; digits has its own test split.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: what suits the source.")] = None,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
) -> None:
    """Train a teacher: a CIFAR ResNet on a folder of images or on the digits."""
    if precision not in ("fp32", "bf16"):
        raise UserError(f"--precision {precision!r}: fp32 or bf16")
    from benchmark import pretrain as training
    from benchmark.engine import check_device

    training.pretrain(
        model,
        source,
        out,
        epochs=epochs,
        seed=seed,
        device=check_device(device),
        test=test,
        precision=precision,  # type: ignore[arg-type]
        overwrite=overwrite,
    )


@app.command()
def models(pattern: Annotated[str, typer.Argument(help="A wildcard, like 'pytorchcv:resnet*_cifar10'.")] = "*") -> None:
    """List the networks that can be teachers; `my_nets.py:*` and `my_package.nets:*` list a file's and a module's factories."""
    from benchmark.errors import nearest
    from benchmark.teachers import list_models

    found = list_models(pattern)
    if not found:
        raise UserError(f"no network matches {pattern!r}: {nearest(pattern, list_models())}")
    print("\n".join(found))


app.command()(cli_lists.sets)
app.command()(cli_lists.protocols)


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


def _load(config: str, results: Path, plugins: list[str] | None, writable: bool = False) -> tuple[Store, LoadedSweep]:
    from benchmark.config_text import find_config
    from benchmark.memo import cache_folder
    from benchmark.store import Store
    from benchmark.sweep import load_sweep

    path = find_config(config)
    store = Store(results)
    loaded = load_sweep(path, cache_folder(), plugins)
    return Store(results, writable=True) if writable else store, loaded


def main() -> None:
    """Entry point: what a user can mend is one line and exit code 2; a traceback is for bugs."""
    try:
        app()
    except UserError as error:
        for line in str(error).splitlines():
            print(f"dfqbench: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)


if __name__ == "__main__":
    main()
