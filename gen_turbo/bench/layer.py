"""`gen-turbo bench layer`: one self-attention layer, matching included, against full attention and tomesd."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from tqdm import tqdm

from gen_turbo.bench import records, tomesd_baseline
from gen_turbo.bench.primitives import smooth_tokens
from gen_turbo.bench.timing import alternate
from gen_turbo.methods.turbo import TurboProcessor
from gen_turbo.methods.vistog import VisToGProcessor
from gen_turbo.tokens.ratios import num_removed

REUSE = 5
HEADS = 8
FULL = "full attention"
_FAMILIES = {FULL: "stock", "tomesd": "package tomesd"}


def run(options: argparse.Namespace) -> None:
    """Measures and records; each timed round is five passes through the layer."""
    torch.set_num_threads(options.threads)
    params = {
        "batch": 2,
        "tokens": options.side**2,
        "width": options.width,
        "heads": HEADS,
        "ratio": 0.5,
        "rounds": options.rounds,
    }
    functions = _functions(smooth_tokens(2, (options.side, options.side), options.width, options.seed), options)
    missing = [
        name for name in functions if not records.is_finished(options.records, "layer", name, params, options.seed)
    ]
    if not missing:
        print("layer: finished before; delete the records to measure again")
        return
    functions = {name: run for name, run in functions.items() if name in missing or name == FULL}
    with torch.no_grad(), tqdm(total=len(functions) * (options.rounds + 1), desc="layer") as bar:
        timings = alternate(functions, options.rounds, progress=bar.update)
    full = timings[FULL]
    for name in missing:
        own = timings[name]
        record = records.BenchRecord(
            bench="layer",
            setting=name,
            family=_FAMILIES.get(name, name.partition(",")[0]),
            params=params,
            cpu_s=[t.cpu_s / REUSE for t in own],
            baseline_cpu_s=[t.cpu_s / REUSE for t in full],
            wall_s=[t.wall_s / REUSE for t in own],
            baseline_wall_s=[t.wall_s / REUSE for t in full],
            seed=options.seed,
        )
        records.append(options.records, record)


def _functions(tokens: Tensor, options: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """Five each: full, tomesd, Turbo with a plan for every pass, for both guidance halves, for all; plans alone."""
    grid, ratio = (options.side, options.side), 0.5
    torch.manual_seed(options.seed)
    layer = Attention(options.width, heads=HEADS, dim_head=options.width // HEADS).eval()
    processor, vistog = TurboProcessor(ratio), VisToGProcessor(ratio)

    def tomesd() -> Tensor:
        merge, unmerge = tomesd_baseline.matching(tokens, grid, num_removed(tokens.shape[1], ratio))
        merged: Tensor = layer(merge(tokens))
        return unmerge(merged)

    def turbo(planned: Tensor, reuse: int) -> Tensor:
        for number in range(REUSE):
            if number % reuse == 0:
                plan = processor.plan_tokens(planned, grid=grid)
            output = plan.unmerge(layer(plan.merge(tokens)))
        return output

    return {
        FULL: lambda: _repeat(lambda: layer(tokens)),
        "tomesd": lambda: _repeat(tomesd),
        "turbo, fresh plans": lambda: turbo(tokens, 1),
        "turbo, fresh plans shared by the guidance halves": lambda: turbo(tokens[1:], 1),
        "turbo, plan reuse 5": lambda: turbo(tokens, REUSE),
        "turbo, a plan alone": lambda: _repeat(lambda: processor.plan_tokens(tokens, grid=grid).slot_BN),
        "vistog, a plan alone": lambda: _repeat(lambda: vistog.plan_tokens(tokens, grid=grid).slot_BN),
    }


def _repeat(function: Callable[[], Tensor]) -> Tensor:
    for _ in range(REUSE):
        output = function()
    return output
