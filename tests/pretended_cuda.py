"""A CUDA device for tests where there is none: tensors say that they lie on cuda:0, their numbers are computed on the CPU.

    with PretendedCuda() as gpu: ...       # torch.cuda.is_available(), torch.device("cuda"), torch.Generator("cuda"), CUDA graphs

    gpu.mixtures   operations that were given tensors of both devices, which a GPU refuses: "NAME at FILE:LINE"
    gpu.waits      what makes the program wait for the device: .item(), `if`, .cpu(), nonzero, a mask as an index, a copy from pageable memory
    gpu.loose      operations that have no deterministic kernel on a GPU; under `use_deterministic_algorithms(True)` they raise, as there
    gpu.kernels    how many times each operation was called that launches a kernel, or several

It cannot show what only a GPU has: no kernel runs, so nothing is said of CUDA's rounding, memory, speed, or what a kernel allows and refuses. C++
sees a CPU: autograd, fused operations and composite ones run as there, and an operation that is one kernel on a GPU may count as several, or the
other way round. Streams, events and other threads do nothing. A captured graph is replayed by its documented rules: operations once more on the
tensors of the capture, Python not at all; that a driver would take the capture is not known.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pretended_parts as parts
import torch
import torch._dynamo  # imported here, before anything is replaced
from pretended_parts import CPU, CUDA, Autocast, Generator, Graph, RealGenerator
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_active: list[PretendedCuda] = []


class CudaTensor(Tensor):
    """Wraps a tensor of the CPU, `held`, and says of itself that it is CUDA's."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: Tensor) -> CudaTensor:
        place = {"storage_offset": held.storage_offset(), "dtype": held.dtype, "layout": held.layout, "device": CPU}
        made = Tensor._make_wrapper_subclass(cls, held.size(), strides=held.stride(), **place)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _active[-1].compute(function, args, kwargs or {})

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        copied = kwargs.pop("copy", False)
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "cpu":
            _active[-1].wait("copy to the CPU")
            return self.detach().held.to(dtype=dtype or self.dtype, copy=True)
        asked = {"dtype": dtype or self.dtype} | ({"memory_format": layout} if layout else {}) | ({"copy": True} if copied else {})
        return Tensor.to(self, **asked) if dtype or layout or copied else self

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def cuda(self, *_: Any, **__: Any) -> Tensor:
        return self

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        _active[-1].wait("copy from pageable memory (new_tensor)")
        return CudaTensor(self.held.new_tensor(data, **options))

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def __repr__(self, **_: Any) -> str:
        return f"CudaTensor({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> CudaTensor:
        if id(self) not in memo:
            memo[id(self)] = CudaTensor(self.held.detach().clone()).requires_grad_(self.requires_grad)
            if getattr(self, "_is_param", False):
                memo[id(self)]._is_param = True
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.detach().__reduce_ex__(protocol)  # as `torch.load(map_location="cpu")` gives it back


class _Stream:
    device, cuda_stream = CUDA, 0

    def __init__(self, *_: Any, **__: Any): ...
    def wait_stream(self, other: Any) -> None: ...
    def record(self, *_: Any) -> None: ...  # as an event
    def synchronize(self) -> None:
        _active[-1].wait("synchronize")

    def is_capturing(self) -> bool:
        return _active[-1].capturing is not None

    def elapsed_time(self, other: Any) -> float:
        return 1.0


@contextlib.contextmanager
def _capture(graph: Graph, **_: Any) -> Iterator[None]:
    _active[-1].capturing = graph
    try:
        yield
    finally:
        _active[-1].capturing = None
        with torch._C._DisableTorchDispatch():
            graph.end()


