"""What a method logs: sums that stay where they were computed, averaged at the end of every epoch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value", Tensor, float)


class Log:
    """Running sums of logged scalars, kept where they were computed so that nothing waits for the device."""

    SHARED = ""

    def __init__(self) -> None:
        self.scope = self.SHARED
        self.sums: dict[str, dict[str, list[Any]]] = {}  # scope -> name -> sum (a tensor that stays where it is) and count

    @contextmanager
    def of(self, scope: str) -> Iterator[None]:
        """Inside, values belong to the student of that name."""
        self.scope = scope
        try:
            yield
        finally:
            self.scope = self.SHARED

    def add(self, name: str, value: Tensor | float) -> None:
        value = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))
        value = value if value.dtype == torch.float64 else value.float()
        entry = self.sums.setdefault(self.scope, {}).setdefault(name, [torch.zeros_like(value), 0])
        entry[0] += value
        entry[1] += 1

    def averages(self, scope: str) -> dict[str, float]:
        """The means since the last reset."""
        return {name: float(total) / count for name, (total, count) in self.sums.get(scope, {}).items() if count}

    def reset(self) -> None:
        for values in self.sums.values():
            for entry in values.values():
                entry[0].zero_()
                entry[1] = 0

    def counts(self) -> dict[tuple[str, str], int]:
        """How many values each sum holds, by scope and name."""
        return {(scope, name): count for scope, values in self.sums.items() for name, (_, count) in values.items()}

    def count(self, values: dict[tuple[str, str], int]) -> None:
        """Counts values that a replayed step added to the sums without its Python code being run."""
        for (scope, name), more in values.items():
            self.sums[scope][name][1] += more

    def recount(self, counts: dict[tuple[str, str], int]) -> None:
        """Back to earlier `counts()`, for a step whose Python code ran without its arithmetic; names that it brought in are dropped."""
        self.sums = {
            scope: {name: [total, counts[scope, name]] for name, (total, _) in values.items() if (scope, name) in counts}
            for scope, values in self.sums.items()
        }
