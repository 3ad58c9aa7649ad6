"""Accuracy, mIoU or AP of a network on an evaluation set, image by image, and a hash that shows whether evaluating changed it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfqbench.data import Images
from dfqbench.data.dense import placed
from dfqbench.errors import UserError
from dfqbench.network import Network
from dfqbench.task import Task
from dfqbench.tasks.detect import Boxes, Detections, average_precision, average_precisions, matches_of
from dfqbench.tasks.segment import intersections_over_unions, mean_iou, pixel_accuracy, pixel_counts
from dfqbench.teachers.weights import hash_tensors

Precision = Literal["fp32", "tf32", "bf16"]
T = TypeVar("T")
DENSE_BATCH = 16  # images


@dataclass(frozen=True)
class Evaluation:
    """What a network got right. `correct` has one entry per image in the set's order, so that two networks can be compared image by image.

    metric: `top1`, or `agreement` where there are no labels: then right is what the teacher says, and the loss is KL(teacher || student).
    """

    correct: npt.NDArray[np.bool_]
    top1: float  # percent
    top5: float | None  # percent; None below 6 classes, where it would say nothing
    loss: float  # mean cross-entropy in nats; nan for a network that diverged
    metric: Literal["top1", "agreement"] = "top1"

    @property
    def value(self) -> float:
        """Of the metric, in percent."""
        return self.top1

    def files(self) -> dict[str, bytes]:
        """What is kept of every image, by file name."""
        return {"correct.npy": _as_file(np.save, np.packbits(self.correct))}

    def scores(self) -> dict[str, Any]:
        """As a result.json has them."""
        counts = {"correct": int(self.correct.sum()), "images": int(self.correct.size)}
        if self.metric == "agreement":
            return {"metric": self.metric, "agreement": self.top1, "kl": self.loss, **counts}
        return {"top1": self.top1, "top5": self.top5, **counts, "loss": self.loss}


@dataclass(frozen=True)
class DenseEvaluation:
    """How well a network labels pixels (`miou`) or finds objects (`ap`). said: as a result.json has it. per_image: arrays from which the metric of
    any choice of images can be put together (tasks/segment.py, tasks/detect.py)."""

    metric: Literal["miou", "ap"]
    said: dict[str, Any]
    per_image: dict[str, npt.NDArray[Any]]

    @property
    def value(self) -> float:
        """Of the metric, in percent."""
        return float(self.said[self.metric])

    def files(self) -> dict[str, bytes]:
        """What is kept of every image, by file name."""
        return {"per_image.npz": _as_file(np.savez_compressed, **self.per_image)}

    def scores(self) -> dict[str, Any]:
        """As a result.json has them."""
        return {"metric": self.metric, **self.said}


Evaluated = Evaluation | DenseEvaluation


def _as_file(save: Callable[..., None], *arrays: npt.NDArray[Any], **named: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *arrays, **named)
    return buffer.getvalue()


def evaluate_task(
    network: Network,
    images: Images,
    task: Task,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    batch_size: int = 500,
    smaller: Callable[[int], None] = lambda size: None,
) -> Evaluated:
    """As `evaluate`, by the metric of whatever kind of task it is. Dense networks answer much: their batches have DENSE_BATCH images at most."""
    if task.kind == "classify":
        return evaluate(network, images, task, device, precision, batch_size, smaller)
    scored = _segmentation if task.kind == "segment" else _detection

    @torch.inference_mode()
    def work(size: int) -> DenseEvaluation:
        return scored(network, images, task, _answers(network, images, task, torch.device(device), precision, size))

    return in_batches_that_fit(work, min(batch_size, DENSE_BATCH), smaller)


def evaluate(
    network: nn.Module,
    images: Images,
    task: Task,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    batch_size: int = 500,
    smaller: Callable[[int], None] = lambda size: None,
) -> Evaluation:
    """Run every image through the network in eval mode; training flags are as before afterwards.

    The network is moved to `device` and stays there. An answer that is not finite counts as wrong. `bf16` is autocast; `fp32` and `tf32` are
    the caller's to tell apart (`products_in`). smaller: is told the size of the batches that are tried next, where a GPU's memory does not suffice.
    Raises UserError where the network does not answer with one logit per class of the set.
    """
    return in_batches_that_fit(lambda size: _evaluated(network, images, task, torch.device(device), precision, size), batch_size, smaller)


def in_batches_that_fit(work: Callable[[int], T], batch_size: int, smaller: Callable[[int], None]) -> T:
    """work(batch_size), and where that runs out of a GPU's memory, again with batches of half the size, down to one image."""
    while True:
        try:
            return work(batch_size)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
        batch_size //= 2  # out here, where the error does not hold what was at work any more
        torch.cuda.empty_cache()
        smaller(batch_size)


@torch.inference_mode()
def _evaluated(network: nn.Module, images: Images, task: Task, device: torch.device, precision: Precision, batch_size: int) -> Evaluation:
    network.to(device)
    mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (task.mean, task.std))
    hits1, hits5, losses = [], [], []
    with eval_mode(network), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for pixels, labels in images.batches(batch_size):
            target = _to(labels, device)
            logits = network(normalise(_to(pixels, device), mean, std))
            _check(logits, len(labels), images.classes)
            logits = logits.float()
            finite = torch.isfinite(logits).all(1)
            hits1.append((logits.argmax(1) == target) & finite)
            if images.classes > 5:
                hits5.append((logits.topk(5, 1).indices == target[:, None]).any(1) & finite)
            losses.append(F.cross_entropy(logits, target, reduction="none"))
    correct = torch.cat(hits1)  # nothing is fetched from the device before all batches are under way
    return Evaluation(
        correct=correct.cpu().numpy(),
        top1=100.0 * correct.double().mean().item(),
        top5=100.0 * torch.cat(hits5).double().mean().item() if hits5 else None,
        loss=torch.cat(losses).double().mean().item(),
    )


