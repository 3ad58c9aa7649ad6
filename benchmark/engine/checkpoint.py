"""Checkpoints of unfinished bundles: one file, written whole or not at all."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from dfqbench.files import write_atomically

FORMAT = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Raises OSError where it cannot be written (a full disk); the checkpoint before stays."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path, members: list[str]) -> tuple[dict[str, Any] | None, str]:
    """The saved state, or None with the reason: there is none, it cannot be read, or it is that of other members."""
    if not path.is_file():
        return None, ""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        return None, f"the checkpoint cannot be read ({str(error).splitlines()[0]})"
    if state.get("format") != FORMAT or state.get("members") != members:
        return None, "the checkpoint is of another version or other cells"
    return state, ""
