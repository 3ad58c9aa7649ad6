"""What a method may hold: everything that is saved is restored, and what could not be is refused by name when it is first saved."""

from __future__ import annotations

import enum
from collections import Counter, OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dfqbench import Batch, Student
from dfqbench.engine.checkpoint import load_checkpoint, save_checkpoint
from dfqbench.engine.method_state import Attributes, modules_of, optimizers_of, restore_state, state_of, streams_of
from dfqbench.method.registry import find_method
from dfqbench.quantization import Bits
from dfqbench.testing import Trial, small_task, small_teacher
from dfqbench.testing.checks import interrupted_equals_uninterrupted

Gdfq: Any = find_method("gdfq")


def made(cls: Any = Gdfq) -> Any:
    method = cls(small_teacher(small_task(1)), cls.Config(batch_size=4), 0)
    method.setup()
    return method


def carried_over(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """As a checkpoint's file gives it back."""
    save_checkpoint(folder / "checkpoint.pt", {"members": [], "method": state})
    found, why = load_checkpoint(folder / "checkpoint.pt", [])
    assert found is not None, why
    return dict(found["method"])


class PerStudent(Gdfq):  # type: ignore[misc]
    """Each student is drawn to a moving average of its own weights, held as tensors and as a module with an optimizer."""

    def setup(self) -> None:
        super().setup()
        self.average: dict[Bits, dict[str, Tensor]] = {}
        self.heads: dict[str, dict[Any, Any]] = {"module": {}, "optimizer": {}}

    def student_optimizer(self, student: Student) -> torch.optim.Optimizer:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.heads["module"][student.bits] = nn.Linear(self.task.classes, self.task.classes).to(self.device)
        self.heads["optimizer"][student.bits] = torch.optim.Adam(self.heads["module"][student.bits].parameters(), lr=0.01)
        return torch.optim.SGD(student.parameters(), lr=0.01)

    def distill(self, student: Student, batch: Batch) -> Tensor:
        logits = self.heads["module"][student.bits](student(batch.images))
        average = self.average.setdefault(student.bits, {name: p.detach().clone() for name, p in student.named_parameters()})
        pull = sum((p - average[name]).square().sum() for name, p in student.named_parameters())
        for name, p in student.named_parameters():
            average[name].lerp_(p.detach(), 0.1)
        return nn.functional.cross_entropy(logits, batch.labels) + 0.1 * pull

    def student_step(self, student: Student, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        self.heads["optimizer"][student.bits].zero_grad()
        super().student_step(student, loss, optimizer)
        self.heads["optimizer"][student.bits].step()


def trial_of(cls: type[Any]) -> Trial:
    cls.info = Gdfq.info
    trial = Trial(Gdfq, {"epochs": 3, "iterations": 2, "batch_size": 8, "warmup_epochs": 1, "calibration_epochs": 1})
    trial.method = cls
    return trial


@pytest.fixture
def per_student(monkeypatch: pytest.MonkeyPatch) -> Trial:
    monkeypatch.setattr("dfqbench.engine.method_state.find_method", lambda name: PerStudent)
    return trial_of(PerStudent)


@pytest.mark.slow
def test_state_of_each_student_interrupted_equals_uninterrupted(per_student: Trial) -> None:
    interrupted_equals_uninterrupted(per_student)


def test_state_of_each_student_is_kept_apart_by_its_bits(per_student: Trial, tmp_path: Path) -> None:
    lockstep = per_student.end(bits=("w4a4", "w3a3"))
    again = per_student.start(bits=("w4a4", "w3a3"))
    restore_state(again.method, carried_over(lockstep.method_state(), tmp_path))
    old, new = lockstep.method.average, again.method.average  # type: ignore[attr-defined]
    assert list(new) == list(old) == [Bits(4, 4), Bits(3, 3)]
    assert all(torch.equal(new[bits][name], old[bits][name]) for bits in old for name in old[bits])


KEYS: list[Any] = ["a", 3, 1.5, True, None, Bits(4, 4), (Bits(4, 4), "x"), (1, 2)]


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_a_key_is_restored_as_what_it_was(key: Any, tmp_path: Path) -> None:
    old, new = made(), made()
    old.memory = {key: torch.ones(2), "bits": Bits(3, 3), "shape": torch.Size([2, 3]), "dtype": torch.float16}
    restore_state(new, carried_over(state_of(old), tmp_path))
    assert list(new.memory) == list(old.memory)
    assert [type(k) for k in new.memory] == [type(k) for k in old.memory]
    assert [(v, type(v)) for v in list(new.memory.values())[1:]] == [(v, type(v)) for v in list(old.memory.values())[1:]]


class Colour(enum.Enum):
    RED = 1


class Word(str):
    pass


Pair = namedtuple("Pair", ["a", "b"])


class WithArray(nn.Module):
    def get_extra_state(self) -> Any:
        return {"array": np.zeros(2)}

    def set_extra_state(self, state: Any) -> None: ...


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({Colour.RED: 1}, r"self\.memory has the key <Colour\.RED: 1>, a Colour"),
        ({Word("a"): 1}, r"self\.memory has the key 'a', a Word"),
        ({Bits(4, 4): {Path("x"): 1}}, r"self\.memory\[w4a4\] has the key PosixPath\('x'\)"),
        ({(1, Colour.RED): 1}, r"self\.memory has the key .*, a Colour"),
        ({Bits(4, 4): {1, 2}}, r"self\.memory\[w4a4\] is a set"),
        ([np.float64(1.0)], r"self\.memory\[0\] is a float64"),
        ({"a": Colour.RED}, r"self\.memory\['a'\] is a Colour"),
        (Pair(1, 2), r"self\.memory is a Pair"),
        (nn.Linear, r"self\.memory is a type"),
        ([WithArray()], r"self\.memory\[0\]\.state_dict\(\)\['_extra_state'\]\['array'\] holds a ndarray"),
    ],
    ids=str,
)
def test_what_cannot_be_restored_is_refused_by_name_when_it_is_saved(value: Any, said: str) -> None:
    method = made()
    method.memory = value
    with pytest.raises(TypeError, match=said):
        state_of(method)


