"""Every kind of batch norm as torch's own: what is later folded, frozen, observed or trained knows only `nn.BatchNorm1d`, `2d` and `3d`."""

from __future__ import annotations

import torch
from torch import fx, nn

from dfqbench.errors import UserError
from dfqbench.network.frozen_batch_norm import BatchNorm

_PLAIN = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}  # by the axes of the input
_FROZEN = {"weight", "bias", "running_mean", "running_var"}


def with_plain_batch_norms(network: nn.Module) -> nn.Module:
    """Takes apart timm's batch norms with an activation in them, and makes frozen ones (torchvision's, Detectron2's) plain: in place."""
    plain: dict[nn.Module, nn.Module] = {}
    for parent in list(network.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child not in plain:
                plain[child] = _taken_apart(child)
            if child is not None:
                parent._modules[name] = plain[child]
    return network


def _taken_apart(module: nn.Module) -> nn.Module:
    frozen, act = _is_frozen(module), getattr(module, "act", None)
    if not frozen and not (isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and isinstance(act, nn.Module)):
        return module
    plain = _plain(module, 4)
    if isinstance(act, nn.Module):
        return nn.Sequential(plain, *(part for part in (getattr(module, "drop", None), act) if isinstance(part, nn.Module)))
    if not _computes(module, plain, (2, plain.num_features, 2, 2)):
        raise UserError(f"a {type(module).__name__} does not compute the batch norm of its four buffers: use torchvision.ops.FrozenBatchNorm2d")
    return plain


def _is_frozen(module: nn.Module) -> bool:
    """A batch norm of images that has buffers alone."""
    return type(module).__name__.startswith("FrozenBatchNorm") and not module._parameters and {*module._buffers} >= _FROZEN


def _plain(norm: nn.Module, axes: int) -> BatchNorm:
    """torch's own batch norm with the numbers of `norm`. An `eps` of 0, or none, becomes one too small to matter: torch trains with none of 0."""
    state = {k: v for k, v in norm.state_dict().items() if "." not in k and k in (*_FROZEN, "num_batches_tracked")}
    some = next(iter(state.values()), None)
    features = getattr(norm, "num_features", None) or len(state["running_mean"])
    plain = _PLAIN[axes](features, getattr(norm, "eps", 0.0) or 1e-12, getattr(norm, "momentum", 0.1), "weight" in state, "running_mean" in state)
    if "running_mean" in state:
        state.setdefault("num_batches_tracked", torch.zeros((), dtype=torch.long, device=state["running_mean"].device))
    plain.load_state_dict(state, assign=True)
    return plain.to(some.device if some is not None else None).train(norm.training)


def make_batch_norms_plain(traced: fx.GraphModule) -> None:
    """SyncBatchNorm and other subclasses become torch's own classes, by the shapes that enter them: in place.

    Raises UserError that names a subclass that computes something else: it can neither be folded nor frozen.
    """
    for node in traced.graph.nodes:
        norm = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(norm, BatchNorm) or type(norm) in _PLAIN.values():
            continue
        shape = node.args[0].meta["shape"]
        plain = _plain(norm, len(shape))
        if not _computes(norm, plain, (2, *shape[1:])):
            name = type(norm).__name__
            raise UserError(f"{node.target} ({name}) does more than a batch norm: write what it adds as a module of its own behind nn.BatchNorm2d")
        traced.set_submodule(str(node.target), plain)


@torch.no_grad()
def _computes(module: nn.Module, plain: BatchNorm, shape: tuple[int, ...]) -> bool:
    some = next(iter(plain.state_dict().values()), torch.zeros(()))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(some.device, some.dtype)
    return torch.allclose(module(x.clone()), plain(x), rtol=1e-4, atol=1e-4, equal_nan=True)
