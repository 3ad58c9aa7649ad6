"""Builds a teacher's network, gives it its weights, and asks it about one image."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from dfqbench.errors import UserError
from dfqbench.task import Task, size_of_images
from dfqbench.tasks.answers import answers_of, packed, without_auxiliary
from dfqbench.teachers.baking import bake
from dfqbench.teachers.own import from_file
from dfqbench.teachers.spec import ZOOS, Built, TeacherSpec
from dfqbench.teachers.weights import one_line
from dfqbench.teachers.zoo import BUILDERS


def build(spec: TeacherSpec) -> Built:
    """The network in float32, eval mode, without gradients, with plain weights (baking.py); torch's global random stream is left as it was."""
    place, name = spec.source
    with torch.random.fork_rng(devices=[]):
        built = BUILDERS[place](name, spec) if place in ZOOS else from_file(name, spec)
    lazy = next((name for name, p in built.network.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)), None)
    if lazy is not None:
        raise UserError(f"teacher {spec.model!r}: {lazy} has no shape yet (a lazy module): let the factory run the network once")
    network = built.network.float().eval()
    bake(network)
    network.requires_grad_(False)
    return replace(built, network=network, task=_with_overrides(built.task, spec))


def check_answer(built: Built, where: str) -> None:
    """UserError, with `where` in front, unless the network gives one grey image a finite answer of its task's kind."""
    task = built.task
    try:
        with torch.inference_mode():
            answer = without_auxiliary(built.network(torch.zeros(1, *task.image_shape)))
    except Exception as error:
        raise UserError(f"{where} cannot take an image of {' x '.join(map(str, task.image_shape))}: {one_line(error)}") from error
    problem = answers_of(task).problem(answer, 1)
    if problem:
        raise UserError(f"{where} answers one image {problem}")
    if not bool(torch.isfinite(packed(answer, task)).all()):
        raise UserError(f"{where} answers a grey image with logits that are not finite")


def _with_overrides(task: Task, spec: TeacherSpec) -> Task:
    """The spec's settings win over what a zoo says; UserError where they do not go with the network's channels."""
    given = ("classes", "mean", "std", "crop_ratio", "interpolation", "kind", "scores", "exits")
    changes = {key: value for key in given if (value := getattr(spec, key)) is not None}
    if spec.height_and_width is not None:
        changes |= size_of_images(*spec.height_and_width)
    for key in ("mean", "std"):
        if key in changes and len(changes[key]) != task.channels:
            raise UserError(f"teacher {spec.model!r}: {key} has {len(changes[key])} values, the network takes {task.channels} channels")
    task = replace(task, **changes)
    if task.kind == "classify" and task.width is not None:
        raise UserError(f"teacher {spec.model!r}: classifiers are evaluated on square images here: give one number as `size`")
    return task