class _Calls(TorchFunctionMode):
    """What would ask C++ for the device, which answers with the CPU, or for the driver, which is not there."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, gpu, name = kwargs or {}, _active[-1], getattr(function, "__name__", "")
        if name == "one_hot" and isinstance(args[0], CudaTensor):  # looks at its labels on a CPU, on a GPU only for their number
            classes = [*args[1:], kwargs.get("num_classes", -1)][0]
            assert classes > 0, "one_hot without the number of classes waits for the device"
            return torch.zeros(*args[0].shape, classes, dtype=torch.long, device=CUDA).scatter_(-1, args[0].unsqueeze(-1), 1)
        if name == "to" and len(args) > 1 and isinstance(args[1], CudaTensor) and not isinstance(args[0], CudaTensor):
            args = (args[0], CUDA, args[1].dtype, *args[2:])
        before, gpu.stream = gpu.stream, kwargs.get("generator") or gpu.stream
        try:
            return function(*map(_indexed, args), **{key: _indexed(value) for key, value in kwargs.items()})
        finally:
            gpu.stream = before


def _indexed(value: Any) -> Any:
    return CUDA if (isinstance(value, torch.device) and value.type == "cuda") or (isinstance(value, str) and value in ("cuda", "cuda:0")) else value


class PretendedCuda(TorchDispatchMode):
    """See the head of this file. `part` is told beside what is found: the part of a step that is run, say. count: of GPUs."""

    def __init__(self, count: int = 1) -> None:
        super().__init__()
        self.mixtures, self.waits, self.loose, self.kernels = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
        self.part, self.count, self.stream = "", count, None
        self.capturing: Graph | None = None

    def _note(self, found: Counter[str], what: str) -> None:
        found[f"{self.part}: {what} at {parts.where()}" if self.part else f"{what} at {parts.where()}"] += 1

    def wait(self, what: str) -> None:
        if self.capturing is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")
        self._note(self.waits, what)

    def compute(self, function: Any, args: Any, kwargs: Any) -> Any:
        """One operation: looked at as a GPU would, and done on the CPU."""
        given, name = list(parts.leaves((args, kwargs))), function.overloadpacket.__name__
        ours = [v for v in given if isinstance(v, CudaTensor)]
        made_here = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
        if ours or made_here:
            self._look(name, args, [v for v in given if isinstance(v, Tensor)], made_here)
            if any(isinstance(v, RealGenerator) for v in given):
                self._draw(name)
        plain = {k: CPU if k == "device" and v is not None else v for k, v in kwargs.items() if k != "pin_memory"}
        bare_args, bare_kwargs = parts.mapped(lambda v: v.held if isinstance(v, CudaTensor) else v, (args, plain))
        captured = self.capturing if ours or made_here else None
        if captured is not None:
            captured.will_run(function, bare_args, bare_kwargs)
        result = parts.computed(function, bare_args, bare_kwargs)
        if captured is not None:
            captured.has_run(function, bare_args, bare_kwargs, result)
        if not (ours or made_here) or name == "_local_scalar_dense":
            return result
        if not function.is_view and name not in parts.NO_KERNEL:
            self.kernels[name] += 1
        known = {id(t.held): t for t in ours}

        def wrapped(v: Any) -> Any:
            if not isinstance(v, Tensor) or isinstance(v, CudaTensor):
                return v
            return known[id(v)] if id(v) in known else CudaTensor(v)

        return parts.mapped(wrapped, result)

    def _look(self, name: str, args: Any, given: list[Tensor], made_here: bool) -> None:
        """What a GPU would refuse or wait for in an operation that it takes part in."""
        theirs = [t for t in given if not isinstance(t, CudaTensor)]
        from_cpu = bool(theirs) and len(theirs) < len(given)
        if from_cpu and name in parts.INDEXES and isinstance(args[0], CudaTensor):
            self.wait(f"{name}: an index from the CPU is copied")
        elif from_cpu and name == "copy_":
            self.wait("copy_ between the devices")
        elif from_cpu and name not in ("_to_copy", "set_data"):
            # a number in a tensor of the CPU may go into an operation, but not be kept by an optimizer, nor be written to
            written = name.endswith("_") and args and args[0] is theirs[0]
            if written or name.startswith("_fused_") or any(t.dim() for t in theirs):
                self._note(self.mixtures, f"{name} {[(tuple(t.shape), t.device.type) for t in given][:4]}")
        if name == "_local_scalar_dense":
            self.wait("a value is read (.item(), float(), if)")
        if name in parts.SIZED_BY_VALUES:
            self.wait(f"{name}: its size depends on values")
        if name in parts.INDEXES and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            self.wait(f"{name}: a mask as an index")
        if name == "_to_copy" and made_here and theirs and not hasattr(theirs[0], "is_pinned_copy"):
            self.wait("copy from pageable memory (torch.tensor(..., device=), .to(device))")
        if name in parts.WITHOUT_DETERMINISTIC_KERNEL:
            self._note(self.loose, name)
            if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
                said = "does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms(True)'"
                raise RuntimeError(f"{name} {said}. You can turn off determinism just for this operation")

    def _draw(self, name: str) -> None:
        if self.stream is not None and self.stream.device.type != "cuda":
            self._note(self.mixtures, f"{name}: a random stream of the CPU")
        if self.capturing is not None and self.stream not in self.capturing.streams:
            raise RuntimeError("Attempt to increase offset for a CUDA generator not in capture mode")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.compute(function, args, kwargs or {})

    def __enter__(self) -> PretendedCuda:
        self._undo = contextlib.ExitStack()
        do, state = self._undo.enter_context, torch.zeros(16, dtype=torch.uint8)

        def nothing(*_: Any, **__: Any) -> None: ...

        cuda: dict[str, Any] = {
            "is_available": lambda: True,
            "is_initialized": lambda: False,
            "device_count": lambda: self.count,
            "current_device": lambda: 0,
            **dict.fromkeys(("_lazy_init", "set_rng_state", "manual_seed", "manual_seed_all", "empty_cache", "set_device"), nothing),
            "Stream": _Stream,
            "Event": _Stream,
            "current_stream": _Stream,
            "CUDAGraph": Graph,
            "graph": _capture,
            **dict.fromkeys(("stream", "device"), contextlib.nullcontext),
            "synchronize": lambda *_: self.wait("synchronize"),
            "get_rng_state": lambda *_: state.clone(),
            "_is_in_bad_fork": lambda: False,
            "get_device_name": lambda *_: "Pretended GPU",
            "is_current_stream_capturing": lambda: self.capturing is not None,
            "graph_pool_handle": lambda: (0, 0),
            "get_device_capability": lambda *_: (9, 0),
        }
        for name, value in cuda.items():
            do(patch.object(torch.cuda, name, value))
        do(patch.object(torch.accelerator, "current_stream", _Stream))
        do(patch.object(torch, "Generator", Generator))
        do(patch.object(torch, "autocast", Autocast))
        do(patch.object(torch.nn.Module, "_apply", parts.apply))
        do(patch.object(torch.optim.Optimizer, "_group_tensors_by_device_and_dtype", staticmethod(parts.grouped)))
        do(patch.object(Tensor, "pin_memory", parts.pinned))
        do(
            patch.object(
                torch.inference_mode, "__enter__", lambda mode: setattr(mode, "_was", torch.is_grad_enabled()) or torch.set_grad_enabled(False)
            )
        )
        do(patch.object(torch.inference_mode, "__exit__", lambda mode, *_: torch._C._set_grad_enabled(mode._was)))
        lifts_on_cpu = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        self._undo.callback(torch._C._set_only_lift_cpu_tensors, lifts_on_cpu)
        do(_Calls())
        _active.append(self)
        self._undo.callback(_active.pop)
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._undo.close()
