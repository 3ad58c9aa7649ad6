"""Losses that several methods share (spec section 1.2)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from dfqbench import Observation


def batch_norm_loss(answer: Observation) -> Tensor:
    """L_BNS: how far the batch is from the statistics that the teacher's BN layers remember (scalar).

    (1/L) sum_l [ (1/c_l) ||m_l - mu_l||^2 + (1/c_l) ||s_l - v_l||^2 ], with batch mean m_l and biased batch variance s_l
    of the input of BN layer l, and that layer's running mean mu_l and running variance v_l.
    """
    means, variances = zip(*answer.statistics(), strict=True)
    targets = [(bn.running_mean, bn.running_var) for bn in answer.batch_norms]
    weights = _channel_weights(tuple(m.numel() for m in means), means[0].dtype, means[0].device)
    mean_error = torch.cat(means) - torch.cat([t[0] for t in targets])  # type: ignore[misc]
    variance_error = torch.cat(variances) - torch.cat([t[1] for t in targets])  # type: ignore[misc]
    return ((mean_error.square() + variance_error.square()) * weights).sum()


@functools.cache
def _channel_weights(channels: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Of all layers in one tensor: each channel weighs 1 / (L c_l). Kept, since making it anew would be a kernel for each layer in every step."""
    return torch.cat([torch.full((count,), 1.0 / (len(channels) * count), dtype=dtype, device=device) for count in channels])


def distillation_loss(logits: Tensor, labels: Tensor, teacher_logits: Tensor, temperature: float, kd_weight: float = 1.0) -> Tensor:
    """L_Q = CE(Q(x), y) + alpha T^2 mean_{n,k} KL(softmax(P/T) || softmax(Q/T)), scalar.

    The KL terms are averaged over all N * C elements, as the authors' code does, not over the batch.
    """
    cross_entropy = F.cross_entropy(logits, labels)
    log_p, log_q = F.log_softmax(teacher_logits / temperature, 1), F.log_softmax(logits / temperature, 1)
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).mean()
    return cross_entropy + kd_weight * temperature**2 * divergence


def divergence_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(P/T) || softmax(Q/T)), averaged over the batch (scalar)."""
    log_p, log_q = F.log_softmax(teacher_logits / temperature, 1), F.log_softmax(logits / temperature, 1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def decoupled_loss(logits: Tensor, labels: Tensor, teacher_logits: Tensor, target_weight: float, other_weight: float) -> Tensor:
    """Decoupled distillation at temperature 1 (Zhao et al., CVPR 2022): alpha TCKD + beta NCKD, averaged over the batch (scalar).

    TCKD = KL between the two-way distributions (p_y, 1 - p_y); NCKD = KL between the distributions over the C - 1 other classes.
    """
    log_p, log_q = F.log_softmax(teacher_logits, 1), F.log_softmax(logits, 1)
    member, count = F.one_hot(labels, logits.shape[1]).bool(), logits.shape[1] - 1
    rest = torch.arange(count, device=labels.device)
    rest = rest + (rest >= labels[:, None])  # the other classes of each image, N x C - 1 (a mask as an index would wait for the device)

    def two_way(log_probabilities: Tensor, scores: Tensor) -> Tensor:
        target = log_probabilities.gather(1, labels[:, None])[:, 0]
        others = torch.logsumexp(scores.masked_fill(member, -torch.inf), 1) - torch.logsumexp(scores, 1)
        return torch.stack([target, others], 1)

    targets = F.kl_div(two_way(log_q, logits), two_way(log_p, teacher_logits), reduction="batchmean", log_target=True)
    others_p = F.log_softmax(teacher_logits.gather(1, rest), 1)
    others_q = F.log_softmax(logits.gather(1, rest), 1)
    others = F.kl_div(others_q, others_p, reduction="batchmean", log_target=True)
    return target_weight * targets + other_weight * others
