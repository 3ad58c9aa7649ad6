"""How large a network is, and how much work it does for one image: bytes, average bits, MACs, BOPs.

BOPs (bit operations) are multiply-accumulates x bits of the weights x bits of what enters, summed over all convolutions, linear layers and matrix
products, as HAWQ-V3 counts them (Yao et al., ICML 2021, arXiv:2011.10680). What is not quantized counts with 32 bits.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dfqbench.network import Network
from dfqbench.network.frozen_batch_norm import module_of
from dfqbench.network.products import operands
from dfqbench.quantization.insert import keeps_values
from dfqbench.quantization.layers import ActivationQuantizer, QuantizedLayer, WeightGrid

FLOAT_BITS = 32
_CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate, torch.stack}


class Work(NamedTuple):
    """What one call of a layer, or one product of tensors, does for one image; of_images: a product of two tensors that both depend on the image, of
    which the second counts as the weight."""

    name: str
    macs: int
    weight_bits: int
    activation_bits: int
    of_images: bool = False

    @property
    def bops(self) -> int:
        return self.macs * self.weight_bits * self.activation_bits


class Share(NamedTuple):
    """Shares in 0..1: of the multiplications by a weight those whose weight lies on a grid, and of all multiplications those whose activations do."""

    weights: float
    activations: float


@dataclass(frozen=True)
class Size:
    """A network's size and work.

    bytes: of all that inference needs: weights packed at their bits, the scale and zero point of each grid as float32 (no zero point where it is
    always 0), and everything that stays float. weight_bits: of an average entry of the layers' weights, without biases, norms and grids. work: in the
    order of the forward pass; a layer that is called twice is there twice.
    """

    bytes: int
    weight_bits: float
    work: list[Work]

    @property
    def macs(self) -> int:
        return sum(each.macs for each in self.work)

    @property
    def bops(self) -> int:
        return sum(each.bops for each in self.work)

    def as_dict(self) -> dict[str, Any]:
        """What result.json holds."""
        counted = {"bytes": self.bytes, "weight_bits": round(self.weight_bits, 4), "macs": self.macs, "bops": self.bops}
        return counted | {"quantized": {what: round(share, 4) for what, share in self.quantized._asdict().items()}}

    @property
    def quantized(self) -> Share:
        """How much of the work has operands on a grid."""
        weighed = [each for each in self.work if not each.of_images]
        on_grid = sum(each.macs for each in weighed if each.weight_bits < FLOAT_BITS)
        entering = [each for each in self.work if max(each.activation_bits, each.weight_bits if each.of_images else 0) < FLOAT_BITS]
        return Share(on_grid / max(1, sum(each.macs for each in weighed)), sum(each.macs for each in entering) / max(1, self.macs))


def size_of(network: Network) -> Size:
    """Of a teacher or a student; it runs once, on a black image."""
    stored = list(_stored(network.traced, getattr(network, "left_float", ())))
    weights = [(bits, count) for _, bits, count, is_weight in stored if is_weight]
    entries = sum(count for _, count in weights)
    average = sum(bits * count for bits, count in weights) / entries if entries else float(FLOAT_BITS)
    return Size(sum(size for size, *_ in stored), average, _work_of(network))


def _stored(traced: fx.GraphModule, left_float: Collection[str]) -> Iterator[tuple[int, int, int, bool]]:
    """(bytes, bits of an entry, entries, whether it is a weight) of every tensor that the graph needs; what several modules share is there once."""
    seen = set[tuple[int, int]]()

    def once(tensor: Tensor, bits: int, is_weight: bool = False, grids: int = 0) -> Iterator[tuple[int, int, int, bool]]:
        if (id(tensor), bits) not in seen:
            seen.add((id(tensor), bits))
            yield math.ceil(tensor.numel() * bits / 8) + grids, bits, tensor.numel(), is_weight

    for node in traced.graph.nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(traced)
            if isinstance(value, Tensor):
                yield from once(value, 8 * value.element_size(), str(node.target) in left_float)
        module = module_of(node, traced)
        if isinstance(module, ActivationQuantizer):
            yield from once(module.scale, FLOAT_BITS, grids=0 if module.protocol.activation_symmetric else 4)
        elif module is not None:
            layer = module.layer if isinstance(module, QuantizedLayer) else module
            for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
                if isinstance(module, QuantizedLayer) and name == "weight":
                    yield from once(tensor, module.bits, True, _grid_bytes(module))
                elif not name.endswith("num_batches_tracked"):  # counts batches in training
                    yield from once(tensor, 8 * tensor.element_size(), isinstance(tensor, nn.Parameter) and tensor.dim() > 1)


def _grid_bytes(module: QuantizedLayer) -> int:
    """Of a weight's scales and zero points, float32."""
    grids = module.layer.weight.shape[0] if module.protocol.weight_granularity == "per-channel" else 1
    return 4 * grids * (1 if module.protocol.weight_symmetric else 2)


def _work_of(network: Network) -> list[Work]:
    """Counted while it runs, one node after the other: whatever multiplies tensors is found, in layers or not."""
    device = next((tensor.device for tensor in (*network.parameters(), *network.buffers())), None)
    counter, work = FlopCounterMode(display=False), list[Work]()

    class Counting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            before = counter.get_total_flops()
            answer = super().run_node(n)
            macs = (counter.get_total_flops() - before) // 2
            if macs:
                of_images = n.op != "call_module" and not any(operand.is_weight for operand in operands(n, network.traced))
                work.append(Work(str(n.target) if n.op == "call_module" else n.name, macs, *_bits_of(n, network.traced), of_images))
            return answer

    with _without_gradients(network), _plain_attention(), counter:
        Counting(network.traced).run(torch.zeros(1, *network.task.image_shape, device=device))
    return work


@contextlib.contextmanager
def _without_gradients(network: Network) -> Iterator[None]:
    """Inside, no parameter wants one, either: the counter would look for the graphs of views of them."""
    trained = [p for p in network.parameters() if p.requires_grad]
    network.requires_grad_(False)
    try:
        with torch.no_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Inside, attention is made of products that can be counted, not of one fused kernel."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _bits_of(node: fx.Node, traced: fx.GraphModule) -> tuple[int, int]:
    """(of the weights, of what enters); a product of two activations has those of the second in the weights' place."""
    module = module_of(node, traced)
    operands = [_activation_bits(n, traced) for n in node.all_input_nodes if "shape" in n.meta]
    entering = operands[0] if operands else FLOAT_BITS
    if module is not None:
        return module.bits if isinstance(module, QuantizedLayer) else FLOAT_BITS, entering
    return operands[1] if len(operands) > 1 else entering, entering


def _activation_bits(node: fx.Node, traced: fx.GraphModule) -> int:
    """Of the quantizer that made these values: poolings and reshapes pass them on, a concatenation has the widest of its parts'."""
    module = module_of(node, traced)
    if isinstance(module, ActivationQuantizer | WeightGrid):
        return module.bits
    if node.target in _CONCATENATIONS:
        return max(_activation_bits(part, traced) for part in node.all_input_nodes)
    if keeps_values(node, traced) and node.args and isinstance(node.args[0], fx.Node):
        return _activation_bits(node.args[0], traced)
    return FLOAT_BITS
