"""Files and folders of somebody else, some of them closed: one line that names the place, and no cell taken for missing."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image

if TYPE_CHECKING:
    from conftest import Colleague

pytestmark = pytest.mark.slow
READING = ("plan", "status", "table", "plot", "report", "compare", "merge from")
WRITING = ("run", "select", "merge into")


class Place(NamedTuple):
    """A sweep with a store in which it is finished, and all that it consists of."""

    root: Path
    ids: list[str]
    closed: Callable[..., None]

    @property
    def results(self) -> Path:
        return self.root / "results"

    def config(self, **changes: object) -> Path:
        path = self.root / f"{'-'.join(['sweep', *changes])}.yaml"
        content = {
            "name": "small",
            "teachers": [f"{self.root}/net/tiny.py:tiny"],
            "evaluate": f"imagefolder:{self.root}/images",
            "methods": ["round"],
            "bits": ["w4a4", "w8a8"],
            "selection": {"images": {"zeroq": {"images": 8, "synthesis_iterations": 1}}, "count": 8},
        }
        path.write_text(yaml.safe_dump(content | changes))
        return path

    def words(self, name: str) -> list[object]:
        config, at = self.root / "sweep.yaml", ["--results", self.results]
        return {
            "merge from": ["merge", self.results, "--results", self.root / "merged"],
            "merge into": ["merge", self.root / "other", *at],
            "compare": ["compare", *self.ids, *at],
            "plot": ["plot", config, *at, "--out", self.root / "figures"],
            "report": ["report", config, *at, "--out", self.root / "report.html"],
            "plot here": ["plot", *at],
            "report here": ["report", *at],
            "models": ["models", f"{self.root}/net/tiny.py:*"],
            "pretrain": ["pretrain", f"imagefolder:{self.root}/images", "--out", self.root / "out" / "w.safetensors"],
            "speed": ["speed", "--rounds", "1", "--seconds", "0", "--device", "cpu", "--out", self.root / "out" / "s.json"],
        }.get(name, [name, config, *at])


@pytest.fixture(scope="module")
def made(colleague: Colleague, tmp_path_factory: pytest.TempPathFactory) -> Place:
    import conftest

    place = Place(tmp_path_factory.mktemp("made"), [], colleague.close)
    (place.root / "net").mkdir()
    (place.root / "net" / "tiny.py").write_text("from beside import nothing\n" + conftest.TINY)
    (place.root / "net" / "beside.py").write_text("nothing = None\n")
    for name in range(10):
        (place.root / "images" / f"c{name}").mkdir(parents=True)
        Image.fromarray(np.full((16, 16, 3), name, np.uint8)).save(place.root / "images" / f"c{name}" / "1.png")
    config = place.config()
    for results in (place.results, place.root / "other"):
        ((code, _, err),) = colleague.run([["run", config, "--results", results]])
        assert code == 0, err
    place.ids.extend(sorted(path.name for path in (place.results / "runs").iterdir()))
    return place


def files_of(place: Place, name: str) -> list[Path]:
    return [place.results / "runs" / cell_id / name for cell_id in place.ids]


# what is closed -> (how, the commands that must say so in one line, and what they name; the commands that must work all the same)
CLOSED: dict[str, tuple[Callable[[Place], object], dict[str, tuple[str, ...]], tuple[str, ...]]] = {
    "the store": (
        lambda p: p.closed(p.results),
        {"results/runs": ("plan", "table", "plot", "report", "compare", "merge from"), "results": (*WRITING, "status", "report here")},
        (),
    ),
    "the folder above": (
        lambda p: (p.results.rename(p.root / "out" / "r"), p.results.symlink_to(p.root / "out" / "r"), p.closed(p.root / "out")),
        {"results": (*READING, *WRITING)},
        (),
    ),
    "the runs": (lambda p: p.closed(p.results / "runs"), {"results/runs": (*READING, *WRITING)}, ()),
    "the cells": (
        lambda p: [p.closed(file.parent) for file in files_of(p, "result.json")],
        {"results/runs/": ("plan", "status", "run", "compare", "merge into")},
        (),
    ),
    "results of cells": (
        lambda p: [p.closed(file, 0o600) for file in files_of(p, "result.json")],
        {"result.json": ("plan", "status", "run", "compare")},
        ("merge into",),
    ),
    "bundles": (lambda p: ((p.results / "bundles").mkdir(exist_ok=True), p.closed(p.results / "bundles")), {"results/bundles": WRITING}, READING),
    "a store that may only be read": (
        lambda p: [p.closed(path, 0o755 if path.is_dir() else 0o644) for path in (p.results, *p.results.rglob("*"))],
        {"results": WRITING, "results/figures": ("plot here",), "results/report.html": ("report here",)},
        READING,
    ),
    "a failed cell of somebody else": (
        lambda p: ([file.unlink() for file in files_of(p, "result.json")], [p.closed(file.parent, 0o755) for file in files_of(p, "result.json")]),
        {"results/runs/": ("run",)},
        ("plan", "status"),
    ),
    "the config": (
        lambda p: p.closed(p.root / "sweep.yaml", 0o600),
        {"sweep.yaml": ("plan", "status", "table", "plot", "report", "run", "select")},
        (),
    ),
    "the network": (lambda p: p.closed(p.root / "net" / "tiny.py", 0o600), {"net/tiny.py": ("plan", "run", "models")}, ()),
    "the network's neighbour": (lambda p: p.closed(p.root / "net" / "beside.py", 0o600), {"net/beside.py": ("plan", "run", "models")}, ()),
    "the network's folder": (lambda p: p.closed(p.root / "net"), {"net": ("plan", "run", "models")}, ()),
    "the weights": (
        lambda p: (
            (p.root / "w.pth").touch(),
            p.closed(p.root / "w.pth", 0o600),
            p.config(teachers=[{"model": "cifar:resnet20", "weights": f"{p.root}/w.pth"}]).rename(p.root / "sweep.yaml"),
        ),
        {"w.pth cannot be read": ("plan", "run")},
        (),
    ),
    "the protocol": (
        lambda p: (
            (p.root / "p.yaml").touch(),
            p.closed(p.root / "p.yaml", 0o600),
            p.config(protocol=f"{p.root}/p.yaml").rename(p.root / "sweep.yaml"),
        ),
        {"p.yaml": ("plan", "run")},
        (),
    ),
    "a plug-in": (
        lambda p: ((p.root / "m.py").touch(), p.closed(p.root / "m.py", 0o600), p.config(plugins=[f"{p.root}/m.py"]).rename(p.root / "sweep.yaml")),
        {"m.py": ("plan", "run")},
        (),
    ),
    "the images": (lambda p: p.closed(p.root / "images"), {"images": ("plan", "run", "pretrain")}, ()),
    "a class of images": (lambda p: p.closed(p.root / "images" / "c3"), {"images/c3": ("plan", "run", "pretrain")}, ()),
    "an image": (lambda p: p.closed(p.root / "images" / "c3" / "1.png", 0o600), {"images/c3/1.png": ("plan", "run", "pretrain")}, ()),
    "where it is to be written": (lambda p: p.closed(p.root / "out", 0o755), {"out": ("pretrain", "speed")}, ()),
}
Answers = dict[str, tuple[int, str, str]]


@pytest.fixture(scope="module")
def answers(made: Place, colleague: Colleague, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answers]:
    """What each command says, each place closed in its way; what they could have remembered of before, they remember."""
    places: dict[str, Place] = {}
    for number, what in enumerate(CLOSED):
        places[what] = made._replace(root=tmp_path_factory.mktemp(f"closed{number}") / "place")
        shutil.copytree(made.root, places[what].root)
        (places[what].root / "out").mkdir()
        places[what].config()
    colleague.run([place.words("plan") for place in places.values()])
    for what, (how, _, _) in CLOSED.items():
        how(places[what])
    asked = [(what, name) for what, (_, refused, works) in CLOSED.items() for name in (*itertools.chain(*refused.values()), *works)]
    try:
        said = colleague.run([places[what].words(name) for what, name in asked])
    finally:
        colleague.open_again()
    return {what: {name: answer for (where, name), answer in zip(asked, said, strict=True) if where == what} for what in CLOSED}


@pytest.mark.parametrize("what", CLOSED)
def test_what_is_closed_is_named_in_one_line(answers: dict[str, Answers], what: str) -> None:
    said = answers[what]
    _, refused, works = CLOSED[what]
    for path, names in refused.items():
        for name in names:
            code, _, err = said[name]
            last = err.splitlines()[-1] if err else ""
            assert code == 2, (name, said[name])
            assert "Traceback" not in err, (name, err)
            assert last.startswith("dfqbench: "), (name, err)
            assert f"/place/{path}" in last or path in last.replace("'", ""), (name, err)
            assert "ermission denied" in last, (name, err)
    for name in works:
        assert said[name][0] == 0, (name, said[name])


@pytest.mark.thorough("448")
@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_closed_cache_only_costs_time(made: Place, colleague: Colleague, tmp_path: Path, mode: int) -> None:
    cache = tmp_path / "cache"
    commands = [[*made.words("plan")], ["methods", "list"], ["models", "cifar:*"], ["run", made.root / "sweep.yaml", "--results", tmp_path / "r"]]
    assert [code for code, _, _ in colleague.run(commands[:3], DFQBENCH_CACHE=str(cache))] == [0] * 3
    for path in (*cache.iterdir(), cache):
        colleague.close(path, mode if path == cache else 0o600)
    try:
        answers = colleague.run(commands, DFQBENCH_CACHE=str(cache))
    finally:
        colleague.open_again()
    assert [code for code, _, _ in answers] == [0] * 4, answers


def test_cells_that_cannot_be_read_are_left_out_aloud(made: Place, colleague: Colleague, tmp_path: Path) -> None:
    """Written under umask 077, one cell of two."""
    place = made._replace(root=tmp_path / "place")
    shutil.copytree(made.root, place.root)
    place.config()
    colleague.close(place.results / "runs" / made.ids[0])
    try:
        table, merged = colleague.run([["table", "--results", place.results], place.words("merge from")])
    finally:
        colleague.open_again()
    for code, _, err in (table, merged):
        assert code == 0, err
        assert f"skipped: {place.results / 'runs' / made.ids[0]}: Permission denied" in err
    assert "1 new" in merged[1]
    shutil.rmtree(place.root / "merged")
    colleague.close(place.results / "runs" / made.ids[1] / "result.json", 0o600)
    try:
        ((_, _, err),) = colleague.run([place.words("merge into")])
    finally:
        colleague.open_again()
    assert f"{made.ids[1]}/result.json: Permission denied, so " in err
