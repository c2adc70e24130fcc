"""Seconds and ratios of seconds, always with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """One run on two clocks.

    Attributes:
        cpu_s: Seconds that all threads of this process computed; what else runs on the machine hardly changes it.
        wall_s: Seconds that passed.
    """

    cpu_s: float
    wall_s: float


@dataclass(frozen=True)
class Spread:
    """Five numbers that stand for many: the median and how far the rest lie from it."""

    least: float
    lower_quartile: float
    median: float
    upper_quartile: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarises at least one value; quartiles interpolate linearly between neighbours.

        Raises:
            ValueError: If there is no value.
        """
        if not values:
            raise ValueError("no values to summarise; time at least one round")
        if len(values) == 1:
            return cls(*[float(values[0])] * 5)
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(min(values), lower, median, upper, max(values))

    def __format__(self, spec: str) -> str:
        """Shows `median (lower quartile to upper quartile)`, each number by `spec`."""
        return f"{self.median:{spec}} ({self.lower_quartile:{spec}} to {self.upper_quartile:{spec}})"


def clocked(function: Callable[[], T]) -> tuple[T, Timing]:
    """Runs a function once and times it, after all earlier work of an accelerator has ended."""
    _wait_for_accelerator()
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    _wait_for_accelerator()
    return result, Timing(time.process_time() - cpu, time.perf_counter() - wall)


def alternate(
    functions: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1, progress: Callable[[], object] = int
) -> dict[str, list[Timing]]:
    """Times several functions in turn, so that a machine that slows down slows all of them alike.

    Args:
        functions: What to time, by name. Each round runs every one once; each next round begins one further.
        rounds: Timed rounds.
        warmup: Rounds before them that are not counted.
        progress: Called after every run, counted or not.

    Returns:
        One timing per round, by name; the i-th of all names belong together.

    Raises:
        ValueError: If `rounds` is not positive.
    """
    if rounds < 1:
        raise ValueError(f"at least one round is needed, got {rounds}; raise --rounds")
    names = list(functions)
    timings: dict[str, list[Timing]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            _, timing = clocked(functions[name])
            if number >= 0:
                timings[name].append(timing)
            progress()
    return timings


def speedups(baseline_s: Sequence[float], candidate_s: Sequence[float]) -> list[float]:
    """Divides the baseline's seconds by the candidate's, round by round; above 1 the candidate is faster.

    Raises:
        ValueError: If the two do not have the same number of rounds.
    """
    if len(baseline_s) != len(candidate_s):
        raise ValueError(f"{len(baseline_s)} and {len(candidate_s)} rounds do not pair; time both in the same rounds")
    return [baseline / candidate for baseline, candidate in zip(baseline_s, candidate_s, strict=True)]


def _wait_for_accelerator() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
