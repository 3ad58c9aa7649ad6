"""Captured steps: on a GPU, the parts of a training step are recorded once, as CUDA graphs, and replayed instead of being launched kernel by kernel.

A step of a small network is thousands of kernels that take microseconds each; launching them one by one takes longer than they do.

A part is what the stopwatch tells apart: the making of the images, and each student's update. Every part is a graph of its own, all in one pool of
memory, replayed in the order in which they were recorded: so each part's seconds are measured, and a student that diverges leaves without the others
being recorded anew. The first steps of a kind run as they are, as steps of the training: they create optimizer states, random streams and sums of
logged values. Recording executes nothing, so the step that is recorded is then replayed, and counts once.

With `streams`, each student's graphs have a pool and a stream of their own, so that a GPU may work on several students at once: they share the
images, which nobody writes to in the meantime, and nothing else. Students that draw random numbers are replayed one after the other: where a graph
goes on drawing from lies in one place on the device, which every replay writes to.

Steps of an epoch may be of several kinds (`Method.before_step`), each recorded for itself, its students' parts too: they read the images where that
kind's making left them. A step of no kind runs as it is, and may leave other tensors behind: after it, all is recorded anew.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import torch

from dfqbench.engine.method_state import Attributes, anchors_of, streams_of
from dfqbench.method.contract import Method

WARM_UP = 3  # steps of a kind before one is recorded; torch's own make_graphed_callables takes as many
T = TypeVar("T")
Replay = Callable[[], None]


class Parts(Protocol):
    """How the engine runs the parts of a step. replayed: how many were not run but replayed. streams: whether students may be at work at once."""

    replayed: int
    streams: bool

    def begin(self, epoch: object) -> None:
        """The steps from here on are of an epoch of this kind: between equal ones, nothing is recorded anew."""

    def next(self, kind: Hashable) -> None:
        """A step begins, of this kind: in one epoch, equal kinds do the same operations. None: like no other."""

    def run(self, name: str, work: Callable[[], T]) -> T:
        """One part of the step. In steps of one kind, a name stands for the same work."""

    def join(self) -> None:
        """Whatever comes now may read and write what the parts that were run have left."""

    def forget(self) -> None:
        """Tensors were replaced: what was recorded holds no more."""


class Eager:
    """Every part is run as it is."""

    replayed, streams = 0, False

    def begin(self, epoch: object) -> None: ...

    def next(self, kind: Hashable) -> None: ...

    def run(self, name: str, work: Callable[[], T]) -> T:
        return work()

    def join(self) -> None: ...

    def forget(self) -> None: ...


class Recorder(Protocol):
    """What records work and gives it back to be replayed. Everything recorded by one of these shares one pool of memory, and takes turns."""

    def eagerly(self, work: Callable[[], T]) -> T:
        """Runs work as it is, under the conditions under which it will be recorded."""

    def record(self, work: Callable[[], T], streams: Sequence[torch.Generator]) -> tuple[T, Replay]:
        """What work returns, without its arithmetic being done, and what does the arithmetic: it leaves its results in those very tensors.

        streams: what the work draws from; a replay draws on from them. Raises whatever the work raises, or NotRecorded.
        """

    def aside(self, replay: Replay) -> None:
        """Replays beside whatever else is under way, once all that was begun before is done."""

    def join(self) -> None:
        """Whatever is begun from here on waits for what was replayed aside."""


class NotRecorded(Exception):
    """Why a part of a step cannot be recorded, in one line."""


class NotUndone(Exception):
    """The attempt to record a part of a step left something changed, so that the run cannot go on rightly."""


@dataclass
class _Part:
    warm: int = 0  # steps run as they are
    replay: Replay | None = None
    result: Any = None
    logged: dict[tuple[str, str], int] = field(default_factory=dict)  # values that each replay adds to the log's sums
    places: dict[str, Any] = field(default_factory=dict)  # of the method's tensors when it was recorded; empty when they were looked at once more


class CapturedParts:
    """Records the parts of a step and replays them; what cannot be recorded is told once, and then every step is run as it is.

    students: their state, by name: whatever a step may write to in place, and must not replace. say: takes the line for the user.
    """

    def __init__(
        self,
        method: Method,
        students: dict[str, Any],
        make_recorder: Callable[[], Recorder],
        say: Callable[[str], None],
        streams: bool = False,
    ):
        self.method, self.students, self.make_recorder, self.say = method, students, make_recorder, say
        self.replayed = 0
        self.refused = False
        self.streams = streams and len(students) > 1
        self._epoch: object = None
        self._kind: Hashable = 0
        self._recorders: dict[str, Recorder] = {}
        self._aside = list[Recorder]()  # with work under way
        self.forget()

    def begin(self, epoch: object) -> None:
        if epoch != self._epoch:
            self._epoch = epoch
            self.forget()

    def next(self, kind: Hashable) -> None:
        self._kind = kind
        if kind is None:
            self.forget()

    def forget(self) -> None:
        self.join()
        self._parts: dict[tuple[str, Hashable], _Part] = {}
        self._recorders = {}  # a pool of memory is done with when its last graph is gone: the next one is new

    def join(self) -> None:
        while self._aside:
            self._aside.pop().join()

    def _recorder_of(self, name: str) -> Recorder:
        """That of all parts, or of a student's own."""
        owner = name if self.streams and name in self.students else ""
        if owner not in self._recorders:
            self._recorders[owner] = self.make_recorder()
        return self._recorders[owner]

    def run(self, name: str, work: Callable[[], T]) -> T:
        if self.refused:
            return work()
        part = self._parts.setdefault((name, self._kind), _Part())
        if part.replay is None:
            if self._kind is None:
                return self._recorder_of(name).eagerly(work)
            if part.warm < WARM_UP:
                part.warm += 1
                return self._warm_up(name, work)
            try:
                self._record(part, work, self._recorder_of(name), aside=self.streams and name in self.students)
            except NotUndone:
                raise
            except Exception as error:  # whatever it is: run as it is, the step does what it is meant to do, or raises that again
                self._refuse(error)
                return work()
        elif part.places and (moved := first_difference(part.places, anchors_of(self.method, "self", numbers=False))):
            self._refuse(NotRecorded(f"before_step replaces {moved}: fill the tensor that is there, in place"))
            return work()
        else:
            part.places = {}
        assert part.replay is not None
        if self.streams and name in self.students:
            self._aside.append(self._recorder_of(name))
            self._aside[-1].aside(part.replay)
        else:
            part.replay()
        self.method._log.count(part.logged)
        self.replayed += 1
        return cast(T, part.result)

    def _warm_up(self, name: str, work: Callable[[], T]) -> T:
        """A step as it is; a student that draws random numbers in it has all of them replayed one after the other."""
        before = self._drawn() if self.streams and name in self.students else None
        result = self._recorder_of(name).eagerly(work)
        if before is not None and any(stream not in before or not torch.equal(before[stream], state) for stream, state in self._drawn().items()):
            self.streams = False
            self.say(f"students of {self.method.info.name} are replayed one after the other: they draw random numbers")
        return result

    def _drawn(self) -> dict[str, torch.Tensor]:
        """How far each random stream is, torch's own included."""
        device = self.method.device
        own = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
        return {name: stream.get_state() for name, stream in streams_of(self.method).items()} | {"torch's own": own}

    def _record(self, part: _Part, work: Callable[[], T], recorder: Recorder, aside: bool = False) -> None:
        """aside: the work draws from no stream.

        Raises what the work raises, or NotRecorded where a replay would not do what the step does. Then all is as it was before, or NotUndone.
        """
        log, counts = self.method._log, self.method._log.counts()
        streams, attributes, anchors = streams_of(self.method), Attributes(self.method), self._anchors()
        try:
            result, replay = recorder.record(work, [] if aside else list(streams.values()))
            logged = {name: count - counts.get(name, 0) for name, count in log.counts().items()}
            self._check_streams(set(streams_of(self.method)) - set(streams))
            self._check_log({name for name, more in logged.items() if more}, set(counts))
            self._check_state(anchors)
        except Exception:
            attributes.put_back()
            if first_difference(anchors, self._anchors()):
                raise NotUndone(f"{self._fault(anchors)}, which cannot be undone: run {self.method.info.name} with --no-graphs") from None
            raise
        finally:
            log.recount(counts)
        part.replay, part.result, part.places = replay, result, anchors_of(self.method, "self", numbers=False)
        part.logged = {name: more for name, more in logged.items() if more}

    def _anchors(self) -> dict[str, Any]:
        return anchors_of(self.method, "self") | anchors_of(self.students, "students")

    def _fault(self, anchors: dict[str, Any]) -> str:
        return f"a step replaces or changes {first_difference(anchors, self._anchors())} outside of its arithmetic"

    def _check_state(self, anchors: dict[str, Any]) -> None:
        if first_difference(anchors, self._anchors()):
            raise NotRecorded(self._fault(anchors))

    def _check_streams(self, new: set[str]) -> None:
        if new:
            raise NotRecorded(f"the random stream {min(new)!r} is first drawn from in the recorded step: the steps before were others")

    def _check_log(self, used: set[tuple[str, str]], known: set[tuple[str, str]]) -> None:
        for scope, name in sorted(used):
            if (scope, name) not in known:
                raise NotRecorded(f"{name!r} is first logged in the recorded step: the steps before were others")
            if self.method._log.sums[scope][name][0].device.type != self.method.device.type:
                raise NotRecorded(f"{name!r} is logged as a number of Python's: a replay would add the same one again and again")

    def _refuse(self, error: Exception) -> None:
        self.forget()
        self.refused = True
        reason = " ".join(str(error).split()) or type(error).__name__
        self.say(f"steps of {self.method.info.name} are not replayed but run as they are: {reason}")


