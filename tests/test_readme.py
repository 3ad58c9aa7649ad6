"""The example method of the README runs. What else holds for the README and all other pages is in test_pages.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from dfqbench.run.options import Options, StopFlag
from dfqbench.run.runner import run_sweep
from dfqbench.store import Store
from dfqbench.store.cache import cache_folder
from dfqbench.sweep.load import load_sweep

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_example_method_runs(sweep_file: Callable[..., Path], tmp_path: Path) -> None:
    from rich.console import Console

    from dfqbench.run.progress import Progress

    (code,) = blocks("python")
    (tmp_path / "noise.py").write_text(code)
    config = sweep_file(methods=["noise"], plugins=[str(tmp_path / "noise.py")])
    store = Store(tmp_path / "r", writable=True)
    summary = run_sweep(load_sweep(config, cache_folder()), store, Options(), Progress(Console(quiet=True)), StopFlag())
    assert (summary.done, summary.failed) == (2, 0)
    assert {result["cell"]["label"] for result in store.results()[0]} == {"noise"}
