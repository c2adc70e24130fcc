"""The route of PAR for any denoiser and sampler: which calls run by their place in the run alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gen_turbo.training.schedule import WHOLE, Schedule

_LEAST_CALLS, _FIRST, _FIRST_OF_FEW, _FEW = 4, 3, 2, 7
_UNKNOWN = 10_000
_WHOLE_SLOPE = 2
"""The gap between calls that run over which the line is continued by its whole slope."""


@dataclass(frozen=True)
class Generic:
    """A rule instead of a calibrated schedule.

    The first three calls run (two where no more than seven run in all), the last one does, and others between, as many
    as the budget allows: twice as close at both ends as in the middle, for errors at the first steps grow and the last
    steps are large. Where the model is left out its result continues the line through the last two results in time, the
    less steeply the longer the gap: by the whole slope where one call is left out, by two thirds of it where two are,
    and so on. The first result of a run, of noise alone, gives no slope: the second is held. All were chosen on runs of
    the embedded models, of which one changes smoothly and one does not.

    Attributes:
        budget: Share of calls that may run.
        is_merged: Whether what merges tokens does so in these runs.
    """

    budget: float
    is_merged: bool = True

    def schedule(self, times: Sequence[float]) -> Schedule:
        """The schedule of a run.

        Args:
            times: The denoising time of every call; empty where nobody knows how many there will be: then calls run
                at a distance that the budget allows, for as long as the run goes on.
        """
        places = self._places(len(times)) if times else self._endless()
        num_calls = len(times) or _UNKNOWN
        times = tuple(times) or tuple(float(num_calls - call) for call in range(num_calls))
        weights: dict[int, tuple[float, ...]] = {}
        for before, newest, following in zip([None, *places], places, [*places[1:], num_calls], strict=False):
            for call in range(newest + 1, following):
                weights[call] = (1.0,)
                if before is not None and before > 0 and times[newest] != times[before]:
                    share = _WHOLE_SLOPE / (following - newest)
                    reach = share * (times[call] - times[newest]) / (times[newest] - times[before])
                    weights[call] = (1 + reach, -reach)
        skips = {WHOLE: frozenset(weights)} if weights else {}
        made = Schedule(times, skips, {}, 1 - len(weights) / num_calls, weights={WHOLE: weights})
        return made if self.is_merged else made.without_merging()

    def _places(self, num_calls: int) -> list[int]:
        """The calls that run."""
        if num_calls < _LEAST_CALLS:
            return list(range(num_calls))
        num_run = int(self.budget * num_calls + 1e-9)
        first = _FIRST if num_run > _FEW else _FIRST_OF_FEW
        between = min(max(num_run, first + 1), num_calls) - first
        # Where the calls between end that are as far into the rest of the run as their number is among them.
        shares = [_place(number / between) for number in range(1, between + 1)]
        return [*range(first), *_apart([first - 1 + round((num_calls - first) * share) for share in shares], first)]

    def _endless(self) -> list[int]:
        every = math.ceil(1 / self.budget - 1e-9)
        return [*range(_FIRST), *range(_FIRST - 1 + every, _UNKNOWN, every)]


def _place(share: float) -> float:
    """How far into the run a share of its calls reaches; the distance of calls is 1 + sin(pi u) at the place u."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if _density(middle) < share * _density(1.0) else (low, middle)
    return high


def _density(place: float) -> float:
    """The integral of 1 / (1 + sin(pi u)) from 0 to a place."""
    return (math.tan(math.pi * place / 2 - math.pi / 4) + 1) / math.pi


def _apart(places: list[int], first: int) -> list[int]:
    """The same places, each at least one behind the one before it and none beyond the last."""
    for number, place in enumerate(places):
        places[number] = max(place, first + number)
    for number in range(len(places) - 2, -1, -1):
        places[number] = min(places[number], places[number + 1] - 1)
    return places
