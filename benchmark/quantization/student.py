"""The student: a quantized copy of the teacher, the thing that a method trains."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from dfqbench.errors import UserError
from dfqbench.network import Network, Teacher
from dfqbench.network.frozen_batch_norm import BatchNorm
from dfqbench.network.network import without_owner
from dfqbench.quantization.bn_ranges import activation_ranges, mean_inputs
from dfqbench.quantization.insert import insert_quantizers
from dfqbench.quantization.layers import ActivationQuantizer, QuantizedLayer, WeightGrid
from dfqbench.quantization.pairs import Pair, find_pairs
from dfqbench.quantization.protocol import Bits, Protocol
from dfqbench.quantization.tune_mode import tuned


class Student(Network):
    """A quantized copy of `teacher`. Its weights start as the teacher's; its activation quantizers have no range yet.

    Called, it computes convolutions with the batch norms behind them; observed, one after the other: the same up to rounding.

    left_float: layers that no quantizer is known for; they compute in full precision.
    """

    _other_graphs: ClassVar[tuple[str, ...]] = (*Network._other_graphs, "_tuned_graph")

    def __init__(self, teacher: Teacher, protocol: Protocol, bits: Bits, own: Mapping[str, int] | None = None):
        """own: bits of those `tensors` that have others than `bits` says. Raises UserError for a network that the protocol cannot quantize."""
        traced = copy.deepcopy(teacher.traced)
        left_float = insert_quantizers(traced, protocol, bits, own)
        super().__init__(traced, teacher.task)
        if unknown := sorted({*(own or {})} - {*self.tensors}):
            raise ValueError(f"bits for {unknown[0]!r}: the network has no such tensor")
        self.protocol, self.bits, self.left_float = protocol, bits, left_float
        self.decode = teacher.decode
        self.requires_grad_(True)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        graph = self.__dict__.get("_tuned_graph")
        if graph is None:
            graph = self.__dict__["_tuned_graph"] = without_owner(tuned(self.traced))
        return self._said(graph(images))

    @property
    def quantizers(self) -> dict[str, ActivationQuantizer]:
        """Activation quantizers in the order of the forward pass, by the name of the graph node they follow."""
        nodes = (str(n.target) for n in self.traced.graph.nodes if n.op == "call_module")
        found = {name: self.traced.get_submodule(name) for name in nodes}
        return {name.removeprefix("quantizers."): m for name, m in found.items() if isinstance(m, ActivationQuantizer)}

    @property
    def quantized_modules(self) -> dict[str, str]:
        """The module of the teacher whose output each activation quantizer takes; "" where a function or the image gives it."""
        nodes = {n.target: n.args[0] for n in self.traced.graph.nodes if n.op == "call_module" and n.args}
        before = {name: nodes[f"quantizers.{name}"] for name in self.quantizers}
        return {name: str(n.target) if isinstance(n, fx.Node) and n.op == "call_module" else "" for name, n in before.items()}

    @property
    def layers(self) -> dict[str, QuantizedLayer]:
        """Layers with quantized weights, by their names in the teacher."""
        return {name.removeprefix("traced."): m for name, m in self.named_modules() if isinstance(m, QuantizedLayer)}

    @property
    def tensors(self) -> dict[str, QuantizedLayer | WeightGrid | ActivationQuantizer]:
        """What puts weights and activations on a grid, by its name in the network, in the order of the forward pass; each once."""
        nodes = dict.fromkeys(str(n.target) for n in self.traced.graph.nodes if n.op == "call_module")
        found = {name: self.traced.get_submodule(name) for name in nodes}
        return {name: m for name, m in found.items() if isinstance(m, QuantizedLayer | WeightGrid | ActivationQuantizer)}

    def training_mode(self, training: bool) -> None:
        """What a training step wants: BN layers move their statistics only under batch_norm 'trained'; nothing else differs from eval."""
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.train(training and self.protocol.batch_norm == "trained")

    def track_ranges(self, tracking: bool) -> None:
        """Whether activation ranges follow what passes through. They never move otherwise."""
        for quantizer in self.quantizers.values():
            quantizer.tracking = tracking

    def set_ranges_from_bn(self, n: float) -> None:
        """Activation ranges from the BN parameters alone: see `activation_ranges`. Raises UserError where they do not say enough."""
        ranges, quantizers = activation_ranges(self.traced, self.task, n), self.quantizers
        for name, (low, high) in ranges.items():
            quantizers[name].set_range(low, high)

    def pairs(self) -> list[Pair]:
        """Layers between which channels can be scaled and shifted, in the order of the forward pass; residual branches give none."""
        return find_pairs(self.traced)

    @torch.no_grad()
    def correct_biases(self, images: Tensor | None = None) -> list[str]:
        """Takes out of every layer's bias what rounding its weights adds to its mean output, per output channel.

        (DFQ, Nagel et al., ICCV 2019, section 4.2.) The inputs' means are measured on `images`, or, without, those that BN parameters say. Layers
        without a bias get one. Returns the names of the layers that were left as they are: those whose input no batch norm describes.
        """
        inputs: list[Tensor] = []
        means = mean_inputs(self.traced) if images is None else {}
        for name, quantized in self.layers.items():  # in turn: each sees the inputs that the corrected layers before it give
            layer = quantized.layer
            if images is None:
                mean = means.get(name)
                if mean is None:
                    continue
                x = mean.to(layer.weight)
            else:
                hook = quantized.register_forward_pre_hook(lambda module, given: inputs.append(given[0].clone()))
                self(images)
                hook.remove()
                x = inputs.pop()
                inputs.clear()
            added = quantized(x) - layer(x)
            channels = added.dim() - 1 if isinstance(layer, nn.Linear) else 1
            shift = added.mean([d for d in range(added.dim()) if d != channels])
            layer.bias = nn.Parameter(-shift if layer.bias is None else layer.bias - shift)
        return [name for name in self.layers if images is None and means.get(name) is None]

    def check_ranges(self) -> None:
        """Raises UserError naming the quantizers that never got a range."""
        without = [name for name, quantizer in self.quantizers.items() if not quantizer.has_range]
        if without:
            shown = ", ".join(without[:3]) + (f" and {len(without) - 3} more" if len(without) > 3 else "")
            raise UserError(
                f"{len(without)} activation quantizers have no range ({shown}): a phase needs calibration_epochs, or finish() must set them"
            )

    @torch.no_grad()
    def clipped_shares(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(logits, how much of each activation is clipped): images are N x C x H x W; shares in 0..1 by layer, in the order of the forward pass.

        Quantizers that are off or have no range have no share. Nothing moves, as long as nothing is set to (see `training_mode`, `track_ranges`).
        """
        shares: list[Tensor] = []
        listened = [q for q in self.quantizers.values() if q.enabled and q.has_range]
        hooks = [q.register_forward_pre_hook(lambda q, given: shares.append(q.clipped_share(given[0]))) for q in listened]
        try:
            logits = self(images)
        finally:
            for hook in hooks:
                hook.remove()
        return logits, torch.stack(shares) if shares else logits.new_zeros(0)

    @contextlib.contextmanager
    def full_precision(self) -> Iterator[None]:
        """Inside, every quantizer is off: the network computes what the float network with these weights computes."""
        parts = [m for m in self.modules() if isinstance(m, ActivationQuantizer | QuantizedLayer | WeightGrid)]
        before = [part.enabled for part in parts]
        for part in parts:
            part.enabled = False
        try:
            yield
        finally:
            for part, enabled in zip(parts, before, strict=True):
                part.enabled = enabled
