"""dfqbench: the command line put together."""

from __future__ import annotations

import sys
import warnings

import typer

from dfqbench.cli import cluster, lists, methods, results, run, speed
from dfqbench.errors import Notice, UserError

app = typer.Typer(
    name="dfqbench",
    help="Benchmark data-free quantizers: methods x networks x bit widths x seeds, measured and tabulated.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    *(run.run, run.plan, run.select),
    *(cluster.submit, cluster.status, cluster.cancel),
    *(results.table, results.compare, results.plot, results.report, results.merge),
    *(speed.speed, run.pretrain),
    *(lists.models, lists.sets, lists.protocols),
):
    app.command()(command)
app.add_typer(methods.app, name="methods")
app.add_typer(results.wandb_app, name="wandb")


_python_line = warnings.formatwarning


def main() -> None:
    """Entry point: what a user can mend is one line and exit code 2; a traceback is for bugs."""
    warnings.formatwarning = _one_line
    warnings.simplefilter("default", Notice)  # whatever PYTHONWARNINGS says
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


def _one_line(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    return f"dfqbench: {message}\n" if issubclass(category, Notice) else _python_line(message, category, filename, lineno, line)
