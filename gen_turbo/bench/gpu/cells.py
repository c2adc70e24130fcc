"""The cells of one model: every setting in every mode, measured in turn with stock, one record each."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch

from gen_turbo.api import attachments
from gen_turbo.bench import records
from gen_turbo.bench.gpu import meter
from gen_turbo.bench.gpu.journal import (
    BENCH,
    Wishes,
    check_device,
    described,
    device_name,
    is_finished,
    origin,
    sentence,
)
from gen_turbo.bench.gpu.pipeline import BarePipeline
from gen_turbo.bench.gpu.variants import (
    Mode,
    Variant,
    compiler_limits,
    forget_compiled,
    groups,
    num_graphs,
    prepared,
)
from gen_turbo.bench.settings import Stock

_BASELINE_STEPS = 4
"""Of bare stock, whose steps are all alike."""
_SLOW_S = 0.1
"""A step so slow that what happens once per run is lost in it."""
_WARM_STEPS, _WATCHED_STEPS = 8, 7
"""Both pass every kind of step."""
_COUNTED_STEPS = 3
"""The third is the first that every setting reduces."""
_COUNTING_S = 5.0
_MOST_SECONDS, _MOST_COMPILING = 60.0, 120.0
_STOCK = Variant(Stock(), tuple(Mode))


class Cells:
    """Measures the cells of one pipeline until a deadline.

    Args:
        make: Makes the stock pipeline once something is to be measured.
        params: What defines model and size, for the records.
        rounds: Alternating rounds.
        run_steps: Steps of a run of what the package decides about.
        wishes: What is asked for.
        announce: Called with the record of a failure before a cell is measured, should the process die there, and
            with nothing behind it.
    """

    def __init__(
        self,
        make: Callable[[], BarePipeline],
        params: Mapping[str, Any],
        rounds: int,
        run_steps: int,
        wishes: Wishes,
        announce: Callable[[str], object],
    ) -> None:
        self._make = make
        self._params = dict(params) | {"rounds": rounds, "device": device_name() or "cpu"}
        self._rounds, self._run_steps = rounds, run_steps
        self._wishes = wishes
        self._announce = announce
        self._is_slow = False
        self._uncounted: list[tuple[Variant, Mode, records.BenchRecord]] = []

    def measure(self, found: list[Variant], is_first: bool, deadline: float) -> int:
        """Measures what has no record yet and returns how many cells are left because the time is over."""
        patterns = self._wishes.settings
        wished = {
            v.setting.name for v in found if not patterns or any(fnmatchcase(v.setting.name, p) for p in patterns)
        }
        left = 0
        for mode, members in groups(found, is_first):
            if self._wishes.modes and mode not in self._wishes.modes:
                continue
            pending = [v for v in members if v.setting.name in wished and not self._is_finished(v, mode)]
            if pending or not self._is_finished(_STOCK, mode):
                left += self._group(mode, pending, deadline)
        return left

    def _group(self, mode: Mode, pending: list[Variant], deadline: float) -> int:
        is_stock_due = not self._is_finished(_STOCK, mode)
        if time.monotonic() > deadline:
            return len(pending) + is_stock_due
        if mode.is_compiled:
            forget_compiled()
        with contextlib.ExitStack() as stack, compiler_limits():
            stock: _Ready | None = None
            if mode is Mode.EAGER:
                stock = _Ready(self._eager, meter.first_run(self._eager, self._wishes.steps), (0, 0))
            else:
                with self._guarded(_STOCK, mode) as guarded:
                    stock = stack.enter_context(self._ready(_STOCK, mode))
                if guarded.has_failed:
                    is_stock_due = False
            if is_stock_due and stock is not None:
                with self._guarded(_STOCK, mode):
                    self._cell(_STOCK, mode, stock, None)
            for index, variant in enumerate(pending):
                if time.monotonic() > deadline:
                    return len(pending) - index
                with self._guarded(variant, mode), self._ready(variant, mode) as own:
                    self._cell(variant, mode, own, stock)
                self._clean()
        self._clean()
        return 0

    @cached_property
    def _eager(self) -> BarePipeline:
        pipeline = self._make()
        pipeline(_BASELINE_STEPS)
        self._is_slow = meter.timed(pipeline, 2).step_s > _SLOW_S
        return pipeline

    @contextlib.contextmanager
    def _ready(self, variant: Variant, mode: Mode) -> Iterator[_Ready]:
        graphs, breaks = num_graphs()
        with prepared(self._eager, variant, mode) as pipeline:
            with warnings.catch_warnings():
                # Where capture is refused, figures of eager steps would stand under its name.
                warnings.filterwarnings("error", message="CUDA graphs were asked for")
                first = meter.first_run(pipeline, self._steps(variant, _WARM_STEPS), _more_runs(variant, mode))
            now = num_graphs()
            yield _Ready(pipeline, first, (now[0] - graphs, now[1] - breaks))

    @contextlib.contextmanager
    def _guarded(self, variant: Variant, mode: Mode) -> Iterator[_Guarded]:
        """Turns an error into a record, and stops what takes too long."""
        guarded = _Guarded()
        failure = self._record(variant, mode, failure="the process ended while this was measured")
        self._announce(failure.to_line())
        try:
            with meter.limited(_MOST_COMPILING if mode.is_compiled else _MOST_SECONDS):
                yield guarded
        except Exception as error:
            guarded.has_failed = True
            self._keep(replace(failure, failure=sentence(error)))
            check_device(error)
        finally:
            self._announce("")

    def _cell(self, variant: Variant, mode: Mode, own: _Ready, stock: _Ready | None) -> None:
        """Measures one setting beside stock in the same mode and beside eager stock, and records it."""
        loops: dict[str, tuple[meter.Steps, int]] = {}
        if stock is not None:
            is_short = mode is Mode.EAGER or self._is_slow
            loops["stock"] = (stock.pipeline, _BASELINE_STEPS if is_short else self._wishes.steps)
        loops["own"] = (own.pipeline, self._steps(variant, self._wishes.steps))
        if mode is not Mode.EAGER:
            loops["eager"] = (self._eager, _BASELINE_STEPS)
        traces = meter.alternated(loops, self._rounds)
        mine = traces["own"]
        base = traces.get("stock", mine if isinstance(variant.setting, Stock) else [])
        eager = traces.get("eager", base)
        by_step = zip(*(trace.steps_s for trace in mine), strict=True)
        values = {
            "step_ms": [1000 * statistics.median(seconds) for seconds in by_step],
            "typical_step_s": [statistics.median(trace.steps_s[2:] or trace.steps_s) for trace in mine],
            "eager_s": [trace.step_s for trace in eager],
            "first_run_s": [own.first.seconds],
            "peak_mib": [own.first.peak_mib],
        }
        watched_steps = self._steps(variant, _WATCHED_STEPS)
        counts = {"host_waits": meter.host_waits(own.pipeline, watched_steps), "finite": int(own.first.is_finite)}
        if mode.is_compiled:
            counts |= {"graphs": own.graphs[0], "graph_breaks": own.graphs[1]}
        if variant.is_automatic:
            counts |= _chosen(own.pipeline)
        record = self._record(
            variant,
            mode,
            cpu_s=[trace.cpu_s / len(trace.steps_s) for trace in mine],
            baseline_cpu_s=[trace.cpu_s / len(trace.steps_s) for trace in base],
            wall_s=[trace.step_s for trace in mine],
            baseline_wall_s=[trace.step_s for trace in base],
            values=values,
            counts=counts,
        )
        self._keep(record)
        if not mode.is_compiled and not variant.is_automatic:
            self._uncounted.append((variant, mode, record))

    def count(self, deadline: float) -> None:
        """Adds to the records of this process how many kernels a step launches, of what needs no compiling again."""
        for variant, mode, record in self._uncounted:
            if time.monotonic() > deadline + _COUNTING_S:
                break
            with contextlib.suppress(Exception), prepared(self._eager, variant, mode) as pipeline:
                pipeline(_WARM_STEPS if mode.is_captured else _COUNTED_STEPS)
                counts = record.counts | meter.launches(pipeline, _COUNTED_STEPS)
                records.append(self._wishes.records, replace(record, counts=counts))
            self._clean()
        self._uncounted = []

    def _keep(self, record: records.BenchRecord) -> None:
        records.append(self._wishes.records, record)
        print(described(record), flush=True)

    def _record(self, variant: Variant, mode: Mode, **measured: Any) -> records.BenchRecord:
        return records.BenchRecord(
            bench=BENCH,
            setting=variant.setting.name,
            family=variant.setting.family,
            params=self._full(variant, mode),
            seed=self._wishes.seed,
            origin=origin(),
            **measured,
        )

    def _full(self, variant: Variant, mode: Mode) -> dict[str, Any]:
        steps = self._steps(variant, self._wishes.steps)
        return self._params | {"steps": steps, "mode": mode.value} | variant.setting.params()

    def _is_finished(self, variant: Variant, mode: Mode) -> bool:
        return is_finished(self._wishes, variant.setting.name, self._full(variant, mode))

    def _steps(self, variant: Variant, others: int) -> int:
        """A whole run of what is decided for a run by its length, and so many steps of all else."""
        return self._run_steps if variant.is_automatic else others

    def _clean(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _chosen(pipeline: BarePipeline) -> dict[str, int]:
    """What was decided for the last run: how many layers merge, how often they run in full, whether it was captured."""
    part: Any = attachments(pipeline.model)[0]
    reducer = part.arrangement.reducer
    rhythm = {"full_every": reducer.refresh_every, "warmup_steps": reducer.num_warmup}
    return {"layers": len(part.layers), **rhythm, "captured": int(part.graph_status.startswith("captured"))}


def _more_runs(variant: Variant, mode: Mode) -> int:
    """Runs until every kind of step is captured, and where that is to be decided, timed as well."""
    return 1 if variant.is_automatic else 2 * mode.is_captured


@dataclass
class _Guarded:
    has_failed: bool = False


@dataclass(frozen=True)
class _Ready:
    """A setting applied and run once, with the graphs and the graph breaks that took."""

    pipeline: BarePipeline
    first: meter.FirstRun
    graphs: tuple[int, int]
