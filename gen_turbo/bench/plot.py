"""A plot of the quality benchmark: distance to stock against measured speed and against counted attention."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gen_turbo.bench.records import BenchRecord, load
from gen_turbo.bench.tables import attention_cost, median_speedup, quality_records

try:
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("a plot needs matplotlib; run: pip install 'gen_turbo[report]'") from error

_OWN = "turbo"
_MARKERS = "osD^v<>Pp*Xhd"


def plot_quality(folder: Path, path: Path) -> None:
    """Draws the quality records into a picture file, one row for each number of steps of stock.

    Stock itself is left out, for its distance is no number that a plot can show.

    Args:
        folder: Where the records are.
        path: The picture, PNG or SVG by its ending.

    Raises:
        ValueError: If there are no records.
    """
    found = {steps: quality_records(folder, steps) for steps in {r.params["steps"] for r in load(folder, "quality")}}
    rows = {steps: [r for r in found[steps] if r.setting != "stock"] for steps in sorted(found, reverse=True)}
    rows = {steps: records for steps, records in rows.items() if records}
    if not rows:
        raise ValueError(f"no quality records in {folder}; run: gen-turbo bench quality")
    figure = Figure(figsize=(15, 5.5 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 2, sharey="row", squeeze=False)
    families = sorted({record.family for records in rows.values() for record in records})
    for (left, right), (steps, records) in zip(axes, rows.items(), strict=True):
        _draw(left, records, median_speedup, families)
        _draw(right, records, attention_cost, families)
        left.set(xlabel="times faster than stock, measured", ylabel="PSNR to stock, dB (median)")
        left.set_title(f"{steps} steps, {records[0].params['captions']} captions, same seeds as stock")
        right.set(xlabel="attention cost, counted (stock: 1)")
        right.invert_xaxis()
        right.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _draw(
    axes: Any, records: Sequence[BenchRecord], cost: Callable[[BenchRecord], float], families: Sequence[str]
) -> None:
    """One curve for each family, own families with solid lines; a family looks the same in every panel."""
    axes.grid(alpha=0.3)
    for number, family in enumerate(families):
        points = sorted((cost(r), statistics.median(r.values["psnr_db"])) for r in records if r.family == family)
        if points:
            axes.plot(
                *zip(*points, strict=True),
                label=family,
                color=colormaps["tab20"](number % 20),
                marker=_MARKERS[number % len(_MARKERS)],
                linestyle="-" if family.startswith(_OWN) else ":",
            )
