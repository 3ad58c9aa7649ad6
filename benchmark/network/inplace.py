"""A traced graph without side effects: who reads a tensor after an in-place operation reads that operation's result.

torch.fx records `F.relu_(x)` as a node that nobody reads where the value of the call is not used, and later nodes go on reading `x`. Run in order
that is right; but what looks at the graph (where activations are quantized, what a batch norm is folded into) sees the later layers read what was
before the ReLU. One run of the graph shows, by torch's own version counters and storages, which node changes which tensor, and which tensors are
views of it; then readers, and views that are read later, are moved to the new value. (Over 300 lines: what is seen and what is rewritten are one
thought.)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from dfqbench.errors import UserError
from dfqbench.network.activations import is_activation

_SETS_ITEM = (operator.setitem, "__setitem__")
_PLAIN: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul, operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv, operator.imod: operator.mod, operator.ipow: operator.pow, operator.imatmul: operator.matmul,
    operator.iand: operator.and_, operator.ior: operator.or_, operator.ixor: operator.xor, operator.ilshift: operator.lshift,
    operator.irshift: operator.rshift,
}  # fmt: skip
_RESHAPED = {"unsqueeze_", "squeeze_", "t_", "transpose_", "swapaxes_", "swapdims_"}  # methods that change a tensor's shape, and no value


class InPlaceProxy(fx.Proxy):
    """A proxy that records `x += y` and `x[:, 0] = y`, which torch.fx takes for `x = x + y` and refuses."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _augmented(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    name = _PLAIN[function].__name__  # as torch.fx calls it
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {}, name=name)


for _function in _PLAIN:
    setattr(InPlaceProxy, f"__{_function.__name__}__", _augmented(_function))


def with_item(x: Tensor, index: Any, value: Any) -> Tensor:
    """A copy of x, in which x[index] is `value`."""
    new = x.clone()
    new[index] = value
    return new


def with_view(base: Tensor, value: Tensor, steps: tuple[tuple[str, tuple[Any, ...], dict[str, Any]], ...]) -> Tensor:
    """A copy of `base`, in which the view that `steps` (methods of a tensor, or of a tuple of tensors) lead to is `value`."""
    places: Any = torch.arange(base.numel(), device=base.device).view(base.shape)
    for name, args, kwargs in steps:
        places = getattr(places, name)(*args, **kwargs)
    return base.reshape(-1).index_copy(0, places.reshape(-1), value.reshape(-1).to(base.dtype)).view(base.shape)


Geometry = tuple[Any, ...]  # offset, shape, strides and dtype of a tensor in its memory


def _geometry(x: Tensor) -> Geometry:
    return x.storage_offset(), tuple(x.shape), x.stride(), x.dtype


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor) and t.layout == torch.strided and not t.is_inference()]


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


@dataclass
class _Seen:
    """What one run shows about a node. parents: the inputs whose memory its output lies in. changed: the inputs that it writes to."""

    is_tensor: bool = False
    geometry: Geometry | None = None  # of an output that is one tensor
    parents: list[fx.Node] = field(default_factory=list)
    changed: list[fx.Node] = field(default_factory=list)
    reshaped: bool = False  # an input is of another shape now
    returns: fx.Node | None = None  # the changed input that is its output


class _Watch(fx.Interpreter):
    def __init__(self, traced: fx.GraphModule):
        super().__init__(traced)
        self.seen: dict[fx.Node, _Seen] = {}
        self.constants: dict[int, fx.Node] = {}

    def run_node(self, n: fx.Node) -> Any:
        inputs = [(a, t, t._version, _geometry(t)) for a in n.all_input_nodes for t in _tensors(self.env[a])]
        result = super().run_node(n)
        outputs = _tensors(result)
        seen = self.seen[n] = _Seen(bool(outputs) or n.op == "output")
        if isinstance(result, Tensor) and outputs:
            seen.geometry = _geometry(result)
        storages = {_storage(t) for t in outputs}
        seen.parents = list(dict.fromkeys(a for a, t, _, _ in inputs if _storage(t) in storages))
        if n.op == "get_attr" and isinstance(result, Tensor) and outputs:  # each reading of a buffer has a node of its own
            first = self.constants.setdefault(_storage(result), n)
            seen.parents = [first] if first is not n and self.seen[first].geometry == seen.geometry else []
        written = [(a, t, before) for a, t, version, before in inputs if t._version != version or _geometry(t) != before]
        seen.changed = list(dict.fromkeys(a for a, _, _ in written))
        seen.reshaped = any(_geometry(t) != before for _, t, before in written)
        seen.returns = next((a for a, t, _ in written if isinstance(result, Tensor) and (result is t or _is_same(result, t))), None)
        return result


