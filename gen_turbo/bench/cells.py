"""What the tables and plots of all benchmarks share: cells, and which records belong together."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from gen_turbo.bench.records import BenchRecord
from gen_turbo.bench.timing import Spread, speedups

_DRAWN = ("pipeline", "weights", "captions", "guidance", "images", "device", "pixels")


def speedups_of(record: BenchRecord) -> list[float]:
    """Stock's CPU seconds divided by the setting's, for every timed round."""
    return speedups(record.baseline_cpu_s, record.cpu_s)


def median_speedup(record: BenchRecord) -> float:
    """Median over the timed rounds of stock's CPU seconds divided by the setting's."""
    return statistics.median(speedups_of(record))


def milliseconds(seconds: Sequence[float]) -> str:
    """The median of seconds with its quartiles, in milliseconds."""
    return f"{Spread.of([1000 * value for value in seconds]):.1f}"


def passed(values: Sequence[float]) -> str:
    """How many of the values are 1."""
    return f"{int(sum(values))} of {len(values)}"


def share(values: Sequence[float]) -> str:
    """The mean in per cent; nothing of nothing."""
    return f"{100 * statistics.fmean(values):.1f}" if values else ""


def share_of_flops(record: BenchRecord) -> float:
    """Counted FLOPs of the run over those of stock."""
    return record.counts["flops"] / record.counts["stock_flops"]


def distance(record: BenchRecord) -> float:
    """Median PSNR to stock, in dB."""
    return statistics.median(record.values["psnr_db"])


def by_workload(records: Sequence[BenchRecord]) -> list[list[BenchRecord]]:
    """The records by what they draw: rows of other weights, captions or seeds are no comparison."""
    groups: dict[tuple[object, ...], list[BenchRecord]] = {}
    for record in records:
        drawn = (record.params.get(name) for name in _DRAWN)
        groups.setdefault((record.seed, *drawn), []).append(record)
    return list(groups.values())


def of_one_workload(records: Sequence[BenchRecord]) -> list[BenchRecord]:
    """Those that draw what the last one draws."""
    return next((group for group in by_workload(records) if group[-1] is records[-1]), [])
