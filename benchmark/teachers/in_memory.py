"""Networks that a caller holds in memory, as teachers."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

from torch import nn

from dfqbench.errors import UserError
from dfqbench.network import Teacher
from dfqbench.task import Task
from dfqbench.teachers.baking import bake
from dfqbench.teachers.build import check_answer
from dfqbench.teachers.card import InMemory, TeacherCard
from dfqbench.teachers.own import boxes_of, decode_of, refuse_torchscript, task_of, unwrap_parts, wrapped
from dfqbench.teachers.spec import Built
from dfqbench.teachers.weights import hash_tensors


def in_memory(given: nn.Module, task: Task | None = None, name: str | None = None, **settings: Any) -> InMemory:
    """A copy of a caller's network as a teacher. What is not among the settings (classes, size, mean, std) is looked for among its attributes.

    Raises UserError for what keeps it from being one.
    """
    label = name or type(given).__name__
    if not isinstance(given, nn.Module):
        raise UserError(f"a torch.nn.Module is wanted, not {label}")
    refuse_torchscript(given, label)
    shells = [given]
    while (inner := wrapped(shells[-1])) is not None:
        shells.append(inner)
    found = task or task_of(label, shells, settings)
    network = copy.deepcopy(shells[-1]).cpu().float().eval()
    if found.kind == "detect":
        network.decode, network.boxes = decode_of(label, shells), boxes_of(shells)
    unwrap_parts(network)
    bake(network)
    network.requires_grad_(False)
    check_answer(Built(network, found), label)
    teacher = Teacher(network, found)
    text = f"{teacher.traced.graph}\n{teacher.traced}"
    card = TeacherCard(
        label=label,
        model=f"memory:{type(shells[-1]).__name__}",
        weights="memory",
        weights_sha256=hash_tensors([*network.named_parameters(), *network.named_buffers()]),
        source_sha256=hashlib.sha256(text.encode()).hexdigest(),
        task=found,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        form=teacher.traced.meta["form"],
        offers=teacher.offers,
    )
    return InMemory(card, network, teacher)
