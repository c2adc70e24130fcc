"""The cells of one model: every setting in every mode, measured in turn with stock, one record each."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from gen_turbo.bench import records
from gen_turbo.bench.gpu import meter
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
from gen_turbo.bench.settings import Setting, Stock
from gen_turbo.bench.timing import Spread

BENCH = "gpu"
NO_GPU = "no GPU, tiny widths and wall times"
_BASELINE_STEPS = 3
_WARM_STEPS, _INSPECTED_STEPS = 8, 7
"""Both pass every kind of step; the last inspected one is reduced with every setting."""
_MOST_SECONDS, _MOST_COMPILING = 60.0, 120.0
_SENTENCE = 300
_STOCK = Variant(Stock(), tuple(Mode))


class BrokenDeviceError(RuntimeError):
    """The device takes no more work from this process."""


@dataclass(frozen=True)
class Wishes:
    """What is asked of a whole benchmark.

    Attributes:
        records: Folder of the records.
        seed: Of weights.
        steps: Of a timed run.
        rounds: Alternating rounds; None for what each case has.
        settings: Names or shell patterns; all where there is none.
        modes: Names of modes; all where there is none.
        began: When, as records write it; a failure since then is not tried again.
    """

    records: Path
    seed: int
    steps: int
    rounds: int | None
    settings: list[str]
    modes: list[str]
    began: str


def origin() -> records.Origin:
    """Where this process measures, beginning with the name of the GPU or with the absence of one."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return replace(_origin(), date=now)


@cache
def _origin() -> records.Origin:
    here = records.Origin.here()
    return replace(here, hardware=f"{device_name() or NO_GPU}, {here.hardware}")


