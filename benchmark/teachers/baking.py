"""Weights that a network computes from others in every forward pass (weight and spectral normalisation, pruning masks) as plain weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


@torch.no_grad()
def bake(network: nn.Module) -> None:
    """Replaces every parametrization, old weight and spectral norm and pruning mask of `network`, in eval mode, by the weight that it gives."""
    for module in list(network.modules()):
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                trains = any(True for _ in module.parametrizations[name].parameters())  # type: ignore[index,union-attr]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
                weight = getattr(module, name)
                if trains and not isinstance(weight, nn.Parameter):  # torch leaves what it computes of several tensors as a plain tensor
                    delattr(module, name)
                    module.register_parameter(name, nn.Parameter(weight))


def baked(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """`state`, in which what a pruned or normalised network saved becomes the weight that it stands for, where `network` has that one.

    Spectral norm: Miyato et al., ICLR 2018, equation 8, with the vectors that were saved. Weight norm: Salimans and Kingma, NeurIPS 2016, equation 2.
    """
    new = dict(state)
    for name in network.state_dict():
        if name in new:
            continue
        module, _, leaf = name.rpartition(".")
        spectral = _spectral_normed_transposed if isinstance(network.get_submodule(module), nn.modules.conv._ConvTransposeNd) else _spectral_normed
        modern = f"{module}.parametrizations.{leaf}".removeprefix(".")
        for keys, compute in (
            ((f"{name}_orig", f"{name}_mask"), torch.mul),
            ((f"{name}_g", f"{name}_v"), _weight_normed),
            ((f"{modern}.original0", f"{modern}.original1"), _weight_normed),
            ((f"{name}_orig", f"{name}_u", f"{name}_v"), spectral),
            ((f"{modern}.original", f"{modern}.0._u", f"{modern}.0._v"), spectral),
        ):
            if all(key in new for key in keys):
                new[name] = compute(*(new.pop(key) for key in keys))
                break
    return new


def _weight_normed(size: Tensor, direction: Tensor) -> Tensor:
    axes = [i for i in range(direction.dim()) if size.dim() != direction.dim() or size.shape[i] == 1]
    normed: Tensor = direction * (size / torch.linalg.vector_norm(direction, dim=axes, keepdim=True))
    return normed


def _spectral_normed(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    normed: Tensor = weight / torch.dot(u, torch.mv(weight.flatten(1), v))
    return normed


def _spectral_normed_transposed(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return _spectral_normed(weight.transpose(0, 1), u, v).transpose(0, 1)
