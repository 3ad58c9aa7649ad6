"""How large a network is, and how much work it does for one image: bytes, average bits, MACs, BOPs (see quantization/work.py)."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from dfqbench.network import Network
from dfqbench.network.frozen_batch_norm import module_of
from dfqbench.quantization.layers import ActivationQuantizer, QuantizedLayer
from dfqbench.quantization.work import FLOAT_BITS, Share, Work, share_of, work_of


@dataclass(frozen=True)
class Size:
    """A network's size and work.

    bytes: of all that inference needs: weights packed at their bits, the scale and zero point of each grid as float32 (no zero point where it is
    always 0), the codewords of each codebook as float32, and everything that stays float. weight_bits: of an average entry of the layers' weights,
    without biases, norms and grids. work: in the order of the forward pass; a layer that is called twice is there twice.
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
        return share_of(self.work)


def size_of(network: Network) -> Size:
    """Of a teacher or a student; it runs once, on a black image."""
    stored = list(_stored(network.traced, getattr(network, "left_float", ())))
    weights = [(bits, count) for _, bits, count, is_weight in stored if is_weight]
    entries = sum(count for _, count in weights)
    average = sum(bits * count for bits, count in weights) / entries if entries else float(FLOAT_BITS)
    return Size(sum(size for size, *_ in stored), average, work_of(network))


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
    """Of a weight's scales and zero points, or its codebook, float32. Levels that are the same for all weights (powers of two) take none."""
    if module.protocol.weight_grid == "kmeans":
        return 4 << module.bits
    grids = module.layer.weight.shape[0] if module.protocol.weight_granularity == "per-channel" else 1
    return 4 * grids * (1 if module.protocol.weight_symmetric or module.protocol.weight_grid != "uniform" else 2)
