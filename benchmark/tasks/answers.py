"""The answers of a classifier, of a segmentation network and of a detector, each as one tensor, and what is compared in them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dfqbench.task import Task

BOX = 4  # numbers per box
SURE = 0.3  # probability from which on a detector's position counts as an object when two detectors are compared


@dataclass(frozen=True)
class Answers(ABC):
    """How answers of one task's networks are read. An answer is N x ... (see the subclasses), of any floating-point type."""

    task: Task

    @abstractmethod
    def problem(self, native: Any, count: int) -> str:
        """What a network that answers `count` images with `native` (as its forward returns it) does wrong; empty where nothing."""

    @abstractmethod
    def rows(self, answer: Tensor) -> Tensor:
        """The choices among classes that an answer consists of, as logits: M x K, every image's rows one after the other.

        A binary choice (does this position hold this class?) has K = 2.
        """

    @abstractmethod
    def agreement(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """How far two networks decide alike: one share in 0..1 per image, N."""

    def divergence(self, ours: Tensor, theirs: Tensor, temperature: float = 1.0) -> Tensor:
        """temperature^2 KL(theirs || ours), a scalar in nats: mean over all choices, in float32 at least."""
        return self._divergences(ours, theirs, temperature).mean()

    def divergence_per_image(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """KL(theirs || ours) in nats, mean over an image's choices: N."""
        return self._divergences(ours, theirs, 1.0).view(len(ours), -1).mean(1)

    def _divergences(self, ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
        """By choice, M."""
        log_q, log_p = (F.log_softmax(_precise(self.rows(answer)) / temperature, 1) for answer in (ours, theirs))
        return temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)

    def distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """Mean absolute difference, a scalar (ZAQ's)."""
        return (ours - theirs).abs().mean()


class OneClass(Answers):
    """Logits, N x classes: of the exit that is asked, where there are several."""

    def problem(self, native: Any, count: int) -> str:
        wanted, exits = (count, self.task.classes), self.task.exits
        if exits > 1:
            shapes = [_shape(part) for part in native] if isinstance(native, Sequence) else _shape(native)
            return "" if shapes == [wanted] * exits else f"with {shapes}, not with {wanted} logits at each of {exits} exits"
        several = isinstance(native, Sequence) and len(native) > 1 and all(_shape(part) == wanted for part in native)
        hint = f": if these are early exits, say `exits: {len(native)}`" if several else ""
        return "" if _shape(native) == wanted else f"with {_shape(native)}, not with {wanted} logits{hint}"

    def rows(self, answer: Tensor) -> Tensor:
        return answer

    def divergence(self, ours: Tensor, theirs: Tensor, temperature: float = 1.0) -> Tensor:
        """Operation by operation as the field's code has it."""
        log_p, log_q = F.log_softmax(theirs / temperature, 1), F.log_softmax(ours / temperature, 1)
        return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    def agreement(self, ours: Tensor, theirs: Tensor) -> Tensor:
        return (ours.argmax(1) == theirs.argmax(1)).float()


class OneClassPerPixel(Answers):
    """Logits, N x classes x H x W, at the size of the images or below it."""

    def problem(self, native: Any, count: int) -> str:
        shape = _shape(native)
        right = isinstance(shape, tuple) and len(shape) == 4 and shape[:2] == (count, self.task.classes)
        return "" if right else f"with {shape}, not with ({count}, {self.task.classes}, height, width) logits"

    def rows(self, answer: Tensor) -> Tensor:
        return answer.flatten(2).transpose(1, 2).reshape(-1, answer.shape[1])

    def agreement(self, ours: Tensor, theirs: Tensor) -> Tensor:
        return (ours.argmax(1) == theirs.argmax(1)).flatten(1).float().mean(1)


class Boxes(Answers):
    """What a detector's head says of each position (and anchor): N x positions x (classes + 4 + others), see `packed`.

    Class logits, four numbers that say where the box is, and, where a head has them, further logits (centerness).
    """

    def problem(self, native: Any, count: int) -> str:
        try:
            answer = packed(native, self.task)
            others = answer.shape[2] - self.task.classes - BOX
            if self.task.scores == "softmax" and others:
                return f"with {others} further logits beside classes and boxes, which a softmax head does not have"
        except ValueError as error:
            return str(error)
        return "" if answer.shape[0] == count else f"for {answer.shape[0]} images instead of {count}"

    def parts(self, answer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Class logits (N x positions x classes), boxes (N x positions x 4), further logits (N x positions x others, often 0)."""
        end = self.task.classes
        return answer[..., :end], answer[..., end : end + BOX], answer[..., end + BOX :]

    def probabilities(self, answer: Tensor) -> Tensor:
        """Of each class but a background, N x positions x classes, in float32 at least."""
        logits = _precise(self.parts(answer)[0])
        return logits.softmax(2)[..., 1:] if self.task.scores == "softmax" else logits.sigmoid()

    def foreground(self, answer: Tensor) -> Tensor:
        """Probability that a position holds any object: N x positions."""
        return self.probabilities(answer).amax(2)

    def rows(self, answer: Tensor) -> Tensor:
        classes, _, others = self.parts(answer)
        if self.task.scores == "softmax":
            return classes.flatten(0, 1)
        yes_or_no = torch.cat([classes, others], 2)
        return torch.stack([yes_or_no, torch.zeros_like(yes_or_no)], -1).flatten(0, 2)

    def _divergences(self, ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
        """Each position's: its choices, and where the teacher sees an object, how far off its box is (smooth L1, so weighted).

        Nearly all positions are background, about which two networks hardly differ: the sum is scaled so that its mean over an image's positions
        is the sum over them for every object that the teacher expects, one at least.
        """
        seen = self.foreground(theirs)
        choices = super()._divergences(ours, theirs, temperature).view(*seen.shape, -1).sum(2)
        off = F.smooth_l1_loss(_precise(self.parts(ours)[1]), _precise(self.parts(theirs)[1]), reduction="none").sum(2)
        expected = seen.sum(1, keepdim=True).clamp(min=1)
        return ((choices + seen * off) * seen.shape[1] / expected).flatten()

    def agreement(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """Of the positions and classes where either is sure of an object, the share where both are; 1 where neither is."""
        we, they = (self.probabilities(answer) > SURE for answer in (ours, theirs))
        both, either = (together.flatten(1).sum(1) for together in (we & they, we | they))
        return torch.where(either > 0, both / either.clamp(min=1), torch.ones_like(both, dtype=torch.float32))


KINDS_OF_ANSWERS: dict[str, type[Answers]] = {"classify": OneClass, "segment": OneClassPerPixel, "detect": Boxes}


def answers_of(task: Task) -> Answers:
    """How this task's answers are read."""
    return KINDS_OF_ANSWERS[task.kind](task)


def without_auxiliary(native: Any) -> Any:
    """What counts of an answer by name: torchvision's segmentation networks give {"out": logits, "aux": ...}, the latter for training."""
    return native["out"] if isinstance(native, dict) and "out" in native else native


def packed(native: Any, task: Task) -> Tensor:
    """What a network's forward returned, as one tensor; of classifiers and segmentation networks the tensor itself, of early exits N x exits x C.

    Of detectors: N x positions x (classes + 4 + others). Its head gives level after level, each as (class logits, boxes, further logits, ...), or
    one such tuple: as maps N x A c x H x W, or as lists N x M x c (M positions and anchors), c being `classes`, 4, and what further logits have.
    Positions of a map are counted row by row, the anchors of a position next to each other, as torchvision does. Raises ValueError otherwise.
    """
    if task.exits > 1:
        return torch.stack(list(native), 1)
    if task.kind != "detect":
        assert isinstance(native, Tensor)
        return native
    return torch.cat([_level(level, task.classes) for level in _levels(native)], 1)


def unpacked(answer: Tensor, shapes: Sequence[Sequence[tuple[int, ...]]], classes: int) -> list[tuple[Tensor, ...]]:
    """`packed` undone: level after level, each (class logits, boxes, ...), shaped as `shapes` says (without the batch's axis)."""
    levels, start = [], 0
    for level in shapes:
        positions = _positions(level[0], classes)
        part, channel, found = answer[:, start : start + positions], 0, []
        for shape in level:
            width = math.prod(shape) // positions
            list_ = part[..., channel : channel + width]
            found.append(list_ if len(shape) == 2 else list_.reshape(len(answer), *shape[1:], -1).permute(0, 3, 1, 2))
            channel += width
        levels.append(tuple(found))
        start += positions
    return levels


def native_shapes(native: Any) -> list[list[tuple[int, ...]]]:
    """What `unpacked` wants to know of a detector's answer."""
    return [[tuple(part.shape[1:]) for part in level] for level in _levels(native)]


def _levels(native: Any) -> list[Sequence[Tensor]]:
    several = isinstance(native, Sequence) and len(native) > 0
    levels = [native] if several and all(isinstance(part, Tensor) for part in native) else list(native) if several else []
    for level in levels:
        if not isinstance(level, Sequence) or len(level) < 2 or not all(isinstance(part, Tensor) and part.dim() in (3, 4) for part in level):
            levels = []
    if not levels:
        raise ValueError(f"with {_shape(native)}, not with one (class logits, boxes) for each level of its head")
    return levels


def _positions(shape: tuple[int, ...], classes: int) -> int:
    """Positions times anchors, from the shape of class logits without the batch's axis."""
    return shape[0] if len(shape) == 2 else shape[0] // classes * shape[1] * shape[2]


def _level(parts: Sequence[Tensor], classes: int) -> Tensor:
    """N x positions x channels."""
    positions, found = _positions(tuple(parts[0].shape[1:]), classes), []
    known = [("class logits", classes), ("boxes", BOX), *[("further logits", 0)] * (len(parts) - 2)]
    for part, (name, wanted) in zip(parts, known, strict=True):
        each, left = divmod(part[0].numel(), positions) if positions else (0, 1)
        if left or not each or (wanted and each != wanted):
            raise ValueError(f"with {name} of shape {tuple(part.shape)}, which is not {wanted or 'a whole number'} for each position and anchor")
        by_position = part if part.dim() == 3 else part.permute(0, 2, 3, 1)
        found.append(by_position.reshape(len(part), positions, each))
    return torch.cat(found, 2)


def _shape(native: Any) -> Any:
    """A tensor's shape, or what else it is."""
    return tuple(native.shape) if isinstance(native, Tensor) else type(native).__name__


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
