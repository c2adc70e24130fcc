"""`gen-turbo bench step`: denoising steps of the Stable Diffusion 1.5 UNet with random weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from tqdm import tqdm

from gen_turbo.bench import records
from gen_turbo.bench.settings import Setting, Stock, selected, step_catalogue
from gen_turbo.bench.timing import Timing, alternate
from gen_turbo.metrics.cost import count_cost

_WIDTHS = (320, 640, 1280, 1280)
_TEXT_TOKENS = 77
_TEXT_WIDTH = 768
_NORM_GROUPS = 32


def run(options: argparse.Namespace) -> None:
    """Measures all selected settings in alternating rounds and records each against stock."""
    torch.set_num_threads(options.threads)
    params = {
        "latents": options.latents,
        "batch": 2,
        "width_scale": options.width_scale,
        "steps": options.steps,
        "rounds": options.rounds,
    }
    settings = [setting for setting in selected(step_catalogue(), options.settings) if setting.name != "stock"]
    settings = [s for s in settings if not records.is_finished(options.records, "step", s.name, _full(params, s))]
    if not settings:
        print("step: finished before; delete the records to measure again")
        return
    unet = make_unet(options.width_scale, options.latents, options.seed)
    runs: dict[str, Setting] = {setting.name: setting for setting in [Stock(), *settings]}
    functions = {name: _denoise(unet, setting, options.latents, options.steps) for name, setting in runs.items()}
    counts = {name: _count(unet, functions[name]) for name in tqdm(functions, desc="step, counting")}
    with tqdm(total=len(runs) * options.rounds, desc="step, timing") as bar:
        timings = alternate(functions, options.rounds, warmup=0, progress=bar.update)
    for setting in runs.values():
        record = _record(setting, _full(params, setting), timings, counts[setting.name], options.seed)
        records.append(options.records, record)


def make_unet(width_scale: float, latents: int, seed: int) -> UNet2DConditionModel:
    """Builds the configuration of Stable Diffusion 1.5, all widths scaled, with random weights.

    Raises:
        ValueError: If a scaled width is no multiple of the 32 normalisation groups.
    """
    widths = tuple(int(width * width_scale) for width in _WIDTHS)
    if any(width == 0 or width % _NORM_GROUPS for width in widths):
        raise ValueError(f"--width-scale {width_scale} gives widths {widths}; they must be multiples of {_NORM_GROUPS}")
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=latents, block_out_channels=widths, cross_attention_dim=_TEXT_WIDTH, attention_head_dim=8
    )
    return unet.eval().requires_grad_(False)


def _denoise(unet: UNet2DConditionModel, setting: Setting, latents: int, steps: int) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, latents, latents, generator=generator).repeat(2, 1, 1, 1)
    text = torch.randn(2, _TEXT_TOKENS, _TEXT_WIDTH, generator=generator)

    def run_once() -> Tensor:
        sample = noise
        with torch.no_grad(), setting.applied(unet):
            for step in range(steps):
                prediction = unet(sample, 999 - step * (1000 // steps), text).sample
                sample = sample - 0.05 * prediction
        return sample

    return run_once


def _count(unet: UNet2DConditionModel, run_once: Callable[[], Tensor]) -> dict[str, int]:
    """Counts one run, which warms up the memory allocator too."""
    with count_cost(unet) as cost:
        run_once()
    return {
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
