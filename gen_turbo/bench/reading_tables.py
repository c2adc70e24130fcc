"""Tables of the benchmarks that read images: vision-language models, and captions that are drawn again."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gen_turbo.bench.cells import by_workload, passed, share, speedups_of
from gen_turbo.bench.markdown import table
from gen_turbo.bench.records import BenchRecord, load
from gen_turbo.bench.timing import Spread

CONTROLS = ("uniform", "random")
_OPERATORS, _BATCHED = "operators", "batch"
"""The phases of records that count operators, and of whole batches."""
_TRAINED = "trained"

_WHAT = "Share of right answers, in per cent; medians of CPU seconds (lower to upper quartile), image and answer"


def understanding(folder: Path) -> str:
    """Counted cost of the language model, time and right answers, for every method and number of tokens, most first."""
    records = [record for record in understanding_records(folder) if not _is_routed(record)]
    kinds = list(dict.fromkeys(kind for record in records for kind in record.values))
    rows = []
    for record in sorted(records, key=lambda r: (-r.counts["kept"], r.family)):
        shares = [share(record.values.get(kind, [])) for kind in kinds]
        rows.append(
            (record.family, _kept(record), f"{counted_cost(record):.2f}", _times_faster(record), *shares, _all(record))
        )
    return table(("", "image tokens", "counted cost", "times faster", *kinds, "all"), rows, records, _WHAT)


def routing(folder: Path) -> str:
    """PAR by what it is given, a budget first: counted cost, time and right answers beside those of its controls."""
    records = [record for record in understanding_records(folder) if _is_routed(record)]
    layouts: dict[str, dict[str, BenchRecord]] = {}
    for record in records:
        options = record.params["options"]
        layouts.setdefault(_layout(options), {})[options.get("router") or _TRAINED] = record
    rows = []
    for name, routed in sorted(layouts.items()):
        trained = routed.get(_TRAINED)
        told = (*_told(trained), _times_faster(trained) if trained else "")
        rows.append((name, *told, *(cell for router in CONTROLS for cell in _told(routed.get(router)))))
    shown = ("counted cost", "right answers")
    titles = (*shown, "times faster", *(f"{router}: {what}" for router in CONTROLS for what in shown))
    return table(("", *titles), rows, records, _WHAT)


def unseen(folder: Path) -> str:
    """Right answers to other questions than those of the table above, whichever else were asked, beside stock's."""
    others, rows = _by_questions(folder)[1:], []
    for records in others:
        stock = next((record for record in records if record.setting == "stock"), None)
        for record in sorted(records, key=lambda r: (-r.counts["kept"], -right_answers(r))):
            asked = (str(record.seed), str(len(_answers(record))))
            rows.append((record.family, _kept(record), *asked, _all(record), _of_stock(record, stock)))
    head = ("", "image tokens", "seed", "questions", "right answers", "of stock's (95 % interval)")
    return table(head, rows, [record for records in others for record in records], "In per cent")


def understanding_records(folder: Path) -> list[BenchRecord]:
    """All records of one model and the same questions, those that most settings were asked."""
    return next(iter(_by_questions(folder)), [])


def curve_of(record: BenchRecord) -> str:
    """The family that a record of `understanding` belongs to; PAR's by whether tokens, layers or both are given."""
    if not _is_routed(record):
        return record.family
    options = record.params["options"]
    given = [name for name in ("budget", "tokens", "layers") if name in options]
    return ", ".join(["par", " and ".join(given), *([options["router"]] if options.get("router") else [])])


def counted_cost(record: BenchRecord) -> float:
    """What the language model's layers cost, router included, as a share of stock."""
    return record.counts["cost"] / 1000


def right_answers(record: BenchRecord) -> float:
    """Share of all questions, each counted once."""
    return statistics.fmean(_answers(record))


def share_of_stock(own: Sequence[float], stock: Sequence[float]) -> tuple[float, float]:
    """What share of stock's right answers is reached, and half its 95 % interval, both having had the same questions.

    The interval is that of a ratio of two means from paired samples, by its linear approximation.
    """
    if len(own) != len(stock):
        raise ValueError(f"{len(own)} answers are not to the same questions as stock's {len(stock)}")
    ratio = statistics.fmean(own) / statistics.fmean(stock)
    off = [value - ratio * base for value, base in zip(own, stock, strict=True)]
    return ratio, 1.96 * statistics.stdev(off) / math.sqrt(len(off)) / statistics.fmean(stock)


def _by_questions(folder: Path) -> list[list[BenchRecord]]:
    """The records of the last model by what was asked; first what most settings were asked."""
    records = load(folder, "understanding")
    same = [record for record in records if record.params.get("weights") == records[-1].params.get("weights")]
    return sorted(by_workload(same), key=len, reverse=True)


