"""A worker: one process that runs some cells of a submission one bundle after the other, as `dfqbench run` would.

    python -m dfqbench_slurm.worker FOLDER --device cpu --threads 4 --checkpoint-every 300 CELL...

Exit status: 0 all done or left to others, 1 a cell failed (the rest is left to a fresh process), 2 it cannot run, 3 its GPU answers no more (another
process may go on), 143 told to stop and saved.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dfqbench.errors import UserError

FAILED, REFUSED, LOST, STOPPED = 1, 2, 3, 143


def work(
    folder: Path,
    cell_ids: list[str],
    device: str,
    threads: int,
    checkpoint_every: float,
    name: str,
    graphs: bool | None = None,
    streams: bool = False,
) -> int:
    """Raises UserError where the snapshot does not stand for the submitted cells any more."""
    from dfqbench_slurm.submission import read_submission, sha256

    submission = read_submission(folder)
    for file, digest in submission.plugins.items():
        if not Path(file).is_file() or sha256(Path(file)) != digest:
            raise UserError(f"plug-in {file} is not what was submitted: submit again")
    import torch

    torch.set_num_threads(threads)
    from rich.console import Console

    from dfqbench.engine.device import DeviceLost
    from dfqbench.run.options import Options, StopFlag
    from dfqbench.run.progress import Progress
    from dfqbench.run.runner import run_cells
    from dfqbench.store import Store
    from dfqbench.store.cache import cache_folder
    from dfqbench.sweep.load import load_sweep

    with StopFlag().installed() as stop:
        loaded = load_sweep(folder / "sweep.yaml", cache_folder())
        known = {cell.id: cell for cell in loaded.cells}
        missing = [cell_id for cell_id in cell_ids if cell_id not in known]
        if missing:
            raise UserError(f"cells {', '.join(missing)}: weights, evaluation set or code are not those that were submitted: submit again")
        progress = Progress(Console(soft_wrap=True), name)
        options = Options(device, checkpoint_every, retry_failed=True, stop_at_failure=True, graphs=graphs, streams=streams)
        store = Store(submission.results, writable=True)
        try:
            summary = run_cells(loaded, [known[cell_id] for cell_id in cell_ids], store, options, progress, stop)
        except DeviceLost as lost:
            print(f"dfqbench: {lost}", file=sys.stderr)
            for cell_id in lost.cells:  # claims left behind, as by a worker that was killed: the supervisor counts what a bundle costs
                store.lease(cell_id).acquire()
            return LOST
    return STOPPED if summary.interrupted else FAILED if summary.failed else 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dfqbench_slurm.worker", description="Runs some cells of a submission.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("cells", nargs="+")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint-every", type=float, default=300.0)
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, help="replay steps as CUDA graphs, or do not")
    parser.add_argument("--streams", action="store_true", help="replay the students of a bundle at the same time")
    parser.add_argument("--name", default="", help="what its lines begin with")
    given = parser.parse_args()
    try:
        sys.exit(work(given.folder, given.cells, given.device, given.threads, given.checkpoint_every, given.name, given.graphs, given.streams))
    except UserError as error:
        for line in str(error).splitlines():
            print(f"dfqbench: {line}", file=sys.stderr)
        sys.exit(REFUSED)


if __name__ == "__main__":
    main()
