"""How to run, how to stop, and what became of it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Options:
    """How to run, as opposed to what: nothing here is part of a cell's identity."""

    device: str = "auto"
    checkpoint_every_s: float = 300.0
    retry_failed: bool = False
    stop_at_failure: bool = False  # after the bundle in which a cell failed, so that the rest gets a fresh process
    evaluation_batch: int = 500
    wandb: str | None = None  # online, offline or off instead of what the config says
    graphs: bool | None = None  # replay training steps as CUDA graphs, where the method allows it; None: on a GPU, where a check of it passes
    streams: bool = False  # students of a bundle are replayed on streams of their own, at the same time


class StopFlag:
    """Set by SIGTERM, SIGUSR2 or Ctrl-C: the step ends, the state is saved. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def installed(self) -> Iterator[StopFlag]:
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._caught) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


@dataclass
class Summary:
    """What became of a run's cells."""

    done: int = 0
    failed: int = 0
    failed_earlier: int = 0  # and not tried again
    left: int = 0  # to other processes, or to the next run
    interrupted: bool = False
