"""How many kernels a step launches on a GPU, counted on a pretended one: `python tests/kernels_per_step.py [METHOD...]`.

Counted are the operations that C++ sees on a CPU: what is one kernel on a GPU may count as several, or the other way round. Of each method and part
of a step the last one that was taken counts; shared is the making of images, and what comes with it.
"""

from __future__ import annotations

import sys

import torch
from pretended_cuda import PretendedCuda

from dfqbench.method.registry import find_method
from dfqbench.speed.steps import Stand, phases_of
from dfqbench.teachers.cifar import cifar_resnet
from dfqbench.teachers.zoo import cifar_task

METHODS = ("gdfq", "acq", "qimera", "ait", "zaq", "lrq", "intraq", "gznq", "zeroq")
BATCH = 16  # which changes no count


def counted(name: str) -> dict[str, tuple[int, int, int]]:
    """By phase: kernels of the shared part and of one student's, and waits of a whole step."""
    method, found = find_method(name), {}
    with PretendedCuda() as gpu:
        torch.manual_seed(0)
        stand = Stand(cifar_resnet("resnet20", 10, 3), cifar_task(10, 3), BATCH, torch.device("cuda"))
        for phase in phases_of(method, stand):
            lockstep, planned = stand.lockstep(method, phase, ("w4a4",), "fp32")
            lockstep.begin_epoch(planned, calibrating=method.info.name == "zaq")  # whose ranges are tracked to the end
            parts: dict[str, int] = {}
            run = lockstep.parts.run

            def noted(part: str, work: object, run: object = run, parts: dict[str, int] = parts) -> object:
                gpu.kernels.clear()
                made = run(part, work)  # type: ignore[operator]
                parts[part] = gpu.kernels.total()
                return made

            lockstep.parts.run = noted  # type: ignore[method-assign, assignment]
            steps = int(getattr(stand.config(method, phase), "student_steps", 1))
            for _ in range(4 * steps):
                gpu.waits.clear()
                lockstep.step(planned, calibrating=method.info.name == "zaq")
            found[phase] = (parts.get("shared", 0), parts.get("w4a4", 0), gpu.waits.total())
    return found


if __name__ == "__main__":
    print("method   phase   shared  per student  waits")
    for name in sys.argv[1:] or METHODS:
        for phase, (shared, own, waits) in counted(name).items():
            print(f"{name:8} {phase:7} {shared:6} {own:12} {waits:6}", flush=True)
