"""Whether an exported file answers as the student does, image by image.

Promise: the same best class on every image, but where the two best logits lie within 1e-4. Float arithmetic cannot keep that everywhere: where a
value lies on the boundary between two levels, the order of a sum decides which of the two it gets, and a whole level's difference goes on from there.
How far that reaches is measured, not assumed: in the student itself, with what it quantizes moved by a little. A file passes if what differs lies
within that, and is rejected otherwise. An answer of many choices (a class for each pixel, yes or no for each position and class of a detector)
is equal where every choice is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from dfqbench.network import Network
from dfqbench.quantization.layers import ActivationQuantizer
from dfqbench.task import Task
from dfqbench.tasks.answers import answers_of

CLOSE = 1e-4  # logits: an answer as near as that to another may be the other
SYSTEMATIC = 1e-3  # of the largest logit: boundaries that are met move few images, a wrong file moves the median one
JITTER = 1e-5  # a sum of float32 is known to about a tenth of that
Run = Callable[[Tensor], Tensor]  # images -> answers
Batches = Callable[[], Iterable[Tensor]]  # normalised images, the same ones at every call


class Rejected(Exception):
    """A file does not answer as the student does, or not at all. It is kept under another name, for those who want to know why."""


@dataclass(frozen=True)
class Agreement:
    """How the answers of a file and of its student compare. moved: the largest difference of a logit, one per image; margins: see `Agreement.of`."""

    how: str
    moved: Tensor
    differs: Tensor  # whether the best class does, of any choice
    margins: Tensor  # between the student's two best logits; of the choices that differ, the largest
    largest: float  # logit
    why: str = ""
    noise: Tensor | None = None  # as `moved`, of the same network with other rounding; None where the promise holds without
    equal: float | None = None  # share of all choices that are, where an answer consists of many

    @classmethod
    def of(cls, how: str, student: Tensor, file: Tensor, task: Task | None = None) -> Agreement:
        """From answers of a task (N x ...; see `dfqbench.tasks`), by default logits, N x classes each."""
        ours, theirs = (answers_of(task).rows(answer) if task is not None else answer for answer in (student, file))
        best = ours.topk(2, 1).values
        margins, differs = ((best[:, 0] - best[:, 1]).view(len(student), -1), (ours.argmax(1) != theirs.argmax(1)).view(len(student), -1))
        moved = (student - file).abs().flatten(1).amax(1).nan_to_num(torch.inf)
        equal = None if differs.shape[1] == 1 else 1 - float(differs.double().mean())
        largest = torch.where(differs.any(1), margins.where(differs, -torch.inf).amax(1), margins.amin(1))
        return cls(how, moved, differs.any(1), largest, float(student.abs().max()), equal=equal)

    @property
    def holds(self) -> bool:
        """Whether the promise holds as it stands."""
        return not bool((self.differs & (self.margins > CLOSE)).any()) and float(self.moved.median()) <= SYSTEMATIC * self.largest

    @property
    def passes(self) -> bool:
        """Whether it holds, or `noise` says why it cannot."""
        if self.noise is None:
            return self.holds
        apart = float(self.margins[self.differs].max()) if bool(self.differs.any()) else 0.0
        median = SYSTEMATIC * self.largest + 3 * float(self.noise.median())
        return apart <= max(CLOSE, 2 * float(self.noise.max())) and float(self.moved.median()) <= median

    def __str__(self) -> str:
        """A line, and indented ones about what differs."""
        images, different = len(self.moved), int(self.differs.sum())
        many = "" if self.equal is None else f" ({100 * self.equal:.7g} % of their choices)"
        said = [
            f"{self.how}: {images - different} of {images} answers equal{many}; logits (up to {self.largest:.3g}) differ by at most "
            f"{self.moved.max():.1e}, on the median image by {self.moved.median():.1e}"
        ]
        if different:
            apart = sorted({f"{margin:.2g}" for margin in self.margins[self.differs].tolist()}, key=float)
            largest = "" if self.equal is None else "at most "
            said.append(
                f"where the answer differs, the student's two best logits lie {largest}{' to '.join(dict.fromkeys([apart[0], apart[-1]]))} apart"
            )
        if self.noise is not None:
            said.append(f"{self.why} moves logits by up to {self.noise.max():.1e}, on the median image by {self.noise.median():.1e}")
        return "\n  ".join(said)


@torch.no_grad()
def agreements(network: Network, runs: dict[str, Run], batches: Batches, others: dict[str, tuple[str, Run]] | None = None) -> list[Agreement]:
    """Each of `runs`, by its name, against the network; where the promise does not hold as it stands, it is measured what little moves do.

    others: for some of `runs`, something else that moves logits without being wrong: what, and a network that has it.
    """
    answers: dict[str, list[Tensor]] = {name: [] for name in ["", *runs]}
    for images in batches():
        answers[""].append(network(images))
        for name, run in runs.items():
            answers[name].append(run(images))
    joined = {name: torch.cat(parts) for name, parts in answers.items()}
    student = joined[""]
    found, noise = [Agreement.of(name, student, joined[name], network.task) for name in runs], None

    def moved_by(like: Run) -> Tensor:
        return Agreement.of("", student, torch.cat([like(images) for images in batches()]), network.task).moved

    for place, agreement in enumerate(found):
        if agreement.holds:
            continue
        noise = moved_by(jittered(network)) if noise is None else noise
        why, total = f"a move by {JITTER:g} of the largest value, in front of each quantizer,", noise
        if others and agreement.how in others:
            further, like = others[agreement.how]
            why, total = f"{why} or {further}", torch.maximum(noise, moved_by(like))
        found[place] = replace(agreement, why=why, noise=total)
    return found


def jittered(network: Network) -> Run:
    """The network with noise on what is quantized, but not on the images: they are the same everywhere."""
    graph = network.traced.graph
    places = [n for n in graph.nodes if n.op == "call_module" and n.args and isinstance(n.args[0], fx.Node) and n.args[0].op != "placeholder"]
    found = [m for n in places if isinstance(m := network.traced.get_submodule(str(n.target)), ActivationQuantizer)]
    generator = torch.Generator().manual_seed(0)

    def move(_: object, given: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = given
        return (x + JITTER * x.abs().amax() * torch.randn(x.shape, generator=generator),)

    def run(images: Tensor) -> Tensor:
        hooks = [quantizer.register_forward_pre_hook(move) for quantizer in found]
        try:
            answer = network.answer_of(tree_leaves(network.traced(images)))
        finally:
            for hook in hooks:
                hook.remove()
        return answer

    return run


def random_images(task: Task, count: int, batch_size: int = 50) -> Batches:
    """Images of random pixels, normalised."""

    def draw() -> Iterable[Tensor]:
        generator = torch.Generator().manual_seed(0)
        lows, highs = (torch.tensor(values).view(-1, 1, 1) for values in zip(*task.pixel_range(), strict=True))
        for start in range(0, count, batch_size):
            pixels = torch.rand(min(batch_size, count - start), *task.image_shape, generator=generator)
            yield lows + (highs - lows) * pixels

    return draw
