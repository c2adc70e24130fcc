"""`gen-turbo bench step`: denoising steps of published configurations with random weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gen_turbo.bench import records
from gen_turbo.bench.arithmetic import counted
from gen_turbo.bench.catalogue import step_catalogue
from gen_turbo.bench.settings import Setting, Stock, selected
from gen_turbo.bench.step_models import StepModel, make
from gen_turbo.bench.timing import Timing, alternate
from gen_turbo.metrics.cost import count_cost


def run(options: argparse.Namespace) -> None:
    """Measures all selected settings in alternating rounds and records each against stock."""
    torch.set_num_threads(options.threads)
    params = {
        "model": options.model,
        "latents": options.latents,
        "blocks": options.blocks or "all",
        "width_scale": options.width_scale,
        "steps": options.steps,
        "rounds": options.rounds,
    }
    found = selected(step_catalogue(options.model, options.steps), options.settings)
    settings = [setting for setting in found if setting.name != "stock"]
    settings = [
        s for s in settings if not records.is_finished(options.records, "step", s.name, _full(params, s), options.seed)
    ]
    if not settings:
        print("step: finished before; delete the records to measure again")
        return
    step = make(options.model, options.latents, options.width_scale, options.blocks, options.seed)
    runs: dict[str, Setting] = {setting.name: setting for setting in [Stock(), *settings]}
    functions = {name: _denoise(step, setting, options.steps) for name, setting in runs.items()}
    counts = {name: _count(step.model, functions[name]) for name in tqdm(functions, desc="step, counting")}
    with tqdm(total=len(runs) * options.rounds, desc="step, timing") as bar:
        timings = alternate(functions, options.rounds, warmup=0, progress=bar.update)
    for setting in runs.values():
        record = _record(setting, _full(params, setting), timings, counts[setting.name], options.seed)
        records.append(options.records, record)


def _denoise(step: StepModel, setting: Setting, steps: int) -> Callable[[], Tensor]:
    def run_once() -> Tensor:
        with setting.applied(step.model):
            return step.run(steps)

    return run_once


def _count(model: nn.Module, run_once: Callable[[], Tensor]) -> dict[str, int]:
    """Counts one run, which warms up the memory allocator too."""
    with count_cost(model) as cost:
        _, flops = counted(run_once)
    return {
        "flops": flops,
        "attention_flops": cost.attention_flops(),
        "projection_flops": sum(cost.projection_flops.values()),
        "matching_flops": cost.matching_flops,
    }


def _full(params: dict[str, object], setting: Setting) -> dict[str, object]:
    return params | setting.params()


def _record(
    setting: Setting, params: dict[str, object], timings: dict[str, list[Timing]], counts: dict[str, int], seed: int
) -> records.BenchRecord:
    own, stock, steps = timings[setting.name], timings["stock"], int(str(params["steps"]))
    return records.BenchRecord(
        bench="step",
        setting=setting.name,
        family=setting.family,
        params=params,
        cpu_s=[t.cpu_s / steps for t in own],
        baseline_cpu_s=[t.cpu_s / steps for t in stock],
        wall_s=[t.wall_s / steps for t in own],
        baseline_wall_s=[t.wall_s / steps for t in stock],
        counts=counts,
        seed=seed,
    )
