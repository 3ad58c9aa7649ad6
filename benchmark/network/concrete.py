"""Tracing networks whose forward asks for shapes: what is known from running along with examples is a constant, what depends on the batch is not.

torch.fx sees `if h % 8:` or `range(x.shape[1])` with a symbol in it, and refuses. Here every symbol carries what it is for two batches of different
sizes. A number that both agree in (heights, channels, whether a padding is needed) is that number; one that they do not agree in (the batch size)
stays a symbol. Values of tensors are never looked at: control flow that depends on an image is refused as ever.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace
from torch.fx.node import map_aggregate

from dfqbench.network.inplace import InPlaceProxy

_ASKING = {
    "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point", "is_complex", "get_device", "element_size",
}  # fmt: skip
_CONSTANTS = (int, float, bool, str, torch.dtype, torch.device, torch.layout, type(None))


class ConcreteProxy(InPlaceProxy):
    """A symbol with what it stands for in two runs."""

    examples: tuple[Any, Any]

    def __getattr__(self, name: str) -> Any:
        if name == "examples":
            raise AttributeError(name)
        if callable(getattr(self.examples[0], name)):  # a method: torch.fx records its call
            return super().__getattr__(name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __len__(self) -> int:
        first, second = map(len, self.examples)
        if first != second:
            raise TypeError("its length depends on the number of images")
        return first

    def __iter__(self) -> Iterator[Any]:
        symbol: Any = self
        return iter([symbol[i] for i in range(len(self))])

    def __contains__(self, value: Any) -> bool:
        if isinstance(self.examples[0], Tensor):
            raise TypeError("whether a tensor has a value is not known while tracing")
        return value in self.examples[0] and value in self.examples[1]


@contextlib.contextmanager
def _untraced() -> Iterator[None]:
    """Inside, modules run: a tracer has put calls and attributes of its own in their place."""
    before = nn.Module.__call__, nn.Module.__getattr__
    nn.Module.__call__, nn.Module.__getattr__ = _symbolic_trace._orig_module_call, _symbolic_trace._orig_module_getattr  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__, nn.Module.__getattr__ = before  # type: ignore[method-assign]


@contextlib.contextmanager
def nothing_kept_whole() -> Iterator[None]:
    """Inside, functions that zoos registered with `torch.fx.wrap`, because shapes decide in them, are traced like any other."""
    known = dict(_symbolic_trace._wrapped_fns_to_patch)
    _symbolic_trace._wrapped_fns_to_patch.clear()
    try:
        yield
    finally:
        _symbolic_trace._wrapped_fns_to_patch.update(known)


class ConcreteTracer(fx.Tracer):
    """A tracer that runs along. images: two batches of different sizes."""

    images: tuple[Tensor, Tensor]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return ConcreteProxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """torch.fx remembers the symbol of each parameter and buffer; a forward may have put another tensor in its place."""
        with _untraced():
            for name, symbol in list(parameter_proxy_cache.items()):
                if symbol.examples[0] is not operator.attrgetter(name)(self.root):
                    del parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    @torch.no_grad()
    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        made: Any = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        if kind == "output":
            return made
        with _untraced():
            found = tuple(self._run(kind, target, args, kwargs, i) for i in (0, 1))
        made.examples = found
        if isinstance(found[0], Tensor) or not self._is_asked(kind, target, args, kwargs):
            return made
        return self._known(made, *found)

    def _run(self, kind: str, target: Any, args: Any, kwargs: Any, which: int) -> Any:
        def example(value: Any) -> Any:
            return value.examples[which] if isinstance(value, ConcreteProxy) else value

        given, named = map_aggregate(args, example), map_aggregate(kwargs, example)
        if kind == "placeholder":
            return self.images[which]
        if kind == "get_attr":
            return operator.attrgetter(target)(self.root)
        if kind == "call_method":
            return getattr(given[0], target)(*given[1:], **named)  # type: ignore[index,arg-type]
        function = self.root.get_submodule(target) if kind == "call_module" else target
        return function(*given, **named)  # type: ignore[misc]

    def _is_asked(self, kind: str, target: Any, args: Any, kwargs: Any) -> bool:
        """Whether the answer says something of shapes and types, not of values."""
        tensors: list[Any] = []
        map_aggregate((args, kwargs), lambda a: tensors.append(a) if isinstance(a, ConcreteProxy) and isinstance(a.examples[0], Tensor) else None)
        return not tensors or target is getattr or (kind == "call_method" and target in _ASKING)

    def _known(self, made: Any, first: Any, second: Any) -> Any:
        """The constant, if both runs agree in it; a tuple of constants and symbols; or the symbol."""
        if isinstance(first, tuple | list) and len(first) == len(second):
            return tuple(self._known_part(made, i, *pair) for i, pair in enumerate(zip(first, second, strict=True)))
        return first if isinstance(first, _CONSTANTS) and first == second else made

    def _known_part(self, made: Any, place: int, first: Any, second: Any) -> Any:
        if isinstance(first, _CONSTANTS) and first == second:
            return first
        return self.create_proxy("call_function", operator.getitem, (made, place), {})
