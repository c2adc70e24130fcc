"""`gen-turbo bench choices`: what `TurboProcessor(0.4)` chooses on published configurations, and what it expects."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from torch import nn
from tqdm import tqdm

from gen_turbo.api import adapter_of
from gen_turbo.bench import records
from gen_turbo.bench.gpu.cases import CASES, PUBLISHED, Case
from gen_turbo.bench.markdown import table
from gen_turbo.engine.costs.auto import Choice, choose
from gen_turbo.engine.costs.devices import CLASSES
from gen_turbo.engine.costs.expected import Costs, RunFacts
from gen_turbo.engine.costs.work import Workload
from gen_turbo.methods.turbo import TurboProcessor

BENCH = "choices"
RATIO = 0.4
_SHORT = 4
"""Steps of distilled models; beside them each case has the default length of its pipeline."""
_LATENT, _FRAMES = 8, 4


def run(options: argparse.Namespace) -> None:
    """Queries the model of costs for every case, device and length; nothing is run, so no weights are made."""
    cells = [(case, device, n) for case in CASES for device in CLASSES for n in (_SHORT, case.run_steps or _SHORT)]
    built: dict[str, Costs] = {}
    for case, device, steps in tqdm(cells, desc="choices"):
        params = {"model": case.model, "pixels": case.pixels, "batch": case.batch, "ratio": RATIO}
        params |= {"device": device, "steps": steps}
        if case.model not in built:
            model = PUBLISHED[case.model].build()
            built[case.model] = Costs(_giving(model), adapter_of(model))
        costs, facts = built[case.model], facts_of(case, device, steps)
        found = choose(costs, TurboProcessor(RATIO), facts)
        stock = costs.stock(facts.load).flops * steps
        values = {"gain": [found.gain], "merging_gain": [found.merging_gain]}
        counts = {"stock_flops": round(stock), "flops": round(stock * found.flops), "layers": len(found.layers)}
        params["choice"] = short(found)
        name = f"{case.name}-{device}-{steps}"
        if not records.is_finished(options.records, BENCH, name, params, options.seed):
            record = records.BenchRecord(BENCH, name, case.name, params, options.seed, values=values, counts=counts)
            records.append(options.records, record)


def facts_of(case: Case, device: str, steps: int) -> RunFacts:
    """A run of a case on a device: in float32 on a CPU, else in half types and captured."""
    denoiser, is_cpu = PUBLISHED[case.model], device == "cpu"
    grid = case.height // _LATENT // denoiser.patch, case.width // _LATENT // denoiser.patch
    frames = (case.frames - 1) // _FRAMES + 1
    load = Workload(case.batch, frames, grid, denoiser.text[0], denoiser.joins_text, 4 if is_cpu else 2)
    return RunFacts(load, CLASSES[device], steps, is_captured=not is_cpu)


def choices(folder: Path) -> str:
    """Expected gain, that of merging alone, and the share of FLOPs, by case and device."""
    rows = list({row.setting: row for row in records.load(folder, BENCH)}.values())
    cells = {(row.family, row.params["steps"], row.params["device"]): _cell(row) for row in rows}
    devices = [name for name in CLASSES if any(key[2] == name for key in cells)]
    lines = [
        (f"{case}, {steps} steps", *(cells.get((case, steps, device), "") for device in devices))
        for case, steps in dict.fromkeys(key[:2] for key in cells)
    ]
    what = (
        "Expected by the model of costs, not timed: times faster than eager stock, in brackets by merging alone, and "
        "the counted FLOPs of the run over stock's. GPUs in half types with calls captured in CUDA graphs"
    )
    return table(("", *(CLASSES[device].name for device in devices)), lines, rows, what)


def _giving(model: nn.Module) -> Callable[[], nn.Module]:
    return lambda: model


def _cell(row: records.BenchRecord) -> str:
    share = row.counts["flops"] / row.counts["stock_flops"]
    gain = f"{row.values['gain'][0]:.2f} ({row.values['merging_gain'][0]:.2f})"
    return f"{gain}, {share:.0%}, {row.params['choice']}"


def short(choice: Choice) -> str:
    """A choice in a few words."""
    if not choice.layers:
        return "nothing merged"
    rhythm = choice.rhythm
    how = f"copied from {rhythm.start}" if rhythm.restore == "copy" else f"1 full in {rhythm.full_every}"
    return f"{choice.scope}, {how}"
