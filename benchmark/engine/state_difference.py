"""What differs between two states: nested dicts and lists of tensors, numbers and strings, as checkpoints hold them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def difference(before: Any, after: Any) -> dict[str, Any] | None:
    """What turns `before` into `after`, to the bit, leaf by leaf; None where they are the same.

    It is itself a state: `keys` and `gone` of a dict, `items` of a list of unchanged length, `new` for everything else.
    """
    if isinstance(before, dict) and isinstance(after, dict):
        keys = {k: found for k, v in after.items() if k in before and (found := difference(before[k], v)) is not None}
        keys |= {k: {"new": v} for k, v in after.items() if k not in before}
        gone = [k for k in before if k not in after]
        return {"keys": keys, "gone": gone} if keys or gone else None
    if isinstance(before, list | tuple) and type(before) is type(after) and len(before) == len(after):
        items = {i: found for i, (old, new) in enumerate(zip(before, after, strict=True)) if (found := difference(old, new)) is not None}
        return {"items": items} if items else None
    return None if _same(before, after) else {"new": after}


def changed(state: Any, found: dict[str, Any] | None) -> Any:
    """`state` with a difference applied: only the leaves that it speaks of are other than before."""
    if found is None:
        return state
    if "new" in found:
        return found["new"]
    if "keys" in found:
        kept = {k: v for k, v in state.items() if k not in found["gone"]}
        return kept | {k: changed(kept.get(k), inner) for k, inner in found["keys"].items()}
    return type(state)(changed(v, found["items"][i]) if i in found["items"] else v for i, v in enumerate(state))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.device == b.device and bool(torch.equal(_bytes(a), _bytes(b)))
    return type(a) is type(b) and bool(a == b or (a != a and b != b))  # not-a-number is the same as itself here


def _bytes(tensor: Tensor) -> Tensor:
    """-0.0 is not 0.0, and not-a-number is itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
