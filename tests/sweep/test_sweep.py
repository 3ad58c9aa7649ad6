"""Configs: what they span, and that every mistake is one line that names file, key, value and what would be right."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dfqbench.errors import UserError, UserErrors
from dfqbench.store.cache import cache_folder
from dfqbench.sweep.cell import bundles, coordinates_of, fingerprint
from dfqbench.sweep.config_file import find_config, text_digest
from dfqbench.sweep.load import load_sweep

SweepFile = Callable[..., Path]


def errors_of(path: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_sweep(path, cache_folder())
    assert isinstance(caught.value, UserErrors)
    assert all(message.startswith(f"{path}: ") for message in caught.value.messages)
    return [message.removeprefix(f"{path}: ") for message in caught.value.messages]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methods": ["gdqf"]}, ["methods[0].gdqf: unknown method 'gdqf': did you mean 'gdfq'?"]),
        ({"methods": [{"gdfq": {"bn_wieght": 1}}]}, ["methods[0].gdfq.bn_wieght: unknown setting: did you mean 'bn_weight'?"]),
        ({"methods": [{"gdfq": {"bn_weight": -1}}]}, ["methods[0].gdfq.bn_weight: -1: input should be greater than or equal to 0"]),
        ({"methods": [{"gdfq": {"preset": "imagnet"}}]}, ["methods[0].gdfq.preset: 'imagnet': unknown preset: did you mean 'imagenet'?"]),
        ({"methods": [{"gdfq": {}, "round": {}}]}, ["one method with its settings is expected"]),
        ({"teachers": ["cifar:resnet2"]}, ["teachers[0]: ", "resnet2", "known: resnet20, resnet20_exits"]),
        ({"teachers": ["torchvison:resnet18"]}, ["teachers[0]: ", "did you mean 'torchvision'?"]),
        ({"teachers": [{"model": "cifar:resnet20", "weights": "gone.safetensors"}]}, ["teachers[0]: ", "there is no weights file gone.safetensors"]),
        ({"evaluate": {"set": "digits", "nam": "x"}}, ["evaluate.nam: 'x': extra inputs"]),
        ({"bits": ["w1a4"]}, ["bits[0]: 'w1a4' is not a bit width"]),
        ({"bits": ["w9a9"]}, ["bits[0]: 'w9a9' is not a bit width"]),
        ({"bits": ["w4"]}, ["bits[0]: 'w4' is not a bit width", "like 'w4a4'"]),
        ({"bits": [1]}, ["bits[0]: '1' is not a bit width"]),
        ({"bits": [9, "w4a4"]}, ["bits[0]: '9' is not a bit width"]),
        ({"bits": []}, ["bits: []: "]),
        ({"evaluate": "digit"}, ["evaluate: ", "did you mean 'digits'?"]),
        ({"evaluate": "imagefolder:/nowhere/at/all"}, ["evaluate: image folder /nowhere/at/all: there is no such folder"]),
        ({"evaluate": "imagefolder:${NOT_SET_ANYWHERE}/x"}, ["evaluate: ", "the environment variable NOT_SET_ANYWHERE is not set"]),
        ({"protocol": "linage"}, ["protocol: unknown protocol 'linage': did you mean 'lineage'?"]),
        ({"protocol": {"first_bit": 8}}, ["protocol: unknown protocol setting 'first_bit': did you mean 'first_bits'?"]),
        ({"protocol": {"first_bits": 9}}, ["first_bits: 9: "]),
        ({"sedes": [0]}, ["sedes: unknown key: did you mean 'seeds'?"]),
        ({"seeds": ["a"]}, ["seeds[0]: 'a': "]),
        ({"budget": {"epoch": 3}}, ["budget.epoch: 3: extra inputs are not permitted"]),
        ({"budget": {"epochs": -1}}, ["budget.epochs: -1: "]),
        ({"precision": "fp16"}, ["precision: 'fp16': "]),
        ({"name": None}, ["name: missing"]),
        ({"name": "a/b"}, ["name: 'a/b': "]),
        ({"plugins": ["nowhere.py"]}, ["plugins[0]: plug-in nowhere.py: no such file"]),
    ],
)
def test_a_mistake_is_one_line_with_key_value_and_what_would_be_right(sweep_file: SweepFile, change: dict[str, Any], said: list[str]) -> None:
    (message,) = errors_of(sweep_file(**change))
    for part in said:
        assert part in message


def test_all_mistakes_of_a_config_are_told_at_once(sweep_file: SweepFile) -> None:
    path = sweep_file(
        methods=["gdqf", {"gdfq": {"latent": 3}}], bits=["w4a4", "w1a1"], protocol="linage", evaluate="digit", teachers=["cifar:resnet2"]
    )
    keys = [message.split(":")[0] for message in errors_of(path)]
    assert sorted(keys) == ["bits[1]", "evaluate", "methods[0].gdqf", "methods[1].gdfq.latent", "protocol", "teachers[0]"]


def test_broken_yaml_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("name: x\nbits: [w4a4\nseeds: [0]\n")
    with pytest.raises(UserError, match=r"broken\.yaml: line 3: not valid YAML"):
        load_sweep(path, cache_folder())


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "just text\n"])
def test_a_file_that_is_no_mapping_is_told_so(tmp_path: Path, content: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    assert "a mapping with the keys name, teachers, evaluate" in errors_of(path)[0]


def test_a_truncated_weights_file_is_refused(sweep_file: SweepFile, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00")
    (message,) = errors_of(sweep_file(teachers=[{"model": "cifar:resnet20", "weights": str(tmp_path / "cut.safetensors")}]))
    assert "teachers[0]: " in message
    assert "cut.safetensors" in message


def test_a_pickle_that_executes_code_is_refused_and_not_run(sweep_file: SweepFile, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "was-here",))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"conv1.weight": Attack()}))
    (message,) = errors_of(sweep_file(teachers=[{"model": "cifar:resnet20", "weights": str(tmp_path / "evil.pth")}]))
    assert "refused" in message
    assert not (tmp_path / "was-here").exists()


def test_a_teacher_whose_classes_do_not_match_the_set_is_refused(sweep_file: SweepFile, tmp_path: Path) -> None:
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "two" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "two" / name / "1.png")
    (message,) = errors_of(sweep_file(evaluate=f"imagefolder:{tmp_path / 'two'}"))
    assert message == "teachers[0]: tiny has 10 classes, evaluation set imagefolder:two has 2"


def test_an_empty_image_folder_is_refused(sweep_file: SweepFile, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (message,) = errors_of(sweep_file(evaluate=f"imagefolder:{tmp_path / 'empty'}"))
    assert "it is empty" in message


def test_a_method_and_a_protocol_that_cannot_work_together_are_an_error(sweep_file: SweepFile, tmp_path: Path) -> None:
    plugin = tmp_path / "moving.py"
    plugin.write_text(
        "from dfqbench import Method, register\n\n\n"
        '@register("moving", paper="none", fidelity="paper")\n'
        'class Moving(Method):\n    """Trains BN statistics."""\n\n    batch_norm = "trained"\n'
    )
    (message,) = errors_of(sweep_file(methods=["moving"], plugins=[str(plugin)], protocol="hardware"))
    assert message.startswith("methods[0].moving: method moving needs batch norm 'trained', protocol hardware has it 'folded'")
    (cell, _) = load_sweep(sweep_file(methods=["moving"], plugins=[str(plugin)]), cache_folder()).cells
    assert cell.protocol.batch_norm == "trained"


def test_two_plugins_of_one_name_are_an_error_that_names_both(sweep_file: SweepFile, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text('from dfqbench import Method, register\n\n\n@register("gdfq", paper="x", fidelity="code")\nclass Mine(Method):\n    pass\n')
    load_sweep(sweep_file(), cache_folder())  # the built-in one is known by then
    (message,) = errors_of(sweep_file(plugins=[str(plugin)]))
    assert "two methods are called 'gdfq'" in message
    assert "methods/gdfq.py" in message
    assert "mine.py" in message


def test_cells_are_the_product_and_bundles_join_bit_widths(sweep_file: SweepFile) -> None:
    loaded = load_sweep(sweep_file(bits=["w4a4", "w3a3", "w8a8"], seeds=[0, 1], methods=["gdfq", "round"]), cache_folder())
    assert len({cell.id for cell in loaded.cells}) == 9
    found = bundles(loaded.cells)
    assert len(found) == 3
    assert [str(cell.bits) for cell in found[0].cells] == ["w8a8", "w4a4", "w3a3"]


def test_a_method_without_randomness_has_one_cell_for_all_seeds(sweep_file: SweepFile) -> None:
    cells = load_sweep(sweep_file(bits=["w4a4"], seeds=[3, 4], methods=["gdfq", "round"]), cache_folder()).cells
    assert [(cell.method, cell.seed) for cell in cells] == [("gdfq", 3), ("gdfq", 4), ("round", 0)]


def test_a_set_can_be_named_which_changes_no_identity(sweep_file: SweepFile) -> None:
    named = load_sweep(sweep_file(evaluate={"set": "digits", "name": "mine"}, bits=["w4a4"]), cache_folder()).cells[0]
    plain = load_sweep(sweep_file(bits=["w4a4"]), cache_folder()).cells[0]
    assert (named.evaluation.name, plain.evaluation.name) == ("mine", "digits")
    assert named.id == plain.id


def test_a_list_value_spans_a_grid_and_a_setting_that_is_a_list_needs_lists(sweep_file: SweepFile) -> None:
    settings = {"bn_weight": [0.1, 1.0], "milestones": [2]}
    loaded = load_sweep(sweep_file(methods=[{"gdfq": settings}], bits=["w4a4"]), cache_folder())
    assert [cell.config["bn_weight"] for cell in loaded.cells] == [0.1, 1.0]
    assert [cell.config["milestones"] for cell in loaded.cells] == [[2], [2]]
    assert [cell.label for cell in loaded.cells] == ["gdfq(milestones=[2])", "gdfq(bn_weight=1, milestones=[2])"]
    grid = load_sweep(sweep_file(methods=[{"gdfq": {"milestones": [[1], [2, 3]]}}], bits=["w4a4"]), cache_folder())
    assert [cell.config["milestones"] for cell in grid.cells] == [[1], [2, 3]]


def test_budget_and_preset_fill_what_a_method_has(sweep_file: SweepFile) -> None:
    loaded = load_sweep(sweep_file(methods=["gdfq", "round"], preset="imagenet", bits=["w4a4"], budget={"epochs": 7}), cache_folder())
    gdfq, rounding = loaded.cells
    assert (gdfq.config["epochs"], gdfq.config["batch_size"], gdfq.config["warmup_epochs"], gdfq.config["student_lr"]) == (7, 16, 50, 1e-6)
    assert gdfq.label == "gdfq"
    assert "epochs" not in rounding.config


def test_a_preset_is_the_networks_own_and_that_for_the_bits_where_there_is_one(sweep_file: SweepFile, tiny_teacher: str) -> None:
    teachers = [
        {"model": tiny_teacher, "preset": "imagenet-resnet50"},
        {"model": tiny_teacher, "std": [0.2] * 3, "preset": "cifar100"},
        {"model": tiny_teacher, "std": [0.3] * 3},
    ]
    methods = ["round", "qimera", {"ait": {"host": "qimera"}}, {"gdfq": {"preset": "imagenet"}}]
    selection = {"images": "qimera"}
    loaded = load_sweep(sweep_file(teachers=teachers, methods=methods, bits=["w5a5", "w4a4"], preset="imagenet", selection=selection), cache_folder())
    found = {(i, c.method, str(c.bits)): c for i, teacher in enumerate(loaded.teachers) for c in loaded.cells if c.teacher == teacher}
    assert len(found) == len(loaded.cells) == 24, "three networks, four methods, two widths"
    mixed = {key: c.config.get("host_identity", c.config).get("mixed_classes") for key, c in found.items()}
    assert [mixed[i, "qimera", w] for i in range(3) for w in ("w5a5", "w4a4")] == [100, 500, 50, 10, 100, 100]
    assert [mixed[i, "ait", "w5a5"] for i in range(3)] == [100, 25, 250]
    presets = [found[0, "qimera", "w5a5"].preset, found[0, "ait", "w4a4"].preset, found[1, "gdfq", "w4a4"].preset, found[1, "round", "w4a4"].preset]
    assert presets == ["imagenet-resnet50-w5", "imagenet-resnet50", "imagenet", ""]
    assert [found[i, "qimera", "w4a4"].record().get("by_width") for i in range(3)] == [["mixed_classes"], ["mixed_classes"], None]
    assert found[0, "qimera", "w5a5"].label == found[0, "qimera", "w4a4"].label == "qimera", "one row"
    assert loaded.selection is not None
    assert [c.config["mixed_classes"] for c in loaded.selection.cells] == [100, 50, 100]


def test_a_preset_that_no_method_has_is_told_and_a_second_one_of_a_network(sweep_file: SweepFile, tiny_teacher: str) -> None:
    imagenet = {"model": tiny_teacher, "preset": "imagenet"}
    for wrong, said in (
        ({"preset": "imagnet"}, "preset: 'imagnet': no method has a preset of that name: did you mean 'imagenet'?"),
        ({"teachers": [{**imagenet, "preset": "imagnet"}]}, "preset: 'imagnet': no method has a preset of that name: did you mean 'imagenet'?"),
        ({"teachers": [imagenet, tiny_teacher]}, "teachers[1].preset: '': the same network stands above with 'imagenet': a network has one preset"),
    ):
        with pytest.raises(UserErrors) as caught:
            load_sweep(sweep_file(**wrong), cache_folder())
        (message,) = caught.value.messages
        assert message.split(": ", 1)[1].startswith(said)


def test_the_identity_holds_what_changes_numbers_and_nothing_else(sweep_file: SweepFile, tmp_path: Path) -> None:
    def first(**changes: Any) -> str:
        return load_sweep(sweep_file(bits=["w4a4"], **changes), cache_folder()).cells[0].id

    base = first()
    assert first(name="other", evaluate_every=2) == base
    assert first(protocol={"base": "lineage", "name": "renamed"}) == base
    for change in (
        {"seeds": [1]},
        {"precision": "bf16"},
        {"budget": {"epochs": 2, "iterations": 4, "batch_size": 8}},
        {"protocol": {"first_bits": 8}},
        {"methods": [{"gdfq": {"bn_weight": 0.2}}]},
    ):
        assert first(**change) != base, change


def test_the_set_counts_by_its_content_and_not_by_its_path(sweep_file: SweepFile, tmp_path: Path) -> None:
    import shutil

    import numpy as np
    from PIL import Image

    def write(folder: Path, shade: int) -> Path:
        for label in range(10):
            (folder / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((16, 16, 3), shade + label, np.uint8)).save(folder / str(label) / "a.png")
        return folder

    def ids(folder: Path) -> str:
        return load_sweep(sweep_file(evaluate=f"imagefolder:{folder}", bits=["w4a4"]), cache_folder()).cells[0].id

    one = write(tmp_path / "one", 10)
    shutil.copytree(one, tmp_path / "elsewhere" / "copy")
    assert ids(one) == ids(tmp_path / "elsewhere" / "copy")
    assert ids(one) != ids(write(tmp_path / "two", 11))


def test_shipped_configs_are_found_by_name_and_unknown_ones_are_told(tmp_path: Path) -> None:
    assert find_config("quickstart").name == "quickstart.yaml"
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        find_config("quickstrat")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagenet", "cifar10-jpeg", "quickstart"])
def test_shipped_configs_are_valid_but_for_the_data_that_is_not_here(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only teachers (weights) and evaluation sets may be missing on a machine without them."""
    monkeypatch.chdir(tmp_path)
    for variable in ("IMAGENET", "CIFAR10_JPEG", "CIFAR10_JPEG_TEACHER", "DFQBENCH_DATA"):
        monkeypatch.setenv(variable, str(tmp_path / "absent"))
    from dfqbench.sweep.load import Problems, _parts, _validate
    from dfqbench.yaml_file import read_yaml

    problems = Problems(find_config(name))
    sweep = _validate(read_yaml(find_config(name)), problems)
    assert problems.lines == []
    assert sweep is not None
    monkeypatch.setattr("dfqbench.sweep.load.find_set", lambda given: (_ for _ in ()).throw(UserError("absent")))
    monkeypatch.setattr("dfqbench.sweep.load.examine", lambda *_: (_ for _ in ()).throw(UserError("absent")))
    _parts(sweep, cache_folder(), problems)
    assert {line.split(": ")[1].split("[")[0] for line in problems.lines} == {"evaluate", "teachers"}


def test_the_text_digest_follows_the_file_and_its_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("evaluate: imagefolder:${SOMEWHERE}\n")
    monkeypatch.setenv("SOMEWHERE", "/a")
    before = text_digest(path)
    monkeypatch.setenv("SOMEWHERE", "/b")
    assert text_digest(path) != before


def test_what_is_put_together_of_parts_is_the_canonical_text(sweep_file: SweepFile) -> None:
    loaded = load_sweep(
        sweep_file(methods=["gdfq", {"gdfq": {"bn_weight": [0.2, 0.3]}}, "round"], bits=["w4a4", "w3a3"], seeds=[0, 12]), cache_folder()
    )
    assert len(loaded.cells) == 14
    for cell in loaded.cells:
        assert cell.id == fingerprint(cell.identity())
        assert cell.coordinates == coordinates_of(cell.record())
