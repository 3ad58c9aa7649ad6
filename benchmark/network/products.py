"""Which nodes of a traced network multiply and add (convolutions, linear layers, matrix products), and by what."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from dfqbench.network.canonical import TransposedConv

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, TransposedConv)
_WITH_WEIGHTS: dict[Any, int] = {F.linear: 0, F.conv1d: 0, F.conv2d: 0, F.conv3d: 0} | dict.fromkeys(
    (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), 1
)  # axis of the output channels of the second operand
_OF_TWO = {torch.matmul, torch.mm, torch.bmm, operator.matmul, "matmul", "mm", "bmm"}
_ADDED = {torch.addmm, torch.baddbmm, "addmm", "baddbmm"}  # the first operand is only added


@dataclass(frozen=True)
class Operand:
    """Something that a node multiplies. axis: of a weight's output channels, None where they have no axis of their own; is_weight: no image has a
    part in it, or it stands where a layer has its weight."""

    node: fx.Node
    is_weight: bool
    axis: int | None = None


def operands(node: fx.Node, traced: fx.GraphModule) -> list[Operand]:
    """What a node multiplies, none where it is no product. Of a layer that has its weight itself: what enters it."""
    if node.op == "call_module":
        layer = isinstance(traced.get_submodule(str(node.target)), LAYERS) and node.args and isinstance(node.args[0], fx.Node)
        return [Operand(node.args[0], False)] if layer else []  # type: ignore[arg-type]
    given = [a for a in (*_flat(node.args), *_flat(tuple(node.kwargs.values()))) if isinstance(a, fx.Node) and a.meta.get("shape", ())]
    if node.target in _WITH_WEIGHTS and len(given) > 1:
        return [_operand(given[0], None), Operand(given[1], True, _WITH_WEIGHTS[node.target])]
    if node.target in _ADDED:
        given = given[1:]
    elif node.target is torch.einsum:
        return [_operand(one, None) for one in given] if len(given) > 1 else []
    elif node.target not in _OF_TWO:
        return []
    return [_operand(given[0], None), _operand(given[1], -1 if len(given[1].meta["shape"]) == 2 else None)] if len(given) == 2 else []


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _flat(value)
        else:
            yield value


def _operand(node: fx.Node, axis: int | None) -> Operand:
    return Operand(node, True, axis) if is_constant(node) else Operand(node, False)


def added(node: fx.Node) -> list[fx.Node]:
    """The tensors that a sum adds."""
    return [a for a in node.args if isinstance(a, fx.Node) and "shape" in a.meta]


def is_constant(node: fx.Node) -> bool:
    """Whether no image has a part in it."""
    reached, waiting = set[fx.Node](), [node]
    while waiting:
        one = waiting.pop()
        if one.op == "placeholder":
            return False
        reached.add(one)
        waiting += [n for n in one.all_input_nodes if n not in reached]
    return True


def take_attention_apart(traced: fx.GraphModule) -> None:
    """Puts two matrix products and a softmax in the place of every fused attention: in place. Causal and grouped ones stay whole."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    for node in list(traced.graph.nodes):
        if node.target is not F.scaled_dot_product_attention:
            continue
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        if not given.get("enable_gqa") and not given.get("is_causal"):
            _apart(node, traced.graph, given)
            traced.graph.erase_node(node)


def _apart(node: fx.Node, graph: fx.Graph, given: dict[str, Any]) -> None:
    query, key, value, mask = (given.get(name) for name in ("query", "key", "value", "attn_mask"))
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    from_to, across = query.meta["shape"], key.meta["shape"]
    scores = (*from_to[:-1], across[-2])

    def call(function: Any, args: tuple[Any, ...], shape: tuple[int, ...]) -> fx.Node:
        made = graph.call_function(function, args)
        made.meta["shape"] = shape
        return made

    with graph.inserting_before(node):
        scaled = call(operator.mul, (query, given.get("scale") or 1 / math.sqrt(from_to[-1])), from_to)
        made = call(torch.matmul, (scaled, call(torch.transpose, (key, -2, -1), (*across[:-2], across[-1], across[-2]))), scores)
        if isinstance(mask, fx.Node) and mask.meta.get("boolean"):
            made = call(torch.masked_fill, (made, call(torch.logical_not, (mask,), mask.meta["shape"]), -math.inf), scores)
        elif mask is not None:
            made = call(operator.add, (made, mask), scores)
        answer = call(torch.matmul, (call(torch.softmax, (made, -1), scores), value), node.meta["shape"])
    answer.meta |= {key: node.meta[key] for key in ("stage", "bn_input") if key in node.meta}
    node.replace_all_uses_with(answer)
