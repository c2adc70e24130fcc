"""Plots of what a setting keeps against its measured speed and its counted cost: images drawn, and images read."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from gen_turbo.bench.cells import distance, median_speedup, share_of_flops
from gen_turbo.bench.quality import MOST_DB
from gen_turbo.bench.reading_tables import CONTROLS, counted_cost, curve_of, right_answers, understanding_records
from gen_turbo.bench.records import BenchRecord, load
from gen_turbo.bench.skipping_tables import curve_records
from gen_turbo.bench.tables import attention_cost, quality_records

try:
    from matplotlib import color_sequences
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("a plot needs matplotlib; run: pip install 'gen_turbo[report]'") from error

_OWN = ("turbo", "par", "vistog")
_MARKERS = "osD^v<>Pp*Xhd"
_MOST_ROWS = 26
"""Names that a legend has room for, one below the other."""
_COLORS = [*color_sequences["tab20"], *color_sequences["tab20b"]]


def plot_quality(folder: Path, path: Path) -> None:
    """Draws the quality records into an image file, one row for each number of steps of stock.

    Stock itself is left out, for its distance is no number that a plot can show.

    Args:
        folder: Where the records are.
        path: The image, PNG or SVG by its ending.

    Raises:
        ValueError: If there are no records.
    """
    found = {steps: quality_records(folder, steps) for steps in {r.params["steps"] for r in load(folder, "quality")}}
    rows = {steps: [r for r in found[steps] if r.setting != "stock"] for steps in sorted(found, reverse=True)}
    rows = {steps: records for steps, records in rows.items() if records}
    if not rows:
        raise ValueError(f"no quality records in {folder}; run: gen-turbo bench quality")
    figure, axes = _panels(len(rows))
    families = sorted({record.family for records in rows.values() for record in records})
    for (left, right), (steps, records) in zip(axes, rows.items(), strict=True):
        for panel, cost in ((left, median_speedup), (right, attention_cost)):
            _draw(panel, records, cost, distance, _family, families)
        left.set(xlabel="times faster than stock, measured", ylabel="PSNR to stock, dB (median)")
        left.set_title(f"{steps} steps, {records[0].params['captions']} captions, same seeds as stock")
        _finish(right, "attention cost, counted (stock: 1)")
    _save(figure, path)


def plot_skipping(folder: Path, path: Path) -> None:
    """Draws the methods that skip steps of the embedded transformer's runs into an image file, by counted cost.

    Raises:
        ValueError: If there are no records.
    """
    # A cache that skips nothing draws the image of stock, as stock does.
    rows = {steps: [r for r in curve_records(folder, steps) if distance(r) < MOST_DB] for steps in (28, 14)}
    if not all(rows.values()):
        raise ValueError(
            f"no counted records of 28 and 14 steps in {folder}; run: gen-turbo bench quality --pipeline tiny-dit "
            "--steps 28 --timed 0"
        )
    figure, [axes] = _panels(1)
    families = sorted({record.family for records in rows.values() for record in records})
    for panel, (steps, records) in zip(axes, rows.items(), strict=True):
        _draw(panel, records, share_of_flops, distance, _family, families)
        panel.set_title(f"{steps} steps, {records[0].params['captions']} captions, same seeds as stock")
        panel.set(xlabel="all arithmetic, counted (stock: 1)", ylabel="PSNR to stock, dB (median)")
        panel.set_xlim(1, 0.15)
    _legend(*axes)
    _save(figure, path)


def plot_understanding(folder: Path, path: Path) -> None:
    """Draws the records of the vision-language model into an image file; the left panel has those that were timed.

    Raises:
        ValueError: If there are no records.
    """
    records = [record for record in understanding_records(folder) if record.setting != "stock"]
    if not records:
        raise ValueError(f"no records of answers in {folder}; run: gen-turbo bench understanding")
    figure, [[left, right]] = _panels(1)
    families = sorted({curve_of(record) for record in records})
    for panel, own, cost in (
        (left, [record for record in records if record.cpu_s], median_speedup),
        (right, records, counted_cost),
    ):
        _draw(panel, own, cost, lambda record: 100 * right_answers(record), curve_of, families)
    left.set(xlabel="times faster than stock, measured", ylabel="right answers, %")
    left.set_title(f"{records[0].params['images']} scenes, the same questions for all")
    _finish(right, "cost of decoder layers, counted (stock: 1)")
    _save(figure, path)


def _panels(rows: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(11, 4.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, 2, sharey="row", squeeze=False)


def _draw(
    axes: Any,
    records: Sequence[BenchRecord],
    cost: Callable[[BenchRecord], float],
    value: Callable[[BenchRecord], float],
    curve: Callable[[BenchRecord], str],
    families: Sequence[str],
) -> None:
    """One curve for each family, own methods with solid lines; a family looks the same in every panel."""
    axes.grid(alpha=0.3)
    for number, family in enumerate(families):
        points = sorted((cost(record), value(record)) for record in records if curve(record) == family)
        if points:
            axes.plot(
                *zip(*points, strict=True),
                label=family,
                color=_COLORS[number % len(_COLORS)],
                marker=_MARKERS[number % len(_MARKERS)],
                linestyle="-" if is_own(family) else ":",
            )


def is_own(family: str) -> bool:
    """Whether a curve is of this package's methods: neither a package's, nor of a control that uses one of them."""
    return family.lower().startswith(_OWN) and not family.endswith(CONTROLS)


def _finish(axes: Any, what: str) -> None:
    axes.set(xlabel=what)
    axes.invert_xaxis()
    _legend(axes)


def _legend(*panels: Any) -> None:
    """The curves of all panels beside the last, in as many columns as fit its height."""
    curves = {name: line for panel in panels for line, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    columns = -(-len(curves) // _MOST_ROWS)
    panels[-1].legend(
        curves.values(), curves, fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1), ncols=columns
    )


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120)
    # Few colors take a third of the bytes.
    palette = Image.open(drawn).convert("RGB").quantize(96, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    palette.save(path, optimize=True)


def _family(record: BenchRecord) -> str:
    return record.family
