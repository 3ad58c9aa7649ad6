"""What several tests share: a tiny teacher in a user's file, and sweeps over it."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

torch.set_num_threads(1)  # the tests run side by side; results do not depend on it within one run
os.environ.setdefault("OMP_NUM_THREADS", "1")  # nor do what they start have more

EXAMPLE = Path(__file__).parent / "example_package"
TINY = '''
import torch
from torch import nn


class Tiny(nn.Module):
    """Two residual stages for 16 x 16 images, quick enough for a test."""

    classes, size, mean, std = 10, 16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.down, self.bn2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv3, self.bn3 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(16, 10)

    def forward(self, x):
        x = self.relu(self.bn0(self.stem(x)))
        x = self.relu(self.bn1(self.conv1(x)) + x)
        x = self.relu(self.bn2(self.down(x)))
        x = self.relu(self.bn3(self.conv3(x)) + x)
        return self.head(x.mean((2, 3)))


def tiny():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        network = Tiny()
        for bn in (network.bn0, network.bn1, network.bn2, network.bn3):
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.normal_(bn.bias, std=0.2)
            nn.init.uniform_(bn.running_var, 0.5, 1.5)
    return network
'''


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="all cases of the tests marked `thorough`, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test marked `thorough(NAME, ...)` the cases whose names contain none of these are left for `make test-all`."""
    if config.getoption("--thorough") or any("[" in asked for asked in config.args):
        return
    marked = [(item, mark) for item in items if (mark := item.get_closest_marker("thorough"))]
    left = {item for item, mark in marked if not any(kept in item.name for kept in mark.args)}
    names = {item.nodeid.partition("[")[0] for item, _ in marked}
    if lost := names - {item.nodeid.partition("[")[0] for item, _ in marked if item not in left}:
        raise pytest.UsageError(f"thorough: no case of {min(lost)} has one of the names that it is to keep")
    config.hook.pytest_deselected(items=list(left))
    items[:] = [item for item in items if item not in left]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache; within a session it is shared."""
    monkeypatch.setenv("DFQBENCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model name: `<file>:tiny`."""
    path = tmp_path_factory.mktemp("teacher") / "tiny.py"
    path.write_text(textwrap.dedent(TINY))
    return f"{path}:tiny"


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dfqbench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process, wide enough that no line wraps: exit code, standard output, standard error."""
    from dfqbench.cli import app as cli

    monkeypatch.setenv("COLUMNS", "250")

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dfqbench", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


COMMANDS = """
import contextlib, io, json, sys, traceback
from dfqbench.cli import app

answers = []
for words in json.load(sys.stdin):
    sys.argv, code = ["dfqbench", *words], 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            app.main()
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            code = 1
            traceback.print_exc()
    answers.append((code, out.getvalue(), err.getvalue()))
json.dump(answers, sys.stdout)
"""


class Colleague:
    """Somebody whose files are not all open to us. Root, whom no mode stops, runs commands without the capabilities that make it so."""

    OTHER = 12345  # a user who is not there
    DROPPED = "-dac_override,-dac_read_search"

    def __init__(self) -> None:
        self.prefix = ["setpriv", f"--bounding-set={self.DROPPED}", f"--inh-caps={self.DROPPED}"] if os.geteuid() == 0 else []
        self._before: list[tuple[Path, os.stat_result]] = []

    def close(self, path: Path, mode: int = 0o700) -> None:
        """Makes `path` another user's, with the mode that it has for them; where that cannot be, nobody may do what others may not."""
        self._before.append((path, path.stat()))
        if self.prefix:
            os.chown(path, self.OTHER, self.OTHER)
        path.chmod(mode if self.prefix else (mode & 0o7) * 0o111)

    def open_again(self) -> None:
        for path, was in reversed(self._before):
            path.chmod(was.st_mode)
            if self.prefix:
                os.chown(path, was.st_uid, was.st_gid)
        self._before = []

    def run(self, commands: list[list[object]], **environment: str) -> list[tuple[int, str, str]]:
        """`dfqbench` with each list of words, in one process: exit code, standard output, standard error."""
        given = {**os.environ, "COLUMNS": "250", "OMP_NUM_THREADS": "1", **environment}
        words = json.dumps([[str(word) for word in command] for command in commands])
        done = subprocess.run([*self.prefix, sys.executable, "-c", COMMANDS], input=words, env=given, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return [(code, out, err) for code, out, err in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def colleague(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Colleague]:
    found, probe = Colleague(), tmp_path_factory.mktemp("closed") / "probe"
    if found.prefix and shutil.which("setpriv") is None:
        pytest.skip("root may read everything, and there is no setpriv to take that away")
    probe.touch()
    found.close(probe)
    if subprocess.run([*found.prefix, "cat", probe], capture_output=True).returncode == 0:
        pytest.skip("this machine lets its users read what is closed to them")
    yield found
    found.open_again()


@pytest.fixture
def sweep_file(tmp_path: Path, tiny_teacher: str) -> Callable[..., Path]:
    """Writes a small, valid sweep with some keys changed (None removes one), and returns its path."""

    def write(**changes: Any) -> Path:
        content: dict[str, Any] = {
            "name": "small",
            "teachers": [tiny_teacher],
            "evaluate": "digits",
            "methods": [{"gdfq": {"warmup_epochs": 1, "calibration_epochs": 1}}],
            "bits": ["w4a4", "w3a3"],
            "budget": {"epochs": 3, "iterations": 4, "batch_size": 8},
        }
        content = {k: v for k, v in (content | changes).items() if v is not None}
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


class Example:
    """The example package, installed in an environment of its own on top of the suite's; commands run in its folder."""

    def __init__(self, folder: Path):
        self.folder, self.python = folder / "package", folder / "env" / "bin" / "python"
        shutil.copytree(EXAMPLE, self.folder, ignore=shutil.ignore_patterns("__pycache__"))
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
        (packages,) = (folder / "env" / "lib").glob("python3*/site-packages")
        # whatever the suite's own environment has, editable installations included: nothing is downloaded a second time
        (packages / "suite.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages()))
        words = ["--python", str(self.python), "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", str(self.folder)]
        done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def dfqbench(self, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.python), "-m", "dfqbench.cli", *map(str, words)]
        given = {**os.environ, "COLUMNS": "250", "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run(command, cwd=self.folder, env=given, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    return Example(tmp_path_factory.mktemp("example"))
