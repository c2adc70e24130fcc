"""Choosing what to skip and when: the cheapest errors first, until a run costs what is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from gen_turbo.training.schedule import WHOLE

Error = Callable[[str, int, int, int], float]
"""Squared error of the run's result where a group is forecast at a call from two earlier ones: (group, call, newer,
older)."""
Skips = dict[str, frozenset[int]]
_FIRST = 2
"""The first call that may be skipped: a line needs two points."""


class Search:
    """A greedy search over groups and calls, by error per cost saved.

    Errors of single skips are taken to add up. A skip far from the last runs costs more error, so each choice changes
    the price of others, which are priced anew.

    Attributes:
        num_calls: Calls of the model in a run.
        base: Mean cost of a call without skips, as a share of a stock call's.
        shares: Share of a stock call's cost that each group saves.
        inside: The groups that another one contains, which save and cost nothing where it is skipped.
        error: Price of a skip.
    """

    def __init__(
        self,
        num_calls: int,
        base: float,
        shares: Mapping[str, float],
        inside: Mapping[str, Sequence[str]],
        error: Error,
    ) -> None:
        self.num_calls, self.base, self.shares, self.error = num_calls, base, dict(shares), error
        self.inside = {group: set(inside.get(group, ())) for group in shares}
        self.skips: dict[str, set[int]] = {group: set() for group in shares}
        self._parts = {group: 0.0 for group in shares}

    def run(self, costs: Sequence[float]) -> Iterator[Skips]:
        """Gives the first choice that costs at most each of the costs, falling shares of the stock cost."""
        prices: dict[tuple[str, int], float] = {}
        for cost in costs:
            while self.cost() > cost:
                prices |= {item: self._price(*item) for item in self._candidates() if item not in prices}
                if not prices:
                    return
                group, call = min(prices, key=lambda item: prices[item])
                self.skips[group].add(call)
                self._parts |= {other: self._error(other) for other in self._affected(group)}
                changed = self._affected(group)
                prices = {item: p for item, p in prices.items() if item[0] not in changed and self._is_open(*item)}
            yield self._found()

    def cost(self) -> float:
        """Share of the stock cost."""
        return sum(self._call_cost(call) for call in range(self.num_calls)) / self.num_calls

    def _found(self) -> Skips:
        """What is skipped, without what lies inside of something skipped."""
        outer = {g: [call for call in calls if not self._is_covered(g, call)] for g, calls in self.skips.items()}
        return {group: frozenset(calls) for group, calls in outer.items() if calls}

    def _candidates(self) -> Iterator[tuple[str, int]]:
        for group in self.shares:
            yield from ((group, call) for call in range(_FIRST, self.num_calls) if self._is_open(group, call))

    def _is_open(self, group: str, call: int) -> bool:
        return call not in self.skips[group] and not self._is_covered(group, call)

    def _is_covered(self, group: str, call: int) -> bool:
        return any(call in self.skips[other] for other in self.shares if group in self.inside[other])

    def _affected(self, group: str) -> set[str]:
        """The groups whose errors a skip of this one changes."""
        return {group} | self.inside[group] | {other for other in self.shares if group in self.inside[other]}

    def _price(self, group: str, call: int) -> float:
        """Error per cost saved; what it contains, skipped already at this call, is free of charge then."""
        saved = self._call_cost(call)
        self.skips[group].add(call)
        saved -= self._call_cost(call)
        affected = self._affected(group)
        more = sum(self._error(other) for other in affected) - sum(self._parts[other] for other in affected)
        self.skips[group].remove(call)
        return more / saved if saved > 0 else float("inf")

    def _call_cost(self, call: int) -> float:
        outer = [g for g in self.shares if call in self.skips[g] and not self._is_covered(g, call)]
        saved = self.shares[WHOLE] if WHOLE in outer else sum(self.shares[group] for group in outer)
        return max(0.0, self.base - saved)

    def _error(self, group: str) -> float:
        """Squared error of all skips of a group, each from the last two calls at which it ran."""
        total, ran = 0.0, [-1, -1]
        for call in range(self.num_calls):
            is_covered = self._is_covered(group, call)
            if call in self.skips[group] and not is_covered:
                total += self.error(group, call, ran[-1], ran[-2])
            elif not is_covered:
                ran.append(call)
        return total
