"""Times of steps by CUDA events, peak memory, host waits and kernels; on a CPU wall times and operators."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.profiler_util import DeviceType  # type: ignore[attr-defined]

_FIRST_COUNTED = 2
"""Host waits are counted from the third step on; the first two may set up."""
_MIB = 2**20


class Steps(Protocol):
    """A denoising loop: runs so many steps and calls `before` ahead of each and behind the last."""

    def __call__(self, steps: int, before: Callable[[int], object]) -> Tensor:
        """Runs the loop and gives what it made."""
        ...


@dataclass(frozen=True)
class Trace:
    """One timed run.

    Attributes:
        steps_s: Seconds of every step; on a GPU between events, so that waiting for the host is in them.
        cpu_s: Seconds that the process computed, all steps together.
    """

    steps_s: list[float]
    cpu_s: float

    @property
    def step_s(self) -> float:
        """Seconds per step over the whole run."""
        return sum(self.steps_s) / len(self.steps_s)


def timed(loop: Steps, steps: int) -> Trace:
    """Times one run and each of its steps."""
    if torch.cuda.is_available():
        return _timed_by_events(loop, steps)
    marks: list[float] = []
    cpu = time.process_time()
    loop(steps, lambda step: marks.append(time.perf_counter()))
    return Trace([b - a for a, b in zip(marks, marks[1:], strict=False)], time.process_time() - cpu)


def _timed_by_events(loop: Steps, steps: int) -> Trace:
    events = [
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(steps + 1)
    ]
    torch.cuda.synchronize()
    cpu = time.process_time()
    loop(steps, lambda step: events[step].record())
    cpu = time.process_time() - cpu
    torch.cuda.synchronize()
    pairs = zip(events, events[1:], strict=False)
    return Trace([before.elapsed_time(after) / 1000 for before, after in pairs], cpu)


def alternated(loops: Mapping[str, tuple[Steps, int]], rounds: int) -> dict[str, list[Trace]]:
    """Times several loops in turn, A B A B, so that a card that slows down slows all of them alike."""
    traces: dict[str, list[Trace]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, (loop, steps) in loops.items():
            traces[name].append(timed(loop, steps))
    return traces


@dataclass(frozen=True)
class FirstRun:
    """What a setting's first run costs, compiling and capturing included.

    Attributes:
        seconds: Until its last step ended.
        peak_mib: Most memory held at once, weights included; what graphs keep is taken at their capture. Zero
            without a GPU.
        is_finite: Whether what it gave holds neither infinity nor NaN.
    """

    seconds: float
    peak_mib: float
    is_finite: bool


def first_run(loop: Steps, steps: int, more: int = 0) -> FirstRun:
    """Runs a loop for the first time, and some times more before the peak is read."""
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    made = loop(steps, lambda step: None)
    if has_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    for _ in range(more):
        loop(steps, lambda step: None)
    peak = torch.cuda.max_memory_allocated() / _MIB if has_gpu else 0.0
    return FirstRun(seconds, peak, bool(made.isfinite().all()))


def host_waits(loop: Steps, steps: int) -> int:
    """Counts how often the host waits for the device from the third step of a run on; never without a GPU."""
    if not torch.cuda.is_available():
        return 0

    def before(step: int) -> None:
        if step in (_FIRST_COUNTED, steps):
            torch.cuda.set_sync_debug_mode("warn" if step < steps else "default")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            loop(steps, before)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def launches(loop: Steps, steps: int) -> dict[str, int]:
    """Counts the kernels and CUDA graphs that a run's last step launches; without a GPU operators of torch.

    A profiler may slow down whatever this process runs later, so it comes behind everything that is timed.
    """
    has_gpu = torch.cuda.is_available()
    # What CUDA graphs need of the profiler, in the words of torch's own.
    os.environ.update(DISABLE_CUPTI_LAZY_REINIT="1", TEARDOWN_CUPTI="0")
    activity = torch.profiler.ProfilerActivity
    profile: Any = torch.profiler.profile(activities=[activity.CUDA if has_gpu else activity.CPU])

    def before(step: int) -> None:
        if step < steps - 1:
            return
        if has_gpu:
            torch.cuda.synchronize()
        profile.start() if step < steps else profile.stop()

    loop(steps, before)
    # The raw events: building the profiler's tree of thousands of them takes longer than the step.
    events = profile.profiler.kineto_results.events()
    if not has_gpu:
        return {"operators": sum(event.name().startswith("aten::") for event in events)}
    device: Any = DeviceType.CUDA
    return {
        "kernels": sum(event.device_type() == device for event in events),
        "graph_launches": sum("GraphLaunch" in event.name() for event in events),
    }


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside of the `with` block after so many seconds; only the main thread can be stopped."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
