"""Calibration of PAR's routes that leave whole calls out, on a pipeline's own runs of a few prompts.

Stock runs are recorded and their sampler asked what a wrong result costs; a search without a model then fills every
budget (`gen_turbo.training.route`), and its weights are fitted again to runs that follow them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from gen_turbo.training.route import Route, RouteSearch, weights_of
from gen_turbo.training.sampled import SampledRun, effects, gains, probed_steps, sampling
from gen_turbo.training.schedule import MERGING, WHOLE, Schedule

Draw = Callable[[int], Any]
"""Makes the i-th calibration image."""
Follow = Callable[[Schedule, int, Sequence[Any], int], SampledRun]
"""Follows a schedule on the i-th prompt, with known results of the model, up to a call; gives the run."""
LATE: Mapping[str, Any] = {"method": "turbo", "scope": "block", "restore": "copy", "ratio": 0.7}
"""How the last call of a run merges tokens where it does: it moves the latents least, yet nothing forecasts it."""
FELT = (0.1, 1.0)
"""Shares of an error made good at the next call that the model may have seen: long gaps want a large one."""
_MOST_PROBED = 2
_LEAST_CALLS = 4


@dataclass
class Recorded:
    """Stock runs of a pipeline.

    Attributes:
        runs: One for each prompt.
        images: What they drew.
        searches: Over what they show, one for each of `FELT`.
    """

    runs: list[SampledRun]
    images: list[Any]
    searches: tuple[RouteSearch, ...]

    def schedules(self, budgets: Sequence[float], late: float | None = None) -> list[Schedule]:
        """The best schedules for each budget by each search, each begun from the one before.

        Args:
            budgets: Shares of a stock run's calls.
            late: What a call that merges as `LATE` says costs of one that does not; if given, the last call runs so.
        """
        times, found = tuple(self.runs[0].times), dict[tuple[int, ...], Route]()
        for search in self.searches:
            start: Sequence[int] | None = None
            for budget in sorted(budgets, reverse=True):
                count = int(budget * len(times) + (0.0 if late is None else 1 - late) + 1e-9)
                route = search.best(count, start, late is not None)
                if len(route.runs) < len(times):
                    found[route.runs] = route
                start = route.runs
        return [_schedule(route, times, late) for route in found.values()]

    def fitted(self, schedule: Schedule, follow: Follow) -> Schedule:
        """The schedule with weights fitted to what its own runs make of stock's results, call by call.

        Args:
            schedule: As the search made it.
            follow: Follows schedules.
        """
        runs = schedule.ran_before(WHOLE, len(schedule.times))[::-1]
        effect = self.searches[0].effect
        raw: list[list[Any]] = [[] for _ in self.runs]
        values = [[result.flatten().numpy() for result in stock.guided] for stock in self.runs]
        for number, (call, following) in enumerate(zip(runs, [*runs[1:], len(effect)], strict=True)):
            for index in range(len(self.runs)):
                run = follow(schedule, index, raw[index], call)
                raw[index] = run.raw
                values[index].append(run.guided[call].flatten().numpy())
            products = sum(stacked @ stacked.T for stacked in map(np.stack, values))
            weights = weights_of(runs[: number + 1], np.asarray(products), effect, following)
            schedule = replace(schedule, weights={WHOLE: weights})
        return schedule


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
    gain = np.exp(np.mean(logs, axis=0))
    return Recorded(runs, images, tuple(RouteSearch(products, effect, gain, felt) for felt in FELT))


def num_images(num_calls: int, num_prompts: int, budgets: Sequence[float]) -> float:
    """Images' worth of model calls that calibration takes: every schedule is tried, fitted and tried again."""
    probes = sum(num_calls - 1 - step for step in probed_steps(num_calls)) / num_calls
    return num_prompts + min(num_prompts, _MOST_PROBED) * probes + 3 * num_prompts * sum(budgets)


def _schedule(route: Route, times: tuple[float, ...], late: float | None) -> Schedule:
    skips = {WHOLE: frozenset(range(len(times))) - set(route.runs)}
    cost, weights = len(route.runs) / len(times), {WHOLE: route.weights}
    if late is None:
        return Schedule(times, skips, {}, round(cost, 4), weights=weights)
    skips[MERGING] = frozenset(range(len(times) - 1))
    return Schedule(times, skips, {}, round(cost - (1 - late) / len(times), 4), inner=dict(LATE), weights=weights)
