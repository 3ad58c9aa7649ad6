"""Methods that wrap another one: a rule for the student's training that works with any host's images, say."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from pydantic import model_validator

from dfqbench.errors import UserError
from dfqbench.method.contract import Batch, Method, Phase
from dfqbench.method.info import Needs
from dfqbench.method.registry import find_method
from dfqbench.method.settings import Field, MethodConfig, TrainingConfig, preset_of
from dfqbench.method.yardstick import YardstickImages
from dfqbench.quantization.student import Student
from dfqbench.task import Kind

if TYPE_CHECKING:
    from dfqbench.network import Teacher

SHARED_SETTINGS = ("epochs", "iterations", "batch_size", "milestones", "lr_decay")  # what the wrapping method says for both


class HostingConfig(TrainingConfig):
    """Settings of a method that wraps the one named in `host`. Epochs, steps, batch, milestones and decay are said once, for both.

    A host starts from the preset that `host_preset` names, as `preset_of` finds it among the host's own, and then from what `hosts` says of it: for
    each host by name, presets of settings that differ from the host's own wherever this method wraps it; "" is that without a preset.

    The host's version and all of its settings enter the cell's identity through `host_identity`. In place of a method, `host` may name one of the
    sweep's `yardsticks`, real images, whose digest and count then stand in `yardstick`.

    keeps_plan: phases, ranges and final edits are the host's, which has to be a method that trains; False: only its images are wanted.
    """

    hosts: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {}
    keeps_plan: ClassVar[bool] = True

    host: str = Field("gdfq", description="the method that makes the images, or a yardstick of the sweep", source="chosen here")
    host_preset: str = Field("", description="the host's preset; empty: its defaults", source="chosen here", later=True)
    host_settings: dict[str, Any] = Field({}, description="what differs from the host's defaults", source="chosen here")
    host_identity: dict[str, Any] = Field({}, description="the host's version and complete settings: filled in, not to be given", source="the host")

    yardstick: dict[str, Any] = Field(
        {}, description="digest and count of the real images that `host` names: filled in, not to be given", source="the sweep", later=True
    )

    @model_validator(mode="after")
    def _host_is_complete(self) -> Self:
        method, config = host_of(self)
        complete = {"version": method.version, **config.model_dump(mode="json")}
        if self.host_identity not in ({}, complete):
            raise ValueError("host_identity is filled in: leave it out, and give host_settings")
        self.__dict__["host_identity"] = complete  # frozen for everybody else
        return self


def host_of(config: HostingConfig) -> tuple[type[Method], MethodConfig]:
    """The host with its settings. Raises ValueError (pydantic's way) where that method cannot be wrapped, or a setting is wrong."""
    method = YardstickImages if config.yardstick else _wrapped(config)
    shared = [name for name in SHARED_SETTINGS if name in method.Config.model_fields]
    twice = [name for name in shared if name in config.host_settings]
    if twice:
        raise ValueError(f"host_settings: {', '.join(twice)}: give it beside `host`, it holds for both")
    wrapped = config.hosts.get(config.host, {})
    start = method.Config.preset(config.host_preset) | wrapped.get(preset_of(wrapped, config.host_preset), {})
    return method, method.Config(**{**start, **config.host_settings, **{name: getattr(config, name) for name in shared}})


def _wrapped(config: HostingConfig) -> type[Method]:
    try:
        method = find_method(config.host)
    except UserError as error:
        raise ValueError(str(error)) from None
    why_not = {
        "it wraps a method itself": issubclass(method.Config, HostingConfig),
        "it trains no student": config.keeps_plan and not issubclass(method.Config, TrainingConfig),
        "it makes no images": not config.keeps_plan and method.synthesize is Method.synthesize,
        "its images depend on the student": not method.info.shares_synthesis,
        "it has rules of its own for ranges or BN": config.keeps_plan and bool(method.ranges or method.batch_norm),
    }
    for reason, holds in why_not.items():
        if holds:
            raise ValueError(f"{config.host} cannot be wrapped: {reason}")
    return method


def methods_of(method: type[Method], config: MethodConfig) -> list[tuple[type[Method], MethodConfig]]:
    """A method and the one that it wraps, each as configured; a yardstick is no method."""
    return [(method, config), host_of(config)] if isinstance(config, HostingConfig) and not config.yardstick else [(method, config)]


def needs_of(method: type[Method], config: MethodConfig) -> set[Needs]:
    """What a method needs as configured: its own `needs`, and those of the method that it wraps."""
    return {need for one, _ in methods_of(method, config) for need in one.needs}


def tasks_of(method: type[Method], config: MethodConfig) -> set[Kind]:
    """The kinds of tasks for which a method as configured is defined: not more than the one that it wraps is."""
    return set.intersection(*(one.tasks_with(settings) for one, settings in methods_of(method, config)))


class HostingMethod(Method):
    """A method whose images are another's. `self.host` is that method; `setup` sets it up as it would be alone: the same seed gives it the same bits.

    What is left to write is how a student learns: `distill`, `student_optimizer`, `student_step`. The host's log, schedules, pictures and final
    edits are kept; checkpoints hold its state.
    """

    def __init__(self, teacher: Teacher, config: MethodConfig, seed: int, device: torch.device | str = "cpu", work: Path | None = None):
        super().__init__(teacher, config, seed, device, work)
        method, host_config = host_of(self.config)
        self.host = method(self.teacher, host_config, self.seed, self.device, self._work)
        self.host._log, self.host._schedules = self._log, self._schedules

    def setup(self) -> None:
        self.host.setup()

    def phases(self) -> list[Phase]:
        return self.host.phases()

    def before_step(self, phase: Phase) -> Hashable:
        return self.host.before_step(phase)

    def synthesize(self) -> Batch:
        return self.host.synthesize()

    def finish(self, student: Student) -> None:
        self.host.finish(student)

    def pictures(self) -> dict[str, Any]:
        return self.host.pictures()
