"""Reading an image with a LLaVA-1.5 7B of random weights: the prompt alone, and with an answer."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from gen_turbo.bench import records
from gen_turbo.bench.gpu import meter, repeats
from gen_turbo.bench.gpu.apart import Announce
from gen_turbo.bench.gpu.journal import (
    BENCH,
    REPEATED,
    Wishes,
    check_device,
    described,
    device_name,
    is_finished,
    origin,
    sentence,
)
from gen_turbo.bench.gpu.readers import Reader, compiled, dtype, made
from gen_turbo.bench.gpu.variants import Mode, compiler_limits, forget_compiled, num_graphs
from gen_turbo.bench.settings import Method, Setting, Stock, selected
from gen_turbo.bench.vlm_step import NUM_IMAGE_TOKENS, SIDE_PX

NAME = "llava-1.5-7b"
SHARE = 1.6
PHASES = {"prefill": 1, "prefill + 24": 24}
"""Tokens that are generated in each."""
REPEATS = Method("identity", "identity", "identity")
"""Stands for the check of `repeats`."""
_BATCHES, _TINY_BATCHES = (16, 1, 4), (2, 1)
"""Of which the first is read first, and the first two are compiled too."""
_ROUNDS = {"prefill": 3, "prefill + 24": 2}
_MOST_SECONDS, _MOST_COMPILING = 60.0, 150.0
_COUNTING_S = 5.0
_FIRST = ("turbo-192", "turbo_vit-gate-64", "turbo_vit-tower-64")
_COMPILED = Mode.COMPILED_CAPTURED
"""Compiled in inductor's `reduce-overhead`, with a static cache; without a GPU nothing is captured."""


def catalogue() -> list[Setting]:
    """Every method, at the budgets that published methods are compared at."""

    def ratio(kept: int) -> dict[str, Any]:
        # Half a token more, so that rounding down removes exactly this number.
        return {"ratio": 1 - (kept - 0.5) / NUM_IMAGE_TOKENS}

    return [
        Method("turbo-192", "turbo", "turbo", ratio(192)),
        Method("turbo_vit-gate-64", "turbo_vit, gate", "turbo_vit", ratio(64) | {"place": "pre_llm"}),
        Method("turbo_vit-tower-64", "turbo_vit, tower", "turbo_vit", ratio(64)),
        Method("fastv-64", "fastv", "fastv", ratio(64) | {"layer": 2}),
        Method("divprune-64", "divprune", "divprune", ratio(64)),
        Method("visionzip-64", "visionzip", "visionzip", ratio(64)),
        Method("vistog_vit-64", "vistog_vit, untrained", "vistog_vit", {"num_tokens": 64}),
    ]


@dataclass(frozen=True)
class _Cell:
    """One setting, by name, at one batch in one phase and mode."""

    name: str
    mode: Mode
    batch: int
    phase: str

    @property
    def setting(self) -> Setting:
        """What is applied."""
        return next(setting for setting in _known() if setting.name == self.name)


def _known() -> list[Setting]:
    return [Stock(), REPEATS, *catalogue()]


def _plan(batches: tuple[int, ...]) -> Iterator[_Cell]:
    """All cells, the most telling first; some come twice."""
    most, one = batches[:2]
    prefill, answer = PHASES
    yield _Cell(REPEATS.name, Mode.EAGER, most, REPEATED)
    yield from (_Cell(name, Mode.EAGER, most, prefill) for name in _FIRST)
    yield from (_Cell(name, _COMPILED, one, prefill) for name in _FIRST)
    for phase in PHASES:
        for batch in (one, most, *batches[2:]):
            yield from (_Cell(setting.name, Mode.EAGER, batch, phase) for setting in catalogue())
    yield from (_Cell(name, _COMPILED, one, answer) for name in _FIRST)
    yield from (_Cell(name, _COMPILED, most, prefill) for name in _FIRST)


def measure(wishes: Wishes, announce: Announce, deadline: float) -> int:
    """Measures what has no record yet until a deadline, and returns how many cells are left."""
    repeats.prepare()
    plan = dict.fromkeys(_plan(_BATCHES if torch.cuda.is_available() else _TINY_BATCHES))
    # A denoiser's setting may be all that is asked for.
    patterns = [p for p in wishes.settings if any(fnmatchcase(s.name, p) for s in _known())]
    wished = [] if wishes.settings and not patterns else [s.name for s in selected(_known(), patterns)]
    bench = _Bench(wishes, announce)
    left = 0
    with compiler_limits():
        for cell in plan:
            is_wished = cell.name in wished and (not wishes.modes or cell.mode in wishes.modes)
            if not is_wished or bench.is_finished(cell):
                continue
            if time.monotonic() > deadline:
                left += 1
                continue
            bench.measure(cell)
        bench.count(deadline + _COUNTING_S)
    forget_compiled()
    return left


@dataclass(frozen=True)
class _Turns:
    """What one setting took in turn with eager stock."""

    own: list[meter.Trace]
    eager: list[meter.Trace]
    first: meter.FirstRun
    eager_first: meter.FirstRun
    counts: dict[str, int]


