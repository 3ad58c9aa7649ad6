"""What a sweep's methods say is remembered word for word, and only where nothing but the suite's own code has a say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dfqbench import Field, InputFile, Method, TrainingConfig, register
from dfqbench.errors import UserErrors
from dfqbench.files import shipped
from dfqbench.method import registry
from dfqbench.quantization import Protocol, find_protocol
from dfqbench.sweep import variants
from dfqbench.sweep.load import Problems, _validate
from dfqbench.sweep.schema import Sweep
from dfqbench.sweep.variants import Variant, find_variants
from dfqbench.task import Task
from dfqbench.yaml_file import read_yaml

TASK = Task(10, 3, 16, (0.5,) * 3, (0.25,) * 3)
Found = tuple[list[Variant], list[Variant]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The entries of sweeps whose methods were asked, in a process that passes for one that has not met any method."""
    entries: list[str] = []
    ask = variants._variants
    monkeypatch.setattr(variants, "_variants", lambda key, *rest: entries.append(key) or ask(key, *rest))  # type: ignore[func-returns-value]
    monkeypatch.setattr(registry, "untouched", lambda: True)
    monkeypatch.setattr(registry, "broken", {})
    return entries


def sweep_of(methods: list[Any], **changes: Any) -> Sweep:
    return Sweep(**{"name": "s", "teachers": ["a:b"], "evaluate": "digits", "bits": ["w4a4"], "methods": methods, **changes})


def found(sweep: Sweep, cache: Path, protocol: Protocol | None = None, tasks: tuple[Task, ...] = (TASK,)) -> Found:
    problems = Problems(Path("c.yaml"))
    presets = {sweep.preset or "", *(given["preset"] for given in sweep.teachers if isinstance(given, dict) and "preset" in given)}
    answer = find_variants(sweep, protocol or find_protocol("lineage"), tasks, presets, problems, cache, cards_of(sweep))
    problems.raise_all()
    return answer


def cards_of(sweep: Sweep) -> dict[str, dict[str, Any]]:
    """As if all yardsticks were there."""
    return {name: {"digest": "0" * 64, "count": given.count} for name, given in sweep.yardsticks.items()}


@pytest.mark.parametrize("config", sorted(path.name for path in shipped("configs").glob("*.yaml")))
def test_the_remembered_answer_is_the_fresh_one_for_every_shipped_config(
    config: str, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in re.findall(r"\$\{(\w+)\}", (shipped("configs") / config).read_text()):
        monkeypatch.setenv(variable, "x")
    sweep = _validate(read_yaml(shipped("configs") / config), Problems(Path(config)))
    assert sweep is not None
    first = found(sweep, tmp_path, find_protocol(sweep.protocol))
    assert asked
    asked.clear()
    again = found(sweep, tmp_path, find_protocol(sweep.protocol))
    assert not asked
    assert (again, repr(again)) == (first, repr(first)), "in the same order too"
    assert all(variant.steps[str(TASK)] is not None for variant in again[0])
    monkeypatch.setattr(registry, "untouched", lambda: False)
    fresh = found(sweep, tmp_path, find_protocol(sweep.protocol))
    assert asked
    for one, other in zip(again[0] + again[1], fresh[0] + fresh[1], strict=True):
        assert {**vars(one), "steps": {}} == vars(other)


SETTINGS = {"bn_weight": [0.5, 1.0], "epochs": 30}


@pytest.mark.parametrize(
    "changed",
    [
        sweep_of([{"gdfq": dict(reversed(SETTINGS.items()))}]),  # another order of the cells' settings
        sweep_of([{"gdfq": {**SETTINGS, "bn_weight": [1.0, 0.5]}}]),
        sweep_of([{"gdfq": {**SETTINGS, "bn_weight": [0.5, 1]}}]),
        sweep_of([{"gdfq": {**SETTINGS, "kd_weight": 1.0}}]),
        sweep_of([{"gdfq": SETTINGS}, "zaq"]),
        sweep_of([{"gdfq": SETTINGS}], preset="imagenet"),
        sweep_of([{"gdfq": SETTINGS}], budget={"batch_size": 8}),
        sweep_of([{"gdfq": SETTINGS}], selection={"images": "zeroq"}),
        sweep_of([{"gdfq": SETTINGS}], bits=["w3a3"]),
    ],
    ids=lambda sweep: f"{sweep.methods} {sweep.preset} {sweep.budget.batch_size} {sweep.selection is not None} {sweep.bits}",
)
def test_whatever_methods_are_asked_about_is_asked_anew(changed: Sweep, asked: list[str], tmp_path: Path) -> None:
    found(sweep_of([{"gdfq": SETTINGS}]), tmp_path)
    asked.clear()
    answer = found(changed, tmp_path)
    assert asked
    assert answer == found(changed, tmp_path / "empty")


def test_a_protocol_and_a_task_are_asked_about_too(asked: list[str], tmp_path: Path) -> None:
    sweep, other = sweep_of(["round"]), Task(100, 3, 32, (0.5,) * 3, (0.25,) * 3)
    for protocol, tasks in (("lineage", (TASK,)), ("hardware", (TASK,)), ("lineage", (TASK, other)), ("lineage", (other,))):
        (variant,), _ = found(sweep, tmp_path, find_protocol(protocol), tasks)
        assert asked == ["methods[0]"]
        assert set(variant.steps) == {str(task) for task in tasks}
        asked.clear()
    found(sweep, tmp_path, find_protocol("lineage"), (other, TASK))
    assert not asked, "in whatever order teachers stand"


def test_changed_code_is_asked_and_what_changes_meanwhile_is_not_remembered(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for states, fresh in (("ab", True), ("aa", True), ("a", False), ("bb", True), ("b", False), ("a", False)):
        seen = iter(states)  # before the question, and after it
        monkeypatch.setattr(variants, "code_state", lambda seen=seen: next(seen))
        found(sweep_of(["gdfq"]), tmp_path)
        assert (bool(asked), list(seen)) == (fresh, []), states
        asked.clear()


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> type[Method]:
    registry.discover()
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))

    @register("mine", paper="none", fidelity="paper", shares_synthesis=True)
    class Mine(Method):
        """Mine."""

        class Config(TrainingConfig):
            start: InputFile | None = Field(None)

    return Mine


