"""dfqbench submit, status and cancel: a sweep on a Slurm cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from dfqbench.cli.options import DEFAULT_RESULTS, Config, Plugins, Results


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
    from dfqbench_slurm import commands

    commands.submit(config, profile, results, local=local, dry_run=dry_run, retry_failed=retry_failed, plugins=plugin or [])


def status(
    config: Config,
    results: Results = DEFAULT_RESULTS,
    watch: Annotated[bool, typer.Option("--watch", help="Keep showing it until nothing moves any more; Ctrl-C ends it.")] = False,
    plugin: Plugins = None,
) -> None:
    """Show each cell of a sweep: done, running (how far, how fast, where), queued, pre-empted, failed, lost or missing."""
    from dfqbench_slurm import commands

    commands.status(config, results, watch=watch, plugins=plugin or [])


def cancel(config: Config, results: Results = DEFAULT_RESULTS) -> None:
    """End the Slurm jobs of a sweep, and only those; what they have done is kept."""
    from dfqbench_slurm import commands

    commands.cancel(config, results)
