"""What the README shows works as it stands there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import yaml

from dfqbench.cache import cache_folder
from dfqbench.run.options import Options, StopFlag
from dfqbench.run.runner import run_sweep
from dfqbench.store import Store
from dfqbench.sweep.load import load_sweep
from dfqbench.sweep.schema import Sweep

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


def test_the_example_sweep_has_only_keys_that_exist() -> None:
    (text,) = blocks("yaml")
    content = yaml.safe_load(text)
    assert Sweep(**content).seeds == [0, 1, 2]
    assert set(content) == set(Sweep.model_fields), "the example shows every key"


def test_every_command_that_it_names_exists() -> None:
    from typer.main import get_command

    from dfqbench.cli.app import app

    named = set(re.findall(r"^dfqbench (\w+)", README, re.MULTILINE))
    assert named == set(get_command(app).commands)  # type: ignore[attr-defined]
