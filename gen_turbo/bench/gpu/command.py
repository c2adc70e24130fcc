"""The command itself: which models, in how much time, each in a process of its own where there is a GPU."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import nn

from gen_turbo.bench import records
from gen_turbo.bench.gpu import own, reading
from gen_turbo.bench.gpu.apart import Announce, apart
from gen_turbo.bench.gpu.cases import CASES, PUBLISHED, Case, build, cases, pipeline
from gen_turbo.bench.gpu.cells import Cells
from gen_turbo.bench.gpu.journal import BENCH, NO_GPU, BrokenDeviceError, Wishes
from gen_turbo.bench.gpu.pipeline import BarePipeline
from gen_turbo.bench.gpu.variants import variants

_BROKEN = 3
_NO_CUDA_IN_FORK = 4
_MOST_TRIES = 4
_GRACE_S = 90.0
"""A process is killed so long after its time is over: a cell that hangs inside of a kernel cannot be stopped within."""

Work = Callable[[Announce, float], int]


def run(options: argparse.Namespace) -> None:
    """Measures what has no record yet, the most telling cells of all models first, until the time is over.

    Raises:
        ValueError: If a pattern matches nothing, or the user's own model cannot be measured.
    """
    deadline = time.monotonic() + 60 * options.minutes
    torch.set_num_threads(options.threads)
    # Counting the devices does not initialize them, so that forks can use them.
    has_gpu = torch.cuda.device_count() > 0
    if not has_gpu:
        print(f"{NO_GPU}: these records never enter the GPU table", flush=True)
    wishes = Wishes(
        options.records,
        options.seed,
        options.steps,
        options.rounds,
        options.settings,
        options.modes,
        datetime.now(UTC).isoformat(timespec="seconds"),
    )
    left = 0
    for work, share in _works(options, wishes, has_gpu):
        ends = time.monotonic() + share * max(0.0, deadline - time.monotonic())
        left += _supervised(work, ends, wishes) if has_gpu else work(lambda announced: None, ends)
    if left:
        print(f"{BENCH}: the time is over and {left} settings are left; the same command goes on with them")


def _works(options: argparse.Namespace, wishes: Wishes, has_gpu: bool) -> Iterator[tuple[Work, float]]:
    """What is to be done in turn, each with its share of the time that is left then."""
    if options.model:
        yield partial(_measure_own, options.model, options.pixels, wishes), 1.0
        return
    reads = not options.models or any(fnmatchcase(reading.NAME, pattern) for pattern in options.models)
    found = [case if has_gpu else case.shrunk() for case in cases(options.models, (reading.NAME,))]
    models = list(dict.fromkeys(case.model for case in found))
    for is_first in (True, False):
        parts: list[tuple[Work, float]] = []
        for model in models:
            of_model = [case for case in found if case.model == model]
            parts.append((partial(_measure, of_model, wishes, is_first), sum(case.share for case in of_model)))
        if reads and is_first:
            parts.append((partial(reading.measure, wishes), reading.SHARE))
        for index, (work, share) in enumerate(parts):
            yield work, share / sum(later for _, later in parts[index:])


def _measure(found: list[Case], wishes: Wishes, is_first: bool, announce: Announce, deadline: float) -> int:
    """Measures the cases of one model and returns how many cells are left."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made: list[nn.Module] = []

    def make(case: Case) -> BarePipeline:
        made.extend([] if made else [build(case, device, wishes.seed)])
        return pipeline(case, made[0])

    left, measured = 0, list[Cells]()
    for index, case in enumerate(found):
        rest = sum(other.share for other in found[index:])
        ends = time.monotonic() + max(0.0, deadline - time.monotonic()) * case.share / rest
        params = {"model": case.model, "pixels": case.pixels, "batch": case.batch, "dtype": case.dtype}
        cells = Cells(
            partial(make, case), params, wishes.rounds or case.rounds, case.run_steps or wishes.steps, wishes, announce
        )
        is_unet = PUBLISHED[case.model].model.startswith("UNet")
        left += cells.measure(variants(case.model, is_unet), is_first, ends)
        measured.append(cells)
    for cells in measured:
        cells.count(deadline)
    return left


def _measure_own(name: str, pixels: int | None, wishes: Wishes, announce: Announce, deadline: float) -> int:
    """Measures the user's own denoiser and returns how many cells are left."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loop, params = own.load(name, pixels, device)
    cells = Cells(lambda: loop, params, wishes.rounds or CASES[0].rounds, wishes.steps, wishes, announce)
    found = variants(name, hasattr(loop.model, "down_blocks"))
    left = sum(cells.measure(found, is_first, deadline) for is_first in (True, False))
    cells.count(deadline)
    return left


def _supervised(work: Work, deadline: float, wishes: Wishes) -> int:
    """Runs work in processes of its own until one ends well; the cell that one dies in is recorded as failed."""
    counted = _Counted(work, deadline)
    for _ in range(_MOST_TRIES):
        ended = apart(counted, max(0.0, deadline - time.monotonic()) + _GRACE_S)
        if ended.code == _NO_CUDA_IN_FORK:
            return work(lambda announced: None, deadline)
        if ended.code == 0:
            break
        if ended.announced.startswith("{"):
            failure = records.BenchRecord.from_line(ended.announced)
            records.append(wishes.records, replace(failure, failure=f"{failure.failure} (exit code {ended.code})"))
        elif ended.code != _BROKEN:
            break
        print(f"{BENCH}: a process ended with code {ended.code}; going on in another", flush=True)
    return 0


class _Counted:
    """Work as a process of its own does it: its exit code says how it went."""

    def __init__(self, work: Work, deadline: float) -> None:
        self._work = work
        self._deadline = deadline

    def __call__(self, announce: Announce) -> int:
        try:
            _begin_on_device()
        except RuntimeError:
            return _NO_CUDA_IN_FORK
        try:
            left = self._work(announce, self._deadline)
        except BrokenDeviceError as error:
            print(f"{BENCH}: the device takes no more work: {error}", flush=True)
            return _BROKEN
        if left:
            print(f"{BENCH}: {left} settings are left for another call", flush=True)
        return 0


def _begin_on_device() -> None:
    torch.ones(1, device="cuda")
