"""A network as a torch.export program: weights as integers, activations through torch's standard decomposed quantize and dequantize operators.

Both exports start here: `save_program` writes the program, onnx_file.py translates it.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from dfqbench.errors import UserError
from dfqbench.files import write_atomically
from dfqbench.network import Network
from dfqbench.quantization.fake_quantize import levels
from dfqbench.quantization.layers import ActivationQuantizer, QuantizedLayer
from dfqbench.quantization.student import Student

ABOUT = "about.json"
INT16 = 2**15  # a centred level below it has an integer type


def register_operators() -> None:
    """torch.ops.quantized_decomposed: they are there once this module of torch has been imported, and a saved program needs them to load."""
    import torch.ao.quantization.fx._decomposed  # noqa: F401


class IntegerLayer(nn.Module):
    """A quantized layer that keeps its weight as int8 or uint8 levels; what it computes is `QuantizedLayer`'s, to the bit."""

    levels: Tensor
    scale: Tensor
    zero_point: Tensor
    table: Tensor | None

    def __init__(self, quantized: QuantizedLayer):
        super().__init__()
        codes = quantized.codes()
        self.lowest, self.highest = codes.lowest, codes.highest
        self.dtype = torch.int8 if codes.lowest < 0 else torch.uint8
        zero = codes.zero_point
        self.fits = bool(((zero >= codes.lowest) & (zero <= codes.highest)).all())  # else no integer type need hold it: plain arithmetic
        self.register_buffer("levels", codes.levels.to(self.dtype).contiguous())
        self.register_buffer("scale", codes.scale.clone())
        self.register_buffer("table", None if codes.table is None else codes.table.clone())
        self.register_buffer("zero_point", zero.to(torch.int32) if self.fits else zero.clone())
        self.whole = (float(codes.scale), int(zero)) if self.fits and not zero.dim() else (1.0, 0)  # scale and zero point of one grid
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
        along = [-1, *[1] * (self.levels.dim() - 1)] if self.scale.dim() else []
        if self.table is not None:
            places = ops.dequantize_per_tensor(self.levels, 1.0, 0, *grid)
            return self.table[places.to(torch.int64)] * self.scale.view(along)
        if self.fits and self.scale.dim():
            result: Tensor = ops.dequantize_per_channel(self.levels, self.scale, self.zero_point, 0, *grid)
            return result
        result = ops.dequantize_per_tensor(self.levels, *self.whole, *grid)
        if not self.fits:
            result = (result - self.zero_point.view(along)) * self.scale.view(along)
        return result


class StandardQuantizer(nn.Module):
    """An activation quantizer in torch's standard operators, with int8 or uint8 levels.

    A zero point that lies outside the levels (a range that is far from zero) makes it int16 levels around 0, or plain arithmetic where even
    those do not suffice.

    of_images: for what is the same number wherever the network runs, the level is, too. The standard operators divide, round, and add the zero
    point; `fake_quantize` multiplies, adds, and rounds. That differs on a boundary between two levels, and there pixels do lie: 256 of them on 256
    levels whose range is symmetric are all half a level off. So the operators get what is to be rounded.
    """

    def __init__(self, quantizer: ActivationQuantizer, of_images: bool = False):
        super().__init__()
        lowest, highest = levels(quantizer.bits, quantizer.protocol.activation_symmetric)
        self.scale, self.inverse, zero = float(quantizer.scale), float(1.0 / quantizer.scale), int(quantizer.zero_point)
        self.dtype = torch.int8 if lowest < 0 else torch.uint8
        self.of_images = of_images and lowest <= zero <= highest
        if not lowest <= zero <= highest:
            lowest, highest, zero, self.dtype = lowest - zero, highest - zero, 0, torch.int16
        self.lowest, self.highest, self.zero_point = lowest, highest, zero

    def forward(self, x: Tensor) -> Tensor:
        if self.dtype == torch.int16 and not -INT16 <= self.lowest <= self.highest < INT16:
            return torch.clamp(torch.round(x * self.inverse), self.lowest, self.highest) * self.scale
        grid, ops = (self.lowest, self.highest, self.dtype), torch.ops.quantized_decomposed
        if self.of_images:
            whole = ops.quantize_per_tensor(x * self.inverse + self.zero_point, 1.0, 0, *grid)
        else:
            whole = ops.quantize_per_tensor(x, self.scale, self.zero_point, *grid)
        result: Tensor = ops.dequantize_per_tensor(whole, self.scale, self.zero_point, *grid)
        return result


def float_layer(quantized: QuantizedLayer) -> nn.Module:
    """The plain layer, with the weight on its grid as floats."""
    layer = copy.copy(quantized.layer)
    layer._parameters = {**quantized.layer._parameters, "weight": nn.Parameter(quantized.codes().weight(), requires_grad=False)}
    return layer


def lowered(network: Network, quantized: bool = True) -> fx.GraphModule:
    """The network's graph on the CPU, with standard operators in place of the suite's own modules; shares what is left as it is.

    Without `quantized` the weights on their grids are written as floats, and activations are not quantized.
    Raises UserError where an activation quantizer has no range or a weight is not finite.
    """
    register_operators()
    if isinstance(network, Student):
        network.check_ranges()
    if any(t.device.type != "cpu" for t in [*network.parameters(), *network.buffers()]):
        network = copy.deepcopy(network).cpu()
    graph = fx.GraphModule(network.traced, copy.deepcopy(network.traced.graph))
    images = {str(user.target) for node in graph.graph.nodes if node.op == "placeholder" for user in node.users}
    for name, module in dict(network.traced.named_modules()).items():
        if isinstance(module, ActivationQuantizer):
            graph.set_submodule(name, StandardQuantizer(module, name in images) if quantized else nn.Identity())
        elif isinstance(module, QuantizedLayer):
            try:
                graph.set_submodule(name, IntegerLayer(module) if quantized else float_layer(module))
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None
    return graph.eval()


@torch.no_grad()
def program(network: Network, quantized: bool = True) -> ExportedProgram:
    """The network as a program in ATen operators with a dynamic batch axis: N x C x H x W normalised images -> N x classes.

    Raises UserError where torch.export cannot follow it.
    """
    images = torch.zeros(2, *network.task.image_shape)
    try:
        return torch.export.export(lowered(network, quantized), (images,), dynamic_shapes=({0: Dim("batch", min=1)},), strict=False)
    except UserError:
        raise
    except Exception as error:  # torch.export may raise anything
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{network.traced.meta.get('network', 'the network')} cannot be exported by torch.export: {first}") from error


def save_program(network: Network, path: Path, about: dict[str, str]) -> None:
    """Writes a torch.export file with `description(network)` and `about` in it as `about.json`."""
    made = program(network)
    buffer = io.BytesIO()
    torch.export.save(made, buffer, extra_files={ABOUT: json.dumps({**description(network), **about})})
    write_atomically(path, buffer.getvalue())


def load_program(path: Path) -> Callable[[Tensor], Any]:
    """The program of a file that this suite wrote, to be called with normalised images; it answers in the network's own form."""
    register_operators()
    with path.open("rb") as file:
        return torch.export.load(file).module()  # type: ignore[return-value]


def description(network: Network) -> dict[str, str]:
    """What a user of a file needs to know: text by key, values that are not text as JSON."""
    found: dict[str, Any] = {"network": network.traced.meta.get("network", ""), "task": network.task.as_dict()}
    if isinstance(network, Student):
        found |= {"protocol": network.protocol.name, "rules": network.protocol.fingerprint(), "bits": str(network.bits)}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}
