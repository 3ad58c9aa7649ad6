"""Any training of the student on any images: each half is that of the method which it is named after, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from dfqbench.engine.evaluate import state_hash
from dfqbench.method.registry import find_method
from dfqbench.quantization import PROTOCOLS, Bits
from dfqbench.quantization.student import Student
from dfqbench.store.cache import cache_folder
from dfqbench.sweep.load import load_sweep
from dfqbench.testing import Trial, ends_of, outcomes, small_task, small_teacher
from dfqbench_methods.intraq import IntraQ
from dfqbench_methods.lrq import LRQ
from dfqbench_methods.qat import QAT, TRAININGS
from dfqbench_methods.squant import round_cancelling

SweepFile = Callable[..., Path]
SHORT = {"warmup_epochs": 1, "calibration_epochs": 1}
NO_ACQ = {"condition": False, "matching_weight": 0, "adversarial_weight": 0, "consistency_weight": 0}
ZEROQ = {"images": 8, "synthesis_iterations": 3}
GZNQ = {"images": 8, "synthesis_batch": 8, "synthesis_iterations": 3, "confidence": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings", "host", "student"),
    [
        ("gdfq", SHORT, "gdfq", "gdfq"),
        ("qimera", SHORT | {"mixing": 1.0}, "qimera", "gdfq"),
        ("acq", SHORT, "acq", "gdfq"),
        ("acq", SHORT | NO_ACQ | {"student_loss": "kl"}, "gdfq", "kl"),
        ("ait", {"host_settings": SHORT}, "gdfq", "ait"),
        ("intraq", IntraQ.quick, "intraq", "intraq"),
        ("lrq", LRQ.quick, "lrq", "dkd"),
        ("gaussian", {"calibration_epochs": 1}, "gaussian", "kl"),
    ],
)
def test_the_halves_of_one_method_are_that_method_to_the_bit(method: str, settings: dict[str, Any], host: str, student: str) -> None:
    own = settings.get("host_settings", settings)
    own = own if method != "acq" or host == "acq" else SHORT
    bits = ("w4a4", "w3a3")
    halves = {"host": host, "host_settings": own, "student": student, "student_lr": 1e-3, "milestones": [2]}
    alone = Trial(find_method(method), settings | {"student_lr": 1e-3, "milestones": [2]})
    assert ends_of(alone.end(bits=bits)) == ends_of(Trial(QAT, halves).end(bits=bits))
    other = "gdfq" if student != "gdfq" else "intraq"
    assert ends_of(alone.end()) != ends_of(Trial(QAT, halves | {"student": other}).end()), "the student's half makes a difference"


@pytest.mark.slow
@pytest.mark.parametrize("student", [*TRAININGS])
def test_the_images_are_the_hosts_to_the_bit_whoever_trains_on_them(student: str) -> None:
    alone = Trial(find_method("intraq"), IntraQ.quick | {"milestones": []}).end()
    wrapped = Trial(QAT, {"host": "intraq", "host_settings": IntraQ.quick, "milestones": [], "student": student}).end()
    assert alone.last_batch is not None
    assert wrapped.last_batch is not None
    assert torch.equal(alone.last_batch.images, wrapped.last_batch.images)
    assert torch.equal(alone.last_batch.teacher_logits, wrapped.last_batch.teacher_logits)


@pytest.mark.parametrize(("host", "settings"), [("zeroq", ZEROQ), ("gznq", GZNQ)])
def test_of_a_host_that_trains_no_student_the_images_alone_are_taken(host: str, settings: dict[str, Any]) -> None:
    lockstep = Trial(QAT, {"host": host, "host_settings": settings, "calibration_epochs": 1}).end()
    assert [phase.name for phase, _ in lockstep.epochs if phase.step is None] == ["calibration", "train", "train"]
    assert lockstep.student_steps == 6
    assert lockstep.trainees[0].cell.protocol.ranges == "ema", "ranges belong to the student's training"
    batch = lockstep.last_batch
    assert batch is not None
    stored = lockstep.method.host.images.detach() if host == "zeroq" else lockstep.method.host.stored.images  # type: ignore[attr-defined]
    assert any(torch.equal(batch.images[0], image) for image in stored)
    assert batch.labels is not None
    if host == "zeroq":
        assert torch.equal(batch.labels, batch.teacher_logits.argmax(1)), "without a label it is the teacher's answer"


@pytest.mark.parametrize("student", [*TRAININGS])
def test_each_training_has_its_authors_rate_and_settings_unless_a_rate_is_given(student: str) -> None:
    training = TRAININGS[student]
    own = training.method.Config()
    config = QAT.Config(student=student)
    assert (config.student_lr, config.student_momentum, config.student_weight_decay) == (1e-4, 0.9, 0.0 if student == "ait" else 1e-4)
    assert config.student_lr == own.student_lr
    assert config.student_identity == {"version": training.method.version, **{name: getattr(own, name) for name in training.settings}}
    assert QAT.Config(**config.model_dump(mode="json")) == config, "a stored config is valid as it stands"
    assert QAT.Config(student=student, student_lr=0.5).student_lr == 0.5
    imagenet = QAT.Config(student=student, **QAT.Config.presets["imagenet"])
    assert imagenet.student_lr == {"kl": 1e-4, "ait": 1e-4}.get(student, 1e-6)
    assert imagenet.host_identity["warmup_epochs"] == 50
    with pytest.raises(ValidationError, match="student_identity is filled in"):
        QAT.Config(student=student, student_identity={"version": 99})


def rounded(student: Student) -> list[torch.Tensor]:
    return [layer.codes().levels for layer in student.layers.values()]


def test_weights_set_out_from_squants_rounding_and_end_in_it() -> None:
    def started(**settings: Any) -> Student:
        return Trial(QAT, settings).start(bits=("w3a3",)).trainees[0].student

    plain, wanted = started(), Student(small_teacher(small_task()), PROTOCOLS["lineage"], Bits(3, 3))
    nearest = rounded(wanted)
    assert all(map(torch.equal, rounded(plain), nearest))
    round_cancelling(wanted)
    assert all(map(torch.equal, rounded(started(start="squant")), rounded(wanted)))
    assert any(not torch.equal(*pair) for pair in zip(rounded(wanted), nearest, strict=True))

    trained, ended = (Trial(QAT, {"end": end}).end(bits=("w3a3",)).trainees[0].student for end in ("none", "squant"))
    assert state_hash(trained) != state_hash(ended)
    ranges = [[(q.range.low.item(), q.range.high.item()) for q in s.quantizers.values()] for s in (trained, ended)]
    assert ranges[0] == ranges[1], "ranges stay those of the training"
    round_cancelling(trained)
    assert state_hash(trained) == state_hash(ended)


@pytest.mark.slow
@pytest.mark.thorough("settings0", "settings3")
@pytest.mark.parametrize(
    "settings",
    [
        {"student": "ait", "start": "squant", "end": "squant", "student_lr": 0.01},
        {"student": "dkd", "host": "intraq", "host_settings": IntraQ.quick},
        {"student": "intraq", "host": "zeroq", "host_settings": ZEROQ},
        {"student": "kl", "host": "gaussian", "host_settings": {"calibration_epochs": 1}},
        {"student": "gdfq", "host": "gznq", "host_settings": GZNQ},
    ],
)
def test_it_passes_every_check_with_other_hosts_and_trainings(settings: dict[str, Any]) -> None:
    failed = {outcome.check: outcome.failure for outcome in outcomes(QAT, settings) if outcome.failure}
    assert not failed


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"host": "zaq"}, "zaq cannot be wrapped: its images depend on the student"),
        ({"host": "squant"}, "squant cannot be wrapped: it makes no images"),
        ({"host": "round"}, "round cannot be wrapped: it makes no images"),
        ({"host": "ait"}, "ait cannot be wrapped: it wraps a method itself"),
        ({"host": "gznq", "host_settings": {"epochs": 3}}, "host_settings: epochs: give it beside `host`"),
        ({"student": "zaq"}, "student"),
        ({"yardstick": {"digest": "0", "count": 3}}, "yardstick: it is filled in"),
    ],
)
def test_what_cannot_be_is_told(settings: dict[str, Any], said: str, sweep_file: SweepFile) -> None:
    with pytest.raises(Exception, match=said):
        load_sweep(sweep_file(methods=[{"qat": settings}]), cache_folder())


def test_one_set_of_images_serves_every_training(sweep_file: SweepFile) -> None:
    """What they depend on is the same: the synthesis cache hands them over."""
    images = {name: value for name, value in QAT.Config(host="lrq").model_dump(mode="json").items() if name not in QAT.Config.after_images}
    for change in ({"student": "ait"}, {"start": "squant"}, {"student": "dkd", "student_lr": 0.1}):
        other = QAT.Config(host="lrq", **change).model_dump(mode="json")
        assert {name: value for name, value in other.items() if name not in QAT.Config.after_images} == images
    cells = load_sweep(sweep_file(methods=[{"qat": {"student": [*TRAININGS], "end": ["none", "squant"]}}], bits=["w4a4"]), cache_folder()).cells
    assert len({cell.id for cell in cells}) == 10
    assert {cell.label for cell in cells} >= {"qat", "qat(student=dkd)", "qat(end=squant, student=ait)"}