@pytest.mark.parametrize("entry", ["mine", {"ait": {"host": "mine"}}])
def test_other_peoples_methods_are_always_asked(entry: Any, mine: type[Method], asked: list[str], tmp_path: Path) -> None:
    for version in (1, 2):
        mine.version = version
        ((variant,), _) = found(sweep_of([entry]), tmp_path)
        assert asked == ["methods[0]"] * version
        assert variant.config.get("host_identity", {"version": variant.version})["version"] == version
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_method_that_reads_a_file_is_always_asked(wrapped: bool, mine: type[Method], asked: list[str], tmp_path: Path) -> None:
    mine.info = replace(mine.info, source=replace(mine.info.source, package="dfqbench"))
    settings = {"start": str(tmp_path / "start.bin")}
    sweep = sweep_of([{"ait": {"host": "mine", "host_settings": settings}} if wrapped else {"mine": settings}])
    configs = []
    for content in ("a", "b"):
        (tmp_path / "start.bin").write_text(content * (1 + len(configs)))
        configs.append(found(sweep, tmp_path / "cache")[0][0].config)
    assert configs[0] != configs[1]
    assert not (tmp_path / "cache").exists()
    found(sweep_of(["mine"]), tmp_path / "cache")
    assert (tmp_path / "cache").exists(), "without a file it would be remembered"


def test_nothing_wrong_is_remembered_and_errors_stay(asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    for _ in range(2):
        with pytest.raises(UserErrors) as caught:
            found(sweep_of(["gdqf", {"gdfq": {"bn_weight": -1}}]), tmp_path)
        said.append(caught.value.messages)
    assert said[0] == said[1]
    assert len(said[0]) == 2
    monkeypatch.setattr(registry, "broken", {"mine": "NameError"})  # mended by whatever, it may claim a name
    found(sweep_of(["gdfq"]), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_process_that_has_met_methods_takes_nothing_from_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not registry.untouched()
    with monkeypatch.context() as patch:
        patch.setattr(registry, "untouched", lambda: True)
        patch.setattr(registry, "broken", {})
        found(sweep_of(["gdfq"]), tmp_path)
        monkeypatch.setattr(registry.find_method("gdfq"), "version", 99)
        assert found(sweep_of(["gdfq"]), tmp_path)[0][0].version != 99, "it was in memory"
    assert found(sweep_of(["gdfq"]), tmp_path)[0][0].version == 99
