"""What training a convolution and its batch norm as one gains, in time and memory, over one after the other: `python tests/tune_mode_gain.py`.

A student's forward and backward pass, W4A4 under `lineage`, fp32; the two ways take turns. Memory: what autograd keeps from the forward pass for the
backward pass, each storage once, parameters left out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dfqbench.network import Teacher
from dfqbench.quantization import PROTOCOLS, Bits
from dfqbench.quantization.student import Student
from dfqbench.task import Task
from dfqbench.teachers.cifar import cifar_resnet

ROUNDS = 15


def kept_bytes(student: Student, answer: Callable[[Tensor], Tensor], x: Tensor) -> int:
    own = {p.untyped_storage().data_ptr() for p in student.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        said = answer(x)  # keeps the graph, so that no storage is taken for two
    del said
    return sum(kept.values())


def measured(name: str, network: nn.Module, classes: int, size: int, batch: int) -> None:
    task = Task(classes, 3, size, (0.5,) * 3, (0.25,) * 3)
    student = Student(Teacher(network, task), PROTOCOLS["lineage"], Bits(4, 4)).to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    student.track_ranges(True)
    with torch.no_grad():
        student(x)
    student.track_ranges(False)
    student.training_mode(True)
    ways: dict[str, Callable[[Tensor], Tensor]] = {"as one": student, "apart": student.traced}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(ROUNDS + 1):
        for way, answer in ways.items():
            begun = time.perf_counter()
            student.zero_grad(set_to_none=True)
            answer(x).square().mean().backward()
            if number:  # the first warms up
                seconds[way].append(time.perf_counter() - begun)
    ratio = statistics.median(apart / one for apart, one in zip(seconds["apart"], seconds["as one"], strict=True))
    memory = {way: kept_bytes(student, answer, x) / 2**20 for way, answer in ways.items()}
    times = ", ".join(f"{statistics.median(found):.3f} s {way}" for way, found in seconds.items())
    print(f"{name}, batch {batch}: {times}: {ratio:.2f} times as fast; kept {memory['as one']:.0f} MiB as one, {memory['apart']:.0f} MiB apart")


if __name__ == "__main__":
    from pytorchcv.model_provider import get_model

    torch.manual_seed(0)
    measured("CIFAR ResNet-20, 32 pixels", cifar_resnet("resnet20", 10, 3), 10, 32, 200)
    measured("ResNet-18, 224 pixels", get_model("resnet18"), 1000, 224, 16)