def _answers(
    network: Network, images: Images, task: Task, device: torch.device, precision: Precision, batch_size: int
) -> Iterator[tuple[npt.NDArray[np.int64], Tensor]]:
    """(places in the set, answers in float32), batch by batch."""
    network.to(device)
    mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (task.mean, task.std))
    with eval_mode(network):
        for pixels, places in images.batches(batch_size):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                answer = network(normalise(_to(pixels, device), mean, std))
            yield places, answer.float()


def _segmentation(network: Network, images: Images, task: Task, answers: Iterator[tuple[npt.NDArray[np.int64], Tensor]]) -> DenseEvaluation:
    """Masks are scored at their own size: of each image's logits the part where the image lies is resized to it."""
    assert images.targets is not None
    counts = []
    for places, answer in answers:
        for place, logits in zip(places.tolist(), F.interpolate(answer, task.image_shape[1:], mode="bilinear", align_corners=False), strict=True):
            mask = images.targets(place)
            at = placed(mask.shape[0], mask.shape[1], task)
            logits = logits[None, :, : at.inner_height, : at.inner_width]
            logits = logits if logits.shape[2:] == mask.shape else F.interpolate(logits, mask.shape, mode="bilinear", align_corners=False)
            said = torch.where(torch.isfinite(logits).all(1), logits.argmax(1), -1)[0].cpu().numpy()
            counts.append(pixel_counts(said, mask, task.labels))
    confusion = np.stack(counts)
    if not confusion[..., 1].any():
        raise UserError(f"no pixel of the evaluation set is of one of the teacher's {task.labels} classes: there is nothing to score")
    per_class = intersections_over_unions(confusion.sum(0))
    said_ = {"miou": float(mean_iou(confusion)), "pixel_accuracy": pixel_accuracy(confusion), "per_class": _by_name(images, per_class)}
    return DenseEvaluation("miou", {**said_, "images": len(confusion)}, {"confusion": confusion.astype(np.int32)})


def _detection(network: Network, images: Images, task: Task, answers: Iterator[tuple[npt.NDArray[np.int64], Tensor]]) -> DenseEvaluation:
    """The network's own `decode` makes boxes; they are brought back to the pixels of the image as it is stored."""
    assert images.targets is not None
    if network.decode is None:
        raise UserError("this detector has no decode(answer, height, width), which makes boxes of what its head says")
    found: list[Detections] = []
    annotated: list[Boxes] = []
    height, width = task.image_shape[1:]
    for places, answer in answers:
        finite = torch.isfinite(answer).flatten(1).all(1)
        answer = answer.where(finite[:, None, None], 0.0)  # `decode` need not know of others
        decoded = network.decode(network.native(answer), height, width)
        for place, whole, boxes in zip(places.tolist(), finite.tolist(), decoded, strict=True):
            target = images.targets(place)
            at = placed(target.height, target.width, task)
            scale = np.array([target.width / at.inner_width, target.height / at.inner_height] * 2)
            corners, scores, labels = (boxes[key].detach().cpu().double().numpy() for key in ("boxes", "scores", "labels"))
            if wrong := [label for label in labels.tolist() if not 0 <= label < task.labels]:
                raise UserError(f"decode says class {wrong[0]:g}, classes are 0 to {task.labels - 1}: labels begin at 0, a background is none")
            corners = np.clip(corners * scale, 0, [target.width, target.height] * 2) if whole else np.zeros((0, 4))
            found.append(Detections(corners, scores[: len(corners)], labels[: len(corners)].astype(np.int64)))
            annotated.append(target)
    matches = matches_of(found, annotated, task.labels)
    if not matches.boxes.any():
        raise UserError("the evaluation set has no box that counts: there is nothing to score")
    per_class = average_precisions(matches).mean(1)
    counts = {"images": len(annotated), "boxes": int(matches.boxes.sum())}
    return DenseEvaluation("ap", {**average_precision(matches), "per_class": _by_name(images, per_class), **counts}, matches.arrays())


def _by_name(images: Images, values: npt.NDArray[np.float64]) -> dict[str, float | None]:
    named = zip(images.class_names, values.tolist(), strict=False)
    return {name: value if np.isfinite(value) else None for name, value in named if name}


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """N x H x W x C uint8 -> N x C x H x W float32 in channels_last order, as the teacher was trained on; mean and std are 1 x C x 1 x 1."""
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def state_hash(network: nn.Module) -> str:
    """sha256 of all parameters and buffers, those that a state_dict leaves out included; device and memory layout do not enter."""
    parameters, buffers = network.named_parameters(remove_duplicate=False), network.named_buffers(remove_duplicate=False)
    return hash_tensors([*parameters, *buffers])


def _to(array: npt.NDArray[np.uint8] | npt.NDArray[np.int64], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    with torch.cuda.device(device):  # whose memory is pinned; another GPU would get a context for it
        return tensor.pin_memory().to(device, non_blocking=True)


def _check(logits: object, count: int, classes: int) -> None:
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != (count, classes):
        raise UserError(f"the network answers {count} images with {shape}, the evaluation set needs ({count}, {classes})")


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Inside, all of it. Each module's own flag is restored: a student in training may hold some of its modules in eval mode."""
    flags = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
