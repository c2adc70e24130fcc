"""Records of a benchmark as a Markdown table, each with the command that made it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from gen_turbo.bench import presets as preset_catalogue
from gen_turbo.bench import scopes as scope_catalogue
from gen_turbo.bench import skipping_tables
from gen_turbo.bench.batch import throughput
from gen_turbo.bench.cells import median_speedup, milliseconds, of_one_workload, passed, speedups_of
from gen_turbo.bench.choices import choices
from gen_turbo.bench.cpu import line
from gen_turbo.bench.gpu import tables as gpu_tables
from gen_turbo.bench.markdown import table
from gen_turbo.bench.reading_tables import (
    caption_generate,
    routing,
    understanding,
    unseen,
    vlm_batches,
    vlm_operators,
    vlm_step,
)
from gen_turbo.bench.records import BenchRecord, load
from gen_turbo.bench.timing import Spread

PLAN_CALLS = 5
EMBEDDED, EMBEDDED_TRANSFORMER = "tiny", "tiny-dit"


def primitives(folder: Path) -> str:
    """Milliseconds of merging and unmerging, tomesd and this package."""
    records = load(folder, "primitives")
    head = ("", "package tomesd, ms", "gen_turbo, ms", "times faster", "largest difference")
    rows = []
    for record in records:
        is_equal = bool(record.values["unmerge_bit_equal"][0])
        exact = "none" if is_equal else "not equal"
        merge_error = f"{record.values['merge_max_error'][0]:.1g}"
        difference = {"merge": merge_error, "unmerge": exact}.get(record.setting, "")
        rows.append(
            (
                record.setting,
                milliseconds(record.baseline_cpu_s),
                milliseconds(record.cpu_s),
                f"{Spread.of(speedups_of(record)):.1f}",
                difference,
            )
        )
    return table(head, rows, records)


def layer(folder: Path) -> str:
    """Milliseconds of one attention layer, matching included."""
    records = load(folder, "layer")
    rows = [(r.setting, milliseconds(r.cpu_s), f"{Spread.of(speedups_of(r)):.2f}") for r in records]
    return table(("", "ms", "times faster than full attention"), rows, records)


def host(folder: Path) -> str:
    """Microseconds of what surrounds attention in one call of a layer, stock and reduced."""
    records = load(folder, "host")
    rows = []
    for record in records:
        own, stock = ([1e6 * value for value in seconds] for seconds in (record.cpu_s, record.baseline_cpu_s))
        more = [a - b for a, b in zip(own, stock, strict=True)]
        rows.append((record.setting, *(f"{Spread.of(values):.1f}" for values in (stock, own, more))))
    return table(("", "stock, us", "reduced, us", "reduced over stock, us"), rows, records)


def step(folder: Path) -> str:
    """Seconds of one denoising step, with attention, and all arithmetic where it was counted, against stock."""
    records = load(folder, "step")
    stock = {_workload(r): r.counts for r in records if r.setting == "stock"}
    rows = []
    for record in records:
        own, full = record.counts, stock[_workload(record)]
        share = (own["attention_flops"] + own["matching_flops"]) / full["attention_flops"]
        every = f"{own['flops'] / full['flops']:.2f}" if "flops" in own else ""
        blocks = record.params["blocks"]
        shortened = f", {blocks} of each block," if blocks != "all" else ""
        name = f"{record.params['model']} {record.params['latents']}{shortened} {record.setting}"
        rows.append(
            (name, f"{Spread.of(record.cpu_s):.2f}", f"{Spread.of(speedups_of(record)):.2f}", f"{share:.2f}", every)
        )
    return table(("", "s", "times faster than stock", "counted attention", "counted in all"), rows, records)


def quality(folder: Path, steps: int, pipeline: str = EMBEDDED) -> str:
    """Distance to stock, check rate, measured and counted cost of one pipeline's settings at one number of steps."""
    records = quality_records(folder, steps, pipeline)
    head = ("", "times faster than stock", "counted attention", "PSNR to stock, dB", "SSIM", "check passed")
    rows = [
        (
            record.setting,
            f"{Spread.of(speedups_of(record)):.2f}",
            f"{attention_cost(record):.2f}",
            f"{Spread.of(record.values['psnr_db']):.1f}",
            f"{statistics.median(record.values['ssim']):.3f}",
            passed(record.values["passed"]),
        )
        for record in sorted(records, key=lambda r: (r.family, r.setting))
    ]
    return table(head, rows, records)


def scopes(folder: Path) -> str:
    """What merging costs and saves by what it is applied to, at every ratio and on every pipeline."""
    found = [r for r in load(folder, "quality") if r.family in scope_catalogue.FAMILIES and r.cpu_s]
    records = [record for group in _by_pipeline(found) for record in group]
    cells = {(_run_of(r), r.family, r.params["options"]["ratio"]): _gain(r) for r in records}
    ratios = sorted({ratio for _, _, ratio in cells})
    rows = [
        (f"{run}: {family}", *(cells.get((run, family, ratio), "") for ratio in ratios))
        for run in dict.fromkeys(run for run, _, _ in cells)
        for family in scope_catalogue.FAMILIES
        if any(key[:2] == (run, family) for key in cells)
    ]
    what = "Medians: times faster than stock by CPU seconds; PSNR to stock; images that show what their caption says"
    return table(("", *(f"{ratio:g} removed" for ratio in ratios)), rows, records, what)