LATE: dict[str, Callable[[], Any]] = {
    "module": lambda: nn.Linear(1, 1),
    "optimizer": lambda: torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0),
    "generator": lambda: torch.Generator(),
    "default": lambda: defaultdict(list),
}


@pytest.mark.parametrize("kind", LATE)
def test_what_is_made_after_setup_is_refused_at_the_first_checkpoint(per_student: Trial, kind: str) -> None:
    lockstep = per_student.start(bits=("w4a4",))
    lockstep.state()
    lockstep.method.heads["module"][Bits(2, 2)] = LATE[kind]()  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"self\.heads\['module'\]\[w2a2\], a \w+, was made after setup\(\), so it could not be restored"):
        lockstep.state()


def test_dicts_of_their_own_kind_stay_what_they_are(tmp_path: Path) -> None:
    old, new = made(), made()
    for method in (old, new):
        method.seen, method.counts, method.order = defaultdict(list), Counter(), OrderedDict()
    old.seen[Bits(4, 4)].append(1)
    old.counts[3] += 2
    old.order["b"] = 1
    restore_state(new, carried_over(state_of(old), tmp_path))
    assert (new.seen, new.counts, new.order) == (old.seen, old.counts, old.order)
    assert new.seen["absent"] == []
    assert (type(new.counts), type(new.order)) == (Counter, OrderedDict)


def test_modules_optimizers_and_streams_are_found_in_dicts_and_lists() -> None:
    method = made()
    known = (len(list(modules_of(method))), len(list(optimizers_of(method))), set(streams_of(method)))
    module, stream = nn.Conv2d(1, 1, 3), torch.Generator()
    method.inside = {Bits(4, 4): [{"net": module, "stream": stream}], "optimizers": ({"a": torch.optim.SGD(module.parameters(), lr=1.0)},)}
    method.others = [made()]
    assert module in list(modules_of(method))
    assert len(list(modules_of(method))) == 2 * known[0] + 1
    assert len(list(optimizers_of(method))) == 2 * known[1] + 1
    assert streams_of(method)["self.inside[w4a4][0]['stream']"] is stream


def test_modules_in_dicts_get_the_memory_format(per_student: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    def setup(self: Any) -> None:
        super(PerStudent, self).setup()
        self.average, self.heads = {}, {"module": {}, "optimizer": {}, "conv": [{"a": nn.Conv2d(4, 4, 3)}]}

    monkeypatch.setattr(PerStudent, "setup", setup)
    (conv,) = (m for m in modules_of(per_student.start().method) if isinstance(m, nn.Conv2d))
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_what_was_bound_since_is_undone_in_containers_too() -> None:
    method = made()
    method.inside = {"bits": Bits(4, 4), "hosts": [made()], "seen": defaultdict(list)}
    held = Attributes(method)
    method.inside["hosts"][0].extra = 1
    method.inside["bits"] = None
    held.put_back()
    assert method.inside["bits"] == Bits(4, 4)
    assert isinstance(method.inside["bits"], Bits)
    assert not hasattr(method.inside["hosts"][0], "extra")
    assert isinstance(method.inside["seen"], defaultdict)
