"""Every built-in method through every phase on a pretended GPU: no tensors of two devices meet, no step waits, every operation has a deterministic
kernel, an interrupted run and replayed steps end with the same bits. What such a device cannot show is said in tests/pretended_cuda.py."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretended_cuda import PretendedCuda
from torch.nn import functional as F
from torch.optim import Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dfqbench.engine import step_graph
from dfqbench.engine.device import settings_kept, use_device
from dfqbench.engine.lockstep import Interrupted, Lockstep
from dfqbench.method.contract import Phase
from dfqbench.method.registry import built_in_names, find_method
from dfqbench.method.settings import without_default
from dfqbench.quantization import PROTOCOLS, Bits
from dfqbench.quantization.student import Student
from dfqbench.testing import StopAfter, Trial, ends_of, small_task, small_teacher
from dfqbench.testing.trial import small_task_of
from dfqbench_methods.ait import BISECTIONS, CLOSE_ENOUGH, step_factors, useful_factors
from dfqbench_methods.parts import inundation
from dfqbench_methods.parts.augment import cut
from dfqbench_methods.parts.plateau import Plateau

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "acq": ("acq", {}),
    "ait": ("ait", {}),
    "dfq": ("dfq", {}),
    "gaussian": ("gaussian", {}),
    "gdfq": ("gdfq", {"conditioning": "batch-norm"}),
    "gznq": ("gznq", {"finetune": True, "synthesis_iterations": 6}),
    "gznq, by a generator": ("gznq", {"mode": "generator", "finetune": True, "synthesis_iterations": 6}),
    "intraq": ("intraq", {"synthesis_iterations": 12}),
    "lrq": ("lrq", {"train_on_generator": True, "synthesis_iterations": 12}),
    "qat, ait's step": ("qat", {"student": "ait", "start": "squant", "end": "squant"}),
    "qat, dkd on noise": ("qat", {"student": "dkd", "host": "gaussian", "host_settings": {"calibration_epochs": 1}}),
    "qimera": ("qimera", {"mixed_classes": 4, "mixing": 0.5}),
    "round": ("round", {}),
    "slq": ("slq", {"shares": [0.5, 1.0]}),
    "mlq": ("mlq", {"layer_rounds": 2}),
    "squant": ("squant", {}),
    "tszsq": ("tszsq", {"synthesis_iterations": 8, "relabel_from": 7}),
    "zaq": ("zaq", {}),
    "zeroq": ("zeroq", {"patience": 2, "synthesis_iterations": 12}),
    "acq, pixels": ("acq", {}),
    "gdfq, pixels": ("gdfq", {"conditioning": "batch-norm"}),
    "gznq, pixels": ("gznq", {"finetune": True, "synthesis_iterations": 6}),
    "gznq, boxes": ("gznq", {"finetune": True}),
    "qat, boxes": ("qat", {"student": "kl", "host": "gaussian", "host_settings": {"calibration_epochs": 1}}),
    "zaq, pixels": ("zaq", {}),
    "zaq, boxes": ("zaq", {}),
}
BUDGET = {"epochs": 3, "iterations": 5, "batch_size": 8}
# where a step may wait, by case: what is told of it, and why it stays
WAITS = {
    "gznq": ("index: a mask as an index at methods/gznq.py", "once for each batch of images: how many the teacher is sure of decides what is stored"),
    "gznq, by a generator": ("index: a mask as an index at methods/gznq.py", "as above"),
    "mlq": ("copy to the CPU at methods/mlq.py", "once a round: what each layer costs decides which is next"),
    "tszsq": ("in a step of images", "where boxes are corrected: what the detector sees decides which boxes there are"),
    "gznq, pixels": ("index: a mask as an index at methods/gznq.py", "as above"),
    "gznq, boxes": ("index: a mask as an index at methods/gznq.py", "as above"),
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedCuda]:
    """Under deterministic algorithms, as a run has it. Python's collector rests: a pretended capture cannot be broken off by what is freed in it.
    And a step is recorded after one of its kind, not after three, for the sake of time."""
    monkeypatch.setattr(step_graph, "gc", SimpleNamespace(collect=lambda: 0))
    monkeypatch.setattr(step_graph, "WARM_UP", 1)
    monkeypatch.setitem(BUDGET, "iterations", 3)
    fills, deterministic = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    with PretendedCuda() as device:
        yield device
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fills


def started(case: str, precision: str, gpu: PretendedCuda | None = None) -> Lockstep:
    """Before its first step; what a pretended GPU notes in steps begins with their phase."""
    name, settings = CASES[case]
    fields, method = find_method(name).Config.model_fields, find_method(name)
    kind = "segment" if "pixels" in case else "detect" if "boxes" in case else method.info.tasks[0]
    budget = BUDGET | ({"batch_size": 4} if precision == "bf16" else {})  # of which a CPU without bf16 makes a long time
    trial = Trial(method, {k: v for k, v in budget.items() if k in fields} | settings, kind)
    task = small_task(size=16) if kind == "classify" else small_task_of(kind)
    several = method.info.shares_synthesis and precision == "fp32"
    lockstep = trial.start(bits=("w4a4", "w3a3")[: 1 + several], task=task, device=torch.device("cuda"))
    lockstep.autocast = torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16")
    if gpu is None:
        return lockstep
    step = lockstep.step

    def noted(phase: Phase, calibrating: bool) -> None:
        gpu.part = f"in a step of {phase.name}"
        step(phase, calibrating)
        gpu.part = ""

    lockstep.step = noted  # type: ignore[method-assign]
    return lockstep


def through_a_file(state: dict[str, Any]) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, map_location="cpu", weights_only=True)


def same_bits_come_out(start: Callable[[], Lockstep], whole: Lockstep) -> None:
    """Interrupted and resumed through a file, with steps that are replayed where the method's are all alike."""
    if not whole.steps:
        return
    first, second, said = start(), start(), list[str]()
    if whole.method.static_step:
        first.replay_steps(said.append)
        second.replay_steps(said.append)
    with suppress(Interrupted):
        first.run(StopAfter(whole.steps // 2))
    second.restore(through_a_file(first.state()))
    second.run(StopAfter())
    assert said == []
    assert (first.parts.replayed + second.parts.replayed > 0) == whole.method.static_step
    assert ends_of(second) == ends_of(whole)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible here")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_on_a_real_gpu_the_same_bits_come_out(case: str, precision: str) -> None:
    with settings_kept():
        use_device("cuda")
        whole, again = started(case, precision), started(case, precision)
        whole.run(StopAfter())
        again.run(StopAfter())
        assert all(trainee.failed is None and trainee.evaluation is not None for trainee in whole.trainees)
        assert ends_of(again) == ends_of(whole), "run twice"
        same_bits_come_out(lambda: started(case, precision), whole)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_a_method_runs_on_a_gpu_without_waiting_and_the_same_bits_come_out(case: str, precision: str, gpu: PretendedCuda) -> None:
    whole = started(case, precision, gpu)
    whole.run(StopAfter())
    assert all(trainee.failed is None and trainee.evaluation is not None for trainee in whole.trainees)
    assert dict(gpu.mixtures) == {}
    assert dict(gpu.loose) == {}
    allowed = WAITS.get(case, ("nothing", ""))[0]
    assert [wait for wait in gpu.waits if wait.startswith("in a step") and allowed not in wait] == []
    if case in WAITS:
        assert any(allowed in wait for wait in gpu.waits), "it waits no more: take it out of WAITS"
    same_bits_come_out(lambda: started(case, precision, gpu), whole)
    assert dict(gpu.mixtures) == {}


def test_every_method_that_needs_no_file_is_among_the_cases() -> None:
    assert {name for name, _ in CASES.values()} == {name for name in built_in_names() if not without_default(find_method(name).Config)}


def test_what_a_gpu_refuses_is_found(gpu: PretendedCuda) -> None:
    """The device itself: each fault is named with its place."""
    ours, theirs = torch.ones(3, device="cuda"), torch.ones(3)
    assert torch.equal((ours + 1).cpu(), theirs + 1)
    gpu.waits.clear()
    _ = ours + theirs
    _ = ours[torch.tensor([0])]
    _ = ours + torch.tensor(2.0)  # a number on the CPU may go into an operation
    assert [found.split(" at ")[0] for found in gpu.mixtures] == ["add [((3,), 'cuda'), ((3,), 'cpu')]"]
    assert "tests/methods/test_on_a_gpu.py" in next(iter(gpu.mixtures))
    gpu.waits.clear()
    if ours.sum() > 2:
        _ = ours[ours > 0]
    torch.tensor([1.0], device="cuda")
    torch.rand(2, generator=torch.Generator("cuda"), device="cuda")
    assert [found.split(" at ")[0] for found in gpu.waits] == [
        "a value is read (.item(), float(), if)",
        "index: a mask as an index",
        "copy from pageable memory (torch.tensor(..., device=), .to(device))",
    ]
    torch.rand(2, generator=torch.Generator("cuda"), device="cuda")
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        ours.numpy()
    image = torch.ones(1, 1, 4, 4, device="cuda", requires_grad=True)
    sampled = F.grid_sample(image, torch.zeros(1, 2, 2, 2, device="cuda"), align_corners=False)
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        sampled.sum().backward()


def test_crops_by_products_are_torchs_own(gpu: PretendedCuda) -> None:
    random = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 12, 12, generator=random).requires_grad_()
    height, width = 0.5 + 0.5 * torch.rand(2, 6, generator=random)
    y, x = (2 * torch.rand(2, 6, generator=random) - 1) * (1 - torch.stack([height, width]))
    sign = torch.tensor([1.0, -1.0] * 3)
    zero = torch.zeros(6)
    boxes = torch.stack([torch.stack([width * sign, zero, x], 1), torch.stack([zero, height, y], 1)], 1)
    grid = F.affine_grid(boxes, [6, 3, 12, 12], align_corners=False)
    theirs = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    ours = cut(images, height, y, width * sign, x)
    assert torch.allclose(ours, theirs, atol=1e-5)
    weight = torch.randn(6, 3, 12, 12, generator=random)
    (of_ours,), (of_theirs,) = (torch.autograd.grad((crops * weight).sum(), images) for crops in (ours, theirs))
    assert torch.allclose(of_ours, of_theirs, atol=1e-4)


def test_a_plateau_on_a_gpu_is_torchs_own(gpu: PretendedCuda) -> None:
    random = torch.Generator().manual_seed(1)
    losses = 1 / torch.arange(1, 101) + 0.05 * torch.rand(100, generator=random)

    def rates(device: str) -> list[float]:
        weight = torch.zeros(1, device=device, requires_grad=True)
        optimizer = Adam([weight], lr=0.5, fused=True)
        plateau: Any = Plateau(optimizer, 4, 1e-4) if device == "cuda" else ReduceLROnPlateau(optimizer, factor=0.1, patience=4, min_lr=1e-4)
        found = []
        for loss in losses:
            plateau.step(loss.to(device) if device == "cuda" else loss.item())
            found.append(float(optimizer.param_groups[0]["lr"]))
        return found

    theirs = rates("cpu")
    assert min(theirs) == pytest.approx(1e-4)
    assert rates("cuda") == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("limit", [100.0, math.inf])
@pytest.mark.parametrize("wanted", [1e-3, 0.05, 0.9])
def test_steps_lengthened_together_are_those_lengthened_one_by_one(gpu: PretendedCuda, limit: float, wanted: float) -> None:
    """Of layers whose steps are far too short, nearly right, long enough, lost in rounding, and nothing."""
    random = torch.Generator().manual_seed(3)
    student = Student(small_teacher(small_task()), PROTOCOLS["lineage"], Bits.parse("w4a4"))
    layers = list(student.layers.values())
    weights = [layer.layer.weight.detach().clone() for layer in layers]
    scales = [1e-4, 1e-2, 0.5, 1e-7, 0.0]
    assert len(scales) == len(layers)
    steps = [scale * weight.std() * torch.randn(weight.shape, generator=random) for scale, weight in zip(scales, weights, strict=True)]

    def shares(factors: dict[int, float]) -> dict[int, float]:
        moved = {i: layers[i].weight_levels(weights[i] - a * steps[i]) for i, a in factors.items()}
        return {i: float((levels != layers[i].weight_levels(weights[i])).double().mean()) for i, levels in moved.items()}

    one_by_one = step_factors(useful_factors(weights, steps), shares, wanted, limit)
    student.to("cuda")
    assert inundation.goes(list(student.layers.values()))
    flat = [torch.cat([t.flatten() for t in part]).to("cuda") for part in (weights, steps)]
    inundation.layout(tuple(weight.shape for weight in weights), flat[0].device)
    gpu.waits.clear()
    moved, factors = inundation.lengthened(list(student.layers.values()), *flat, wanted, limit, BISECTIONS, CLOSE_ENOUGH)
    assert dict(gpu.waits) == {}
    assert factors.tolist() == pytest.approx(one_by_one)
    expected = torch.cat([(w - a * s).flatten() for w, a, s in zip(weights, one_by_one, steps, strict=True)])
    assert torch.allclose(moved.cpu(), expected)
    assert max(one_by_one) > 1
