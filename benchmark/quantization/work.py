"""How much a network multiplies for one image, by what, and how much of that is quantized.

BOPs (bit operations) are multiply-accumulates x bits of the weights x bits of what enters, summed over all convolutions, linear layers and matrix
products, as HAWQ-V3 counts them (Yao et al., ICML 2021, arXiv:2011.10680). What is not quantized counts with 32 bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
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


def share_of(work: Sequence[Work]) -> Share:
    """How much of the work has operands on a grid."""
    weighed = [each for each in work if not each.of_images]
    on_grid = sum(each.macs for each in weighed if each.weight_bits < FLOAT_BITS)
    entering = [each for each in work if max(each.activation_bits, each.weight_bits if each.of_images else 0) < FLOAT_BITS]
    return Share(on_grid / max(1, sum(each.macs for each in weighed)), sum(each.macs for each in entering) / max(1, sum(each.macs for each in work)))


def work_of(network: Network) -> list[Work]:
    """Counted while it runs, one node after the other: whatever multiplies tensors is found, in layers or not."""
    device = next((tensor.device for tensor in (*network.parameters(), *network.buffers())), None)
    counting = _Counting(network.traced)
    with _without_gradients(network), _plain_attention(), counting.counter:
        counting.run(torch.zeros(1, *network.task.image_shape, device=device))
    return counting.work


class _Counting(fx.Interpreter):
    def __init__(self, traced: fx.GraphModule):
        super().__init__(traced)
        self.traced, self.counter, self.work = traced, FlopCounterMode(display=False), list[Work]()

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        answer = super().run_node(n)
        macs = (self.counter.get_total_flops() - before) // 2
        if macs:
            of_images = n.op != "call_module" and not any(operand.is_weight for operand in operands(n, self.traced))
            self.work.append(Work(str(n.target) if n.op == "call_module" else n.name, macs, *_bits_of(n, self.traced), of_images))
        return answer


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
    multiplied = [operand.node for operand in operands(node, traced)] or [n for n in node.all_input_nodes if "shape" in n.meta]
    bits = [_activation_bits(n, traced) for n in multiplied] or [FLOAT_BITS]
    if module is not None:
        return module.bits if isinstance(module, QuantizedLayer) else FLOAT_BITS, bits[0]
    return bits[min(1, len(bits) - 1)], bits[0]


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
