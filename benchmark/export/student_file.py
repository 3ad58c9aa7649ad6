"""student.safetensors: a student as a file that needs neither its teacher nor the float weights that it was trained from.

Tensors, by their names in the network: the codes of each quantized weight at its bit width (packing.py; uint8), `NAME.grid` with its scales and zero
points (2 x channels, or 2), `NAME.table` with the levels of a grid that is not uniform (codes are places in it), and everything that stays float as
it is. `dfqbench` in the header is JSON: the rules of the quantizer, where the student comes from, and a sha256 over the whole content. The tensor
`graph.json` is the graph (graph_text.py) with the widths of its parts and the grids of the activations: JSON as well, compressed (zlib), since it
would be a third of a small network's file.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from dfqbench.errors import UserError
from dfqbench.export.graph_text import NotWritable, attach, graph_of, module_as_text, module_of, nodes_as_text, plain_graph
from dfqbench.export.packing import pack, unpack
from dfqbench.files import write_atomically
from dfqbench.network.canonical import Layer, TransposedConv
from dfqbench.network.network import Network
from dfqbench.network.products import LAYERS
from dfqbench.quantization.fake_quantize import levels
from dfqbench.quantization.layers import ActivationQuantizer, Codes, Grid, QuantizedLayer, WeightGrid
from dfqbench.quantization.protocol import Bits, Protocol
from dfqbench.quantization.student import Student
from dfqbench.task import Task
from dfqbench.teachers.weights import hash_tensors

if TYPE_CHECKING:
    from dfqbench.export.verify import Agreement

FORMAT = 1
GRAPH = "graph.json"
LARGEST_GRAPH = 2**28  # bytes of text: what a file unpacks to must not fill the memory


class StoredLayer(QuantizedLayer):
    """A layer whose weight is already on its grid: it has no float original, and what it computes with is `layer.weight` itself."""

    def __init__(self, layer: Layer | TransposedConv, bits: int, protocol: Protocol, codes: Codes):
        super().__init__(layer, bits, protocol)
        self.register_buffer("levels", codes.levels.to(torch.int16), persistent=False)
        self.register_buffer("scale", codes.scale, persistent=False)
        self.register_buffer("zero_point", codes.zero_point, persistent=False)
        self.register_buffer("table", codes.table, persistent=False)
        self.limits = codes.lowest, codes.highest
        layer.weight = nn.Parameter(codes.weight(), requires_grad=False)

    def quantized_weight(self, found: Grid | None = None) -> Tensor:
        """The weight on its grid."""
        return self.layer.weight

    def codes(self) -> Codes:
        """As they stand in the file."""
        levels, scale, zero_point = (self.get_buffer(name) for name in ("levels", "scale", "zero_point"))
        return Codes(levels.float(), scale, zero_point, *self.limits, self._buffers["table"])


class StoredStudent(Student):
    """A student that was read from a file: eval mode, no gradient for any weight. It computes what the student that was saved computes.

    about: what the file says of itself: `cell` (its record: label, teacher, bits, seed, identity ...), `steps`, `last_epoch`, `sha256`; of a student
    that was saved by hand, the sha256 alone. score: what `dfqbench.quantize` found out about it.
    """

    def __init__(self, traced: fx.GraphModule, task: Task, protocol: Protocol, bits: Bits, left_float: list[str], about: dict[str, Any]):
        Network.__init__(self, traced, task)
        self.protocol, self.bits, self.left_float, self.about = protocol, bits, left_float, about
        self.score: dict[str, Any] = {}
        self.requires_grad_(False)
        self.eval()

    def save(self, path: str | Path) -> None:
        """Writes the student as a file for `dfqbench.load_student`; the name must end with .safetensors. Raises UserError."""
        if Path(path).suffix != ".safetensors" or not Path(path).parent.is_dir():
            raise UserError(f"{path}: a name that ends with .safetensors, in a folder that is there")
        save_student(self, Path(path), {key: value for key, value in self.about.items() if key != "sha256"})

    def export(self, path: str | Path) -> list[Agreement]:
        """Writes the student for other programs, by the name's ending: .onnx, or .pt2 for torch.export. The file is run and its answers compared.

        Returns how they compare, an `Agreement` for each way in which the file was run. Raises UserError where the network cannot be written, and
        `dfqbench.export.verify.Rejected` where the answers differ by more than rounding.
        """
        from dfqbench.export.export import ENDINGS, export

        formats = {ending: to for to, ending in ENDINGS.items()}
        if Path(path).suffix not in formats:
            raise UserError(f"{path}: the name must end with {' or '.join(formats)}")
        return export(self, Path(path), formats[Path(path).suffix])


def save_student(student: Student, path: Path, about: dict[str, Any] | None = None) -> dict[str, Any]:
    """Writes a student's file; `about` (JSON) is kept in it, and can be read back as `StoredStudent.about`.

    Returns its `sha256` (of the content, not of the file's bytes) and `bytes`. Raises UserError where a part of the network has no form in a file: a
    class or a function of the user's own that torch.fx cannot take apart, or a weight that is not finite.
    """
    tensors: dict[str, Tensor] = {}
    packed: dict[str, tuple[int, list[int]]] = {}
    modules: dict[str, Any] = {}

    def pack_weight(name: str, layer: QuantizedLayer) -> None:
        codes = layer.codes()
        packed[name] = layer.bits, list(codes.levels.shape)
        tensors[name] = torch.from_numpy(pack((codes.levels - codes.lowest).to(torch.uint8).cpu().numpy(), layer.bits))
        tensors[f"{name}.grid"] = torch.stack((codes.scale, codes.zero_point))
        if codes.table is not None:
            tensors[f"{name}.table"] = codes.table.clone()  # several may share one

    try:
        graph = plain_graph(student.traced)
        for node in graph.nodes:
            name = str(node.target)
            if node.op == "get_attr" and name not in tensors:
                parent, _, own_name = name.rpartition(".")
                owner = student.traced.get_submodule(parent)
                if isinstance(owner, QuantizedLayer) and own_name == "weight":
                    pack_weight(name, owner)
                else:
                    tensors[name] = getattr(owner.layer if isinstance(owner, QuantizedLayer) else owner, own_name)
            if node.op != "call_module" or name in modules:
                continue
            module = student.traced.get_submodule(name)
            if isinstance(module, ActivationQuantizer):
                modules[name] = {"quantizer": module.bits, "scale": float(module.scale), "zero_point": float(module.zero_point)}
                continue
            if isinstance(module, WeightGrid):
                modules[name] = {"weight_grid": module.bits, "axis": module.axis}
                continue
            layer = module.layer if isinstance(module, QuantizedLayer) else module
            modules[name] = module_as_text(layer)
            own = [*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)]
            tensors |= {f"{name}.{key}": tensor for key, tensor in own if not key.endswith("num_batches_tracked")}
            if isinstance(module, QuantizedLayer):
                pack_weight(f"{name}.weight", module)
        nodes = nodes_as_text(graph)
    except ValueError as error:
        raise UserError(f"the student cannot be written to a file: {error}") from error
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {
        "format": FORMAT,
        "about": about or {},
        "task": student.task.as_dict(),
        "protocol": student.protocol.model_dump(mode="json"),
        "bits": str(student.bits),
        "left_float": student.left_float,
        "network": str(student.traced.meta.get("network", "")),
    }
    text = _json({"nodes": nodes, "modules": modules, "packed": packed}).encode()
    sha256 = _digest(header, text, tensors)
    tensors[GRAPH] = torch.frombuffer(bytearray(zlib.compress(text, 9)), dtype=torch.uint8)
    content = save(tensors, {"dfqbench": _json({"sha256": sha256, **header})})
    write_atomically(path, content)
    return {"sha256": sha256, "bytes": len(content)}


def load_student_file(path: Path) -> StoredStudent:
    """The student of a file, in channels_last order as the engine has it. Nothing in the file is executed, and nothing but the file is read.

    Raises UserError for a file that is absent, damaged, truncated, of a later format, or not a student's.
    """
    try:
        header, text, tensors = _read(path)
        if _digest({key: value for key, value in header.items() if key != "sha256"}, text, tensors) != header["sha256"]:
            raise UserError(f"{path} is damaged: its content does not have the sha256 that it says")
        student = _student_of({**header, **json.loads(text)}, tensors)
    except NotWritable as error:
        raise UserError(f"{path} holds what a student's file must not: {error}") from error
    except SafetensorError as error:
        raise UserError(f"{path} is damaged, or not a student's file: {str(error).splitlines()[0]}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ImportError, zlib.error) as error:
        raise UserError(f"{path} is damaged, or needs other versions of the packages: {type(error).__name__}: {error}") from error
    return student.to(memory_format=torch.channels_last)


def _read(path: Path) -> tuple[dict[str, Any], bytes, dict[str, Tensor]]:
    """Header, text of the graph, tensors."""
    if not path.is_file():
        raise UserError(f"{path} is a folder, not a student's file" if path.is_dir() else f"{path} does not exist")
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("dfqbench")
        if text is None:
            raise UserError(f"{path} is not a student's file: it has tensors, and nothing about a student")
        header = json.loads(text)
        if header["format"] > FORMAT:
            raise UserError(f"{path} has format {header['format']} of a later version; this one reads up to {FORMAT}: update dfqbench")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    return header, zlib.decompressobj().decompress(tensors.pop(GRAPH).numpy().tobytes(), LARGEST_GRAPH), tensors


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _digest(header: dict[str, Any], graph: bytes, tensors: dict[str, Tensor]) -> str:
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode() + graph + hash_tensors(tensors.items()).encode()).hexdigest()


def _student_of(header: dict[str, Any], tensors: dict[str, Tensor]) -> StoredStudent:
    settings: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in header["task"].items()}
    task = Task(**settings)
    protocol = Protocol(**header["protocol"])
    codes: dict[str, Codes] = {}
    for name, (bits, shape) in header["packed"].items():
        table = tensors.pop(f"{name}.table", None)
        lowest, highest = levels(bits, protocol.weight_symmetric) if table is None else (0, len(table) - 1)
        numbers = unpack(tensors[name].numpy(), bits, torch.Size(shape).numel())
        whole = torch.from_numpy(numbers).view(shape).float() + lowest
        scale, zero_point = tensors.pop(f"{name}.grid")
        codes[name] = Codes(whole, scale.clone(), zero_point.clone(), lowest, highest, table)
        tensors[name] = codes[name].weight()
    graph, root = graph_of(header["nodes"]), nn.Module()
    for name, text in header["modules"].items():
        if "quantizer" in text:
            _place(root, name, _stored_quantizer(text["quantizer"], protocol, text["scale"], text["zero_point"]))
            continue
        if "weight_grid" in text:
            _place(root, name, WeightGrid(text["weight_grid"], protocol, text["axis"]))
            continue
        module = module_of(text, tensors, f"{name}.")
        weight = codes.get(f"{name}.weight")
        if weight is not None and isinstance(module, LAYERS):
            rules = protocol.of_pinned if weight.table is None else protocol
            module = StoredLayer(module, header["packed"][f"{name}.weight"][0], rules, weight).eval()
        _place(root, name, module)
    for node in graph.nodes:
        if node.op == "get_attr":
            *parents, last = str(node.target).split(".")
            owner = _container(root, parents)
            if not hasattr(owner, last):
                attach(owner, last, tensors[str(node.target)])
    traced = fx.GraphModule(root, graph, "Stored")
    traced.meta["network"] = header["network"]
    _complete_shapes(traced, task)
    about = {**header["about"], "sha256": header["sha256"]}
    return StoredStudent(traced, task, protocol, Bits.parse(header["bits"], average=True), header["left_float"], about)


def _complete_shapes(traced: fx.GraphModule, task: Task) -> None:
    """For what stands where a user's module was taken apart."""
    unknown = [n for n in traced.graph.nodes if n.op != "output" and not {"shape", "several"} & n.meta.keys()]
    if unknown:
        ShapeProp(traced).propagate(torch.zeros(1, *task.image_shape))
    for node in traced.graph.nodes:
        found = node.meta.pop("tensor_meta", None)
        if node in unknown and found is not None:
            node.meta |= {"shape": tuple(found.shape)} if hasattr(found, "shape") else {"several": True}


def _stored_quantizer(bits: int, protocol: Protocol, scale: float, zero_point: float) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(bits, protocol)
    quantizer.scale.fill_(scale)
    quantizer.zero_point.fill_(zero_point)
    lowest, highest = levels(bits, protocol.activation_symmetric)
    quantizer.range.low.fill_((lowest - zero_point) * scale)
    quantizer.range.high.fill_((highest - zero_point) * scale)
    quantizer.range.batches.fill_(1)
    return quantizer


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    *parents, last = name.split(".")
    owner = _container(root, parents)
    container = owner._modules.get(last)
    for key, part in container.named_children() if container is not None else ():  # it was made for parts of this module
        module.add_module(key, part)
    owner.add_module(last, module)


def _container(root: nn.Module, parents: list[str]) -> nn.Module:
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    return root
