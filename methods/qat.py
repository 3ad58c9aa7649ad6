"""Quantization-aware training of a student on anybody's images: source of images and training of the student as two factors.

A method of this field is both: it makes images, and it trains a student on them. Here each half of one meets each half of another:

    host      makes the images: any method whose images do not depend on the student, or a yardstick of the sweep (real images)
    student   trains on them, as the method that it is named after:
                  gdfq    CE(Q(x), y) + T^2 mean KL(P(x) || Q(x)), the mean over all N x C elements
                  kl      T^2 KL(P(x) || Q(x)) alone, averaged over the batch (`acq` with `student_loss: kl`)
                  ait     KL alone, over all N x C elements, and gradient inundation
                  intraq  CE(Q(x), y) + alpha T^2 KL(P(x) || Q(x)), averaged over the batch
                  dkd     CE(Q(x), y) + TCKD + 8 NCKD (LRQ)
    start     the weights from which it sets out: the teacher's, or these as SQuant rounds them
    end       whether the trained weights are rounded to nearest, or as SQuant rounds them

Fidelity: code. Loss, step, momentum, weight decay and learning rate are those of the method that `student` names, computed by its own class: with
that method's own images this is that method, to the bit. Images are the host's, to the bit. What is said once for both: epochs, batch and milestones
(the lineage's: IntraQ's own fall is at 20 epochs). A host that trains keeps its plan (warm-up, calibration); of one that does not (`zeroq`, `gznq`)
only the images are taken, and ranges are the protocol's, tracked for `calibration_epochs`. ZeroQ's one batch is the batch of every step. y is the
host's label, in segmentation that of each pixel; of Qimera's mixtures the shares of the classes, but the heaviest one for `dkd`; where a host has no
labels (`gaussian`, `zeroq`, real images) the teacher's answer. `kl` trains detectors too, `gdfq` and `ait` segmentation networks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple, Self

from pydantic import model_validator
from torch import Tensor
from torch.optim import Optimizer

from dfqbench import Batch, Field, HostingConfig, HostingMethod, Method, Phase, Student, register
from dfqbench_methods.acq import ACQ
from dfqbench_methods.ait import AIT
from dfqbench_methods.gdfq import GDFQ
from dfqbench_methods.intraq import IntraQ
from dfqbench_methods.lrq import LRQ
from dfqbench_methods.squant import round_cancelling


class Training(NamedTuple):
    """How a method trains its student. settings: those of its Config that this depends on, beside the optimizer's; given: what is chosen of it."""

    method: type[Method]
    settings: tuple[str, ...]
    given: dict[str, Any] = {}
    soft: bool = True  # whether its labels may be a distribution over classes


TRAININGS = {
    "gdfq": Training(GDFQ, ("temperature", "kd_weight")),
    "kl": Training(ACQ, ("temperature",), {"student_loss": "kl"}),
    "ait": Training(AIT, ("temperature", "changed_share", "first_limit")),
    "intraq": Training(IntraQ, ("temperature", "kd_weight")),
    "dkd": Training(LRQ, ("target_weight", "other_weight"), soft=False),
}
OPTIMIZER = ("student_lr", "student_momentum", "student_weight_decay")
FROM_STUDENT = "as the method that `student` names"
PRESETS: dict[str, dict[str, Any]] = {"cifar100": dict(host_preset="cifar100"), "imagenet": dict(batch_size=16, host_preset="imagenet")}
PRESETS |= {f"imagenet-{net}": dict(batch_size=16, host_preset=f"imagenet-{net}") for net in ("resnet18", "resnet50", "mobilenetv2")}


