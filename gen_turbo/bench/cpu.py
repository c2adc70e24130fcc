"""`gen-turbo bench cpu`: the user's one line beside stock on a CPU, at published widths and numbers of tokens.

Models have random weights and, where they have many equal blocks, one of each kind. A run is as long as its pipeline's,
and ends once each kind of step has run: a full one, in which layers remember, and a merged one. What a whole run takes
is the sum of those.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from gen_turbo.api import adapter_of, attach
from gen_turbo.bench import records
from gen_turbo.bench.cells import speedups_of
from gen_turbo.bench.choices import RATIO, facts_of, short
from gen_turbo.bench.gpu.cases import CASES, PUBLISHED, Case, cases, pipeline
from gen_turbo.bench.gpu.pipeline import BarePipeline
from gen_turbo.bench.markdown import table
from gen_turbo.bench.timing import Spread, Timing
from gen_turbo.engine.costs.auto import Choice, choose
from gen_turbo.engine.costs.expected import Costs
from gen_turbo.methods.turbo import TurboProcessor

BENCH, SETTING = "cpu", "turbo-0.4"


def run(options: argparse.Namespace) -> None:
    """Measures what has no record yet, one case after the other."""
    torch.set_num_threads(options.threads)
    for published in cases(options.models):
        case = replace(published, batch=1, dtype="float32")
        denoiser, steps = PUBLISHED[case.model], case.run_steps or 0
        depths = dict.fromkeys(denoiser.depths, 1)
        params = {"model": case.model, "pixels": case.pixels, "depths": depths, "steps": steps, "ratio": RATIO}
        choice = chosen(denoiser.build(depths), case, steps)
        params |= {"choice": short(choice), "rounds": options.rounds}
        if records.is_finished(options.records, BENCH, SETTING, params, options.seed):
            print(f"{case.name}: finished before")
            continue
        torch.manual_seed(options.seed)
        loop = pipeline(case, denoiser.build(depths, device="cpu"), denoiser)
        timed = [rounds(loop, steps, bool(index % 2)) for index in tqdm(range(options.rounds), desc=case.name)]
        records.append(options.records, _record(case, params, choice, timed, options.seed))


def chosen(model: nn.Module, case: Case, steps: int) -> Choice:
    """What the line chooses for a run on a CPU."""
    return choose(Costs(lambda: model, adapter_of(model)), TurboProcessor(RATIO), facts_of(case, "cpu", steps))


@dataclass
class Kinds:
    """Seconds of a step of each kind: of stock, in full and merged."""

    stock: Timing
    full: Timing
    merged: Timing

    def whole(self, choice: Choice) -> Timing:
        """A step of a whole run on average, of as many of each kind as were chosen."""
        refreshes, reduced = choice.rhythm.refreshes, choice.rhythm.reduced

        def mean(full: float, merged: float) -> float:
            return (refreshes * full + reduced * merged) / choice.rhythm.steps

        return Timing(mean(self.full.cpu_s, self.merged.cpu_s), mean(self.full.wall_s, self.merged.wall_s))


def rounds(loop: BarePipeline, steps: int, is_stock_last: bool) -> Kinds:
    """One round: a step of stock and, before or behind it, the first two of a run under the line."""
    stock = [] if is_stock_last else _first_steps(loop, steps, 1)
    with attach(loop, TurboProcessor(RATIO)):
        own = _first_steps(loop, steps, 2)
    return Kinds(*(stock or _first_steps(loop, steps, 1)), *own)


class _Enough(Exception):
    """Ends a run."""


@dataclass
class _Clock:
    """Is called before every step of a run, and ends it after so many."""

    num_steps: int
    marks: list[Timing] = field(default_factory=list)

    def __call__(self, step: int) -> None:
        self.marks.append(Timing(time.process_time(), time.perf_counter()))
        if step == self.num_steps:
            raise _Enough


def _first_steps(loop: BarePipeline, steps: int, num_steps: int) -> list[Timing]:
    clock = _Clock(num_steps)
    try:
        loop(steps, clock)
    except _Enough:
        pass
    pairs = zip(clock.marks, clock.marks[1:], strict=False)
    return [Timing(after.cpu_s - before.cpu_s, after.wall_s - before.wall_s) for before, after in pairs]


def _record(
    case: Case, params: dict[str, object], choice: Choice, timed: list[Kinds], seed: int
) -> records.BenchRecord:
    whole = [kinds.whole(choice) for kinds in timed]
    return records.BenchRecord(
        BENCH,
        SETTING,
        case.name,
        params,
        seed,
        [own.cpu_s for own in whole],
        [kinds.stock.cpu_s for kinds in timed],
        [own.wall_s for own in whole],
        [kinds.stock.wall_s for kinds in timed],
        values={
            "expected": [choice.gain],
            "full_s": [kinds.full.cpu_s for kinds in timed],
            "merged_s": [kinds.merged.cpu_s for kinds in timed],
        },
        counts={"layers": len(choice.layers)},
    )


def line(folder: Path) -> str:
    """What was chosen, expected and measured, by case."""
    found = {row.family: row for row in records.load(folder, BENCH)}
    rows = [found[case.name] for case in CASES if case.name in found]
    lines = [
        (
            f"{row.family}, {row.params['steps']} steps",
            row.params["choice"],
            f"{row.values['expected'][0]:.2f}",
            f"{Spread.of(speedups_of(row)):.2f}",
        )
        for row in rows
    ]
    what = (
        "Times faster than stock in the same process, by CPU seconds of steps of each kind, medians of alternating "
        "rounds (lower to upper quartile); published widths and numbers of tokens, one image, one block of each kind"
    )
    return table(("", "chosen", "expected", "measured"), lines, rows, what)
