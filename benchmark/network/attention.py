"""torch's attention modules taken apart into linear layers and matrix products, which can be observed and quantized; torch keeps each whole."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """What an `nn.MultiheadAttention` computes in eval mode: softmax(q k^T / sqrt(d) + masks) v for each head; called as torch's."""

    def __init__(self, whole: nn.MultiheadAttention):
        super().__init__()
        self.heads, self.head_dim, self.batch_first = whole.num_heads, whole.head_dim, whole.batch_first
        dim, packed = whole.embed_dim, whole.in_proj_weight
        weights = packed.detach().chunk(3) if packed is not None else (whole.q_proj_weight, whole.k_proj_weight, whole.v_proj_weight)
        biases = whole.in_proj_bias.detach().chunk(3) if whole.in_proj_bias is not None else (None,) * 3
        self.query, self.key, self.value = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out = _linear(whole.out_proj.weight, whole.out_proj.bias)
        self.dim = dim

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor]:
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (self._heads(layer(x)) for layer, x in ((self.query, query), (self.key, key), (self.value, value)))
        scores = torch.matmul(q * (1 / math.sqrt(self.head_dim)), k.transpose(-2, -1))
        if attn_mask is not None:  # positions x positions, or one for each head of each image
            scores = _masked(scores, attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, self.heads)))  # type: ignore[no-untyped-call]
        if key_padding_mask is not None:  # images x positions
            scores = _masked(scores, key_padding_mask[:, None, None])
        shares = torch.softmax(scores, -1)
        joined = torch.matmul(shares, v).transpose(1, 2).flatten(2)
        answer: Tensor = self.out(joined)
        shown = shares.mean(1) if average_attn_weights else shares
        return answer if self.batch_first else answer.transpose(0, 1), shown

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.heads, self.head_dim))  # type: ignore[no-untyped-call]
        return heads.transpose(1, 2)


class EncoderLayer(nn.Module):
    """What an `nn.TransformerEncoderLayer` computes in eval mode; called as torch's."""

    def __init__(self, whole: nn.TransformerEncoderLayer):
        super().__init__()
        self.norm_first, self.activation = whole.norm_first, whole.activation
        self.attention = Attention(whole.self_attn) if isinstance(whole.self_attn, nn.MultiheadAttention) else whole.self_attn
        self.linear1, self.linear2, self.norm1, self.norm2 = whole.linear1, whole.linear2, whole.norm1, whole.norm2

    def forward(self, src: Tensor, src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x, masks = src, {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask}
        if self.norm_first:
            x = x + self._attend(self.norm1(x), masks)
            widened: Tensor = x + self._widen(self.norm2(x))
            return widened
        x = self.norm1(x + self._attend(x, masks))
        answer: Tensor = self.norm2(x + self._widen(x))
        return answer

    def _attend(self, x: Tensor, masks: dict[str, Tensor | None]) -> Tensor:
        answer: Tensor = self.attention(x, x, x, **masks)[0]
        return answer

    def _widen(self, x: Tensor) -> Tensor:
        answer: Tensor = self.linear2(self.activation(self.linear1(x)))
        return answer


class Encoder(nn.Module):
    """What an `nn.TransformerEncoder` computes; called as torch's."""

    def __init__(self, whole: nn.TransformerEncoder):
        super().__init__()
        self.layers, self.norm = whole.layers, whole.norm

    def forward(self, src: Tensor, mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None, is_causal: bool | None = None) -> Tensor:
        for layer in self.layers:
            src = layer(src, mask, src_key_padding_mask)
        return src if self.norm is None else self.norm(src)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """True hides a position; numbers are added."""
    return scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask


def make_attention_plain(network: nn.Module) -> bool:
    """Puts modules of this file in the place of torch's, and says whether there were any: in place. One with keys of its own stays whole."""
    before = list(network.modules())
    for parent in before:
        for name, child in list(parent._modules.items()):
            if isinstance(child, nn.MultiheadAttention) and _is_plain(child):
                parent._modules[name] = Attention(child).train(child.training)
            elif type(child) is nn.TransformerEncoderLayer:
                parent._modules[name] = EncoderLayer(child).train(child.training)
            elif type(child) is nn.TransformerEncoder:
                parent._modules[name] = Encoder(child).train(child.training)
    return any(module not in before for module in network.modules())


def _is_plain(whole: nn.MultiheadAttention) -> bool:
    return type(whole) is nn.MultiheadAttention and whole.bias_k is None and not whole.add_zero_attn


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())  # type: ignore[assignment]
    return layer
