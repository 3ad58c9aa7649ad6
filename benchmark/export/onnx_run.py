"""Exported ONNX files in onnxruntime on the CPU: whether they answer as the student does, and how fast."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import Tensor

from dfqbench.export.onnx_file import SESSION_OPTIONS
from dfqbench.export.onnx_graph import IMAGES
from dfqbench.export.verify import Agreement, Batches, Rejected, Run, agreements
from dfqbench.network import Network

X64 = "session.x64quantprecision"
OFF, SHIPPED = "optimizations off", "as shipped"


def verified(network: Network, path: Path, batches: Batches) -> list[Agreement]:
    """The file against the network it came from: without any of the runtime's optimizations, and with all and the session options that it names."""
    runs = {OFF: runner(session(path, optimized=False), network), SHIPPED: runner(session(path), network)}
    whole = None if "session.disable_quant_qdq" in options_of(path) else _with_whole_biases(path)
    why = "rounding the biases to whole numbers, as integer kernels do,"
    return agreements(network, runs, batches, {SHIPPED: (why, runner(session(whole, optimized=False), network))} if whole else None)


def session(model: Path | bytes, optimized: bool = True, threads: int | None = None) -> onnxruntime.InferenceSession:
    """On the CPU; optimized: with the session options that the file's metadata names, where this CPU needs them."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is raised
    options.intra_op_num_threads = threads or torch.get_num_threads()
    if optimized and isinstance(model, Path):
        for key, value in options_of(model).items():
            if key != X64 or not has_vnni():
                options.add_session_config_entry(key, value)
    else:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of many classes, which have no other base
        raise Rejected(f"onnxruntime {onnxruntime.__version__} does not load the file: {str(error).splitlines()[0]}") from error


def runner(opened: onnxruntime.InferenceSession, network: Network | None = None) -> Run:
    """Images to answers, as tensors: `network`'s; without one, to the last output."""

    def run(images: Tensor) -> Tensor:
        found = [torch.from_numpy(array) for array in opened.run(None, {IMAGES: images.contiguous().numpy()})]
        return network.answer_of(found) if network is not None else found[-1]

    return run


def options_of(path: Path) -> dict[str, str]:
    """The session options that a file's metadata names; none for a network of floats."""
    found: dict[str, str] = json.loads(metadata(path).get(SESSION_OPTIONS, "{}"))
    return found


def outputs_of(path: Path) -> list[str]:
    """Name and shape of each output, like `logits (batch x 10)`."""
    outputs = onnx.load(path).graph.output
    return [f"{o.name} ({' x '.join(d.dim_param or str(d.dim_value) for d in o.type.tensor_type.shape.dim)})" for o in outputs]


def advice(path: Path) -> list[str]:
    """Lines for those who run the file elsewhere."""
    options = options_of(path)
    lines = [f"session options for onnxruntime: {' '.join(f'{key}={value}' for key, value in options.items())}"] if options else []
    if X64 in options:
        here = "not needed on this CPU" if has_vnni() else "needed on this CPU"
        lines.append(f"on x86 CPUs without VNNI 8-bit products saturate unless {X64}=1; on others it costs time ({here})")
    return lines


def metadata(path: Path) -> dict[str, str]:
    """What the file says of itself."""
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def has_vnni() -> bool:
    """Whether integer kernels sum pairs of 8-bit products in 32 bits here: not an x86 CPU, or one with VNNI."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return False
    return "vendor_id" not in words or bool({"avx512_vnni", "avx_vnni"} & words)


def _with_whole_biases(path: Path) -> bytes | None:
    """The model with each bias a whole multiple of input scale times weight scale, where both are quantized; None where there is no such bias."""
    model = onnx.load(path)
    found = False
    producers = {name: node for node in model.graph.node for name in node.output}
    numbers: dict[str, Any] = {tensor.name: tensor for tensor in model.graph.initializer}

    def scale_of(name: str) -> Any:
        node = producers.get(name)
        while node is not None and node.op_type in ("MaxPool", "Reshape", "Transpose"):
            node = producers.get(node.input[0])
        return numpy_helper.to_array(numbers[node.input[1]]) if node is not None and node.op_type == "DequantizeLinear" else None

    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm") or len(node.input) < 3 or node.input[2] not in numbers:
            continue
        scales = scale_of(node.input[0]), scale_of(node.input[1])
        if scales[0] is not None and scales[1] is not None:
            found = True
            unit = scales[0].astype(np.float64) * scales[1]
            rounded = (np.rint(numpy_helper.to_array(numbers[node.input[2]]) / unit) * unit).astype(np.float32)
            node.input[2] = f"{node.name}.whole_bias"
            model.graph.initializer.append(numpy_helper.from_array(rounded, node.input[2]))
    content: bytes = model.SerializeToString()
    return content if found else None


def speed_ratio(path: Path, floats: Path, image_shape: tuple[int, int, int], pairs: int = 30) -> tuple[float, float, float]:
    """How many times as fast as the float file this one answers one image on one thread, and the milliseconds of both: (ratio, its own, floats').

    The two take turns, so that whatever else the machine does meets both; medians over the pairs, after two that do not count.
    """
    sessions = [session(p, threads=1) for p in (path, floats)]
    images = {IMAGES: np.random.default_rng(0).standard_normal((1, *image_shape), dtype=np.float32)}
    taken: list[tuple[float, float]] = []
    for turn in range(pairs + 2):
        order = (0, 1) if turn % 2 else (1, 0)
        seconds = [0.0, 0.0]
        for which in order:
            started = time.perf_counter()
            sessions[which].run(None, images)
            seconds[which] = time.perf_counter() - started
        taken.append((seconds[0], seconds[1]))
    counted = taken[2:]
    own, other = (1e3 * statistics.median(pair[which] for pair in counted) for which in (0, 1))
    return statistics.median(b / a for a, b in counted), own, other
