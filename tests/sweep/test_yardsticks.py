"""Yardsticks: which real images they are, that none is a test image, that they reach their place and no other, and what is said of such rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dfqbench.data import Yardstick, find_set
from dfqbench.engine.checkpoint import load_checkpoint, save_checkpoint
from dfqbench.engine.lockstep import Interrupted, Lockstep
from dfqbench.engine.method_state import set_up
from dfqbench.errors import UserError, UserErrors
from dfqbench.method.yardstick import YardstickImages
from dfqbench.store import Store
from dfqbench.store.cache import cache_folder
from dfqbench.sweep.cell import Bundle, Cell
from dfqbench.sweep.load import LoadedSweep, load_sweep
from dfqbench.sweep.reproduce import recipe
from dfqbench.testing import StopAfter, ends_of, small_task, small_teacher

SweepFile = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]
REAL = {"real": {"images": "digits", "count": 40}}
QAT = {"qat": {"host": "real"}}


def folder(root: Path, images: list[np.ndarray], extension: str = "png") -> Path:
    """Two classes in turn."""
    for number, pixels in enumerate(images):
        path = root / "ab"[number % 2] / f"{number:03d}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root


def noise(count: int = 12, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8))


def loaded(sweep_file: SweepFile, *methods: Any, yardsticks: Any = REAL, **changes: Any) -> LoadedSweep:
    return load_sweep(sweep_file(methods=list(methods or (QAT,)), yardsticks=yardsticks, **changes), cache_folder())


def told(sweep_file: SweepFile, *methods: Any, yardsticks: Any = REAL, **changes: Any) -> list[str]:
    with pytest.raises(UserErrors) as caught:
        loaded(sweep_file, *methods, yardsticks=yardsticks, **changes)
    return [message.split(": ", 1)[1] for message in caught.value.messages]


# --- which images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", ["png", "bmp"])
def test_a_folder_with_one_test_image_is_refused_however_its_file_was_written(extension: str, sweep_file: SweepFile, tmp_path: Path) -> None:
    test_image = np.asarray(find_set("digits")._open("test")[0](17).convert("RGB"))
    images = folder(tmp_path / "mixed", [*noise(), test_image], extension)
    (line,) = told(sweep_file, yardsticks={"real": {"images": f"imagefolder:{images}", "count": 2}})
    assert line.startswith(f"yardsticks.real: images: {find_set(f'imagefolder:{images}').name}: 1 of its 13 images are in the evaluation set digits")
    assert "test image 17" in line
    assert told(sweep_file, yardsticks={"real": {"images": f"imagefolder:{images}", "count": 2}}) == [line], "also when it is remembered"
    other = folder(tmp_path / "other", noise(), extension)
    assert loaded(sweep_file, yardsticks={"real": {"images": f"imagefolder:{other}", "count": 2}}).cells


def test_count_and_pixels_identify_the_images_and_no_path(sweep_file: SweepFile, tmp_path: Path) -> None:
    def ids(where: Path, count: int = 6) -> list[str]:
        return [cell.id for cell in loaded(sweep_file, yardsticks={"real": {"images": f"imagefolder:{where}", "count": count}}).cells]

    first = ids(folder(tmp_path / "one", noise()))
    assert ids(folder(tmp_path / "two", noise(), "bmp")) == first
    assert not {*first} & {*ids(tmp_path / "one", 5)}
    changed = noise()
    changed[0] = changed[0] ^ 1
    assert not {*first} & {*ids(folder(tmp_path / "three", changed))}
    (cell, _) = loaded(sweep_file, yardsticks={"real": {"images": f"imagefolder:{tmp_path / 'one'}", "count": 6}}).cells
    assert str(tmp_path) not in str(cell.record())


def test_images_are_taken_from_all_of_the_set_and_are_those_of_its_training_part(tmp_path: Path) -> None:
    task = small_task(size=8)
    found = Yardstick(find_set("digits"), 3)
    pixels = found.pixels(task, found.card(None)["digest"])
    read, labels = find_set("digits")._open("train")
    assert len(labels) == 1198
    for own, index in zip(pixels, (0, 399, 798), strict=True):
        assert np.array_equal(own, np.asarray(read(index).convert("RGB")))
    where = folder(tmp_path / "f", noise())
    yardstick = Yardstick(find_set(f"imagefolder:{where}"), 4)
    digest = yardstick.card(None)["digest"]
    assert len(yardstick.pixels(task, digest)) == 4
    Image.fromarray(noise(1, seed=9)[0]).save(where / "a" / "000.png")
    with pytest.raises(UserError, match="not those any more that they were when the sweep was read"):
        yardstick.pixels(task, digest)


@pytest.mark.parametrize(
    ("methods", "yardsticks", "line"),
    [
        ([QAT], {"real": {"images": "digits", "count": 1199}}, "yardsticks.real: count: 1199: digits has 1198 images"),
        ([QAT], {"real": {"images": "digit"}}, "yardsticks.real.images: unknown evaluation set 'digit': did you mean 'digits'?"),
        ([QAT], {"real": {"images": "digits", "counts": 3}}, "yardsticks.real.counts: "),
        ([QAT], {}, "unknown method 'real': "),
        (["gdfq"], REAL, "yardsticks.real: no method is trained on it"),
        ([{"qat": {"host": "gdfq"}}], {"gdfq": REAL["real"]}, "yardsticks.gdfq: a method is called that"),
        ([{"qat": {"host": "real", "yardstick": {"digest": "0"}}}], REAL, "methods[0].qat.yardstick: it is filled in"),
        ([{"qat": {"host": "real", "host_settings": {"crop": 1}}}], REAL, "methods[0].qat"),
    ],
)
def test_what_is_wrong_is_told(methods: list[Any], yardsticks: Any, line: str, sweep_file: SweepFile) -> None:
    said = told(sweep_file, *methods, yardsticks=yardsticks)
    assert any(line in each for each in said), said


def test_the_section_changes_no_cell_of_a_method(sweep_file: SweepFile) -> None:
    methods = ["gdfq", {"ait": {}}, {"qat": {"host": "gdfq"}}]
    without = {cell.id for cell in load_sweep(sweep_file(methods=methods), cache_folder()).cells}
    found = loaded(sweep_file, *methods, QAT)
    assert without == {cell.id for cell in found.cells if not cell.yardstick}
    assert [cell.yardstick["count"] for cell in found.cells if cell.yardstick] == [40, 40]


# --- where they go ----------------------------------------------------------------------------------------------------


def cell_of(sweep_file: SweepFile, **settings: Any) -> Cell:
    return loaded(sweep_file, {"qat": {"host": "real", "host_settings": {"calibration_epochs": 1}, **settings}}, bits=["w4a4"]).cells[0]


def images(count: int = 24) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_batch_is_of_these_images_alone_every_one_is_seen_and_the_label_is_the_teachers_answer(sweep_file: SweepFile) -> None:
    method = set_up(cell_of(sweep_file), small_teacher(small_task()), torch.device("cpu"), None, images())
    seen: set[int] = set()
    for _ in range(3):
        method.before_step(method.phases()[0])
        batch = method.synthesize()
        same = (batch.images[:, None] == images()[None]).flatten(2).all(2)
        assert same.any(1).all()
        seen |= set(same.int().argmax(1).tolist())
        assert batch.labels is not None
        assert torch.equal(batch.labels, batch.teacher_logits.argmax(1))
    assert len(seen) == 24, "all, in batches of 8, before any is seen again"


def test_nothing_is_handed_to_a_method_and_a_yardstick_without_images_is_an_error(sweep_file: SweepFile) -> None:
    (method,) = (cell for cell in loaded(sweep_file, {"qat": {"host": "gaussian"}}, QAT, bits=["w4a4"]).cells if not cell.yardstick)
    made = set_up(method, small_teacher(small_task()), torch.device("cpu"), None, images())
    assert not isinstance(made.host, YardstickImages)  # type: ignore[attr-defined]
    assert not any(torch.is_tensor(value) for value in (*vars(made).values(), *vars(made.host).values()))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="its images are a yardstick's, and there is none here"):
        set_up(cell_of(sweep_file), small_teacher(small_task()), torch.device("cpu"), None)


def test_interrupted_equals_uninterrupted(sweep_file: SweepFile, tmp_path: Path) -> None:
    def started(name: str) -> Lockstep:
        bundle = Bundle((cell_of(sweep_file, student="intraq"),))
        return Lockstep(bundle, small_teacher(small_task()), torch.device("cpu"), lambda _: None, work=tmp_path / name, yardstick=images())  # type: ignore[arg-type,return-value]

    whole, first, second = started("whole"), started("parts"), started("parts")
    whole.run(StopAfter())
    with pytest.raises(Interrupted):
        first.run(StopAfter(whole.steps - 3))
    save_checkpoint(tmp_path / "checkpoint.pt", first.state())
    state, why = load_checkpoint(tmp_path / "checkpoint.pt", [first.trainees[0].cell.id])
    assert state is not None, why
    second.restore(state)
    second.run(StopAfter())
    assert ends_of(second) == ends_of(whole)


def test_a_run_reads_them_for_their_cells_alone_and_tables_keep_them_apart(
    sweep_file: SweepFile, dfqbench: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    pixels = Yardstick.pixels
    monkeypatch.setattr(Yardstick, "pixels", lambda self, task, digest: (opened.append(digest), pixels(self, task, digest))[1])
    real, short = {"host": "real", "host_settings": {"calibration_epochs": 1}}, {"calibration_epochs": 1}
    config = sweep_file(methods=["round", {"qat": {"host": "gaussian", "host_settings": short}}, {"qat": real}, {"gaussian": short}], yardsticks=REAL)
    store = tmp_path / "results"
    code, out, err = dfqbench("run", config, "--results", store)
    assert code == 0, err
    assert len(opened) == 1, "one bundle of two bit widths"
    code, out, err = dfqbench("table", "--results", store, "--format", "markdown")
    assert code == 0, err
    first, second = out.split("**Yardsticks, trained on real images: ")
    assert "qat(host=gaussian" in first
    assert "host=real" not in first
    assert "host=real" in second
    assert "nothing is bold, compared or ranked" in second
    assert not re.search(r"\*\*\d", second)
    code, out, _ = dfqbench("table", "--results", store, "--format", "csv-means")
    marked = [line for line in out.splitlines() if ",True," in line and "host=real" in line]
    assert len(marked) == 2
    results, _ = Store(store).results()
    (result, _) = (r for r in results if r["cell"]["identity"]["config"].get("yardstick"))
    text = recipe(result)
    assert "export YARDSTICK=imagefolder:path/to/images" in text
    content = yaml.safe_load(text.split("<<'END'\n")[1].split("\nEND")[0].replace("{bits}", result["cell"]["bits"]).replace("{seed}", "0"))
    assert content["yardsticks"] == {"real": {"images": "${YARDSTICK}", "count": 40}}
    content["yardsticks"]["real"]["images"] = "digits"
    again = load_sweep(sweep_file(**{name: content[name] for name in ("methods", "yardsticks", "bits")}, budget=None), cache_folder())
    assert [cell.id for cell in again.cells] == [result["id"]]


def test_settings_are_not_selected_on_real_images(sweep_file: SweepFile, dfqbench: Run, tmp_path: Path) -> None:
    selection = {"images": {"zeroq": {"images": 4, "synthesis_iterations": 1}}, "count": 4}
    config = sweep_file(methods=[QAT], yardsticks=REAL, selection=selection)
    code, _, err = dfqbench("select", config, "--results", tmp_path / "r")
    assert code == 2
    assert "yardsticks: nothing is selected on real images" in err
    selection["images"] = {"qat": {"host": "real"}}  # type: ignore[assignment]
    assert any("unknown method 'real'" in line for line in told(sweep_file, QAT, selection=selection))