def first_difference(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The first name under which two `anchors_of` do not hold the same."""
    missing = object()
    return next((name for name in before | after if before.get(name, missing) != after.get(name, missing)), None)


class CudaRecorder:
    """Records CUDA graphs. Work runs, and is recorded, on a stream of its own; replays run on the current one."""

    _broken: list[torch.cuda.CUDAGraph] = []  # the allocator goes on asking a graph whose capture broke off: it must not be freed

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def eagerly(self, work: Callable[[], T]) -> T:
        """On the stream that will be captured: libraries keep their workspaces, and autograd its accumulation of gradients, per stream."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = work()
        current.wait_stream(self.stream)
        return result

    def record(self, work: Callable[[], T], streams: Sequence[torch.Generator]) -> tuple[T, Replay]:
        """Autocast's cache of weights needs no switching off here: work opens and closes autocast itself, so the cache lives and dies in the capture.

        The stream contexts are entered here too, since torch's own leaves its stream current where a capture breaks off.
        """
        assert not torch.is_autocast_enabled(self.device.type)
        own = [stream for stream in streams if stream.device.type == "cuda"]
        gc.collect()  # what is freed while a stream is captured can break the capture off
        with torch.cuda.device(self.device):
            graph = torch.cuda.CUDAGraph()
            for stream in own:
                graph.register_generator_state(stream)
            cause: Exception | None = None
            try:
                # other threads may go on calling CUDA; autograd's belong to the capture by their stream
                with (
                    torch.cuda.stream(self.stream),
                    torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
                ):
                    try:
                        result = work()
                    except Exception as error:
                        cause = error
                        raise
            except Exception as error:
                if error is not cause:  # ending the capture failed as well: CUDA itself broke it off
                    self._clear_up(graph, own)
                raise cause or error from None
        return result, graph.replay

    def aside(self, replay: Replay) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            replay()

    def join(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _clear_up(self, graph: torch.cuda.CUDAGraph, streams: Sequence[torch.Generator]) -> None:
        """A capture that CUDA broke off leaves random streams that refuse to draw, and an allocator that believes the capture goes on."""
        self._broken.append(graph)
        index = self.stream.device.index
        for stream in (*streams, torch.cuda.default_generators[index]):
            stream.graphsafe_set_state(stream.clone_state())
        with contextlib.suppress(RuntimeError):  # nothing public does it; where it was done already, that is an error
            torch._C._cuda_endAllocateToPool(index, self.pool)
            torch._C._cuda_releasePool(index, self.pool)
