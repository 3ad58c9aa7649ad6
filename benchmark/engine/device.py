"""The device of a training process: which one, in which precision it computes, its memory, and seconds measured on it."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dfqbench.errors import UserError, counted
from dfqbench.sweep.cell import Cell

# malloc.h of the GNU C library
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
CUBLAS_WORKSPACE = ":4096:8"  # one of the two with which cuBLAS gives the same bits every time (its manual, "Results reproducibility")
BATCH_SIZES = ("batch_size", "synthesis_batch", "calibration_batch", "images")  # settings of methods that say how many images are at work at once


class DeviceLost(UserError):
    """The GPU answers no more, and nothing that this process starts there will: what is not done stays to be done, by another process.

    cells: ids of those that were at work.
    """

    def __init__(self, message: str, cells: list[str]):
        super().__init__(message)
        self.cells = cells


def check_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:1`. Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r}: auto, cpu, cuda or cuda:N is expected")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r}: no GPU is visible here; take --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r}: {counted(torch.cuda.device_count(), 'GPU')} visible here, numbered from cuda:0")
    return device


def use_device(name: str) -> torch.device:
    """`check_device`, and this process made ready to compute there: fp32 means fp32, and the same work gives the same bits.

    On a GPU that needs torch's deterministic algorithms: one that has no deterministic kernel raises (see `rehearsal`). Pinned memory, streams and
    whatever else goes to the current GPU goes to this one. What runs on a CPU is as it was.
    """
    device = check_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = CUBLAS_WORKSPACE  # read when cuBLAS starts, with the first product
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # else a kernel for every new tensor, and nobody reads it before it is written
    return device


@contextmanager
def settings_kept() -> Iterator[None]:
    """Afterwards torch's settings are as they were before `use_device`: for a program that has other things to compute, too."""
    places: list[tuple[Any, str]] = [(torch.backends.cudnn, name) for name in ("allow_tf32", "deterministic", "benchmark")]
    places += [(torch.backends.cuda.matmul, "allow_tf32"), (torch.utils.deterministic, "fill_uninitialized_memory")]
    before = [getattr(place, name) for place, name in places]
    mode, index = torch.get_deterministic_debug_mode(), torch.cuda.current_device() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        for (place, name), value in zip(places, before, strict=True):
            setattr(place, name, value)
        torch.set_deterministic_debug_mode(mode)
        if index is not None:
            torch.cuda.set_device(index)


def is_lost(error: Exception, device: torch.device) -> bool:
    """Whether the GPU is dead for this process: after some errors (an illegal address, a fallen bus) every later call fails too."""
    if device.type != "cuda" or not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def out_of_memory(error: Exception, config: dict[str, Any], widths: int) -> str:
    """What to say of a bundle that did not fit, and what to lower: `error` in one line, with the settings that say how much is at work at once."""
    sizes = [f"{name} ({config[name]})" for name in BATCH_SIZES if name in config]
    together = [f"fewer bit widths at once ({widths} trained side by side)"] if widths > 1 else []
    lower = " or ".join([*sizes, *together]) or "the image size"
    said = ". ".join(" ".join(str(error).split()).split(". ")[:2])  # what was tried; how the memory is shared out is left to the traceback
    return f"{said.rstrip('.')}: lower {lower}"


def autocast_of(cell: Cell, device: torch.device) -> torch.autocast:
    """The context in which a cell computes: bfloat16 where its precision says so."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=cell.precision == "bf16")


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """`tf32`: inside, a GPU's convolutions and products of float32 round what enters them to 10 bits of mantissa; otherwise they do not."""
    places: tuple[Any, Any] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        for place, allowed in zip(places, before, strict=True):
            place.allow_tf32 = allowed


class Stopwatch:
    """Seconds by name, by two clocks.

    totals: on a CPU wall time, which grows with whatever else the machine does; on a GPU that of its own events, so that measuring waits for nothing
    until it is read. cpu: processor time of this process, all its threads together. NaN where a part of it was not measured.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.totals: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self._events: list[tuple[tuple[str, ...], Any, Any]] = []

    @contextmanager
    def of(self, *names: str) -> Iterator[None]:
        """names: who share the seconds in equal parts."""
        used = time.process_time()
        if self.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            stream = torch.cuda.current_stream(self.device)  # that of this device, which need not be torch's current one (cuda:1)
            start.record(stream)
            yield
            end.record(stream)
            self._events.append((names, start, end))
        else:
            started = time.perf_counter()
            yield
            _share(self.totals, names, time.perf_counter() - started)
        _share(self.cpu, names, time.process_time() - used)

    def read(self) -> dict[str, float]:
        """All totals so far; on a GPU this waits for the work that was measured."""
        if self._events:
            torch.cuda.synchronize(self.device)
            for names, start, end in self._events:
                _share(self.totals, names, start.elapsed_time(end) / 1000)
            self._events.clear()
        return self.totals

    def goes_on(self, totals: dict[str, float], cpu: dict[str, float] | None) -> None:
        """From what was measured before an interruption; cpu: None where an earlier version did not measure it."""
        self._events.clear()
        self.totals, self.cpu = dict(totals), dict.fromkeys(totals, math.nan) if cpu is None else dict(cpu)


def _share(totals: dict[str, float], names: tuple[str, ...], seconds: float) -> None:
    for name in names:
        totals[name] = totals.get(name, 0.0) + seconds / len(names)


def keep_freed_memory() -> None:
    """Tells the C library to keep what is freed for the next step, which asks for the same sizes again.

    By default large tensors go back to the operating system at once, and every step gets them anew, page by page and filled with zeros:
    some 5 % of a step. Where the C library is another one, nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 * 2**20)