def _is_same(a: Tensor, b: Tensor) -> bool:
    return _storage(a) == _storage(b) and _geometry(a) == _geometry(b)


Watched = dict[fx.Node, _Seen]


@torch.no_grad()
def watched(traced: fx.GraphModule, images: Tensor) -> Watched:
    """What one run shows about each node. images: N x C x H x W with N of 2 or more, so that one image is told from the batch."""
    watch = _Watch(traced)
    watch.run(images)
    return watch.seen


def without_side_effects(traced: fx.GraphModule, seen: Watched) -> None:
    """Rewrites `traced` in place, so that every node reads values as they are when it runs, and none changes a tensor that another one reads.

    Raises UserError that names the operation and its place, where a tensor that was changed cannot be followed.
    """
    if any(each.changed for each in seen.values()) or any(n.target in _PLAIN or n.target in _SETS_ITEM for n in traced.graph.nodes):
        _Rewriting(traced, seen).run()
        traced.graph.lint()
        traced.recompile()


class _Rewriting:
    """One pass in the order of the graph. A *root* is a node that made a tensor; its memory has had `epoch[root]` in-place operations so far.

    value[node] = (epoch, node that holds its value then). A root has one for every epoch, a view is computed anew when somebody reads it.
    """

    def __init__(self, traced: fx.GraphModule, seen: Watched):
        self.traced, self.graph, self.seen = traced, traced.graph, seen
        self.epoch: dict[fx.Node, int] = {}
        self.value: dict[fx.Node, tuple[int, fx.Node]] = {}
        self.same: dict[fx.Node, fx.Node] = {}  # an in-place operation -> the tensor that it returned
        self.parent: dict[fx.Node, fx.Node] = {}  # a view -> what it is a view of
        self.renamed: dict[fx.Node, fx.Node] = {}  # a tensor -> what reshaped it in place
        self.viewed: dict[fx.Node, fx.Node] = {}  # a node of the new graph -> the input that its memory is of
        self.lost: dict[fx.Node, fx.Node] = {}  # a root -> the operation after which its value is not known
        self.several: dict[fx.Node, list[tuple[fx.Node, int]]] = {}  # a node that may be a view of more than one tensor -> roots, epochs
        self.made: list[fx.Node] = []

    def run(self) -> None:
        in_place = []
        for node in list(self.graph.nodes):
            now = {argument: self._at(self._resolved(argument), node) for argument in node.all_input_nodes}
            node.args, node.kwargs = map_arg(node.args, now.__getitem__), map_arg(node.kwargs, now.__getitem__)
            seen = self.seen[node]
            if seen.changed:
                if self._follow(node, seen, now):
                    in_place.append(node)
                continue
            if node.target in _PLAIN:  # of numbers, and not of tensors
                node.target = _PLAIN[node.target]
            self._register(node, seen, now)
        for node in reversed(self.made):
            if not node.users:
                self.graph.erase_node(node)
        for node in in_place:
            if not self._alone(node):
                self._out_of_place(node)

    def _register(self, node: fx.Node, seen: _Seen, now: dict[fx.Node, fx.Node]) -> None:
        if node.op == "get_attr" and seen.parents:
            self.same[node] = seen.parents[0]
        elif len(seen.parents) > 1:
            self.several[node] = [(r, self.epoch.get(r, 0)) for r in (self._root(self._resolved(p)) for p in seen.parents)]
        elif seen.parents:
            self.parent[node], self.viewed[node] = self._resolved(seen.parents[0]), now[seen.parents[0]]
        self.value[node] = (self.epoch.get(self._root(node), 0), node)

    def _resolved(self, node: fx.Node) -> fx.Node:
        """The node that first gave the tensor object that `node` is by now."""
        while node in self.same or node in self.renamed:
            node = self.same[node] if node in self.same else self.renamed[node]
        return node

    def _root(self, node: fx.Node) -> fx.Node:
        while node in self.same or node in self.parent:
            node = self.same[node] if node in self.same else self.parent[node]
        return node

    def _at(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        """The node that holds the value that `reader` finds in `node`."""
        root = self._root(node)
        for changed_root, epoch in self.several.get(root, ()):
            if self.epoch.get(changed_root, 0) != epoch:
                raise self._refusal(root, "may be a view of several tensors, of which one is changed in place before it is read")
        epoch, value = self.value[node]
        if epoch == self.epoch.get(root, 0):
            return value
        if node is root or root in self.lost:
            raise self._refusal(self.lost[root], "changes a tensor in place that is read later in a way that cannot be followed")
        base, old = self._at(self.parent[node], reader), self.viewed[node]
        with self.graph.inserting_before(reader):
            new = self.graph.node_copy(node, lambda a: base if a is old else a)
        self._made(new, base)
        self.value[node] = (self.epoch[root], new)
        return new

    def _made(self, new: fx.Node, viewed: fx.Node | None = None) -> None:
        self.made.append(new)
        self.seen[new] = _Seen(is_tensor=True)
        if viewed is not None:
            self.viewed[new] = viewed

    def _follow(self, node: fx.Node, seen: _Seen, now: dict[fx.Node, fx.Node]) -> bool:
        """Takes `node` into account, which changes a tensor. Whether it still does so in place."""
        # views share their counter: where several inputs seem changed, the one that is returned was, or the one whose items are set
        set_item = [a for a in seen.changed if node.target in _SETS_ITEM and now[a] is node.args[0]]
        target = [*set_item, seen.returns or seen.changed[0]][0]
        changed = self._resolved(target)
        if seen.reshaped and node.op == "call_method" and node.target in _RESHAPED:
            node.target = str(node.target).removesuffix("_")
            self._register(node, seen, now)
            self.renamed[changed] = node
            return False
        roots = list(dict.fromkeys(self._root(self._resolved(a)) for a in seen.changed))
        roots += [other for root in roots for other, _ in self.several.get(root, ())]
        old, writes = now[target], True
        result: fx.Node | None = node if seen.returns is not None else None
        if node.target in _SETS_ITEM:
            with self.graph.inserting_after(node):
                result = self.graph.call_function(with_item, tuple(node.args))
            result.meta = dict(node.meta)
            self._made(result)
            self.graph.erase_node(node)
            writes = False
        elif node.target in _PLAIN:
            node.target, writes = _PLAIN[node.target], False
        elif isinstance(node.kwargs.get("out"), fx.Node) and result is node:
            node.kwargs, writes = {k: v for k, v in node.kwargs.items() if k != "out"}, False
            if seen.reshaped:
                self.renamed[changed] = node
                self.value[node] = (0, node)
                return False
        root, *others = roots
        base = self.value[root][1] if self.value[root][0] == self.epoch.get(root, 0) else None
        for each in roots:
            self.epoch[each] = self.epoch.get(each, 0) + 1
            self.lost[each] = node
        if writes:
            self.viewed[node] = old
        if others or result is None or seen.reshaped or root in self.several or base is None:
            self._register(node, seen, now)
            return writes
        if result is node:
            self.same[node] = changed
        self.value[changed] = (self.epoch[root], result)
        if changed is not root:
            self._write_back(root, base, changed, result)
        if self.value[root][0] == self.epoch[root]:
            del self.lost[root]
        return writes

    def _write_back(self, root: fx.Node, base: fx.Node, view: fx.Node, value: fx.Node) -> None:
        """Gives `root` the value that it has once `view`, a view of it, is `value`."""
        steps: list[tuple[str, tuple[Any, ...], dict[str, Any]] | None] = []
        while view is not root:
            parent = self.parent[view]
            if self.seen[view].geometry != self.seen[parent].geometry or self.seen[view].geometry is None:
                steps.insert(0, self._step(view))
            view = parent
        if not steps:
            self.value[root] = (self.epoch[root], value)
        elif None not in steps:
            with self.graph.inserting_after(value):
                whole = self.graph.call_function(with_view, (base, value, tuple(steps)))
            self._made(whole)
            self.value[root] = (self.epoch[root], whole)

    def _step(self, view: fx.Node) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
        """The view as a method of what it is a view of; None where it is none."""
        args, kwargs = tuple(view.args[1:]), dict(view.kwargs)
        if not view.args or view.args[0] is not self.viewed[view]:
            return None
        if view.op == "call_method":
            return str(view.target), args, kwargs
        if view.op == "call_module":
            module = self.traced.get_submodule(str(view.target))
            return ("flatten", (module.start_dim, module.end_dim), {}) if isinstance(module, nn.Flatten) else None
        if view.target is operator.getitem:
            return "__getitem__", args, kwargs
        if view.target is getattr:
            return "__getattribute__", args, kwargs
        name = getattr(view.target, "__name__", "")
        return (name, args, kwargs) if hasattr(Tensor, name) else None

    def _alone(self, node: fx.Node) -> bool:
        """Whether nothing but `node` reads the tensor that it changes, or a view of it, and the tensor was made in this graph."""
        reader, tensor = node, self.viewed.get(node)
        while tensor is not None:
            others = [u for u in tensor.users if u is not reader and self.seen[u].is_tensor]
            if others or tensor.op in ("placeholder", "get_attr") or is_activation(tensor, self.traced):
                return False  # also what autograd may want again: the output of an activation function
            reader, tensor = tensor, self.viewed.get(tensor)
        return True

    def _out_of_place(self, node: fx.Node) -> None:
        """The same operation on a tensor of its own."""
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        place = next((place for place in (F, torch) if getattr(place, name, None) is node.target), None)
        plain = getattr(Tensor if node.op == "call_method" else place, name.removesuffix("_"), None)
        old = self.viewed.pop(node)
        if node.kwargs.get("inplace") is True:
            node.kwargs = {**node.kwargs, "inplace": False}
        elif node.op in ("call_method", "call_function") and name.endswith("_") and not name.endswith("__") and plain is not None:
            node.target = name.removesuffix("_") if node.op == "call_method" else plain
        else:
            with self.graph.inserting_before(node):
                copied = self.graph.call_method("clone", (old,))
            self._made(copied)
            node.args = map_arg(node.args, lambda a: copied if a is old else a)
            node.kwargs = map_arg(node.kwargs, lambda a: copied if a is old else a)

    def _refusal(self, node: fx.Node, what: str) -> UserError:
        return UserError(f"{self.traced._get_name()}: {described(node)} {what}: write it out of place (`y = f(x)`)")


def described(node: fx.Node) -> str:
    """The operation of `node`, and where it stands: in which module, at which line."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    modules = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values() if path]
    return f"{name!r} in {modules[-1] if modules else 'its forward'}{next(_lines(node), '')}"


def _lines(node: fx.Node) -> Iterator[str]:
    """' (file.py:12)' for each line of the network's own code that led to `node`, the innermost first."""
    frames = [line.strip() for line in (node.stack_trace or "").splitlines() if line.strip().startswith("File ")]
    for frame in reversed(frames):
        path, _, rest = frame.removeprefix('File "').partition('", line ')
        if "/torch/" not in path and "/dfqbench/" not in path:
            yield f" ({path.rpartition('/')[2]}:{rest.partition(',')[0]})"
