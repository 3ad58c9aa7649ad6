"""A growing set of finished synthetic images. What is in it never changes, so it is written once and is no part of any checkpoint."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from dfqbench.files import write_atomically


class ImageSet:
    """Finished images with their labels, kept on one device; a method gets one from `self.image_set(name)`.

    With a folder, every part is a file there and the state is only their names and hashes; without one (in a test), the state
    holds the tensors.
    """

    def __init__(self, name: str, folder: Path | None, device: torch.device):
        self.name, self.folder, self.device = name, folder, device
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._files: list[list[str]] = []
        self._order, self._position = torch.zeros(0, dtype=torch.long), 0
        self._picked = torch.zeros(0, dtype=torch.long, device=device)

    @property
    def files(self) -> list[tuple[str, str]]:
        """Name and sha256 of every file that was written, in their order."""
        return [(file, digest) for file, digest in self._files]

    def __len__(self) -> int:
        return sum(len(labels) for _, labels in self._parts)

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Takes in copies of n images (n x C x H x W) and n labels; n may be 0. Images are kept in torch's default type, whatever made them."""
        part = images.detach().to(self.device, torch.get_default_dtype(), copy=True).contiguous(), labels.to(self.device, copy=True).contiguous()
        if self.folder is not None:
            content = safetensors.torch.save({"images": part[0].cpu(), "labels": part[1].cpu()})
            file = f"{self.name}-{len(self._files):04d}.safetensors"
            write_atomically(self.folder / file, content)
            self._files.append([file, hashlib.sha256(content).hexdigest()])
        self._parts.append(part)

    @property
    def images(self) -> Tensor:
        """All images, M x C x H x W."""
        return self._joined(0)

    @property
    def labels(self) -> Tensor:
        """All labels, M."""
        return self._joined(1)

    def next(self, count: int, shuffle: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """The next images with their labels, around and around: `pick`, then `picked`."""
        self.pick(count, shuffle)
        return self.picked

    @property
    def picked(self) -> tuple[Tensor, Tensor]:
        """The images that were picked last, with their labels: the same operations on the same tensors every time.

        Raises RuntimeError where none were.
        """
        if not len(self._picked):
            raise RuntimeError(f"of the image set {self.name!r} nothing was picked: `pick` in `before_step` chooses the next images")
        return self.images[self._picked], self.labels[self._picked]

    def pick(self, count: int, shuffle: torch.Generator | None = None) -> None:
        """Chooses the next images, around and around; in `before_step`, where the step is to be replayed.

        Without `shuffle` always `count` of them, in the order in which they came. With it, in a random order that is drawn from that stream and
        drawn anew where fewer than `count` are left of it; then never more than there are. Raises RuntimeError where there is none.
        """
        size = len(self)
        if not size:
            raise RuntimeError(f"the image set {self.name!r} is empty")
        if shuffle is None:
            chosen = (self._position + torch.arange(count, device=self.device)) % size
            self._position = (self._position + count) % size
        else:
            count = min(count, size)
            if self._position + count > len(self._order):
                order = torch.randperm(size, generator=shuffle, device=self.device)
                self._order, self._position = self._order.copy_(order) if len(self._order) == size else order, 0
            chosen = self._order[self._position : self._position + count]
            self._position += count
        if len(self._picked) == len(chosen):
            self._picked.copy_(chosen)
        else:
            self._picked = chosen.clone()

    def _joined(self, index: int) -> Tensor:
        if len(self._parts) > 1:
            self._parts = [(torch.cat([p[0] for p in self._parts]), torch.cat([p[1] for p in self._parts]))]
        return self._parts[0][index]

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"order": self._order, "position": self._position}
        if self.folder is not None:
            return state | {"files": list(self._files)}
        return state | ({"images": self.images, "labels": self.labels} if self._parts else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if a file is not the one that was written."""
        self._parts, self._files = [], []
        self._order, self._position = state["order"].to(self.device, copy=True), state["position"]
        if "images" in state:
            self._parts = [(state["images"].to(self.device), state["labels"].to(self.device))]
        for file, digest in state.get("files", []):
            assert self.folder is not None
            content = (self.folder / file).read_bytes()
            if hashlib.sha256(content).hexdigest() != digest:
                raise ValueError(f"{self.folder / file} is not the file that the checkpoint speaks of")
            part = safetensors.torch.load(content)
            self._parts.append((part["images"].to(self.device), part["labels"].to(self.device)))
            self._files.append([file, digest])
