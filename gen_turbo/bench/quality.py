"""`gen-turbo bench quality`: distance to stock, check rate, measured and counted cost of many settings.

Each caption of each setting adds one line to the work folder, so a run that was interrupted goes on where it
stopped, and processes may share the captions (`--part 1/12`). A setting whose captions are complete becomes one record,
by a process that has no part: it draws what is missing and, where nothing is, only reads.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gen_turbo import scenes
from gen_turbo.bench import records
from gen_turbo.bench.catalogue import quality_catalogue
from gen_turbo.bench.settings import Setting, Stock, fitting, selected
from gen_turbo.bench.studio import Studio, open_studio
from gen_turbo.metrics.cost import Cost
from gen_turbo.metrics.image import psnr, ssim

MOST_DB = 100.0
"""PSNR of equal images in a record; the finest difference that bytes can show lies below it."""

Trial = dict[str, float]


def run(options: argparse.Namespace) -> None:
    """Runs every selected setting that has no record yet, or the captions of this process's part."""
    torch.set_num_threads(options.threads)
    run_settings("quality", options.settings, options, num_timed=options.timed)


def run_settings(bench: str, patterns: Sequence[str], options: argparse.Namespace, num_timed: int) -> None:
    """Measures settings over all captions and appends a record for each.

    Args:
        bench: Name of the benchmark that the records belong to.
        patterns: Names of what to measure, or shell patterns; all that fits the pipeline where there is none.
        options: Of the command line.
        num_timed: Captions, from the first, whose time is taken together with a stock run just before or after; where
            it is 0, all arithmetic of the first is counted instead.

    Raises:
        ValueError: If a pattern matches nothing, or nothing that fits the pipeline.
    """
    catalogue = [Stock(), *quality_catalogue(options.steps)]
    selected(catalogue, patterns)
    studio, weights = open_studio(
        options.pipeline,
        options.work,
        options.captions,
        options.seed,
        options.steps,
        options.guidance,
        options.device,
        options.pixels,
    )
    workload = {
        "pipeline": Path(options.pipeline).name,
        "weights": weights,
        "steps": options.steps,
        "captions": options.captions,
        "guidance": options.guidance,
        "timed": num_timed,
        **({} if options.device == "cpu" else {"device": options.device}),
        **({"pixels": options.pixels} if options.pixels else {}),
    }
    part, parts = options.part
    missing = []
    for number, setting in enumerate(fitting(catalogue, patterns, studio.denoiser)):
        if records.is_finished(options.records, bench, setting.name, workload | setting.params(), options.seed):
            print(f"{setting.name}: finished before")
        else:
            missing.append((number, setting))
    indices = range(part - 1, options.captions, parts)
    if not num_timed:
        # All settings go on together, so that a run that is stopped keeps as many captions of each.
        for index in tqdm(indices, desc=f"{len(missing)} settings, {studio.steps} steps"):
            for number, setting in missing:
                _trials(studio, setting, range(index, index + 1), num_timed, number)
    for number, setting in missing:
        params = workload | setting.params()
        trials = _trials(studio, setting, indices, num_timed, number)
        if parts == 1:
            counts = _counted(studio, setting) if num_timed else _mean_flops(trials)
            records.append(
                options.records, _record(bench, setting, params, trials, counts, options.seed, options.device)
            )


