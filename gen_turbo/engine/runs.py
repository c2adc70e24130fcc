"""Which run, guidance branch and step a call of the denoiser belongs to, and what the run holds.

A pipeline shows the beginning, the length and the times of a run on the host: by its scheduler's timesteps, another
object in every run. Without one, a time that does not fall begins a new run. From the third step on nothing is read,
unless a caller makes its conditioning anew in every step: values alone show then whether a branch goes on or begins.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gen_turbo.engine.base import counted
from gen_turbo.engine.context import Context, Layout, Run
from gen_turbo.models.adapter import Geometry, ModelCall
from gen_turbo.models.inputs import place_of

NUM_RISES = 2
"""After so many runs of one step at rising times nobody takes them for runs of their own."""
RISING = (
    "calls at rising times, as in DDIM inversion, are taken for runs of one step where no pipeline shows their times, "
    "and one step runs in full; attach to a pipeline that holds the scheduler of these times, or use restore='copy'"
)
_MAX_CONTEXTS = 4
_MAX_FRAMES = 60
_SETTLED = 2
"""Steps of a guidance branch in which what distinguishes branches may be read from the device."""


class _Here(threading.local):
    """What is running in one thread."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.contexts: list[Context] = []


class Runs:
    """Distinguishes runs, guidance branches and steps. Every thread has runs of its own.

    Args:
        pipeline: The pipeline that a processor was attached through; its scheduler is looked at where no other
            pipeline is calling.
        time: From a call's timestep to the scheduler's time, falling; waits for the device.
        ended: Is given every context that has ended.
        is_timed: Whether `time` is on the scheduler's scale.
    """

    def __init__(
        self, pipeline: Any | None, time: Any, ended: Callable[[Context], object], is_timed: bool = True
    ) -> None:
        has_scheduler = getattr(pipeline, "scheduler", None) is not None
        self._pipeline = weakref.ref(pipeline) if has_scheduler else lambda: None
        self._time, self._is_timed = time, is_timed
        self._here = _Here()
        self._ended = ended
        self._lock, self._depth = threading.RLock(), 0
        self._dead: deque[tuple[Context, list[Context]]] = deque()

    def acquire(self) -> None:
        """Before a call: only one thread is between this and `release`."""
        self._lock.acquire()
        self._depth += 1

    def release(self) -> None:
        """After a call."""
        self._depth -= 1
        self._lock.release()
        self._bury()

    def find(self, call: ModelCall) -> Context | None:
        """The context that a call continues, its step counted; None where `open` has to begin one."""
        here, (pipeline, frame) = self._here, self._caller()
        times = getattr(getattr(pipeline, "scheduler", None), "timesteps", None)
        marker = times if times is not None and len(times) else None
        if here.run is None or marker is not here.run.marker:
            self.forget()
            here.run = _run_of(pipeline, marker)
            self._watch(here.run, frame)
        run = here.run
        layout = Layout.of(call.sample)
        alike = [context for context in here.contexts if context.layout == layout]
        found = next((context for context in alike if context.conditioning is call.condition), None)
        time = None
        if found is None and alike and call.condition is not None:
            found, time = self._same_branch(alike, call, run)
        is_bare = run.marker is None or run.is_over
        if found is not None and is_bare:
            time = self._time(call.timestep) if time is None else time
            if found.time is not None and time >= found.time:
                is_lost = time > found.time and run.num_steps == 1 and run.num_reduced == 0
                rises = run.num_rises + 1 if is_lost else 0
                self.forget()
                here.run, found = Run(run.marker, is_over=run.is_over, num_rises=rises), None
        if found is not None:
            found.step += 1
            self._hold(found, call.condition)
            found.index = None if found.index is None else found.index + 1
            found.time = run.times[found.index] if found.index is not None and found.index < len(run.times) else time
            run.num_steps = max(run.num_steps, found.step + 1)
        return found

    def open(self, call: ModelCall, geometry: Geometry) -> Context:
        """Begins a context for a call that continues none."""
        here = self._here
        assert here.run is not None
        run, time = here.run, self._time(call.timestep)
        # Of an unknown family the time may be on any scale: its runs are taken to begin at the beginning.
        index = place_of(time, run.times) if self._is_timed else (0 if run.times else None)
        if run.times and index is None:
            # Somebody else's run on the model of a pipeline.
            run = here.run = Run(run.marker, is_over=True)
        if run.is_over:
            index = None
        elif index is not None and not here.contexts:
            # Image to image begins late: the run's last call is counted from there.
            run.num_calls = min(len(run.times), index + run.num_calls) if run.num_calls else len(run.times)
        context = Context(run, Layout.of(call.sample), call.condition, geometry, time=time, index=index)
        run.num_steps = max(run.num_steps, 1)
        for old in here.contexts[: -_MAX_CONTEXTS + 1]:
            self.end(old)
        here.contexts.append(context)
        run.contexts.add(context)
        return context

    def end(self, context: Context) -> None:
        """Forgets a context."""
        self._end(context, self._here.contexts)

    def finish(self, context: Context) -> Run | None:
        """After a call: forgets the context if that was its last; gives the run if that was the last of all.

        Branches that have missed a step before it are not called any more, as those of guidance that stops early.
        """
        if not context.is_last:
            return None
        self.end(context)
        for other in list(self._here.contexts):
            if other.run is context.run and other.index is not None and other.index < (context.index or 0) - 1:
                self.end(other)
        if self._here.contexts:
            return None
        context.run.is_over = True
        return context.run

    def forget(self) -> None:
        """Drops all that is remembered in this thread."""
        for context in list(self._here.contexts):
            self.end(context)
        self._here.run = None

    def forget_run(self, marker: object) -> None:
        """Drops what is remembered of a run that another model of the pipeline has ended."""
        if self._here.run is not None and self._here.run.marker is marker:
            self.forget()

    def contexts(self) -> list[Context]:
        """What is remembered in this thread."""
        return self._here.contexts

    def _end(self, context: Context, contexts: list[Context]) -> None:
        contexts[:] = [other for other in contexts if other is not context]
        context.run.contexts.discard(context)
        self._ended(context)

    def _bury(self) -> None:
        """Forgets contexts whose text has died; while a call is running, the end of that will."""
        while self._dead and self._lock.acquire(blocking=False):
            try:
                if self._depth:
                    return
                context, contexts = self._dead.popleft()
                is_dead = context.watched is not None and context.conditioning is None
                if (is_dead or context.run.is_left) and any(other is context for other in contexts):
                    self._end(context, contexts)
            finally:
                self._lock.release()

    def _watch(self, run: Run, frame: Any | None) -> None:
        """Ends a run with the call of the pipeline, whose progress bar lives as long, though a caller holds its text.

        Of a pipeline that has no such variable the text alone ends it.
        """
        bar = None if frame is None else frame.f_locals.get("progress_bar")
        if not isinstance(bar, tqdm):
            return
        contexts = self._here.contexts

        def died(reference: object) -> None:
            run.is_left = True
            self._dead.extend((context, contexts) for context in list(run.contexts))
            self._bury()

        run.call = weakref.ref(bar, died)

    def _hold(self, context: Context, condition: Tensor | None) -> None:
        """Notes a context's conditioning tensor: it dies with the call of the pipeline, however that ends."""
        if condition is None or context.run.recreates or context.step < _SETTLED:
            context.condition, context.watched = condition, None
        elif context.watched is None or context.conditioning is not condition:
            contexts = self._here.contexts

            def died(reference: object) -> None:
                # In whichever thread dropped it, perhaps while another one is in a call.
                if context.watched is reference:
                    self._dead.append((context, contexts))
                    self._bury()

            context.condition, context.watched = None, weakref.ref(condition, died)

    def _same_branch(self, alike: list[Context], call: ModelCall, run: Run) -> tuple[Context | None, float | None]:
        """The branch of a conditioning tensor that was not seen before; waits for the device to compare values."""
        is_bare = run.marker is None or run.is_over
        is_settled = min(context.step for context in alike) + 1 >= _SETTLED
        if is_settled and not is_bare and not run.recreates:
            return None, None
        time = self._time(call.timestep)
        for context in alike:
            moved = context.time is None or time != context.time or _is_repeated(context, run)
            if moved and _is_equal(context.conditioning, call.condition):
                run.recreates = True
                return context, time
        return None, time

    def _caller(self) -> tuple[Any | None, Any | None]:
        """The pipeline that is calling the model and its frame; the one attached through where none is on the stack."""
        frame: Any = sys._getframe(2)
        for _ in range(_MAX_FRAMES):
            if frame is None:
                break
            if frame.f_code.co_name == "__call__" and frame.f_code.co_varnames[:1] == ("self",):
                owner = frame.f_locals.get("self")
                if hasattr(type(owner), "components") and getattr(owner, "scheduler", None) is not None:
                    return owner, frame
            frame = frame.f_back
        return self._pipeline(), None


def _run_of(pipeline: Any, marker: Any) -> Run:
    if marker is None:
        return Run()
    # One read for all of them; the first step of a run may wait for the device.
    times = tuple(float(time) for time in (marker.tolist() if hasattr(marker, "tolist") else marker))
    told, guidance = getattr(pipeline, "_num_timesteps", None), getattr(pipeline, "guidance_scale", None)
    return Run(
        marker,
        times,
        scheduler=type(pipeline.scheduler).__name__,
        guidance=float(guidance) if isinstance(guidance, int | float) else 0.0,
        num_calls=told if isinstance(told, int) and 0 < told <= len(times) else 0,
    )


def _is_repeated(context: Context, run: Run) -> bool:
    """Whether the scheduler has the context's next call at the time of its last one, as those of second order do."""
    place = context.index
    return place is not None and place + 1 < len(run.times) and run.times[place] == run.times[place + 1]


def _is_equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))


def no_effect(run: Run) -> str:
    """What is said of a run in which nothing was reduced."""
    return (
        f"no token was removed in this run of {counted(run.num_steps, 'step')}: every step ran in full; take more "
        "steps, a smaller `warmup_steps`, a larger `memory_limit_mb`, or restore='copy'"
    )
