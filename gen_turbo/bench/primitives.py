"""`gen-turbo bench primitives`: merging and unmerging against the package tomesd, same tokens, same destinations."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from gen_turbo.bench import records, tomesd_baseline
from gen_turbo.bench.timing import Timing, alternate

NAMES = ("merge + unmerge", "merge", "unmerge")


def smooth_tokens(batch: int, grid: tuple[int, int], width: int, seed: int) -> Tensor:
    """Draws features that vary slowly over the grid, with some noise: (batch, height * width, width)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, width, max(1, grid[0] // 8), max(1, grid[1] // 8), generator=generator)
    fine = torch.nn.functional.interpolate(coarse, grid, mode="bicubic")
    fine = fine + 0.3 * torch.randn(fine.shape, generator=generator)
    return fine.flatten(2).transpose(1, 2).contiguous()


def run(options: argparse.Namespace) -> None:
    """Measures and records; the plan is made beforehand on both sides."""
    torch.set_num_threads(options.threads)
    grid, width, ratio = (options.side, options.side), options.width, 0.5
    params = {"batch": 2, "tokens": options.side**2, "width": width, "ratio": ratio, "rounds": options.rounds}
    if all(records.is_finished(options.records, "primitives", name, params, options.seed) for name in NAMES):
        print("primitives: finished before; delete the records to measure again")
        return
    tokens = smooth_tokens(2, grid, width, options.seed)
    num_removed = int(tokens.shape[1] * ratio)
    merge, unmerge = tomesd_baseline.matching(tokens, grid, num_removed)
    plan, row_BM = tomesd_baseline.same_plan(unmerge, 2, grid, num_removed)
    theirs, ours = merge(tokens), plan.merge(tokens)
    index = row_BM[..., None].expand(-1, -1, width)
    values = {
        "merge_max_error": [float((theirs.gather(1, index) - ours).abs().max())],
        "unmerge_bit_equal": [float(torch.equal(unmerge(theirs), plan.unmerge(theirs.gather(1, index))))],
    }
    with tqdm(total=4 * (options.rounds + 3), desc="primitives") as bar:
        timings = alternate(
            {
                "tomesd merge": lambda: merge(tokens),
                "tomesd unmerge": lambda: unmerge(theirs),
                "merge": lambda: plan.merge(tokens),
                "unmerge": lambda: plan.unmerge(ours),
            },
            options.rounds,
            warmup=3,
            progress=bar.update,
        )
    timings["merge + unmerge"] = _sum(timings["merge"], timings["unmerge"])
    timings["tomesd merge + unmerge"] = _sum(timings["tomesd merge"], timings["tomesd unmerge"])
    for name in NAMES:
        _record(options.records, name, params, timings, values, options.seed)


def _sum(first: list[Timing], second: list[Timing]) -> list[Timing]:
    return [Timing(a.cpu_s + b.cpu_s, a.wall_s + b.wall_s) for a, b in zip(first, second, strict=True)]


def _record(
    folder: Path,
    name: str,
    params: dict[str, object],
    timings: dict[str, list[Timing]],
    values: dict[str, list[float]],
    seed: int,
) -> None:
    ours, theirs = timings[name], timings[f"tomesd {name}"]
    record = records.BenchRecord(
        bench="primitives",
        setting=name,
        family="plan",
        params=params,
        cpu_s=[t.cpu_s for t in ours],
        baseline_cpu_s=[t.cpu_s for t in theirs],
        wall_s=[t.wall_s for t in ours],
        baseline_wall_s=[t.wall_s for t in theirs],
        values=values,
        seed=seed,
    )
    records.append(folder, record)