def check(folder: Path) -> str:
    """How many images show what their caption says, of every pipeline and at every number of steps."""
    groups = _by_pipeline(load(folder, "check"))
    records = [record for group in groups for record in sorted(group, key=lambda r: -r.params["steps"])]
    rows = [
        (
            f"{r.params['pipeline']}: {r.setting}",
            str(r.params["steps"]),
            passed(r.values["passed"]),
            passed(r.values["stock_passed"]),
        )
        for r in records
    ]
    return table(("", "steps of stock", "check passed", "stock on the same captions"), rows, records, "Not timed")


def flops(folder: Path) -> str:
    """Counted arithmetic of whole denoisers: times less than stock, and what that is of the bound."""
    records = load(folder, "flops")
    cells = {(*_denoiser_of(r), r.params["scope"], r.params["ratio"]): _of_bound(r) for r in records}
    cases = sorted({key[3:] for key in cells})
    rows = [
        (
            f"{model} {pixels}" + ", text too" * takes_text,
            *(cells.get((model, pixels, takes_text, *c), "") for c in cases),
        )
        for model, pixels, takes_text in sorted({_denoiser_of(r) for r in records})
    ]
    return table(("", *(f"{scope} {ratio:g}" for scope, ratio in cases)), rows, records, "Counted, not timed")


TABLES: dict[str, Callable[[Path], str]] = {
    "primitives": primitives,
    "layer": layer,
    "host": host,
    "step": step,
    "quality": lambda folder: quality(folder, 25),
    "quality50": lambda folder: quality(folder, 50),
    "quality8": lambda folder: quality(folder, 8),
    "quality-dit": lambda folder: quality(folder, 25, EMBEDDED_TRANSFORMER),
    "skipping": lambda folder: skipping_tables.skipping(folder, 28),
    "skipping14": lambda folder: skipping_tables.skipping(folder, 14),
    "merging": skipping_tables.merging,
    "rhythms": skipping_tables.rhythms,
    "quality-dit4": lambda folder: quality(folder, 4, EMBEDDED_TRANSFORMER),
    "presets": preset_catalogue.presets,
    "candidates": preset_catalogue.candidates,
    "choices": choices,
    "cpu": line,
    "scopes": scopes,
    "check": check,
    "flops": flops,
    "understanding": understanding,
    "unseen": unseen,
    "routing": routing,
    "vlm-step": vlm_step,
    "vlm-batches": vlm_batches,
    "vlm-operators": vlm_operators,
    "gains": gpu_tables.gains,
    "gpu": gpu_tables.denoisers,
    "gpu-vlm": gpu_tables.reading,
    "caption-generate": caption_generate,
    "batch": throughput,
}
"""The name between a page's markers -> what stands there, given the folder of the records."""


def reduction_of(record: BenchRecord) -> float:
    """How many times less arithmetic than stock, where a plan serves five calls and the first of them makes it."""
    counts = record.counts
    return PLAN_CALLS * counts["stock"] / (counts["planned"] + (PLAN_CALLS - 1) * counts["served"])


def quality_records(folder: Path, steps: int, pipeline: str = EMBEDDED) -> list[BenchRecord]:
    """The timed quality records of one pipeline and number of steps, of one set of captions; scopes are apart."""
    return of_one_workload(
        [
            record
            for record in load(folder, "quality")
            if (record.params["pipeline"], record.params["steps"]) == (pipeline, steps)
            and record.family not in (*scope_catalogue.FAMILIES, preset_catalogue.FAMILY, preset_catalogue.CANDIDATES)
            and record.cpu_s
        ]
    )


def attention_cost(record: BenchRecord) -> float:
    """Counted products of the finest self-attention and of matching, as a share of stock's finest self-attention."""
    counts = record.counts
    return (counts["top_attention_flops"] + counts["matching_flops"]) / counts["stock_top_attention_flops"]


def _denoiser_of(record: BenchRecord) -> tuple[str, int, bool]:
    return record.params["model"], record.params["pixels"], record.params["text_ratio"] > 0


def _of_bound(record: BenchRecord) -> str:
    reached, bound = reduction_of(record), record.values["bound"][0]
    return f"{reached:.2f} of {bound:.2f} ({reached / bound:.0%})"


def _run_of(record: BenchRecord) -> str:
    return f"{record.params['pipeline']}, {record.params['steps']} steps"


def _gain(record: BenchRecord) -> str:
    distance = statistics.median(record.values["psnr_db"])
    return f"{median_speedup(record):.2f} x, {distance:.1f} dB, {passed(record.values['passed'])}"


def _by_pipeline(records: Sequence[BenchRecord]) -> list[list[BenchRecord]]:
    """The records of each pipeline, those of its last workload."""
    names = dict.fromkeys(record.params["pipeline"] for record in records)
    return [of_one_workload([r for r in records if r.params["pipeline"] == name]) for name in names]


def _workload(record: BenchRecord) -> tuple[object, ...]:
    return tuple(record.params.get(name) for name in ("model", "latents", "blocks", "width_scale", "steps"))
