"""Which calls of a run the whole model is left out at, and what earlier results weigh there: a search without a model.

Between two calls that run, results are forecast from the last ones by least squares over recorded runs. Their errors
lead the sampler astray by a known sum, most of which the next result reveals: it is given to the sampler with weights
that undo what they can, as the corrector of a multistep solver does (UniPC, Zhao et al., NeurIPS 2023, arXiv
2302.04867, has fixed weights for fixed solvers; these are of the model and the sampler at hand).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_FELT = 0.1
"""Share of an error made good at the next call that the model has seen in the meantime."""
_RIDGE = 1e-9
_GAIN = 0.999
_NUM_RESULTS = 3


@dataclass(frozen=True)
class Route:
    """What is left out of a run.

    Attributes:
        runs: The calls at which the model runs.
        weights: By call, what the last results weigh, the newest first; of a call that runs its own first.
        error: Expected squared error of the last latents, in the unit of the products.
    """

    runs: tuple[int, ...]
    weights: dict[int, tuple[float, ...]]
    error: float


class RouteSearch:
    """Finds routes by what recorded runs show.

    Args:
        products: Inner products of the guided results of all pairs of calls, summed over runs; (T, T) for T calls.
        effect: How far the last latents move per unit of each result, by the sampler alone.
        gain: How much farther, for the model reads what it was led to.
    """

    def __init__(self, products: Array, effect: Array, gain: Array) -> None:
        self.products, self.effect, self.gain = products, effect, gain
        self.num_calls = len(effect)
        self._one = np.eye(self.num_calls)

    def best(self, count: int, start: Sequence[int] | None = None) -> Route:
        """A route with so many calls that run: the cheapest left out one by one, then moved while that gains.

        Args:
            count: Calls that run, at least 2.
            start: A route with more of them to begin from; all calls by default.
        """
        runs = set(range(self.num_calls) if start is None else start)
        while len(runs) > max(count, 2):
            runs.remove(min(runs - {0}, key=lambda call: self._error(runs - {call})))
        error = self._error(runs)
        moved = True
        while moved:
            moved = False
            for old in sorted(runs - {0}):
                for new in set(range(1, self.num_calls)) - runs:
                    other = self._error(runs - {old} | {new})
                    if other < error * _GAIN:
                        runs, error, moved = runs - {old} | {new}, other, True
                        break
        return self.route(sorted(runs))

    def route(self, runs: Sequence[int]) -> Route:
        """The best weights for calls that run, and the error that is left."""
        weights: dict[int, tuple[float, ...]] = {}
        total, felt = np.zeros(self.num_calls), 0.0
        for newest, following in zip(runs, [*runs[1:], self.num_calls], strict=True):
            if following == newest + 1:
                continue
            known = [call for call in runs if call <= newest][::-1][:_NUM_RESULTS]
            off = np.zeros(self.num_calls)
            for call in range(newest + 1, following):
                forecast = self._one[newest] + self._fitted(
                    self._differences(known), self._one[call] - self._one[newest]
                )
                weights[call] = self._weights(forecast, known)
                off += self.effect[call] * (forecast - self._one[call])
            gain = self.gain[min(following, self.num_calls - 1)]
            if following < self.num_calls:
                felt += _FELT**2 * gain**2 * self._square(off)
                seen = [following, *known[: _NUM_RESULTS - 1]]
                undone = self._fitted(self._differences(seen), off)
                weights[following] = self._weights(self._one[following] - undone / self.effect[following], seen)
                off = off - undone
            total += gain * off
        return Route(tuple(runs), weights, self._square(total) + felt)

    def _error(self, runs: set[int]) -> float:
        return self.route(sorted(runs)).error

    def _differences(self, calls: Sequence[int]) -> Array:
        return np.array([self._one[a] - self._one[b] for a, b in zip(calls, calls[1:], strict=False)])

    def _fitted(self, basis: Array, wanted: Array) -> Array:
        """The combination of a basis that is nearest to what is wanted."""
        if not len(basis):
            return np.zeros(self.num_calls)
        square = basis @ self.products @ basis.T
        square += _RIDGE * np.trace(square) * np.eye(len(square))
        solution: Array = np.linalg.lstsq(square, basis @ self.products @ wanted, rcond=None)[0] @ basis
        return solution

    def _square(self, off: Array) -> float:
        return float(off @ self.products @ off)

    def _weights(self, combination: Array, calls: Sequence[int]) -> tuple[float, ...]:
        """What the results of some calls weigh, without those at the end that weigh nothing; they add up to 1."""
        values = [round(float(combination[call]), 5) for call in calls]
        while len(values) > 1 and values[-1] == 0:
            values.pop()
        values[0] = round(1 - sum(values[1:]), 5)
        return tuple(values)
