"""What early exits are worth: the accuracy of each, and of leaving at the first one that is sure (BranchyNet, arXiv:1709.01686)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx

from dfqbench.data import Images
from dfqbench.engine.evaluate import Precision, eval_mode, normalise
from dfqbench.network import Network
from dfqbench.quantization.work import work_of
from dfqbench.task import Task

CONFIDENCES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


@torch.inference_mode()
def early_exits(network: Network, images: Images, task: Task, device: torch.device, precision: Precision, batch_size: int = 500) -> dict[str, Any]:
    """`top1` in percent and `macs` for one image of each exit, `macs` being of all that is computed until it has answered; and, `leaving` at the
    first exit whose softmax says at least `confidence`: `shares` of the images in percent by exit, `top1`, and the average `macs`.

    Confidences are given, not chosen: none of them has seen a label. Answers that are not finite are never sure, and wrong.
    """
    mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (task.mean, task.std))
    rights, sures = [], []
    with eval_mode(network), network.answering_at(None), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for pixels, labels in images.batches(batch_size):
            answer = network(normalise(torch.from_numpy(pixels).to(device), mean, std)).float()
            finite = torch.isfinite(answer).all(2)
            rights.append((answer.argmax(2) == torch.from_numpy(labels).to(device)[:, None]) & finite)
            sures.append(torch.where(finite, answer.softmax(2).amax(2), 0.0))
    right, sure, macs = torch.cat(rights).cpu(), torch.cat(sures).cpu(), _macs_until(network)
    return {
        "top1": [_percent(right[:, exit]) for exit in range(task.exits)],
        "macs": macs,
        "leaving": [_leaving(right, sure, macs, confidence) for confidence in CONFIDENCES],
    }


def _leaving(right: Tensor, sure: Tensor, macs: list[int], confidence: float) -> dict[str, Any]:
    enough = sure >= confidence
    enough[:, -1] = True
    first = enough.int().argmax(1)
    shares = [float((first == exit).double().mean()) for exit in range(len(macs))]
    top1 = _percent(right.gather(1, first[:, None])[:, 0])
    average = sum(share * cost for share, cost in zip(shares, macs, strict=True))
    return {"confidence": confidence, "shares": [round(100 * share, 4) for share in shares], "top1": top1, "macs": round(average)}


def _percent(right: Tensor) -> float:
    return 100 * float(right.double().mean())


def _macs_until(network: Network) -> list[int]:
    """By exit."""
    found = []
    for exit in range(network.task.exits):
        until = fx.GraphModule(network.traced, copy.deepcopy(network.traced.graph))
        output = next(n for n in until.graph.nodes if n.op == "output")
        output.args = (tuple(output.args[0][: exit + 1]),)
        until.graph.eliminate_dead_code()
        until.recompile()
        found.append(sum(each.macs for each in work_of(Network(until, network.task))))
    return found
