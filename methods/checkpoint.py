"""Checkpoint: a quantized network that somebody else has trained and released, evaluated here. Nothing is trained and no image is made.

Layout `gdfq`: the state dicts of GDFQ's code (xushoukai/GDFQ) and of what was written on it (Qimera and IntraQ save one; the modules of AIT and
ZeroQ are the same). It rebuilds the float network, so a file holds

    MODULE.weight, MODULE.bias      of each layer: float, put on their grid at run time, per output channel, as under the protocol `lineage`
    MODULE.weight, .running_mean .. of each batch norm: as in the float network
    MODULE.1.x_min, MODULE.1.x_max  behind each ReLU and ReLU6: the range of its output; beta and beta_t beside them only served training

and the children of an nn.Sequential are called 0, 1, ... whatever they were called before: `features.stage1.unit1.body.conv1.conv` of pytorchcv
is `features.1.0.body.conv1.conv`. Both names are understood, and a `module.` before all of them. A module that the network calls twice has one
range for both places. The file says neither its bit width nor which layers its code left in full precision: that is for whoever gives it to say,
by `bits` and the protocol. Everything in the file is used exactly once; what does not fit is named, and nothing is evaluated.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dfqbench import Field, InputFile, Method, MethodConfig, Student, UserError, read_weights, register

BOUNDS = ("x_min", "x_max")
COUNTER = "num_batches_tracked"  # of a batch norm: no output in eval mode depends on it
NAMED = 3  # of each kind of misfit; the others are counted


def parts_of(state: Iterable[str]) -> dict[str, str]:
    """What each module with weights is, in the order of a state dict: a "range", a "batch norm" or a "layer"."""
    entries: dict[str, set[str]] = defaultdict(set)
    for name in state:
        module, _, entry = name.rpartition(".")
        entries[module].add(entry)
    return {
        module: "range" if entries[module] & set(BOUNDS) else "batch norm" if "running_mean" in entries[module] else "layer" for module in entries
    }


def weights_of(student: Student) -> dict[str, Tensor]:
    """The float weights, biases and batch norms that a student computes with, by their names in the teacher."""
    found = {}
    for name, tensor in student.traced.state_dict().items():
        module, _, entry = name.rpartition(".")
        layer = module.removesuffix(".layer")
        if entry != COUNTER and not name.startswith("quantizers."):
            found[f"{layer if layer in student.layers else module}.{entry}"] = tensor
    return found


def in_their_names(own: Mapping[str, str], theirs: Iterable[str], network: nn.Module) -> dict[str, str]:
    """Each of our modules with what their code calls it, given the names of all of theirs."""
    children: dict[str, set[str]] = defaultdict(set)
    for module in theirs:
        steps = module.split(".")
        for i, step in enumerate(steps):
            children[".".join(steps[:i])].add(step)
    called = {}
    for module, kind in own.items():
        there, here = "", network
        for step in module.split("."):
            known, order = children.get(there, set()), [name for name, _ in here.named_children()]  # of the forward pass, as an nn.Sequential's is
            renamed = step not in known and bool(known) and all(map(str.isdigit, known))
            there = f"{there}.{order.index(step) if renamed else step}".removeprefix(".")
            here = here.get_submodule(step)
        called[module] = there + ".1" * (kind == "range")  # nn.Sequential(ReLU, quantizer)
    return called


def in_their_order(own: Mapping[str, str], theirs: Mapping[str, str], file: Path) -> dict[str, str]:
    """Each of our modules with the one of theirs that has its place among those of its kind."""
    if file.suffix == ".safetensors":
        raise UserError(f"{file}: a .safetensors file keeps no order, `match: order` needs a .pth or .pt file")
    found: dict[str, str] = {}
    for kind in ("layer", "batch norm", "range"):
        ours, there = ([module for module, its in parts.items() if its == kind] for parts in (own, theirs))
        if len(ours) != len(there):
            raise UserError(f"{file}: {len(there)} x {kind}, where the network has {len(ours)}")
        found |= zip(ours, there, strict=True)
    return found


def misfits(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """What keeps `state` from being `wanted`: by kind, each with the first few names."""
    shapes = {name: (tuple(state[name].shape), tuple(tensor.shape)) for name, tensor in wanted.items() if name in state}
    kinds = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": [name for name in state if name not in wanted],
        "other shape:": [f"{name} {there} where the network has {here}" for name, (there, here) in shapes.items() if there != here],
        "not numbers:": [name for name, value in state.items() if not (value.is_floating_point() and bool(value.isfinite().all()))],
    }
    more = {kind: f" and {len(names) - NAMED} more" if len(names) > NAMED else "" for kind, names in kinds.items()}
    return [f"{kind} {', '.join(names[:NAMED])}{more[kind]}" for kind, names in kinds.items() if names]


@register("checkpoint", paper="its release", fidelity="released", shares_synthesis=True)
class Checkpoint(Method):
    """Somebody else's quantized network, read from the file that they released; no training."""

    batch_norm = "fixed"  # a folded batch norm has no place for the file's
    uses_seed = False
    expected_failures = {"any_task_works": "a checkpoint is of one network"}

    class Config(MethodConfig):
        source = "chosen here"

        file: InputFile = Field(..., description="the released state dict (.pth, .pt, .safetensors); nothing in it is executed", source="its release")
        layout: Literal["gdfq"] = Field("gdfq", description="whose code wrote it")
        match: Literal["names", "order"] = Field(
            "names", description="what says which module is which; order: for other names, the same order of definition and of the forward pass"
        )
        bits: str | None = Field(
            None,
            pattern="^w[2-8]a[2-8]$",
            exclude=True,
            description="the width it was made for, like w4a4: its one row; null: the sweep has only that",
        )

    @classmethod
    def widths(cls, config: Any, asked: Sequence[str]) -> Sequence[str]:
        if config.bits is None and len(asked) > 1:
            raise UserError("a checkpoint was made for one bit width, and its file does not say which: give `bits`, like `bits: w4a4`")
        if config.bits not in (None, *asked):
            raise UserError(f"bits: it was made for {config.bits}, which the sweep does not have")
        return [width for width in asked if config.bits in (None, width)]

    @torch.no_grad()
    def finish(self, student: Student) -> None:
        """Raises UserError that names what of the file does not fit the student, and the other way round."""
        file, given = self.config.file, read_weights(self.config.file)
        theirs, own, behind = parts_of(given), weights_of(student), student.quantized_modules
        ours = parts_of(own) | {module: "range" for module, _ in student.traced.named_modules() if module in behind.values()}
        called = in_their_order(ours, theirs, file) if self.config.match == "order" else in_their_names(ours, theirs, student.traced)
        state = {}
        for name, value in given.items():
            module, _, entry = name.rpartition(".")
            if entry in BOUNDS or (entry != COUNTER and theirs[module] != "range"):
                state[name] = value.reshape(-1) if entry in BOUNDS else value

        weights = {f"{called[module]}.{entry}": own[f"{module}.{entry}"] for module, _, entry in (name.rpartition(".") for name in own)}
        ranges = {name: [f"{called[module]}.{bound}" for bound in BOUNDS] for name, module in behind.items() if module}
        wanted = weights | dict.fromkeys(itertools.chain(*ranges.values()), torch.zeros(1))
        said = misfits(state, wanted) + [f"no range for {name}" for name in behind if name not in ranges]
        if said:
            hint = "; with other names but the same layers in the same order, try `match: order`" if self.config.match == "names" else ""
            raise UserError(f"{file} does not fit the network: {'; '.join(said)}{hint}")
        for name, tensor in weights.items():
            tensor.copy_(state[name])
        for name, quantizer in student.quantizers.items():
            low, high = (float(state[bound]) for bound in ranges[name])
            if low >= high:
                raise UserError(f"{file}: {ranges[name][0]} to x_max is no range: {low:g} to {high:g}")
            quantizer.set_range(low, high)
