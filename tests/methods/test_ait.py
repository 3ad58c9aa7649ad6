"""AIT: the search for a step's length, the step itself, and wrapping a host."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.optim import SGD

from dfqbench import Batch
from dfqbench.cli import app as cli
from dfqbench.errors import UserErrors
from dfqbench.method.registry import find_method
from dfqbench.quantization import PROTOCOLS, Bits
from dfqbench.quantization.layers import QuantizedLayer
from dfqbench.quantization.student import Student
from dfqbench.store.cache import cache_folder
from dfqbench.sweep.load import load_sweep
from dfqbench.testing import StopAfter, Trial, small_task, small_teacher
from dfqbench_methods.ait import AIT, direction, step_factors, useful_factors
from dfqbench_methods.intraq import IntraQ

SweepFile = Callable[..., Path]


def searched(curve: Callable[[float], float], wanted: float, limit: float = math.inf, useful: float = 2.0**40) -> tuple[float, list[float]]:
    """The factor found for one tensor whose changed share is `curve` of the factor, and the factors that were tried."""
    tried: list[float] = []

    def shares(factors: dict[int, float]) -> dict[int, float]:
        tried.extend(factors.values())
        return {i: curve(a) for i, a in factors.items()}

    (factor,) = step_factors([useful], shares, wanted, limit)
    return factor, tried


def test_a_step_that_changes_enough_stays_as_it_is() -> None:
    assert searched(lambda a: 0.5, 0.001) == (1.0, [1.0])


def test_a_step_is_doubled_and_bisected_by_hand() -> None:
    """The share is a/1000 and 0.0113 is wanted: 16 is the first doubling that reaches it, then 12, 10, 11, 11.5, 11.25 (closer than 1 %)."""
    factor, tried = searched(lambda a: a / 1000, 0.0113)
    assert tried == [1, 2, 4, 8, 16, 12, 10, 11, 11.5, 11.25]
    assert factor == 11.25


def test_bisection_ends_when_the_share_is_within_a_hundredth() -> None:
    factor, tried = searched(lambda a: a / 1000, 0.012)
    assert tried == [1, 2, 4, 8, 16, 12]
    assert factor == 12


def test_the_last_midpoint_is_taken_whichever_side_it_lies_on() -> None:
    """A jump from 0 to 1 at 9: five midpoints of [8, 16], the last of which changes nothing or everything."""
    factor, tried = searched(lambda a: float(a >= 9), 0.5)
    assert tried == [1, 2, 4, 8, 16, 12, 10, 9, 8.5, 8.75]
    assert factor == 8.75


def test_doubling_ends_above_the_limit() -> None:
    factor, tried = searched(lambda a: 0.0, 0.5, limit=100.0)
    assert max(tried) == 128
    assert 64 < factor <= 128, "the last midpoint, as everywhere"


def test_there_is_no_other_limit_than_where_doubling_changes_nothing_any_more() -> None:
    factor, _ = searched(lambda a: float(a >= 2**30 + 1), 0.5)
    assert 2**30 < factor < 2**31
    factor, tried = searched(lambda a: 0.0, 0.5)
    assert (factor, max(tried)) == (1.0, 2**41), "what no length reaches is not lengthened"
    assert searched(lambda a: 0.0, 0.5, useful=0.0) == (1.0, [1, 2]), "nor what has no step"


def test_beyond_the_useful_factor_integers_do_not_change_any_more() -> None:
    student, _ = student_and_batch()
    layers = list(student.layers.values())
    torch.manual_seed(0)
    weights = [layer.layer.weight.detach() for layer in layers]
    steps = [1e-7 * torch.randn_like(weight) * torch.rand(len(weight), *[1] * (weight.ndim - 1)) ** 4 for weight in weights]
    steps[0].zero_()
    useful = useful_factors(weights, steps)
    assert useful[0] == 0.0
    assert min(useful[1:]) > 2**20
    for layer, weight, step, factor in list(zip(layers, weights, steps, useful, strict=True))[1:]:
        at = 2.0 ** math.ceil(math.log2(factor))
        levels = layer.weight_levels(weight - at * step)
        assert torch.equal(levels, layer.weight_levels(weight - 2 * at * step))
        assert torch.equal(levels, layer.weight_levels(weight - 64 * at * step))
        assert not torch.equal(levels, layer.weight_levels(weight - at * 2**-20 * step))


def test_tensors_are_searched_side_by_side_as_alone() -> None:
    curves = [lambda a: a / 1000, lambda a: 0.5, lambda a: a / 70, lambda a: float(a >= 9)]
    together = step_factors([2.0**40] * 4, lambda factors: {i: curves[i](a) for i, a in factors.items()}, 0.0113)
    assert together == [searched(curve, 0.0113)[0] for curve in curves]


def test_the_direction_is_nesterovs_and_the_buffer_plain_sgds() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    optimizer = SGD([weight], lr=0.1, momentum=0.9, nesterov=True)
    buffer: Any = None
    for _ in range(3):
        old = weight.detach().clone()
        gradient = 2 * old.numpy()
        buffer = gradient if buffer is None else 0.9 * buffer + gradient
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
        assert direction(optimizer, weight, old).numpy() == pytest.approx(gradient + 0.9 * buffer)
        assert weight.detach().numpy() == pytest.approx(old.numpy() - 0.1 * (gradient + 0.9 * buffer))


def student_and_batch() -> tuple[Student, Batch]:
    teacher = small_teacher(small_task())
    student = Student(teacher, PROTOCOLS["lineage"], Bits(4, 4))
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    student.track_ranges(True)
    student(images)
    student.track_ranges(False)
    return student, Batch(images, None, teacher(images).detach())


def ait(**settings: Any) -> AIT:
    cls = find_method("ait")
    assert cls is AIT
    made = AIT(small_teacher(small_task()), AIT.Config(**settings), seed=0)
    made.setup()
    return made


def stepped(method: AIT, lr_decay: float = 1.0) -> tuple[Student, dict[str, torch.Tensor]]:
    student, batch = student_and_batch()
    optimizer = method.student_optimizer(student)
    method.schedule(optimizer, [], 1.0)
    optimizer.param_groups[0]["lr"] *= lr_decay
    before = {name: layer.layer.weight.detach().clone() for name, layer in student.layers.items()}
    method.student_step(student, method.distill(student, batch), optimizer)
    return student, before


def test_a_step_changes_about_the_share_of_integers_that_is_wanted_and_no_factor_is_below_one() -> None:
    wanted = 0.05
    method = ait(changed_share=wanted, first_limit=2.0**20, student_lr=0.1)
    student, before = stepped(method)
    plain, batch = student_and_batch()
    optimizer = method.student_optimizer(plain)
    method.minimise(method.distill(plain, batch), optimizer)
    for name, layer in student.layers.items():
        old, weight = before[name], layer.layer.weight.detach()
        step = method.config.student_lr * direction(optimizer, plain.layers[name].layer.weight, old).detach()
        factor = ((old - weight).norm() / step.norm()).item()
        above = 2.0 ** math.ceil(math.log2(factor) - 1e-3)

        def share(a: float, layer: QuantizedLayer = layer, old: torch.Tensor = old, step: torch.Tensor = step) -> float:
            return (layer.weight_levels(old - a * step) != layer.weight_levels(old)).float().mean().item()

        assert factor > 0.999, name
        assert share(above) >= wanted, f"{name}: the first doubling that changes enough bounds the factor from above"
        assert above == 1 or share(above / 2) < wanted, f"{name}: half of it does not change enough"
    for name, parameter in student.named_parameters():
        if "norm" in name or name.endswith("bias"):
            assert torch.equal(parameter, dict(plain.named_parameters())[name]), f"{name} takes SGD's own step"


def test_in_the_first_epoch_factors_end_at_128_and_the_share_decays_with_the_rate() -> None:
    bounded = ait(changed_share=1.0)
    stepped(bounded)
    assert 64 <= bounded._log.averages("")["step_factor"] <= 128
    full, tenth = ait(changed_share=0.1, first_limit=2.0**20), ait(changed_share=0.1, first_limit=2.0**20)
    changed = []
    for method, decay in ((full, 1.0), (tenth, 0.1)):
        student, before = stepped(method, decay)
        layer = student.layers["conv3"]
        changed.append((layer.weight_levels(layer.layer.weight) != layer.weight_levels(before["conv3"])).float().mean().item())
    assert changed[1] < 0.3 * changed[0]


def test_levels_are_whole_numbers_of_the_grid_that_spans_the_weight() -> None:
    student, _ = student_and_batch()
    layer = student.layers["conv1"]
    weight = layer.layer.weight.detach()
    levels = layer.weight_levels(weight)
    rows = weight.flatten(1).double().numpy()
    low, high = rows.min(1, keepdims=True), rows.max(1, keepdims=True)
    expected = np.round(rows * 15 / (high - low) - np.round(low * 15 / (high - low))).clip(0, 15)
    assert (levels.flatten(1).numpy() != expected).mean() < 0.01, "but for ties that float32 breaks otherwise"
    assert set(levels.unique().tolist()) <= set(range(16))


def test_the_loss_is_the_divergence_over_all_elements_and_nothing_else() -> None:
    random = np.random.default_rng(0)
    q, p = random.normal(0, 3, (8, 10)), random.normal(0, 3, (8, 10))

    def log_softmax(z: np.ndarray) -> np.ndarray:
        return z - z.max(1, keepdims=True) - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True))

    log_p, log_q = log_softmax(p / 20), log_softmax(q / 20)
    loss = ait().distill(lambda images: images, Batch(torch.tensor(q), None, torch.tensor(p)))  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(400 * (np.exp(log_p) * (log_p - log_q)).sum() / 80, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "settings"),
    [("gdfq", {"warmup_epochs": 1, "calibration_epochs": 1}), ("intraq", IntraQ.quick)],
)
def test_the_images_are_the_hosts_to_the_bit(host: str, settings: dict[str, Any]) -> None:
    alone = Trial(find_method(host), settings).end()
    wrapped = Trial(AIT, {"host": host, "host_settings": settings, "milestones": alone.method.config.milestones}).end()
    assert alone.last_batch is not None
    assert wrapped.last_batch is not None
    assert torch.equal(alone.last_batch.images, wrapped.last_batch.images)
    assert {"generator_ce", "generator_bns"} <= {key for row in wrapped.trainees[0].history for key in row}, "the host's log is kept"


def test_the_hosts_learning_rates_follow_the_schedule() -> None:
    lockstep = Trial(AIT, {"milestones": [1]}).start()
    lockstep.run(StopAfter())
    (group,) = lockstep.method.host.optimizer.param_groups  # type: ignore[attr-defined]
    assert group["lr"] == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"host": "zaq"}, "zaq cannot be wrapped: its images depend on the student"),
        ({"host": "round"}, "round cannot be wrapped: it trains no student"),
        ({"host": "ait"}, "ait cannot be wrapped: it wraps a method itself"),
        ({"host": "gdqf"}, "unknown method 'gdqf': did you mean 'gdfq'?"),
        ({"host_settings": {"epochs": 3}}, "host_settings: epochs: give it beside `host`"),
        ({"host_settings": {"latent": 3}}, "latent"),
        ({"host_identity": {"version": 1}}, "host_identity is filled in"),
    ],
)
def test_what_cannot_be_wrapped_is_told(settings: dict[str, Any], said: str, sweep_file: SweepFile) -> None:
    with pytest.raises(ValidationError, match=said):
        AIT.Config(**settings)
    with pytest.raises(UserErrors) as caught:
        load_sweep(sweep_file(methods=[{"ait": settings}]), cache_folder())
    assert all(said in message and "\n" not in message for message in caught.value.messages)


def test_the_hosts_settings_are_part_of_the_identity_and_short_in_the_label(sweep_file: SweepFile) -> None:
    methods = ["ait", {"ait": {"host_settings": {"bn_weight": 1.0}}}, {"ait": {"host_settings": {"bn_weight": 0.1}}}]
    cells = load_sweep(sweep_file(methods=methods, bits=["w4a4"]), cache_folder()).cells
    assert len({cell.id for cell in cells}) == 3
    assert cells[1].label == "ait(host_settings={'bn_weight':1.0})"
    complete = cells[0].config["host_identity"]
    assert (complete["version"], complete["bn_weight"], complete["epochs"]) == (1, 0.1, 3)
    assert AIT.Config(**cells[1].config).host_identity == cells[1].config["host_identity"], "a stored config is valid as it stands"


def test_its_authors_ran_qimera_with_other_settings_than_qimeras_authors(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def host(preset: str, name: str = "qimera", **settings: Any) -> dict[str, Any]:
        return AIT.Config(**{**AIT.Config.presets.get(preset, {}), "host": name, **settings}).host_identity

    def mixed(preset: str, **settings: Any) -> tuple[Any, ...]:
        return tuple(host(preset, **settings)[key] for key in ("mixed_classes", "embedding", "mixing", "warmup_epochs", "conditioning"))

    assert mixed("") == (2, "teacher", 0.4, 4, "embedding")
    assert mixed("cifar100") == (25, "teacher", 0.4, 4, "embedding")
    for preset in ("imagenet-resnet18", "imagenet-mobilenetv2", "imagenet"):
        assert mixed(preset) == (250, "random", 0.4, 50, "batch-norm")
    assert mixed("imagenet-resnet50") == (100, "teacher", 0.4, 50, "batch-norm")
    assert mixed("imagenet-resnet50", host_settings={"mixing": 0.7}) == (100, "teacher", 0.7, 50, "batch-norm"), "what is asked for comes last"
    assert (host("imagenet", "gdfq")["warmup_epochs"], host("imagenet", "gdfq")["batch_size"]) == (50, 16)
    assert host("cifar100", "intraq")["farthest"] == 1.0, "the host's own preset"
    monkeypatch.setattr("sys.argv", ["dfqbench", "methods", "show", "ait"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert "host qimera, cifar100: mixed_classes=25, embedding=teacher" in capsys.readouterr().out


def test_a_setting_that_came_later_is_no_part_of_the_identity_at_its_default(sweep_file: SweepFile) -> None:
    assert "host_preset" not in AIT.Config().model_dump(mode="json")
    methods = [{"ait": {"host_preset": ["", "imagenet"]}, "label": "host of {host_preset}"}]
    cells = load_sweep(sweep_file(methods=methods, bits=["w4a4"]), cache_folder()).cells
    assert [cell.config.get("host_preset") for cell in cells] == [None, "imagenet"]
    assert [cell.label for cell in cells] == ["ait", "ait(host_preset=imagenet)"]
    assert [cell.name for cell in cells] == ["host of ", "host of imagenet"]
