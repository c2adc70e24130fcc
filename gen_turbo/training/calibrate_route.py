"""Calibration of PAR's routes that leave whole calls out, on a pipeline's own runs of a few prompts.

Stock runs are recorded and their sampler asked what a wrong result costs; a search without a model then fills every
budget (`gen_turbo.training.route`), and weights are fitted to runs that follow what it found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from torch import Tensor, nn

from gen_turbo.engine.values import mapped
from gen_turbo.training.route import Route, RouteSearch, weights_of
from gen_turbo.training.sampled import SampledRun, effects, gains, parts_of, probed_steps, sampling, shares_of
from gen_turbo.training.schedule import BRANCH, MERGING, WHOLE, Schedule

Draw = Callable[[int], Any]
"""Makes the i-th calibration image."""
Follow = Callable[[Schedule, int, Sequence[Any], int], SampledRun]
"""Follows a schedule on the i-th prompt, with known results of the model, up to a call; gives the run."""
Distance = Callable[[Schedule, int, Sequence[Any]], float]
"""Follows a schedule on the i-th prompt to its end with known results of the model; gives the PSNR to stock in dB."""
LATE: Mapping[str, Any] = {"method": "turbo", "scope": "block", "restore": "copy", "ratio": 0.7}
"""How the last call of a run merges tokens where it does: it moves the latents least, yet nothing forecasts it."""
FELT = (0.1, 1.0)
"""Shares of an error made good at the next call that the model may have seen: long gaps want a large one."""
_MOST_PROBED = 2
_LEAST_CALLS = 4
_NUM_MOVED, _MOST_MOVES = 2, 12
"""Runs that are moved, the last ones, for what comes before them is known; and how many moves are tried."""


@dataclass
class Recorded:
    """Stock runs of a pipeline.

    Attributes:
        runs: One for each prompt.
        images: What they drew.
        searches: Over what they show, for every way to count what an error costs.
        shares: What each guidance branch of a batch weighs in a guided result; (1.0,) where a batch holds one.
    """

    runs: list[SampledRun]
    images: list[Any]
    searches: tuple[RouteSearch, ...]
    shares: tuple[float, ...] = (1.0,)

    def schedules(
        self, budgets: Sequence[float], late: float | None = None, saved: float = 0.0
    ) -> list[list[Schedule]]:
        """For each number of calls that budgets allow, the best schedule by each search, without weights.

        Args:
            budgets: Shares of a stock run's calls.
            late: What a call that merges as `LATE` says costs of one that does not; if given, the last call runs so.
            saved: What is to be saved of a call otherwise; budgets that do not reach farther by it are left out.
        """
        times, found = tuple(self.runs[0].times), dict[int, dict[tuple[int, ...], Route]]()
        for search in self.searches:
            start: Sequence[int] | None = None
            for budget in sorted(budgets, reverse=True):
                num_calls = budget * len(times) + 1e-9
                count = int(num_calls + (saved if late is None else 1 - late))
                if saved and count == int(num_calls):
                    continue
                route = search.best(count, start, late is not None)
                if len(route.runs) < len(times):
                    found.setdefault(count, {})[route.runs] = route
                start = route.runs
        shares = self.shares if len(self.shares) > 1 else ()
        stock = Schedule(times, {}, {}, shares=shares)
        return [[_left_out(stock, route, late) for route in routes.values()] for routes in found.values()]


class Fits:
    """Schedules with weights fitted to what their own runs make of stock's results, call by call.

    Calls that several schedules begin with run once.

    Args:
        recorded: Stock runs.
        follow: Follows schedules.
        distance: Says how near to stock they draw.
    """

    def __init__(self, recorded: Recorded, follow: Follow, distance: Distance) -> None:
        self.recorded, self.follow, self.distance = recorded, follow, distance
        self._ran: dict[tuple[object, ...], list[_Result]] = {}

    def best(self, schedules: Sequence[Schedule], is_narrow: bool = False) -> tuple[Schedule, float]:
        """The fitted schedule that draws nearest to stock, and its distance, in dB, the mean of all prompts.

        It is one of those given, or one with one of their last runs moved.

        Args:
            schedules: With as many runs each.
            is_narrow: Whether the last run is of the conditional branch alone.
        """
        tried = {one.skips[WHOLE]: self.fitted(one, is_narrow) for one in schedules}
        best, most = max(tried.values(), key=lambda one: one[1])
        waiting, num_moves = _neighbours(best), 0
        while waiting and num_moves < _MOST_MOVES:
            other = waiting.pop()
            if other.skips[WHOLE] in tried:
                continue
            num_moves += 1
            found, distance = tried[other.skips[WHOLE]] = self.fitted(other, is_narrow)
            if distance > most:
                best, most, waiting = found, distance, _neighbours(found)
        return best, most

    def fitted(self, schedule: Schedule, is_narrow: bool = False) -> tuple[Schedule, float]:
        """The schedule with fitted weights, and its distance to stock, in dB, the mean of all prompts.

        Args:
            schedule: Which whole calls are left out; its weights are not read.
            is_narrow: Whether the last run is of the conditional branch alone.
        """
        recorded, effect = self.recorded, self.recorded.searches[0].effect
        runs, count = schedule.ran_before(WHOLE, len(schedule.times))[::-1], len(recorded.shares)
        narrow = runs[-1:] if is_narrow else []
        schedule = replace(schedule, weights={})
        raw: list[list[Any]] = [[] for _ in recorded.runs]
        values = [[result.flatten().numpy() for result in stock.guided] for stock in recorded.runs]
        for number, (call, following) in enumerate(zip(runs, [*runs[1:], len(effect)], strict=True)):
            for index, new in enumerate(self._results(schedule, tuple(runs[: number + 1]), raw)):
                raw[index] = [*raw[index], *new.raw]
                values[index] += new.parts(recorded.shares)[call in narrow :]
            products = sum(stacked @ stacked.T for stacked in map(np.stack, values))
            weights, _ = weights_of(runs[: number + 1], np.asarray(products), effect, following, count, narrow)
            schedule = replace(schedule, weights={WHOLE: weights})
        if is_narrow:
            # A call runs without a branch from when weights say what stands for it.
            schedule = replace(schedule, skips={**schedule.skips, BRANCH: frozenset(narrow)})
            raw = [[*known[:-1], mapped(known[-1], lambda t: t[len(t) // count :])] for known in raw]
        return schedule, float(np.mean([self.distance(schedule, index, known) for index, known in enumerate(raw)]))

    def _results(self, schedule: Schedule, runs: tuple[int, ...], raw: list[list[Any]]) -> list[_Result]:
        """For each prompt what the last of some runs gives behind the others."""
        key = (schedule.inner is not None, *runs)
        if key not in self._ran:
            self._ran[key] = []
            for index, known in enumerate(raw):
                run = self.follow(schedule, index, known, runs[-1])
                self._ran[key].append(_Result(run.raw[len(known) :], run.guided[runs[-1]]))
        return self._ran[key]


@dataclass
class _Result:
    """What a step gave: by the models, and to the scheduler."""

    raw: list[Any]
    guided: Tensor

    def parts(self, shares: Sequence[float]) -> list[Any]:
        """What each guidance branch adds, or all of it where a batch holds one."""
        return [self.guided.flatten().numpy()] if len(shares) == 1 else parts_of(self.raw[0], shares)


def _neighbours(schedule: Schedule) -> list[Schedule]:
    """The same with one of the last runs a call earlier or later; a last call that merges stays. The last run first."""
    skipped, num_calls = schedule.skips[WHOLE], len(schedule.times)
    runs = [run for run in schedule.ran_before(WHOLE, num_calls)[:_NUM_MOVED] if run > 0]
    moves = [(old, old + by) for old in runs for by in (-1, 1) if old + by in skipped]
    moves = [move for move in moves if MERGING not in schedule.skips or move[0] != num_calls - 1]
    others = {unit: calls for unit, calls in schedule.skips.items() if unit != BRANCH}
    skips = [{**others, WHOLE: skipped - {new} | {old}} for old, new in reversed(moves)]
    return [replace(schedule, skips=one, weights={}) for one in skips]


def record(
    pipe: Any, models: Sequence[nn.Module], draw: Draw, num_prompts: int, note: Callable[[str], None]
) -> Recorded:
    """Records stock runs and finds what a wrong result costs.

    Raises:
        ValueError: If a run has too few calls for a skip.
    """
    runs, images = [], []
    for index in range(num_prompts):
        with sampling(pipe, models) as run:
            images.append(draw(index))
        runs.append(run)
        note(f"stock run of prompt {index + 1} of {num_prompts}: {len(run.guided)} calls")
        if len(run.guided) < _LEAST_CALLS:
            raise ValueError(
                f"a run of {len(run.guided)} calls has nothing to skip; take at least {_LEAST_CALLS} steps"
            )
    effect = effects(runs[0], type(pipe.scheduler))
    logs = []
    for index, run in enumerate(runs[:_MOST_PROBED]):
        logs.append(np.log(gains(pipe, models, partial(draw, index), run, effect)))
        note(f"prompt {index + 1}: errors at calls {probed_steps(len(effect))} of {len(effect)} followed to the end")
    results = [np.stack([result.flatten().numpy() for result in run.guided]) for run in runs]
    products = sum((values @ values.T for values in results), np.zeros((len(effect), len(effect))))
    # What the model makes of an error may grow, or be made good by the results of later calls.
    gain = np.exp(np.mean(logs, axis=0))
    searches = tuple(RouteSearch(products, effect, *how) for how in product((gain, np.ones_like(gain)), FELT))
    return Recorded(runs, images, searches, shares_of(runs))


def num_images(num_calls: int, num_prompts: int, lengths: Sequence[Sequence[Schedule]]) -> float:
    """Images' worth of model calls that calibration takes at most, with schedules of some lengths to begin with."""
    probes = sum(num_calls - 1 - step for step in probed_steps(num_calls)) / num_calls
    moves = len(lengths) * _MOST_MOVES * _NUM_MOVED / num_calls
    fits = sum(schedule.cost for same in lengths for schedule in same) + moves
    return num_prompts + min(num_prompts, _MOST_PROBED) * probes + num_prompts * fits


def _left_out(stock: Schedule, route: Route, late: float | None) -> Schedule:
    """The schedule of a route; its last call merges where that costs what is given."""
    num_calls = len(stock.times)
    skips = {WHOLE: frozenset(range(num_calls)) - set(route.runs)}
    cost = len(route.runs) / num_calls
    if late is None:
        return replace(stock, skips=skips, cost=round(cost, 4))
    skips[MERGING] = frozenset(range(num_calls - 1))
    return replace(stock, skips=skips, cost=round(cost - (1 - late) / num_calls, 4), inner=dict(LATE))
