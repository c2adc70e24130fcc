"""Timing in alternating rounds, and its summary."""

import pytest

from gen_turbo.bench.timing import Spread, alternate, speedups


def test_rounds_alternate_and_rotate() -> None:
    """Catches timing all rounds of one function before the other, which a machine that warms up biases."""
    calls: list[str] = []
    timings = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1)
    assert calls[2:] == ["a", "b", "b", "a", "a", "b"]
    assert sorted(calls[:2]) == ["a", "b"]
    assert {name: len(own) for name, own in timings.items()} == {"a": 3, "b": 3}


def test_cpu_time_leaves_waiting_out() -> None:
    """Catches a CPU clock that is really a wall clock."""
    import time

    (timing,) = alternate({"sleep": lambda: time.sleep(0.05)}, rounds=1, warmup=0)["sleep"]
    assert timing.cpu_s < timing.wall_s


def test_spread_names_all_five_numbers() -> None:
    """Catches quartiles that are mixed up or extrapolate beyond the values."""
    assert Spread.of([4, 1, 3, 2, 5]) == Spread(1, 2, 3, 4, 5)
    assert Spread.of([7.0]) == Spread(7, 7, 7, 7, 7)
    assert f"{Spread.of([4, 1, 3, 2, 5]):.1f}" == "3.0 (2.0 to 4.0)"


def test_speedups_pair_rounds() -> None:
    """Catches a ratio of medians, or a candidate divided by its baseline."""
    assert speedups([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="do not pair"):
        speedups([1.0], [1.0, 2.0])


def test_no_round_is_refused() -> None:
    """Catches an empty list that fails later, in a table."""
    with pytest.raises(ValueError, match="--rounds"):
        alternate({"a": lambda: None}, rounds=0)
