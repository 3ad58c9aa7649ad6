"""Bit budgets: an entry of `bits` that says how many bits weights have on average, and who chooses the width of each. No torch where it is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from pydantic import ValidationError

from dfqbench.errors import nearest
from dfqbench.method import allocator as allocators
from dfqbench.method import registry
from dfqbench.method.catalogue import code_state
from dfqbench.quantization import Bits
from dfqbench.store.cache import remembered
from dfqbench.sweep.problems import Problems, described
from dfqbench.sweep.schema import BitBudget
from dfqbench.task import Kind


@dataclass(frozen=True)
class Allocation:
    """Who chooses the widths of a cell's tensors, and by what; the average is in the cell's bits.

    activations: whether these have a width each, too. images: the digest of what makes the images that the choice is made on, of which `pool` says
    more (as the `allocation` of a config). text: `dnq`, or `dnq(updates=40)` where settings differ from its own. source: of its code. tasks: kinds of
    teachers that it can choose for.
    """

    allocator: str
    version: int
    settings: dict[str, Any]
    activations: bool
    text: str
    images: str = ""
    pool: dict[str, Any] | None = field(default=None, compare=False)
    source: dict[str, str] | None = field(default=None, compare=False)
    tasks: list[Kind] = field(default_factory=list, compare=False)

    def identity(self) -> dict[str, Any]:
        """Everything that can change the choice, beside teacher, protocol and bits."""
        activations = {"activations": True} if self.activations else {}
        return {"allocator": self.allocator, "version": self.version, "settings": self.settings, "images": self.images, **activations}

    def on(self, images: str, pool: dict[str, Any]) -> Allocation:
        return replace(self, images=images, pool=pool)

    def record(self) -> dict[str, Any]:
        """What cell.json holds beside the identity."""
        return {"text": self.text, "pool": self.pool, "source": self.source}


def find_allocations(bits: Sequence[str | BitBudget], problems: Problems, cache: Path) -> list[tuple[Bits, Allocation | None]]:
    """The entries of `bits` in their order, without images; what is wrong is added to `problems`. Remembered as variants are."""
    budgets = [(i, given) for i, given in enumerate(bits) if _is_budget(given)]
    known = registry.untouched() and allocators.untouched() and not problems.lines

    def ask() -> dict[str, Any]:
        found = [_configured(f"bits[{i}]", budget, problems) for i, budget in budgets]
        own = all(one["source"]["package"] == "dfqbench" for one in found if one) and not registry.broken
        return {"found": found, "holds": own and not problems.lines}

    key = [code_state() if known and budgets else None, repr([budget for _, budget in budgets])]
    answer = remembered(cache if known and budgets else None, "allocators", key, ask, lambda answer: bool(answer["holds"]))
    made = {i: Allocation(**one) for (i, _), one in zip(budgets, answer["found"], strict=True) if one}
    widths = [problems.catch(f"bits[{i}]", lambda given=given: _bits(given)) for i, given in enumerate(bits)]  # type: ignore[misc]
    return [(width, made.get(i)) for i, width in enumerate(widths)]


def _is_budget(given: str | BitBudget) -> TypeGuard[BitBudget]:
    return isinstance(given, BitBudget)


def _bits(given: str | BitBudget) -> Bits:
    return Bits(given.average_weight_bits, given.activations) if _is_budget(given) else Bits.parse(given)


def _configured(key: str, budget: BitBudget, problems: Problems) -> dict[str, Any] | None:
    """An Allocation's fields; None, and the problem noted, where there is none."""
    name, settings = budget.allocator
    key = f"{key}.allocate"
    allocator = problems.catch(key, lambda: allocators.find_allocator(name))
    if allocator is None:
        return None
    if budget.allocate_activations and not allocator.of_activations:
        problems.add(f"{key.removesuffix('.allocate')}.allocate_activations", f"{name} chooses for weights only")
    for unknown in [setting for setting in settings if setting not in allocator.Config.model_fields]:
        problems.add(f"{key}.{name}.{unknown}", f"unknown setting: {nearest(unknown, allocator.Config.model_fields)}")
        return None
    try:
        config = allocator.Config(**settings).model_dump(mode="json")
    except ValidationError as error:
        for line in described(error, f"{key}.{name}"):
            problems.add(*line)
        return None
    plain = allocator.Config().model_dump(mode="json")
    changed = [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in sorted(config.items()) if v != plain[k]]
    changed += ["activations too"] if budget.allocate_activations else []
    return {
        "allocator": name,
        "version": allocator.version,
        "settings": config,
        "activations": budget.allocate_activations,
        "text": f"{name}({', '.join(changed)})" if changed else name,
        "source": allocator.info.source.as_dict(),
        "tasks": sorted(allocator.tasks),
    }
