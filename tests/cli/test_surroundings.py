"""What surrounds a command is told in one line: links that lead nowhere, a full disk, a locale that knows few letters."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SweepFile = Callable[..., Path]
Answer = tuple[int, str, str]
LOCALES = {
    "C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "gbk": {"PYTHONIOENCODING": "gbk"},
    "latin": {"PYTHONIOENCODING": "ascii"},
}


def command(*words: object, out: object = subprocess.PIPE, **environment: str) -> tuple[int, bytes, str]:
    words = (sys.executable, "-m", "dfqbench.cli", *words)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONIOENCODING", "PYTHONUTF8", "LC_ALL")} | {"COLUMNS": "250"} | environment
    done = subprocess.run([str(w) for w in words], stdout=out, stderr=subprocess.PIPE, env=env, timeout=300)  # type: ignore[call-overload]
    return done.returncode, done.stdout or b"", done.stderr.decode("utf-8", "replace")


@pytest.fixture
def finished(sweep_file: SweepFile, tmp_path: Path) -> tuple[Path, Path]:
    config = sweep_file(methods=["round"], bits=["w4a4", "w8a8"])
    assert command("run", config, "--results", tmp_path / "r")[0] == 0
    return config, tmp_path / "r"


def one_line(answer: Answer, *said: object) -> None:
    code, _, err = answer
    assert code == 2, answer
    assert "Traceback" not in err
    assert err.count("\n") == 1, err
    assert all(str(part) in err for part in said), err


def class_folders(root: Path) -> Path:
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(root / name / "1.png")
    return root


@pytest.mark.parametrize("place", ["a/2.png", "c"])
def test_a_link_that_leads_nowhere_is_named(dfqbench: Callable[..., Answer], tmp_path: Path, sweep_file: SweepFile, place: str) -> None:
    root = class_folders(tmp_path / "images")
    (root / place).symlink_to("/nowhere/x.png")
    one_line(
        dfqbench("plan", sweep_file(evaluate=f"imagefolder:{root}", methods=["round"]), "--results", tmp_path / "r"),
        f"{root / place} is a link to /nowhere/x.png, which is not there",
    )


@pytest.mark.slow
def test_plan_creates_nothing(tmp_path: Path, sweep_file: SweepFile) -> None:
    config, place = sweep_file(methods=["round"]), tmp_path / "empty"
    place.mkdir()
    words = [sys.executable, "-m", "dfqbench.cli", "plan", str(config)]
    done = subprocess.run(words, cwd=place, env={**os.environ, "HOME": str(place)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert list(place.rglob("*")) == []


# --- output -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_behind_the_output_is_one_line(finished: tuple[Path, Path]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    config, results = finished
    for words in (["table"], ["table", "--format", "csv"], ["plan", config], ["methods"], ["sets"], ["protocols"], ["--help"]):
        with open("/dev/full", "wb") as full:
            code, _, err = command(*words, out=full, DFQBENCH_RESULTS=str(results))
        assert (code, err) == (2, "dfqbench: standard output: No space left on device\n"), words


@pytest.mark.slow
@pytest.mark.thorough("gbk")
@pytest.mark.parametrize("name", LOCALES)
def test_every_letter_is_read_and_written_in_every_locale(sweep_file: SweepFile, tiny_teacher: str, tmp_path: Path, name: str) -> None:
    config = sweep_file()
    config.write_text(
        f'name: small\n# 注释 ±\nteachers: [{{model: "{tiny_teacher}", name: "größe 量"}}]\nevaluate: digits\nmethods: [round]\nbits: [w4a4]\n',
        encoding="utf-8",
    )
    results = tmp_path / "r"
    for words in (("run", config), ("table", config), ("table", config, "--format", "markdown"), ("plan", config), ("report", config)):
        code, out, err = command(*words, "--results", results, **LOCALES[name])
        assert (code, "Traceback" in err) == (0, False), err
    (report,) = results.glob("report.html")
    assert "größe 量" in report.read_text(encoding="utf-8")
    code, out, _ = command("table", "--format", "csv", "--results", results, **LOCALES[name])
    if name == "C":
        assert "größe 量" in out.decode("utf-8"), "a file or a pipe gets UTF-8"
    if name == "gbk":
        assert "量" in out.decode("gbk")


# --- pretrain ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["file/teacher.safetensors", "folder.safetensors", "/proc/x/teacher.safetensors", "link/teacher.safetensors"])
def test_a_teachers_file_that_cannot_be_written_is_told_before_training(dfqbench: Callable[..., Answer], tmp_path: Path, out: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "link").symlink_to("/nowhere")
    before = sorted(tmp_path.rglob("*"))
    code, said, err = dfqbench("pretrain", "digits", "--out", tmp_path / out, "--overwrite")
    assert said == "", "no epoch was trained"
    one_line((code, said, err), out)
    assert sorted(tmp_path.rglob("*")) == before
