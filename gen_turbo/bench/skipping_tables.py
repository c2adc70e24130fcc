"""What leaving steps out and merging do to the embedded transformer's images at equal counted cost: tables, curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from gen_turbo.bench.catalogue import RHYTHM_FAMILIES
from gen_turbo.bench.cells import by_workload, distance, of_one_workload, passed, share_of_flops
from gen_turbo.bench.markdown import table
from gen_turbo.bench.records import BenchRecord, load
from gen_turbo.bench.skipping import GENERIC, GENERIC_MERGED
from gen_turbo.bench.timing import Spread

OWN = "PAR"
"""The family of the calibrated schedules, which the others are held against."""
_COUNTED = "Counted, not timed"
_PIPELINE = "tiny-dit"
_RHYTHM = "-block-k4-w2"
"""Of all rhythms the one that stands beside methods that skip steps, with its control."""
_PATCH = 4
"""Side in pixels of a token of the embedded transformer."""


def curve_records(folder: Path, steps: int) -> list[BenchRecord]:
    """The counted records of one number of steps at the model's own size, of the last workload; dearest first."""
    found = [r for r in _counted(folder) if r.params["steps"] == steps and _is_shown(r)]
    own_size = [r for r in found if "pixels" not in r.params]
    return sorted(of_one_workload(own_size) if own_size else [], key=lambda r: (-share_of_flops(r), r.setting))


def at_cost(curve: Sequence[BenchRecord], cost: float) -> float | None:
    """The distance in dB that a curve has at a counted cost, on straight lines between its points; None outside."""
    points = sorted((share_of_flops(record), distance(record)) for record in curve)
    for (low, worse), (high, better) in zip(points, points[1:], strict=False):
        if low - 1e-6 <= cost <= high + 1e-6 and high > low:
            return worse + (better - worse) * (cost - low) / (high - low)
    return None


def within(curve: Sequence[BenchRecord], cost: float) -> float | None:
    """The distance in dB that a curve reaches at no more than a counted cost; None where all of it costs more."""
    found = at_cost(curve, cost)
    cheaper = [distance(record) for record in curve if share_of_flops(record) <= cost]
    return max(cheaper, default=None) if found is None else found


def skipping(folder: Path, steps: int) -> str:
    """Counted cost, distance to stock, distance to the calibrated schedules at equal cost, and check rate."""
    records = curve_records(folder, steps)
    own = [record for record in records if record.family == OWN]
    rows = [
        (
            record.setting,
            f"{share_of_flops(record):.2f}",
            f"{Spread.of(record.values['psnr_db']):.1f}",
            "" if record.family == OWN else _above(distance(record), at_cost(own, share_of_flops(record))),
            passed(record.values["passed"]),
        )
        for record in records
    ]
    head = ("", "counted in all", "PSNR to stock, dB", "above `par` at that cost, dB", "check passed")
    return table(head, rows, records, _COUNTED)


def merging(folder: Path) -> str:
    """What merging adds to leaving steps out, at no more cost: by tokens and steps, the best of the rows that merge."""
    records = [record for record in _counted(folder) if "pixels" in record.params]
    rows, shown = [], []
    for group in by_workload(records):
        for steps in sorted({record.params["steps"] for record in group}):
            run = [record for record in group if record.params["steps"] == steps]
            plain = [record for record in run if record.family == GENERIC]
            shown += run
            side = run[0].params["pixels"] // _PATCH
            for title, families in (("alone", RHYTHM_FAMILIES), ("with steps left out", (GENERIC_MERGED,))):
                costs = [(record, within(plain, share_of_flops(record))) for record in run if record.family in families]
                beside = [(distance(r) - other, other, r) for r, other in costs if other is not None]
                if not beside:
                    continue
                more, other, best = max(beside, key=lambda item: item[0])
                rows.append(
                    (
                        f"{side * side:,} tokens, {steps} steps, merging {title}",
                        best.setting,
                        f"{share_of_flops(best):.2f}",
                        f"{distance(best):.1f}",
                        f"{other:.1f}",
                        f"{more:+.1f}",
                    )
                )
    head = ("", "best setting that merges", "counted in all", "dB", "steps left out alone, dB", "difference")
    return table(head, rows, shown, _COUNTED)


def rhythms(folder: Path) -> str:
    """How often layers run in full, and for how many steps at first: counted cost and distance to stock."""
    found = [r for r in _counted(folder) if r.family in RHYTHM_FAMILIES and "pixels" not in r.params]
    records = of_one_workload(found) if found else []
    rows = [
        (
            f"{record.params['steps']} steps: {record.setting}",
            f"{share_of_flops(record):.2f}",
            f"{Spread.of(record.values['psnr_db']):.1f}",
            passed(record.values["passed"]),
        )
        for record in sorted(records, key=lambda r: (-r.params["steps"], r.family, -distance(r)))
    ]
    return table(("", "counted in all", "PSNR to stock, dB", "check passed"), rows, records, _COUNTED)


def _is_shown(record: BenchRecord) -> bool:
    return record.family not in RHYTHM_FAMILIES or record.setting.endswith(_RHYTHM)


def _above(own: float, other: float | None) -> str:
    return "" if other is None or math.isinf(own) else f"{own - other:+.1f}"


def _counted(folder: Path) -> list[BenchRecord]:
    return [r for r in load(folder, "quality") if "flops" in r.counts and r.params["pipeline"] == _PIPELINE]