def _trials(studio: Studio, setting: Setting, part: range, num_timed: int, number: int) -> list[Trial]:
    """Measures those captions of a part that the work folder lacks and returns all of it, in caption order.

    Where nothing is timed, all arithmetic is counted: of one caption, another for each setting so that processes share
    the work, or of all where it depends on them.
    """
    kind = "timed" if num_timed else "untimed"
    path = studio.folder / f"trials-{studio.steps}-{kind}" / f"seed{studio.seed}-{setting.name}.jsonl"
    key = json.dumps(setting.params(), sort_keys=True)
    done = _read_trials(path, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    is_counted = num_timed > 0 or any("flops" in trial for trial in done.values())
    to_count = set(part) if setting.is_adaptive else set() if is_counted else {number % len(studio.captions)}

    def lacks(index: int) -> bool:
        wanted = "cpu_s" if index < num_timed else "flops" if not num_timed and index in to_count else "psnr_db"
        return wanted not in done.get(index, {})

    missing = [index for index in part if lacks(index)]
    if missing and num_timed:
        studio.draw(setting, 0)
    for index in tqdm(missing, desc=f"{setting.name}, {studio.steps} steps", disable=num_timed == 0):
        done[index] = _measure(studio, setting, index, index < num_timed, not num_timed and index in to_count)
        with path.open("ab", buffering=0) as file:
            # One write without a buffer, so that two processes never share a line.
            file.write((json.dumps({"index": index, "key": key, **done[index]}) + "\n").encode())
    return [done[index] for index in part]


def _mean_flops(trials: Sequence[Trial]) -> dict[str, int]:
    """All arithmetic of an image and of stock's, the mean of those that were counted."""
    return {
        name: round(statistics.fmean(trial[name] for trial in trials if name in trial))
        for name in ("flops", "stock_flops")
    }


def _read_trials(path: Path, key: str) -> dict[int, Trial]:
    if not path.exists():
        return {}
    done: dict[int, Trial] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line: dict[str, Any] = json.loads(text)
        except json.JSONDecodeError:
            # The last line of a run that was killed while writing.
            continue
        if line.pop("key") == key:
            done[line.pop("index")] = line
    return done


def _measure(studio: Studio, setting: Setting, index: int, is_timed: bool, is_counted: bool) -> Trial:
    """Draws one image and, for its time, stock before it on even captions and after it on odd ones."""
    times: Trial = {}
    if is_timed:
        order: list[Setting] = [studio.stock, setting] if index % 2 == 0 else [setting, studio.stock]
        (first, first_time), (second, second_time) = (studio.draw(each, index) for each in order)
        if index % 2 == 0:
            stock, stock_time, image, time = first, first_time, second, second_time
        else:
            stock, stock_time, image, time = second, second_time, first, first_time
        studio.keep_stock(index, stock)
        times = {
            "cpu_s": time.cpu_s,
            "wall_s": time.wall_s,
            "baseline_cpu_s": stock_time.cpu_s,
            "baseline_wall_s": stock_time.wall_s,
        }
    elif is_counted:
        image, flops = studio.counted(setting, index)
        times = {"flops": flops, "stock_flops": studio.stock_flops}
        stock = studio.stock_image(index)
    else:
        stock = studio.stock_image(index)
        image = stock if isinstance(setting, Stock) else studio.draw(setting, index)[0]
    distance = psnr(stock, image)
    return {
        "psnr_db": MOST_DB if math.isinf(distance) else distance,
        "ssim": ssim(stock, image),
        "passed": float(scenes.check(image, studio.captions[index]).passed),
        "stock_passed": float(scenes.check(stock, studio.captions[index]).passed),
        **times,
    }


def _counted(studio: Studio, setting: Setting) -> dict[str, int]:
    """Counts one image of the setting beside one of stock."""
    stock, own = studio.stock_cost, studio.count(setting)
    top = stock.top_self_attention()
    return _sums(own, top, "") | _sums(stock, top, "stock_") | {"top_tokens_least": _least_tokens(own, top)}


def _sums(cost: Cost, top: list[str], prefix: str) -> dict[str, int]:
    return {
        f"{prefix}attention_flops": cost.attention_flops(),
        f"{prefix}top_attention_flops": cost.attention_flops(top),
        f"{prefix}projection_flops": sum(cost.projection_flops.values()),
        f"{prefix}matching_flops": cost.matching_flops,
    }


def _least_tokens(cost: Cost, layers: list[str]) -> int:
    return min((call.num_queries for call in cost.calls if call.layer in layers), default=0)


def _record(
    bench: str,
    setting: Setting,
    params: dict[str, Any],
    trials: list[Trial],
    counts: dict[str, int],
    seed: int,
    device: str,
) -> records.BenchRecord:
    def column(name: str) -> list[float]:
        return [trial[name] for trial in trials if name in trial]

    return records.BenchRecord(
        bench=bench,
        setting=setting.name,
        family=setting.family,
        params=params,
        cpu_s=column("cpu_s"),
        baseline_cpu_s=column("baseline_cpu_s"),
        wall_s=column("wall_s"),
        baseline_wall_s=column("baseline_wall_s"),
        values={name: column(name) for name in ("psnr_db", "ssim", "passed", "stock_passed")},
        counts=counts,
        seed=seed,
        origin=records.Origin.here(device),
    )
