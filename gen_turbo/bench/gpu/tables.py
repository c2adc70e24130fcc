"""The tables of what was measured on GPUs; what ran on a CPU is in none of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from gen_turbo.bench.gpu.journal import REPEATED, RUNS
from gen_turbo.bench.markdown import NO_RECORDS, table
from gen_turbo.bench.records import BenchRecord, load
from gen_turbo.bench.timing import Spread, speedups

_Rows = Callable[[list[BenchRecord]], list[Sequence[str]]]
_MODES = ("eager", "captured", "compiled", "compiled + captured")
_STOCK = "stock"
_FAILED = "failed"
_WHAT = (
    "Stock: milliseconds of a step (lower to upper quartile). Others: times faster than stock in the same mode, over a "
    "whole run, then a reduced step alone, and behind the semicolon the whole run against eager stock; medians of CUDA "
    "events. Kernels of a reduced step, host waits of a run after its second step and most memory: of the first mode"
)
_WHAT_GAINS = "Stock: milliseconds of a step. Others: times faster over a whole run; medians of CUDA events"
_SHOWN = (
    ("stock, compiled and captured", "stock", "compiled + captured"),
    ("`TurboProcessor(0.4)`", "turbo-0.4", "eager"),
    ("`TurboProcessor(0.4)`, compiled blocks", "turbo-0.4", "compiled"),
    ("blocks copied, compiled and captured", "spans-copy-r0.5", "compiled + captured"),
)
"""Columns of `gains`: a title, a setting and the mode that it was measured in; one without a figure is left out."""
_WHAT_READING = "Medians of CUDA events (lower to upper quartile); stock in the same mode"
_SORTED_BY = ("model", "batch", "phase", "mode")


def denoisers(folder: Path) -> str:
    """Every setting of every denoiser in every mode against stock, a table per GPU."""
    head = ("", *_MODES, "kernels", "host waits", "GiB")
    return _by_device([r for r in _on_gpus(folder) if "phase" not in r.params], head, _WHAT, _denoiser_rows)


def gains(folder: Path) -> str:
    """What a user gets: each denoiser in the modes that matter, whole runs against eager stock, a table per GPU."""
    found = [r for r in _on_gpus(folder) if "phase" not in r.params]
    measured = {(r.setting, r.params["mode"]) for r in found if not r.failure}
    shown = [column for column in _SHOWN if column[1:] in measured]
    head = ("", "stock", *(title for title, _, _ in shown))
    return _by_device(found, head, _WHAT_GAINS, partial(_gain_rows, [column[1:] for column in shown]))


def _gain_rows(shown: Sequence[tuple[str, str]], records: list[BenchRecord]) -> list[Sequence[str]]:
    found = {(r.params["model"], r.params["pixels"], r.setting, r.params["mode"]): r for r in records if not r.failure}
    rows: list[Sequence[str]] = []
    for size in dict.fromkeys(key[:2] for key in found):
        stock = found.get((*size, _STOCK, _MODES[0]))
        if stock is None:
            continue
        cells = [_against_eager(found.get((*size, setting, mode))) for setting, mode in shown]
        rows.append((" ".join(size), f"{1000 * statistics.median(stock.wall_s):.0f} ms", *cells))
    return rows


def _against_eager(record: BenchRecord | None) -> str:
    """How many times faster than eager stock a whole run is; nothing where it was not measured."""
    if record is None:
        return ""
    eager = record.values.get("eager_s") or record.baseline_wall_s
    return f"{_ratio(eager, record.wall_s):.2f}" if eager else ""


def reading(folder: Path) -> str:
    """Prompt and answer of the vision-language model against stock, a table per GPU."""
    head = ("", "stock, ms", "ms", "times faster", "keys and values, MiB", "stock, MiB")
    found = [r for r in _on_gpus(folder) if "phase" in r.params]
    is_count = {id(r): r.params["phase"] == REPEATED for r in found}
    timed = _by_device([r for r in found if not is_count[id(r)]], head, _WHAT_READING, _reading_rows)
    counted = [r for r in found if is_count[id(r)] and not r.failure]
    return "\n\n".join([timed, *map(_repeated, counted)])


def _repeated(record: BenchRecord) -> str:
    """Whether stock repeats itself, and whether ratio 0 changes anything, in one sentence."""
    counts, params = record.counts, record.params
    parts = []
    for prefix, how in (("", "as torch comes"), ("deterministic_", "with deterministic algorithms")):
        first, attached, detached = (counts[prefix + name] for name in RUNS)
        parts.append(f"{how} {first} in its first run, {attached} with ratio 0 attached, {detached} after detaching")
    return (
        f"Of {counts['logits']:,} logits of {params['model']} at batch {params['batch']} in {params['dtype']} on an "
        f"{params['device']}, so many differ from stock's second run: {'; '.join(parts)}."
    )


def _on_gpus(folder: Path) -> list[BenchRecord]:
    return [record for record in load(folder, "gpu") if record.params["device"] != "cpu"]


def _by_device(records: list[BenchRecord], head: Sequence[str], what: str, rows: _Rows) -> str:
    devices = dict.fromkeys(record.params["device"] for record in records)
    parts = []
    for device in devices:
        own = [record for record in records if record.params["device"] == device]
        parts.append(f"{device}:\n\n{table(head, rows(own), own, what)}")
    return "\n\n".join(parts) or NO_RECORDS


def _denoiser_rows(records: list[BenchRecord]) -> list[Sequence[str]]:
    groups: dict[tuple[str, str, str], dict[str, BenchRecord]] = {}
    for record in records:
        key = (record.params["model"], record.params["pixels"], record.setting)
        groups.setdefault(key, {})[record.params["mode"]] = record
    # Stock is measured anew in every mode; it comes first in its block whenever that was.
    order = {size: place for place, size in enumerate(dict.fromkeys(key[:2] for key in groups))}
    rows: list[Sequence[str]] = []
    for key in sorted(groups, key=lambda key: (order[key[:2]], key[2] != _STOCK)):
        modes = groups[key]
        shown = next((modes[m] for m in _MODES if m in modes and not modes[m].failure), None)
        facts = ("", "", "") if shown is None else _facts(shown)
        rows.append((" ".join(key), *(_cell(modes.get(mode)) for mode in _MODES), *facts))
    return rows


def _cell(record: BenchRecord | None) -> str:
    if record is None:
        return ""
    if record.failure:
        return _FAILED
    against = ""
    if record.params["mode"] != _MODES[0] and record.values["eager_s"]:
        against = f"; {_ratio(record.values['eager_s'], record.wall_s):.2f}"
    if record.setting == _STOCK:
        return f"{Spread.of([1000 * s for s in record.wall_s]):.1f} ms{against}"
    if not record.baseline_wall_s:
        return f"no stock{against}"
    whole = Spread.of(speedups(record.baseline_wall_s, record.wall_s))
    alone = _ratio(record.baseline_wall_s, record.values["typical_step_s"])
    return f"{whole:.2f}, {alone:.2f}{against}"


def _facts(record: BenchRecord) -> tuple[str, str, str]:
    counts = record.counts
    return str(counts.get("kernels", "")), str(counts["host_waits"]), f"{record.values['peak_mib'][0] / 1024:.1f}"


def _ratio(baseline: Sequence[float], own: Sequence[float]) -> float:
    return statistics.median(baseline) / statistics.median(own)


def _reading_rows(records: list[BenchRecord]) -> list[Sequence[str]]:
    ordered = sorted(records, key=lambda r: tuple(r.params[name] for name in _SORTED_BY))
    return [_reading_row(record) for record in ordered]


def _reading_row(record: BenchRecord) -> Sequence[str]:
    params = record.params
    how = "" if params["mode"] == _MODES[0] else f", {params['mode']}"
    name = f"{params['model']}, batch {params['batch']}, {params['phase']}{how}: {record.setting}"
    if record.failure:
        return name, "", _FAILED, "", "", ""
    milliseconds = [[1000 * s for s in times] for times in (record.baseline_wall_s, record.wall_s)]
    return (
        name,
        *(f"{Spread.of(times):.1f}" for times in milliseconds),
        f"{Spread.of(speedups(record.baseline_wall_s, record.wall_s)):.2f}",
        *(f"{record.counts[key] / 2**20:.1f}" for key in ("kv_bytes", "stock_kv_bytes")),
    )
