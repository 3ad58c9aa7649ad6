"""Recorded and replayed steps end with the bits of steps that are run as they are; what cannot be replayed is told, and run as it is.

No GPU is needed: a stand-in for CUDA's graphs does what is documented of them. Recording runs the Python code without effect on any tensor; a
replay does the arithmetic without the Python code, on the tensors of the recording.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dfqbench import Batch, Method, Phase, Student, TrainingConfig
from dfqbench.engine.lockstep import Interrupted, Lockstep
from dfqbench.engine.method_state import Attributes, streams_of
from dfqbench.engine.step_graph import WARM_UP, CapturedParts, first_difference
from dfqbench.method.learning_rate import place_rates, rate_of, set_rate
from dfqbench.method.registry import find_method, register
from dfqbench.testing import StopAfter, Trial, ends_of, small_task

LONG = {"epochs": 3, "iterations": 6, "warmup_epochs": 1}


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for part in fields(value):
            yield from tensors_in(getattr(value, part.name))
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)
    elif isinstance(value, Method):  # a host
        yield from tensors_in(list(vars(value).values()))
    elif hasattr(value, "state_dict"):
        yield from tensors_in(value.state_dict())


class StandIn:
    """Records by running the Python code and taking back its effects on tensors; replays by running it again, taking back its effects on Python."""

    def __init__(self, lockstep: Lockstep, fails: Callable[[], None] = lambda: None):
        self.lockstep, self.fails = lockstep, fails
        self.recorded = self.warmed = self.replays = 0
        self.waiting: list[Callable[[], None]] = []

    def aside(self, replay: Callable[[], None]) -> None:
        """As late as may be."""
        self.waiting.append(replay)

    def join(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()

    def eagerly(self, work: Callable[[], Any]) -> Any:
        self.warmed += 1
        return work()

    def record(self, work: Callable[[], Any], streams: Sequence[torch.Generator]) -> tuple[Any, Callable[[], None]]:
        assert not torch.is_autocast_enabled("cpu"), "autocast must be opened within the recording"
        method = self.lockstep.method
        trainees = [(t.student, t.optimizer) for t in self.lockstep.trainees]
        touched = [*tensors_in(list(vars(method).values())), *tensors_in(trainees), *tensors_in(method._log.sums)]
        before = [tensor.detach().clone() for tensor in touched]
        states = [stream.get_state() for stream in streams]
        self.recorded += 1
        try:
            result = work()
            self.fails()
        finally:
            with torch.no_grad():
                for tensor, value in zip(touched, before, strict=True):
                    tensor.copy_(value)
            for stream, state in zip(streams, states, strict=True):
                stream.set_state(state)

        def replay() -> None:
            self.replays += 1
            counts, attributes = method._log.counts(), Attributes(method)
            made = work()
            method._log.recount(counts)
            attributes.put_back()
            for old, new in zip(tensors_in(result), tensors_in(made), strict=True):
                old.copy_(new)

        for old in tensors_in(result):
            old.detach().fill_(-1 if not old.is_floating_point() else float("nan"))  # a recording computes nothing
        return result, replay


def history(lockstep: Lockstep) -> list[list[dict[str, Any]]]:
    return [[{k: v for k, v in row.items() if k != "seconds"} for row in t.history] for t in lockstep.trainees]


def replaying(lockstep: Lockstep, said: list[str], streams: bool = False, **options: Any) -> list[StandIn]:
    """Has the lockstep replay its steps; the stand-ins come into the list as they are made."""
    made: list[StandIn] = []

    def make() -> StandIn:
        made.append(StandIn(lockstep, **options))
        return made[-1]

    lockstep.replay_steps(said.append, make, streams)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gdfq", "acq"])
def test_replayed_steps_end_with_the_bits_of_steps_run_as_they_are(name: str) -> None:
    trial, bits, said = Trial(find_method(name), LONG), ("w4a4", "w3a3"), []
    plain = trial.end(bits=bits)
    lockstep = trial.start(bits=bits)
    made = replaying(lockstep, said)
    lockstep.run(StopAfter())
    assert said == []
    assert ends_of(lockstep) == ends_of(plain)
    assert history(lockstep) == history(plain)
    assert torch.equal(lockstep.last_batch.images, plain.last_batch.images)  # type: ignore[union-attr]
    # two kinds of steps (6 of the warm-up, 12 of training), three parts: images and two students
    assert [(m.warmed, m.recorded, m.replays) for m in made] == [(3 * WARM_UP, 3, 3 * (6 - WARM_UP)), (3 * WARM_UP, 3, 3 * (12 - WARM_UP))]
    assert isinstance(lockstep.parts, CapturedParts)
    assert lockstep.parts.replayed == 3 * (18 - 2 * WARM_UP)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zaq", "qimera", "slq"])
def test_kinds_of_steps_that_take_turns_are_recorded_each_for_itself(name: str) -> None:
    method, said = find_method(name), list[str]()
    given = {"zaq": {"epochs": 2, "iterations": 12}, "qimera": LONG | {"mixing": 0.5}, "slq": {"epochs": 3, "iterations": 6, "shares": [0.5, 1.0]}}[
        name
    ]
    trial, bits = Trial(method, {**given, "batch_size": 4}), ("w4a4", "w3a3")[: 1 + method.info.shares_synthesis]
    plain, lockstep = trial.end(bits=bits), trial.start(bits=bits)
    made = replaying(lockstep, said)
    lockstep.run(StopAfter())
    assert said == []
    assert ends_of(lockstep) == ends_of(plain)
    assert history(lockstep) == history(plain)
    if name == "slq":  # the first step of each round runs as it is, and what was recorded before it is forgotten
        assert [m.recorded for m in made] == [3, 3, 3]
    else:
        assert max(m.recorded for m in made) == 2 * (1 + len(bits)), "of each kind the images and every student"
    assert sum(m.replays for m in made) > 0


@pytest.mark.slow
def test_bf16_opens_autocast_within_the_recording() -> None:
    trial, task = Trial(find_method("gdfq"), {**LONG, "batch_size": 4}), small_task(size=16)  # a CPU without bf16 is slow
    ends = []
    for replayed in (False, True):
        lockstep = trial.start(task=task)
        lockstep.autocast = torch.autocast("cpu", torch.bfloat16)
        if replayed:
            replaying(lockstep, [])
        lockstep.run(StopAfter())
        ends.append(ends_of(lockstep))
    assert ends[0] == ends[1]


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [5, 11])
def test_after_a_restore_everything_is_recorded_anew(stop_after: int) -> None:
    """Within replayed steps: what is restored into a lockstep that has graphs of its own, and what is restored into a fresh one."""
    trial = Trial(find_method("gdfq"), LONG)
    whole = trial.end()
    first = trial.start()
    replaying(first, [])
    with pytest.raises(Interrupted):
        first.run(StopAfter(stop_after))
    second = trial.start()
    made = replaying(second, [])
    with pytest.raises(Interrupted):
        second.run(StopAfter(4))
    assert made[-1].recorded > 0
    second.restore(first.state())
    second.run(StopAfter())
    assert len(made) > 1, "what was recorded before the restore must not be replayed after it"
    assert ends_of(second) == ends_of(whole)
    assert history(second) == history(whole)


@pytest.mark.slow
def test_a_student_that_diverges_leaves_without_the_others_being_recorded_anew() -> None:
    trial, bits = Trial(find_method("gdfq"), LONG | {"epochs": 4}), ("w4a4", "w3a3")
    healthy = trial.end(bits=bits)
    lockstep = trial.start(bits=bits)
    made = replaying(lockstep, [])
    with pytest.raises(Interrupted):
        lockstep.run(StopAfter(11))  # the first of two epochs of training is not over
    with torch.no_grad():
        next(lockstep.trainees[1].student.parameters()).fill_(float("nan"))
    lockstep.run(StopAfter())
    assert "diverged" in str(lockstep.trainees[1].failed)
    assert len(made) == 2
    assert made[1].recorded == 3
    assert ends_of(lockstep)["w4a4"] == ends_of(healthy)["w4a4"]


@pytest.mark.slow
@pytest.mark.parametrize("failing_part", [1, 2, 3])
def test_a_recording_that_fails_is_told_once_and_the_steps_run_as_they_are(failing_part: int) -> None:
    trial, bits, said = Trial(find_method("gdfq"), LONG), ("w4a4", "w3a3"), []
    plain = trial.end(bits=bits)
    lockstep = trial.start(bits=bits)
    attempts = []

    def fails() -> None:
        attempts.append(1)
        if len(attempts) == failing_part:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    replaying(lockstep, said, fails=fails)
    lockstep.run(StopAfter())
    assert said == ["steps of gdfq are not replayed but run as they are: operation not permitted when stream is capturing"]
    assert len(attempts) == failing_part, "nothing is tried again"
    assert ends_of(lockstep) == ends_of(plain)
    assert history(lockstep) == history(plain)


@pytest.mark.slow
def test_students_that_are_replayed_at_once_end_with_the_same_bits_and_share_the_seconds() -> None:
    """Each with a recorder of its own, and not a step further before all are done: the stand-ins do nothing before they have to."""
    trial, bits, said = Trial(find_method("gdfq"), LONG), ("w4a4", "w3a3", "w5a5"), list[str]()
    plain, lockstep = trial.end(bits=bits), trial.start(bits=bits)
    made = replaying(lockstep, said, streams=True)
    lockstep.run(StopAfter())
    assert said == []
    assert ends_of(lockstep) == ends_of(plain)
    assert history(lockstep) == history(plain)
    assert [(m.recorded, m.replays) for m in made] == [(1, 6 - WARM_UP)] * 4 + [(1, 12 - WARM_UP)] * 4, "images and three students, twice"
    assert not any(m.waiting for m in made)
    assert len({t.history[-1]["seconds"] for t in lockstep.trainees}) == 1


class DrawsForStudents(find_method("gdfq")):  # type: ignore[misc]
    def distill(self, student: Student, batch: Batch) -> Tensor:
        return super().distill(student, batch) + 0.01 * self.draw_noise(()).abs()


@pytest.mark.slow
def test_students_that_draw_random_numbers_are_replayed_one_after_the_other() -> None:
    method = register("draws-for-students", paper="x", fidelity="paper", shares_synthesis=True)(DrawsForStudents)
    trial, bits, said = Trial(method, LONG), ("w4a4", "w3a3"), list[str]()
    plain, lockstep = trial.end(bits=bits), trial.start(bits=bits)
    made = replaying(lockstep, said, streams=True)
    lockstep.run(StopAfter())
    assert said == ["students of draws-for-students are replayed one after the other: they draw random numbers"]
    assert ends_of(lockstep) == ends_of(plain)
    assert sum(m.replays for m in made) > 0
    assert not lockstep.parts.streams


class Plain(Method):
    """Distils on noise, and says that its steps are all the same; the methods below each break that."""

    class Config(TrainingConfig):
        pass

    @property
    def static_step(self) -> bool:
        return True

    def setup(self) -> None:
        self.steps, self.mean, self.seen = 0, torch.zeros(()), [0]

    def phases(self) -> list[Phase]:
        return [Phase("train", self.config.epochs, distill=True, calibration_epochs=1)]

    def synthesize(self) -> Batch:
        images = self.draw_noise(self.config.batch_size, *self.task.image_shape)
        self.once_more(images)
        return Batch(images, None, self.teacher(images).detach())

    def once_more(self, images: Tensor) -> None: ...

    def distill(self, student: Student, batch: Batch) -> Tensor:
        loss: Tensor = (student(batch.images) - batch.teacher_logits).square().mean()
        return loss


class Counts(Plain):
    def once_more(self, images: Tensor) -> None:
        self.steps += 1
        images.mul_(1 + 1 / self.steps)


class CountsInAList(Plain):
    def once_more(self, images: Tensor) -> None:
        self.seen[0] += 1
        images.mul_(1 + 1 / self.seen[0])


class BindsATensor(Plain):
    def once_more(self, images: Tensor) -> None:
        self.mean = 0.5 * self.mean + images.mean()
        images.sub_(self.mean)


class BindsBefore(Plain):
    def before_step(self, phase: Phase) -> int:
        self.mean = torch.rand((), generator=self.random("mean"))
        return 0

    def once_more(self, images: Tensor) -> None:
        images.sub_(self.mean)


class DrawsLater(Plain):
    def once_more(self, images: Tensor) -> None:
        if self.random("noise").get_state().sum() % 2 == 0:  # now and then
            images.add_(torch.rand((), generator=self.random("later")))


class LogsLater(Plain):
    def once_more(self, images: Tensor) -> None:
        if self._log.counts().get(("", "often"), 0) == WARM_UP:
            self.log("late", images.mean())
        self.log("often", images.mean())


class HidesAnAttribute(Plain):
    def once_more(self, images: Tensor) -> None:
        if not hasattr(self, "scale") and self._log.counts().get(("", "mean"), 0) >= WARM_UP:
            self.scale = 0.5
        self.log("mean", images.mean())


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (Counts, "changes self.steps outside of its arithmetic"),
        (CountsInAList, "changes self.seen[0] outside of its arithmetic"),
        (BindsATensor, "changes self.mean outside of its arithmetic"),
        (BindsBefore, "before_step replaces self.mean"),
        (LogsLater, "'late' is first logged in the recorded step"),
        (HidesAnAttribute, "changes self.scale outside of its arithmetic"),
    ],
)
def test_a_false_word_is_told_and_changes_no_result(broken: type[Any], told: str) -> None:
    method = register(f"replayed-{broken.__name__.lower()}", paper="x", fidelity="paper", shares_synthesis=True)(broken)
    trial, said = Trial(method, {"iterations": 6}), []
    plain = trial.end()
    lockstep = trial.start()
    replaying(lockstep, said)
    lockstep.run(StopAfter())
    assert len(said) == 1
    assert told in said[0]
    assert ends_of(lockstep) == ends_of(plain)
    assert history(lockstep) == history(plain)


def test_a_stream_that_is_first_drawn_from_in_the_recording_is_named() -> None:
    method = register("draws-later", paper="x", fidelity="paper", shares_synthesis=True)(DrawsLater)
    trial, said = Trial(method, {"iterations": 6}), []
    lockstep = trial.start()
    replaying(lockstep, said)
    with torch.no_grad():
        seeds = (seed for seed in range(1000) if first_even_draw(trial, seed) == WARM_UP)
        lockstep = trial.start(seed=next(seeds))
    replaying(lockstep, said)
    lockstep.run(StopAfter())
    assert "the random stream 'later' is first drawn from in the recorded step" in said[0]


def first_even_draw(trial: Trial, seed: int) -> int:
    """The step in which DrawsLater first draws from its second stream."""
    method = trial.start(seed=seed).method
    for step in range(20):
        method.synthesize()
        if "later" in streams_of(method):
            return step
    return 20


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible here")


@needs_gpu
@pytest.mark.parametrize("name", ["gdfq", "acq"])
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cuda_graphs_end_with_the_bits_of_steps_run_as_they_are(name: str, precision: str, streams: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    trial, said, ends = Trial(find_method(name), LONG | {"milestones": [2]}), [], []
    for replayed in (False, True):
        lockstep = trial.start(bits=("w4a4", "w3a3"), device=torch.device("cuda"))
        lockstep.autocast = torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16")
        if replayed:
            lockstep.replay_steps(said.append, streams=streams)
        lockstep.run(StopAfter())
        ends.append((ends_of(lockstep), history(lockstep)))
    assert said == []
    assert lockstep.parts.replayed > 0
    assert ends[0] == ends[1]


class Waits(Plain):
    """Breaks the capture off from within: the device is waited for."""

    def once_more(self, images: Tensor) -> None:
        images.mul_(1.0 + float(images.mean() > 0))


@needs_gpu
def test_a_capture_that_cuda_breaks_off_is_told_and_the_run_goes_on_with_the_same_bits() -> None:
    method = register("waits", paper="x", fidelity="paper", shares_synthesis=True)(Waits)
    trial, said = Trial(method, {"iterations": 6}), []
    plain, lockstep = trial.end(device=torch.device("cuda")), trial.start(device=torch.device("cuda"))
    lockstep.replay_steps(said.append)
    lockstep.run(StopAfter())
    assert len(said) == 1
    assert ends_of(lockstep) == ends_of(plain)
    sound = Trial(find_method("gdfq"), LONG)
    later = sound.start(device=torch.device("cuda"))  # and the next cell can be recorded
    later.replay_steps(said.append)
    later.run(StopAfter())
    assert later.parts.replayed > 0
    assert ends_of(later) == ends_of(sound.end(device=torch.device("cuda")))


@pytest.mark.slow
def test_methods_that_do_not_promise_static_steps_are_run_as_they_are() -> None:
    said: list[str] = []
    lockstep = Trial(find_method("zeroq")).start()
    assert replaying(lockstep, said) == []
    lockstep.run(StopAfter())
    assert said == ["steps of zeroq are not replayed but run as they are: they are not the same operations every time (static_step)"]


def test_an_optimizer_whose_rate_would_be_frozen_is_named() -> None:
    class Loose(Plain):
        def student_optimizer(self, student: Student) -> torch.optim.Optimizer:
            return torch.optim.SGD(student.parameters(), lr=0.1)

    said: list[str] = []
    lockstep = Trial(register("loose", paper="x", fidelity="paper", shares_synthesis=True)(Loose)).start()
    assert replaying(lockstep, said) == []
    assert said == ["steps of loose are not replayed but run as they are: its SGD is not one of torch's fused optimizers (fused=True)"]


def test_what_a_failed_recording_bound_is_undone() -> None:
    method = Plain(Trial(find_method("gdfq")).start().teacher, Plain.Config(), 0)
    method.setup()
    held, mean = Attributes(method), method.mean
    method.steps, method.mean, method.extra = 5, torch.ones(()), 1  # type: ignore[attr-defined]
    method.seen.append(3)
    method.random("noise")
    held.put_back()
    assert (method.steps, method.seen, hasattr(method, "extra"), streams_of(method)) == (0, [0], False, {})
    assert method.mean is mean


def test_anchors_differ_where_something_moved() -> None:
    assert first_difference({"a": 1, "b": 2}, {"a": 1, "b": 2}) is None
    assert first_difference({"a": 1, "b": 2}, {"a": 1, "b": 3}) == "b"
    assert first_difference({"a": 1}, {"a": 1, "c": None}) == "c"
    assert first_difference({"a": None}, {}) == "a"


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_a_rate_on_the_device_is_filled_in_place_and_read_as_it_was_given(make: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = make([weight], lr=0.1, fused=True)
    place_rates(optimizer, torch.device("cpu"))
    (group,) = optimizer.param_groups
    placed = group["lr"]
    assert rate_of(group) == 0.1
    set_rate(group, 0.003)
    assert group["lr"] is placed
    assert rate_of(group) == 0.003
    weight.grad = torch.ones(3)
    optimizer.step()
    assert torch.allclose(weight.detach(), torch.full((3,), 1 - 0.003))
    assert group.get("capturable", True), "Adam refuses to be captured without it"


def test_a_rate_that_would_not_be_read_on_the_device_stays_a_number() -> None:
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    place_rates(optimizer, torch.device("cpu"))
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert not isinstance(optimizer.param_groups[0]["lr"], Tensor)
