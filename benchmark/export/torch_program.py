"""A network as a torch.export program: weights as integers, activations through torch's standard decomposed quantize and dequantize operators.

Both exports start here: `save_program` writes the program, onnx_file.py translates it.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from dfqbench.errors import UserError
from dfqbench.network import Network
from dfqbench.quantization.fake_quantize import levels
from dfqbench.quantization.layers import ActivationQuantizer, QuantizedLayer
from dfqbench.quantization.student import Student

INT16 = 2**15  # a centred level below it has an integer type


def register_operators() -> None:
    """torch.ops.quantized_decomposed: they are there once this module of torch has been imported, and a saved program needs them to load."""
    import torch.ao.quantization.fx._decomposed  # noqa: F401


class IntegerLayer(nn.Module):
    """A quantized layer that keeps its weight as int8 or uint8 levels; what it computes is `QuantizedLayer`'s, to the bit."""

    levels: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantized: QuantizedLayer):
        super().__init__()
        codes = quantized.codes()
        self.lowest, self.highest = codes.lowest, codes.highest
        self.dtype = torch.int8 if codes.lowest < 0 else torch.uint8
        zero = codes.zero_point
        self.fits = bool(((zero >= codes.lowest) & (zero <= codes.highest)).all())  # else no integer type need hold it: plain arithmetic
        self.register_buffer("levels", codes.levels.to(self.dtype))
        self.register_buffer("scale", codes.scale)
        self.register_buffer("zero_point", zero.to(torch.int32) if self.fits else zero)
        self.layer = copy.copy(quantized.layer)  # without its float weight
        self.layer._parameters = {name: p for name, p in quantized.layer._parameters.items() if name != "weight"}

    def forward(self, x: Tensor) -> Tensor:
        self.layer.__dict__["weight"] = self.weight()
        try:
            result: Tensor = self.layer(x)
        finally:
            del self.layer.__dict__["weight"]
        return result

    def weight(self) -> Tensor:
        """The weight on its grid, in float32."""
        ops, grid = torch.ops.quantized_decomposed, (self.lowest, self.highest, self.dtype)
        if not self.fits:
            along = [-1, *[1] * (self.levels.dim() - 1)] if self.scale.dim() else []
            whole = ops.dequantize_per_tensor(self.levels, 1.0, 0, *grid)
            result: Tensor = (whole - self.zero_point.view(along)) * self.scale.view(along)
        elif self.scale.dim():
            result = ops.dequantize_per_channel(self.levels, self.scale, self.zero_point, 0, *grid)
        else:
            result = ops.dequantize_per_tensor(self.levels, float(self.scale), int(self.zero_point), *grid)
        return result


class StandardQuantizer(nn.Module):
    """An activation quantizer in torch's standard operators, with int8 or uint8 levels.

    A zero point that lies outside the levels (a range that is far from zero) makes it int16 levels around 0, or plain arithmetic where even
    those do not suffice.
    """

    def __init__(self, quantizer: ActivationQuantizer):
        super().__init__()
        lowest, highest = levels(quantizer.bits, quantizer.protocol.activation_symmetric)
        self.scale, zero = float(quantizer.scale), int(quantizer.zero_point)
        self.dtype = torch.int8 if lowest < 0 else torch.uint8
        if not lowest <= zero <= highest:
            lowest, highest, zero, self.dtype = lowest - zero, highest - zero, 0, torch.int16
        self.lowest, self.highest, self.zero_point = lowest, highest, zero

    def forward(self, x: Tensor) -> Tensor:
        if self.dtype == torch.int16 and not -INT16 <= self.lowest <= self.highest < INT16:
            inverse, scale = 1.0 / torch.tensor(self.scale), torch.tensor(self.scale)
            return torch.clamp(torch.round(x * inverse), self.lowest, self.highest) * scale
        grid = (self.scale, self.zero_point, self.lowest, self.highest, self.dtype)
        ops = torch.ops.quantized_decomposed
        result: Tensor = ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *grid), *grid)
        return result


def lowered(network: Network) -> fx.GraphModule:
    """The network's graph on the CPU, with standard operators in place of the suite's own modules; shares what is left as it is.

    Raises UserError where an activation quantizer has no range or a weight is not finite.
    """
    register_operators()
    if isinstance(network, Student):
        network.check_ranges()
    if any(t.device.type != "cpu" for t in [*network.parameters(), *network.buffers()]):
        network = copy.deepcopy(network).cpu()
    graph = fx.GraphModule(network.traced, copy.deepcopy(network.traced.graph))
    for name, module in dict(network.traced.named_modules()).items():
        if isinstance(module, ActivationQuantizer):
            graph.set_submodule(name, StandardQuantizer(module))
        elif isinstance(module, QuantizedLayer):
            try:
                graph.set_submodule(name, IntegerLayer(module))
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None
    return graph.eval()


@torch.no_grad()
def program(network: Network) -> ExportedProgram:
    """The network as a program in ATen operators with a dynamic batch axis: N x C x H x W normalised images -> N x classes."""
    images = torch.zeros(2, *network.task.image_shape)
    try:
        return torch.export.export(lowered(network), (images,), dynamic_shapes=({0: Dim("batch", min=1)},), strict=False)
    except UserError:
        raise
    except Exception as error:  # torch.export may raise anything
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{network.traced.meta.get('network', 'the network')} cannot be exported by torch.export: {first}") from error


def save_program(network: Network, path: Path, about: dict[str, str]) -> None:
    """Writes a .pt2 file; `about` goes in as `about.json`. It is read by `torch.export.load`, once `register_operators`' module is imported."""
    import json

    torch.export.save(program(network), path, extra_files={"about.json": json.dumps(about)})