def _answers(record: BenchRecord) -> list[float]:
    return [value for _, values in sorted(record.values.items()) for value in values]


def _of_stock(record: BenchRecord, stock: BenchRecord | None) -> str:
    if stock is None or record is stock:
        return ""
    reached, margin = share_of_stock(_answers(record), _answers(stock))
    return f"{100 * reached:.1f} +- {100 * margin:.1f}"


def _is_routed(record: BenchRecord) -> bool:
    return record.params.get("method") == "par"


def _layout(options: dict[str, Any]) -> str:
    if "budget" in options:
        return f"budget {options['budget']:g}"
    tokens = [f"{options['tokens']:.0%} of the tokens"] if "tokens" in options else []
    return ", ".join([*tokens, *([f"{options['layers']} layers"] if "layers" in options else [])])


def _told(record: BenchRecord | None) -> tuple[str, str]:
    return ("", "") if record is None else (f"{counted_cost(record):.2f}", _all(record))


def _times_faster(record: BenchRecord) -> str:
    return f"{Spread.of(speedups_of(record)):.2f}" if record.cpu_s and record.setting != "stock" else ""


def _kept(record: BenchRecord) -> str:
    return f"{record.counts['kept']} of {record.counts['image_tokens']}"


def _all(record: BenchRecord) -> str:
    return f"{100 * right_answers(record):.1f}"


def vlm_step(folder: Path) -> str:
    """Times and counted arithmetic of seeing an image, reading it, and reading it and writing, against stock."""
    records = [record for record in load(folder, "vlm-step") if record.params["phase"] not in (_OPERATORS, _BATCHED)]
    phases = {(r.setting, r.params["phase"]): r for r in records}
    rows = []
    for name in dict.fromkeys(record.setting for record in records):
        own = [phases.get((name, phase)) for phase in ("tower", "prefill", "generate")]
        counts = next(record.counts for record in own if record is not None)
        kept = counts["kv_bytes"] / counts["stock_kv_bytes"]
        rows.append((name, *(cell for record in own for cell in _fewer(record)), f"{kept:.2f}"))
    timed = [f"{what}, times faster" for what in ("tower alone", "prefill", "with answer")]
    head = ("", *(title for what in timed for title in (what, "times fewer FLOPs")), "cache of stock's")
    return table(head, rows, records)


def vlm_batches(folder: Path) -> str:
    """Times of the prompts of several images against stock, by batch."""
    records = [record for record in load(folder, "vlm-step") if record.params["phase"] == _BATCHED]
    rows = []
    for record in records:
        times = [f"{Spread.of(seconds):.1f}" for seconds in (record.baseline_cpu_s, record.cpu_s)]
        sizes = (str(record.params["batch"]), str(record.params["layers"]))
        rows.append((record.setting, *sizes, *times, *_fewer(record)))
    head = ("", "batch", "decoder layers", "stock, s", "s", "times faster", "times fewer FLOPs")
    return table(head, rows, records)


def vlm_operators(folder: Path) -> str:
    """Operators of one call of a LLaVA-1.5 of all layers against stock, by batch."""
    records = [record for record in load(folder, "vlm-step") if record.params["phase"] == _OPERATORS]
    batches = [name for name in (records[0].counts if records else ()) if not name.startswith("stock_")]
    rows = [("stock", *(f"{records[0].counts[f'stock_{name}']:,}" for name in batches))] if records else []
    for record in records:
        cells = [f"{record.counts[name] / record.counts[f'stock_{name}']:.2f} times" for name in batches]
        rows.append((record.setting, *cells))
    return table(("", *(name.replace("operators_", "batch ") for name in batches)), rows, records, "Counted, not timed")


def _fewer(record: BenchRecord | None) -> tuple[str, str]:
    if record is None:
        return "", ""
    fewer = record.counts["stock_flops"] / record.counts["flops"]
    return f"{Spread.of(speedups_of(record)):.2f}", f"{fewer:.2f}"


def caption_generate(folder: Path) -> str:
    """Regenerated images that still show their source scene, and how much faster the whole way is."""
    rows = []
    records = load(folder, "caption-generate")
    for record in records:
        faster, values = _times_faster(record), record.values
        rows.append(
            (record.setting, faster, passed(values["captioned"]), passed(values["passed"]), _tokens(record.counts))
        )
    head = ("", "times faster, end to end", "caption is the scene's", "new image shows the scene", "tokens kept")
    return table(head, rows, records)


def _tokens(counts: dict[str, int]) -> str:
    read = f"{counts['kept']} of {counts['tokens']}"
    drawn = f", {counts['drawn_kept']} of {counts['drawn_tokens']}" if counts["drawn_tokens"] else ""
    return read + drawn
