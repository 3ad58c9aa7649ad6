"""The `dfqbench` command: its sub-commands in the order of --help, and how errors leave it."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import warnings

import typer

from dfqbench.cli import cluster, data, export, lists, methods, report, results, run, speed, students
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
    *(results.table, results.compare, results.plot, report.report, results.merge),
    *(students.quantize, students.evaluate, export.export),
    *(speed.speed, run.pretrain),
    *(lists.models, lists.sets, lists.allocators, lists.protocols),
):
    app.command()(command)
app.add_typer(methods.app, name="methods")
app.add_typer(data.app, name="data")
app.add_typer(results.wandb_app, name="wandb")


# what the file system says of a file that the user named or that stands where results stand
NOT_OURS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.ESTALE, errno.ENOTDIR, errno.EISDIR),
)
_python_line = warnings.formatwarning


def main() -> None:
    """Entry point: what a user can mend is one line and exit code 2; a traceback is for bugs."""
    warnings.formatwarning = _one_line
    warnings.simplefilter("default", Notice)  # whatever PYTHONWARNINGS says
    _write_any_text()
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # what cannot be written is told here; at exit it would be a traceback
    except UserError as error:
        for line in str(error).splitlines():
            print(f"dfqbench: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:
        if error.errno not in NOT_OURS:
            raise
        if error.filename is None:
            _forget_output()
        print(f"dfqbench: {error.filename or 'standard output'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except UnicodeEncodeError as error:
        print(f"dfqbench: {error.object!a} is not in the locale's encoding ({error.encoding}): set PYTHONUTF8=1", file=sys.stderr)
        sys.exit(2)


def _write_any_text() -> None:
    """UTF-8 into files and pipes, and nowhere a crash for a letter that the terminal lacks; PYTHONIOENCODING decides where it is set."""
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            if not encoding and not stream.isatty():
                stream.reconfigure(encoding="utf-8")
            if not errors:
                stream.reconfigure(errors="backslashreplace")


def _forget_output() -> None:
    """Drops what standard output still holds and cannot write: the interpreter would try again at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    return f"dfqbench: {message}\n" if issubclass(category, Notice) else _python_line(message, category, filename, lineno, line)
