"""What the pretended device of pretended_cuda.py puts in the place of parts of torch: random streams, moves of modules, CUDA graphs; and what is
known of operations."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
SIZED_BY_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "equal", "is_nonzero"}
INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh", "_local_scalar_dense", "set_"}
PRODUCTS = {"convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm"}
# torch.use_deterministic_algorithms lists them; NLLLoss is meant for images only (nll_loss2d)
WITHOUT_DETERMINISTIC_KERNEL = {
    *("grid_sampler_2d_backward", "grid_sampler_3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward"),
    *("adaptive_max_pool2d_backward", "avg_pool3d_backward", "fractional_max_pool2d_backward", "fractional_max_pool3d_backward"),
    *("max_unpool2d", "max_unpool3d", "upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward"),
    *("upsample_trilinear3d_backward", "reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward"),
    *("nll_loss2d_forward", "nll_loss2d_backward", "_ctc_loss_backward", "put_", "histc", "median", "nanmedian", "kthvalue"),
}
ROOT = Path(__file__).resolve().parents[1]
RealGenerator, RealAutocast = torch.Generator, torch.autocast


@functools.cache
def _named(file: str) -> str | None:
    """A file of ours, by its path from the root."""
    path = Path(file).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) and ".venv" not in path.parts and not path.stem.startswith("pretended_") else None


def where() -> str:
    """The innermost lines of ours, two of them."""
    frame, found = sys._getframe(1), list[str]()
    while frame is not None and len(found) < 2:
        if name := _named(frame.f_code.co_filename):
            found.append(f"{name}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found) or "torch"


class Generator(RealGenerator):  # type: ignore[misc, valid-type]
    def __new__(cls, device: Any = "cpu") -> Generator:
        made = RealGenerator.__new__(cls, "cpu")
        made.said = torch.device(device)
        return made

    device = property(lambda self: CUDA if self.said.type == "cuda" else CPU)


class Autocast(RealAutocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any):
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def apply(self: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
    """nn.Module._apply, which on a GPU gives a parameter other data, and stays away from what need not move."""
    for module in self.children():
        module._apply(fn)
    for parameter in [p for p in self._parameters.values() if p is not None]:
        with torch.no_grad():
            moved = fn(parameter)
        if moved is not parameter:
            parameter.grad = None
            torch.utils.swap_tensors(parameter, torch.nn.Parameter(moved.detach(), parameter.requires_grad))
    self._buffers.update({key: fn(buffer) for key, buffer in self._buffers.items() if buffer is not None})
    return self


def grouped(lists: list[list[Any]], with_indices: bool = False) -> Any:
    """Optimizer._group_tensors_by_device_and_dtype."""
    found: dict[Any, Any] = {}
    for i, first in enumerate(lists[0]):
        part, numbers = found.setdefault((first.device, first.dtype), ([[] for _ in lists], []))
        for column, values in zip(part, lists, strict=True):
            column += values[i : i + 1]
        numbers.append(i)
    return found


def pinned(tensor: Tensor, *_: Any) -> Tensor:
    copy = tensor.clone()
    copy.is_pinned_copy = True  # type: ignore[attr-defined]
    return copy


def enter_without_gradients(mode: Any) -> None:
    """torch.inference_mode's: no wrapper can be made of the tensors that it makes, so gradients are just off."""
    mode.was = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)


def leave_without_gradients(mode: Any, *_: Any) -> None:
    torch._C._set_grad_enabled(mode.was)


class Graph:
    """By the documented rules, on the tensors that the device holds.

    Captured operations take no effect; a replay does them again on the tensors that were there, and leaves results in those that were made.
    """

    def __init__(self) -> None:
        self.tape: list[tuple[Any, Any, Any, list[Tensor | None]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.streams: dict[Any, Tensor] = {}
        self.made: set[int] = set()

    def register_generator_state(self, stream: Any) -> None:
        self.streams[stream] = stream.get_state()

    def will_run(self, function: Any, args: Any, kwargs: Any) -> None:
        """Keeps what the operation will overwrite, unless the capture itself made it."""
        given = {a.name: value for a, value in zip(function._schema.arguments, args, strict=False)} | kwargs
        written = [a.name for a in function._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if "batch_norm" in function.name():  # its schema is silent about the running statistics
            written += ["running_mean", "running_var"]
        for tensor in tensors_in([given.get(name) for name in written]):
            if place_of(tensor) not in self.made:
                self.before.setdefault(id(tensor), (tensor, tensor.detach().clone()))

    def has_run(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        given = {place_of(t) for t in tensors_in((args, kwargs))}
        fresh = [t if place_of(t) not in given else None for t in tensors_in(result)]
        self.made |= {place_of(t) for t in fresh if t is not None}
        self.tape.append((function, args, kwargs, fresh))

    @torch.no_grad()
    def end(self) -> None:
        for tensor, value in reversed(self.before.values()):  # a view was kept after what it looks at
            tensor.copy_(value)
        for stream, state in self.streams.items():
            stream.set_state(state)
        for tensor in (t for *_, fresh in self.tape for t in fresh if t is not None):  # what a capture leaves there is not defined
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)

    @torch.no_grad()
    def replay(self) -> None:
        with torch._C._DisableTorchDispatch():
            for function, args, kwargs, fresh in self.tape:
                if not function.is_view:
                    for old, new in zip(fresh, tensors_in(computed(function, args, kwargs)), strict=True):
                        if old is not None:
                            old.copy_(new)


def computed(function: Any, args: Any, kwargs: Any) -> Any:
    """The operation on the CPU: products of bfloat16 in float32, rounded at their end, as a GPU sums them; some CPUs take ten times as long."""
    if function.overloadpacket.__name__ not in PRODUCTS or all(t.dtype != torch.bfloat16 for t in tensors_in(args)):
        return function(*args, **kwargs)
    wide = mapped(lambda v: v.float() if isinstance(v, Tensor) and v.dtype == torch.bfloat16 else v, args)
    return mapped(lambda v: v.to(torch.bfloat16) if isinstance(v, Tensor) else v, function(*wide, **kwargs))


def leaves(value: Any) -> Iterator[Any]:
    """What lists, tuples and dicts hold in the end: several times as fast as torch's own, with which these tests would take minutes."""
    if isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)
    else:
        yield value


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """The same lists, tuples and dicts with other leaves."""
    if isinstance(value, list | tuple):
        return type(value)([mapped(change, part) for part in value])  # type: ignore[call-arg]
    return {key: mapped(change, part) for key, part in value.items()} if isinstance(value, dict) else change(value)


def tensors_in(value: Any) -> list[Tensor]:
    return [v for v in leaves(value) if isinstance(v, Tensor)]


def place_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())
