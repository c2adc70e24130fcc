"""Which calls of a run the whole model is left out at, and what earlier results weigh there: a search without a model.

Between two calls that run, results are forecast from the last ones by least squares over recorded runs. Their errors
lead the sampler astray by a known sum, most of which the next result reveals: it is given to the sampler with weights
that undo what they can, as the corrector of a multistep solver does (UniPC, Zhao et al., NeurIPS 2023, arXiv
2302.04867, has fixed weights for fixed solvers; these are of the model and the sampler at hand).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gen_turbo.training.schedule import Weights, by_branch

Array = np.ndarray[Any, Any]
_RIDGE = 1e-9
_GAIN = 0.999
_NUM_RESULTS = 3
"""Results that a forecast is made of; a correction has the next one too."""
_MOST_EXACT, _NUM_STARTS = 64, 6
"""Calls of a run up to which all routes are compared, and how many of the best are moved."""


@dataclass(frozen=True)
class Route:
    """What is left out of a run.

    Attributes:
        runs: The calls at which the model runs.
        error: Expected squared error of the last latents, in the unit of the products.
    """

    runs: tuple[int, ...]
    error: float


def weights_of(
    runs: Sequence[int],
    products: Array,
    effect: Array,
    end: int,
    num_branches: int = 1,
    narrow: Collection[int] = (),
) -> tuple[dict[int, Weights], Array]:
    """What results weigh at calls before `end` so that runs with calls left out stay near those of stock.

    A model that was led astray gives other results than stock, which weights fitted to those of stock do not know of.

    Args:
        runs: The calls that ran.
        products: Inner products of all guided results of stock, followed by what each guidance branch adds to those of
            `runs` where the others were left out, summed over prompts; (T + R, T + R) for T calls and R such parts.
        effect: How far the last latents move per unit of each result, by the sampler alone; (T,).
        end: The first call that has no weights yet.
        num_branches: Parts of a result, which have weights of their own; 1 for none.
        narrow: Of `runs`, those without the first branch, which earlier results stand for.

    Returns:
        By call, what the last results weigh, the newest first, of a call that runs its own first; and what the latents
        behind those calls are off by, as a combination of what the products are of.
    """
    space, found = np.eye(len(products)), dict[int, Weights]()
    left, off, own = iter(space[len(effect) :]), np.zeros(len(products)), dict[int, list[Array]]()
    as_it_is = _plain([[1.0] * num_branches])
    for call in range(end):
        if call in runs:
            # A branch that did not run adds nothing, until it is known what stands for it.
            own[call] = [0 * off if call in narrow and branch == 0 else next(left) for branch in range(num_branches)]
        known: Array = np.array(list(reversed(own.values()))[: _NUM_RESULTS + (call in own)])
        weights = as_it_is
        # Before anything is left out there is nothing to make good.
        if len(own) <= call or call in narrow:
            undone = off / effect[call] if effect[call] else 0.0
            solved = _nearest(known.reshape(-1, len(products)), space[call] - undone, products)
            weights = _plain(solved.reshape(known.shape[:2]))
        if call not in own or weights != as_it_is:
            found[call] = weights
        made = [np.array(w) @ known[: len(w), branch] for branch, w in enumerate(by_branch(weights))]
        if call in narrow:
            own[call][0] = made[0]
        off += effect[call] * (sum(made) - space[call])
    return found, off


def _nearest(basis: Array, wanted: Array, products: Array) -> Array:
    """What vectors of a basis (N, T) weigh in the combination of them that is nearest to what is wanted (T,)."""
    square = basis @ products @ basis.T
    square += _RIDGE * np.trace(square) * np.eye(len(square))
    solution: Array = np.linalg.lstsq(square, basis @ products @ wanted, rcond=None)[0]
    return solution


def _plain(weights: Sequence[Sequence[float]] | Array) -> Weights:
    """Weights by result and branch as weights by branch, in few digits, without those at the end that are nothing."""
    branches = []
    for branch in zip(*weights, strict=True):
        values = [round(float(weight), 5) for weight in branch]
        while len(values) > 1 and values[-1] == 0:
            values.pop()
        branches.append(tuple(values))
    return tuple(branches) if len(branches) > 1 else branches[0]


class RouteSearch:
    """Finds routes by what recorded runs show.

    Args:
        products: Inner products of the guided results of all pairs of calls, summed over runs; (T, T) for T calls.
        effect: How far the last latents move per unit of each result, by the sampler alone.
        gain: How much farther, for the model reads what it was led to.
        felt: Share of an error made good at the next call that the model has seen in the meantime.
    """

    def __init__(self, products: Array, effect: Array, gain: Array, felt: float) -> None:
        self.products, self.effect, self.gain, self.felt = products, effect, gain, felt
        self.num_calls = len(effect)
        self._one = np.eye(self.num_calls)

    def best(self, count: int, start: Sequence[int] | None = None, is_to_end: bool = False) -> Route:
        """A route with so many calls that run: those best if errors of gaps added up, then moved while that gains.

        Args:
            count: Calls that run, at least 2.
            start: For runs of many calls, a route with more of them that run to begin from; all calls by default.
            is_to_end: Whether the last call is among them.
        """
        count = max(count, 2)
        fixed = {0, self.num_calls - 1} if is_to_end else {0}
        if self.num_calls <= _MOST_EXACT:
            starts = self._added(count, is_to_end)
        else:
            runs = set(range(self.num_calls)) if start is None else {*start} | fixed
            while len(runs) > count:
                runs.remove(min(runs - fixed, key=lambda call: self._error(runs - {call})))
            starts = [runs]
        return min((self._moved(runs, fixed) for runs in starts), key=lambda route: route.error)

    def _moved(self, runs: set[int], fixed: set[int]) -> Route:
        """The route after single runs, but those that are fixed, were moved for as long as that gains."""
        error = self._error(runs)
        moved = True
        while moved:
            moved = False
            for old in sorted(runs - fixed):
                for new in set(range(1, self.num_calls)) - runs:
                    other = self._error(runs - {old} | {new})
                    if other < error * _GAIN:
                        runs, error, moved = runs - {old} | {new}, other, True
                        break
        return self.route(sorted(runs))

    def route(self, runs: Sequence[int]) -> Route:
        """A route with calls that run, and the error that the best weights leave."""
        total, felt = np.zeros(self.num_calls), 0.0
        for newest, following in zip(runs, [*runs[1:], self.num_calls], strict=True):
            if following == newest + 1:
                continue
            left_out, known = slice(newest + 1, following), [call for call in runs if call <= newest][::-1]
            wanted = self.effect[left_out] @ (self._one[left_out] - self._one[newest])
            off = self._fitted(self._basis(known[:_NUM_RESULTS]), wanted) - wanted
            gain = self.gain[min(following, self.num_calls - 1)]
            if following < self.num_calls:
                felt += self.felt**2 * gain**2 * self._square(off)
                off = off - self._fitted(self._basis([following, *known[:_NUM_RESULTS]]), off)
            total += gain * off
        return Route(tuple(runs), self._square(total) + felt)

    def _added(self, count: int, is_to_end: bool) -> list[set[int]]:
        """Calls that run where the sum of the squared errors of all gaps is least: dynamic programming.

        Given are the best of those that end in different ways, the best first.

        What a gap costs depends on the two runs before it begins, so a state is the last three runs.
        """
        num = self.num_calls
        cost = np.full((num, num, num), np.inf)
        cost[0, 0, 0] = 0.0
        came: list[Array] = []
        for _ in range(count - 1):
            further = np.full_like(cost, np.inf)
            oldest = np.zeros((num, num, num), dtype=np.int64)
            for newest, following in itertools.combinations(range(num), 2):
                total = cost[: newest + 1, : newest + 1, newest] + self._gaps[newest, following]
                further[: newest + 1, newest, following] = total.min(0)
                oldest[: newest + 1, newest, following] = total.argmin(0)
            came.append(oldest)
            cost = further
        for newest in range(num):
            cost[: newest + 1, : newest + 1, newest] += self._gaps[newest, num]
        if is_to_end:
            cost[:, :, : num - 1] = np.inf
        found = []
        for place in np.argsort(cost, axis=None)[:_NUM_STARTS]:
            state = tuple(int(index) for index in np.unravel_index(place, cost.shape))
            if np.isinf(cost[state]):
                break
            runs = {state[2]}
            for oldest in came[::-1]:
                state = int(oldest[state]), state[0], state[1]
                runs.add(state[2])
            found.append(runs)
        return found

    @cached_property
    def _gaps(self) -> dict[tuple[int, int], Array]:
        """By the last call that runs and the next one, the error of the gap for every two runs before: (c + 1, c + 1).

        The earlier of them comes first; equal ones stand for a run that is not there.
        """
        num, found = self.num_calls, {}
        for newest, following in itertools.combinations(range(num + 1), 2):
            oldest, older = np.indices((newest + 1, newest + 1))
            errors = np.where((oldest <= older) & ((older < newest) | (newest == 0)), 0.0, np.inf)
            if newest > 0:
                # Only the first run has none before it.
                errors[(oldest == older) & (older > 0)] = np.inf
            if following > newest + 1:
                left_out = slice(newest + 1, following)
                wanted = self.effect[left_out] @ (self._one[left_out] - self._one[newest])
                first = np.broadcast_to(self._one[newest], (*oldest.shape, num))
                bases = [first, self._one[newest] - self._one[older], self._one[older] - self._one[oldest]]
                gain = self.gain[min(following, num - 1)] ** 2
                before = self._left(np.stack(bases, -2), wanted)
                if following == num:
                    errors = errors + gain * before
                else:
                    seen = np.broadcast_to(self._one[following], first.shape)
                    errors = errors + gain * (self._left(np.stack([seen, *bases], -2), wanted) + self.felt**2 * before)
            found[newest, following] = errors
        return found

    def _left(self, bases: Array, wanted: Array) -> Array:
        """Squared distance of what is wanted (T,) to the nearest combination of each basis (..., N, T)."""
        mixed = bases @ self.products
        square = mixed @ bases.swapaxes(-1, -2)
        size = np.trace(square, axis1=-2, axis2=-1)[..., None, None]
        square = square + (_RIDGE * size + 1e-300) * np.eye(bases.shape[-2])
        given = (mixed @ wanted)[..., None]
        solved = np.linalg.solve(square, given)
        left: Array = wanted @ self.products @ wanted - (given * solved).sum((-1, -2))
        return left.clip(min=0.0)

    def _error(self, runs: set[int]) -> float:
        return self.route(sorted(runs)).error

    def _basis(self, calls: Sequence[int]) -> Array:
        """The first of some results, and how each differs from the next."""
        differences = (self._one[a] - self._one[b] for a, b in zip(calls, calls[1:], strict=False))
        return np.array([self._one[calls[0]], *differences])

    def _fitted(self, basis: Array, wanted: Array) -> Array:
        """The combination of a basis that is nearest to what is wanted."""
        combination: Array = _nearest(basis, wanted, self.products) @ basis
        return combination

    def _square(self, off: Array) -> float:
        return float(off @ self.products @ off)