@dataclass
class _Bench:
    """The model, once something is measured, and what compiled stock took; None where that failed."""

    wishes: Wishes
    announce: Announce
    _model: Any = None
    _measured: list[tuple[_Cell, records.BenchRecord]] = field(default_factory=list)
    _stock: dict[_Cell, _Turns | None] = field(default_factory=dict)

    def is_finished(self, cell: _Cell) -> bool:
        """Whether it has a record."""
        return is_finished(self.wishes, cell.setting.name, self._params(cell))

    def measure(self, cell: _Cell) -> None:
        """Measures a cell and records it, or why it could not be measured."""
        failure = self._record(cell, failure="the process ended while this was measured")
        self.announce(failure.to_line())
        try:
            with meter.limited(_MOST_COMPILING if cell.mode is _COMPILED else _MOST_SECONDS):
                self._model = self._model or made(self.wishes.seed)
                record = self._repeated(cell) if cell.phase == REPEATED else self._timed(cell)
        except Exception as error:
            record = replace(failure, failure=sentence(error))
            check_device(error)
        finally:
            self.announce("")
        records.append(self.wishes.records, record)
        print(described(record), flush=True)
        self._measured.append((cell, record))
        gc.collect()

    def count(self, deadline: float) -> None:
        """Adds to the records of this process the kernels of an eager prompt, its own and stock's."""
        stock: dict[int, dict[str, int]] = {}
        for cell, record in self._measured:
            if record.failure or (cell.mode, cell.phase) != (Mode.EAGER, "prefill") or time.monotonic() > deadline:
                continue
            if cell.batch not in stock:
                found = meter.launches(Reader(self._model, cell.batch, 1), 1)
                stock[cell.batch] = {f"stock_{name}": number for name, number in found.items()}
            own = meter.launches(Reader(self._model, cell.batch, 1, cell.setting.applied), 1)
            records.append(self.wishes.records, replace(record, counts=record.counts | own | stock[cell.batch]))

    def _repeated(self, cell: _Cell) -> records.BenchRecord:
        return self._record(cell, counts=repeats.differing(self._model, cell.batch))

    def _timed(self, cell: _Cell) -> records.BenchRecord:
        """Times a setting in turn with eager stock, and where it is compiled compares it with compiled stock.

        That is timed in its own turn with eager stock before: compiled code belongs to a class, so that a stock model
        would run what was compiled for an attached one.
        """
        is_eager = cell.mode is Mode.EAGER
        stock = None if is_eager else self._of_stock(cell)
        found = self._turns(cell)
        base, base_first = (found.eager, found.eager_first) if stock is None else (stock.own, stock.first)
        return self._record(
            cell,
            cpu_s=[trace.cpu_s for trace in found.own],
            baseline_cpu_s=[trace.cpu_s for trace in base],
            wall_s=[trace.step_s for trace in found.own],
            baseline_wall_s=[trace.step_s for trace in base],
            values={
                "eager_s": [trace.step_s for trace in found.eager],
                "first_run_s": [found.first.seconds],
                "stock_first_run_s": [base_first.seconds],
                "peak_mib": [found.first.peak_mib],
                "stock_peak_mib": [base_first.peak_mib],
            },
            counts=found.counts,
        )

    def _of_stock(self, cell: _Cell) -> _Turns:
        key = replace(cell, name=Stock().name)
        if key not in self._stock:
            self._stock[key] = None
            self._stock[key] = self._turns(key)
        stock = self._stock[key]
        if stock is None:
            raise RuntimeError(f"stock could not be measured {cell.mode.value}")
        return stock

    def _turns(self, cell: _Cell) -> _Turns:
        """Times a setting in turn with eager stock."""
        new_tokens, is_compiled = PHASES[cell.phase], cell.mode is _COMPILED
        eager = Reader(self._model, cell.batch, new_tokens)
        eager_first = meter.first_run(eager, 1)
        if is_compiled:
            forget_compiled()
        graphs, breaks = num_graphs()
        with ExitStack() as stack:
            if is_compiled:
                own = stack.enter_context(compiled(self._model, cell.setting, cell.batch, new_tokens))
            else:
                own = Reader(self._model, cell.batch, new_tokens, cell.setting.applied)
            # What is compiled is captured in its second run and repeated in its third.
            first = meter.first_run(own, 1, 2 * is_compiled)
            now = num_graphs()
            traces = meter.alternated({"eager": (eager, 1), "own": (own, 1)}, self._rounds(cell))
        counts = {"kv_bytes": own.cache_bytes, "stock_kv_bytes": eager.cache_bytes}
        counts |= {"graphs": now[0] - graphs, "graph_breaks": now[1] - breaks} if is_compiled else {}
        return _Turns(traces["own"], traces["eager"], first, eager_first, counts)

    def _rounds(self, cell: _Cell) -> int:
        return self.wishes.rounds or _ROUNDS[cell.phase]

    def _params(self, cell: _Cell) -> dict[str, Any]:
        timed = {} if cell.phase == REPEATED else {"rounds": self._rounds(cell)}
        return {
            "model": NAME,
            "pixels": f"{SIDE_PX}x{SIDE_PX}",
            "batch": cell.batch,
            "dtype": str(dtype()).removeprefix("torch."),
            "phase": cell.phase,
            "mode": cell.mode.value,
            **timed,
            "device": device_name() or "cpu",
        } | cell.setting.params()

    def _record(self, cell: _Cell, **measured: Any) -> records.BenchRecord:
        return records.BenchRecord(
            bench=BENCH,
            setting=cell.setting.name,
            family=cell.setting.family,
            params=self._params(cell),
            seed=self.wishes.seed,
            origin=origin(),
            **measured,
        )