def device_name() -> str:
    """The name of the GPU; empty without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def sentence(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_SENTENCE]


class Cells:
    """Measures the cells of one pipeline until a deadline.

    Args:
        make: Makes the stock pipeline once something is to be measured.
        params: What defines model and size, for the records.
        rounds: Alternating rounds.
        wishes: What is asked for.
        announce: Called with the record of a failure before a cell is measured, should the process die there, and
            with nothing behind it.
    """

    def __init__(
        self,
        make: Callable[[], BarePipeline],
        params: Mapping[str, Any],
        rounds: int,
        wishes: Wishes,
        announce: Callable[[str], object],
    ) -> None:
        self._make = make
        self._params = dict(params) | {"steps": wishes.steps, "rounds": rounds, "device": device_name() or "cpu"}
        self._rounds = rounds
        self._wishes = wishes
        self._announce = announce

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
            pending = [v for v in members if v.setting.name in wished and not self._is_finished(v.setting, mode)]
            if pending or not self._is_finished(_STOCK.setting, mode):
                left += self._group(mode, pending, deadline)
        return left

    def _group(self, mode: Mode, pending: list[Variant], deadline: float) -> int:
        is_stock_due = not self._is_finished(_STOCK.setting, mode)
        if time.monotonic() > deadline:
            return len(pending) + is_stock_due
        if mode.is_compiled:
            forget_compiled()
        with ExitStack() as stack, compiler_limits():
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
        return pipeline

    @contextmanager
    def _ready(self, variant: Variant, mode: Mode) -> Iterator[_Ready]:
        graphs, breaks = num_graphs()
        with prepared(self._eager, variant, mode) as pipeline:
            first = meter.first_run(pipeline, _WARM_STEPS)
            now = num_graphs()
            yield _Ready(pipeline, first, (now[0] - graphs, now[1] - breaks))

    @contextmanager
    def _guarded(self, variant: Variant, mode: Mode) -> Iterator[_Guarded]:
        """Turns an error into a record, and stops what takes too long."""
        guarded = _Guarded()
        failure = self._record(variant.setting, mode, failure="the process ended while this was measured")
        self._announce(failure.to_line())
        try:
            with meter.limited(_MOST_COMPILING if mode.is_compiled else _MOST_SECONDS):
                yield guarded
        except Exception as error:
            guarded.has_failed = True
            self._keep(replace(failure, failure=sentence(error)), mode)
            check_device(error)
        finally:
            self._announce("")

    def _cell(self, variant: Variant, mode: Mode, own: _Ready, stock: _Ready | None) -> None:
        """Measures one setting beside stock in the same mode and beside eager stock, and records it."""
        loops: dict[str, tuple[meter.Steps, int]] = {}
        if stock is not None:
            loops["stock"] = (stock.pipeline, _BASELINE_STEPS)
        loops["own"] = (own.pipeline, self._wishes.steps)
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
        counts = meter.inspected(own.pipeline, _INSPECTED_STEPS) | {"finite": int(own.first.is_finite)}
        if mode.is_compiled:
            counts |= {"graphs": own.graphs[0], "graph_breaks": own.graphs[1]}
        record = self._record(
            variant.setting,
            mode,
            cpu_s=[trace.cpu_s / len(trace.steps_s) for trace in mine],
            baseline_cpu_s=[trace.cpu_s / len(trace.steps_s) for trace in base],
            wall_s=[trace.step_s for trace in mine],
            baseline_wall_s=[trace.step_s for trace in base],
            values=values,
            counts=counts,
        )
        self._keep(record, mode)

    def _keep(self, record: records.BenchRecord, mode: Mode) -> None:
        records.append(self._wishes.records, record)
        print(described(record), flush=True)

    def _record(self, setting: Setting, mode: Mode, **measured: Any) -> records.BenchRecord:
        nothing: dict[str, Any] = {"cpu_s": [], "baseline_cpu_s": [], "wall_s": [], "baseline_wall_s": []}
        return records.BenchRecord(
            bench=BENCH,
            setting=setting.name,
            family=setting.family,
            params=self._full(setting, mode),
            seed=self._wishes.seed,
            origin=origin(),
            **nothing | measured,
        )

    def _full(self, setting: Setting, mode: Mode) -> dict[str, Any]:
        return self._params | {"mode": mode.value} | setting.params()

    def _is_finished(self, setting: Setting, mode: Mode) -> bool:
        return is_finished(self._wishes, setting.name, self._full(setting, mode))

    def _clean(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass
class _Guarded:
    has_failed: bool = False


@dataclass(frozen=True)
class _Ready:
    """A setting applied and run once, with the graphs and the graph breaks that took."""

    pipeline: BarePipeline
    first: meter.FirstRun
    graphs: tuple[int, int]


def is_finished(wishes: Wishes, setting: str, params: Mapping[str, Any]) -> bool:
    """Whether a cell has a measurement, or has failed in this very benchmark."""
    record = records.found(wishes.records, BENCH, setting, params, wishes.seed)
    return record is not None and (not record.failure or record.origin.date >= wishes.began)


def described(record: records.BenchRecord) -> str:
    """A record in one line."""
    params = record.params
    name = f"{params['model']} {params.get('pixels', '')} {params['mode']}, {record.setting}"
    if record.failure:
        return f"{name}: {record.failure}"
    times = Spread.of([1000 * seconds for seconds in record.wall_s])
    parts = [f"{name}: {times:.2f} ms"]
    against = {"stock": record.baseline_wall_s, "eager stock": record.values["eager_s"]}
    if params["mode"] == Mode.EAGER:
        del against["eager stock"]
    for text, base in against.items():
        if base:
            parts.append(f"{statistics.median(base) / statistics.median(record.wall_s):.2f}x {text}")
    parts += [f"{value} {name.replace('_', ' ')}" for name, value in record.counts.items()]
    peak = record.values["peak_mib"][0]
    return ", ".join([*parts, f"{peak:.0f} MiB"] if peak else parts)


def check_device(error: Exception) -> None:
    """Raises BrokenDeviceError if an error has left the device unusable."""
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()
    except RuntimeError as again:
        raise BrokenDeviceError(sentence(error)) from again