@register("qat", paper="none", fidelity="code", shares_synthesis=True)
class QAT(HostingMethod):
    """Any method's training of the student on any method's images, or on real ones: the two as factors."""

    tasks = {"classify", "segment", "detect"}
    needs = {"labels"}  # and what the host does
    quick = {"host_settings": {"warmup_epochs": 1, "calibration_epochs": 1}, "calibration_epochs": 1}

    class Config(HostingConfig):
        source = "chosen here"
        keeps_plan = False
        after_images = {"student", "start", "end", "calibration_epochs", *OPTIMIZER, "student_identity"}
        presets = PRESETS

        student: Literal["gdfq", "kl", "ait", "intraq", "dkd"] = Field("gdfq", description="whose loss and step train the student")
        start: Literal["teacher", "squant"] = Field("teacher", description="weights to set out from: the teacher's, or as SQuant rounds them")
        end: Literal["none", "squant"] = Field("none", description="rounding of the trained weights: to nearest, or as SQuant rounds")
        calibration_epochs: int = Field(4, ge=1, unit="epochs", description="with tracked ranges, where the host has no plan for students")
        student_lr: float | None = Field(None, gt=0, description="learning rate of the student's SGD; null: its own", source=FROM_STUDENT)  # type: ignore[assignment]
        student_momentum: float | None = Field(None, ge=0, lt=1, description="of the student's SGD; null: its own", source=FROM_STUDENT)  # type: ignore[assignment]
        student_weight_decay: float | None = Field(None, ge=0, description="of the student's SGD; null: its own", source=FROM_STUDENT)  # type: ignore[assignment]
        student_identity: dict[str, Any] = Field(
            {}, description="version and settings of that training: filled in, not to be given", source=FROM_STUDENT
        )

        @model_validator(mode="after")
        def _student_is_complete(self) -> Self:
            training, config = TRAININGS[self.student], training_config(self)
            complete = {"version": training.method.version, **{name: getattr(config, name) for name in training.settings}}
            if self.student_identity not in ({}, complete):
                raise ValueError("student_identity is filled in: leave it out")
            self.__dict__ |= {"student_identity": complete, **{name: getattr(config, name) for name in OPTIMIZER}}  # frozen for everybody else
            return self

    def __init__(self, *given: Any, **more: Any):
        super().__init__(*given, **more)
        training = TRAININGS[self.config.student]
        self.trainer = training.method(self.teacher, training_config(self.config), self.seed, self.device)  # never set up: it makes no images
        self.trainer._log = self._log

    @classmethod
    def tasks_with(cls, config: Any) -> set[Any]:
        """KL alone compares answers of any kind; the others are defined where the methods are whose losses they are."""
        return set(cls.tasks) if config.student == "kl" else set(TRAININGS[config.student].method.tasks)

    @classmethod
    def weight_grids(cls, config: Any) -> Any:
        return ["uniform"] if "squant" in (config.start, config.end) else super().weight_grids(config)

    @property
    def static_step(self) -> bool:
        return self.host.static_step and self.trainer.static_step

    def phases(self) -> list[Phase]:
        c, phases = self.config, self.host.phases()
        if any(phase.distill for phase in phases):
            return phases
        calibration = min(c.calibration_epochs, c.epochs)
        return [
            *(phase for phase in phases if phase.step is not None),
            Phase("calibration", calibration, calibration_epochs=calibration),
            Phase("train", c.epochs - calibration, distill=True),
        ]

    def synthesize(self) -> Batch:
        batch = self.host.synthesize()
        without = batch.labels is None and self.task.kind != "detect"
        return replace(batch, labels=batch.teacher_logits.argmax(1)) if without else batch

    def student_optimizer(self, student: Student) -> Optimizer:
        """Made before the first step, when the student is still the teacher."""
        if self.config.start == "squant":
            round_cancelling(student)
        return self.trainer.student_optimizer(student)

    def distill(self, student: Student, batch: Batch) -> Tensor:
        mixture = getattr(batch, "targets", None) if TRAININGS[self.config.student].soft else None
        return self.trainer.distill(student, batch if mixture is None else replace(batch, labels=mixture))

    def student_step(self, student: Student, loss: Tensor, optimizer: Optimizer) -> None:
        self.trainer.student_step(student, loss, optimizer)

    def finish(self, student: Student) -> None:
        """The host's final edits are no part of its images."""
        if self.config.end == "squant":
            round_cancelling(student)


def training_config(config: Any) -> Any:
    """The settings of the method that `config.student` names, with its preset, and the optimizer's where they are given."""
    training = TRAININGS[config.student]
    names = [name for name in OPTIMIZER if getattr(config, name) is not None]
    given = {**training.given, **{name: getattr(config, name) for name in (*names, "iterations")}}  # of AIT's first epoch
    return training.method.Config(**{**training.method.Config.preset(config.host_preset), **given})
