"""`gen-turbo calibrate par` on a diffusion pipeline: prompts in, a file of schedules out."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from gen_turbo import scenes
from gen_turbo.config import CALL_SETTINGS, ConfigError, PipelineConfig
from gen_turbo.schemas import check_count

_PROMPTS = (
    "a photo of a street market with many people",
    "a portrait of an old woman, soft light",
    "a mountain lake at sunrise, wide angle",
    "a red bicycle leaning on a white wall",
)
_OWN_SEED = 1000
"""Keeps captions and noise apart from those of the benchmarks, whose seeds begin at 0."""
_ALMOST_ALL, _MOST_DB, _FEW_STEPS = 0.999, 100.0, 2
_Draw = Callable[..., Any]
_CLEAR_DB = 1.0
"""By how much merging has to be nearer to stock on a few prompts, so that it is nearer on others."""
_COSTS = (0.85, 0.75, 0.67, 0.6, 0.5, 0.42, 0.34, 0.3, 0.25)


def add_schedule_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that concern diffusion pipelines."""
    group = parser.add_argument_group("diffusion pipelines")
    group.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="a prompt to record; repeatable (default: captions of scenes)",
    )
    group.add_argument("--prompts", type=int, default=2, help="how many prompts are recorded and compared (2)")
    group.add_argument("--steps", type=int, help="the same as steps=... (default: as configured)")
    group.add_argument("--budgets", type=float, nargs="+", default=_COSTS, help="shares of the stock cost to fill")
    group.add_argument(
        "--init-schedule",
        type=Path,
        metavar="FILE",
        help="carry over schedules of other steps (default: search)",
    )
    group.add_argument("--inner", nargs="+", default=["turbo", "none"], help="merging methods meanwhile (turbo none)")
    group.add_argument(
        "--parts",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="search also schedules that skip parts of calls and merge tokens in others, which takes many more images",
    )


def calibrate_schedule(namespace: argparse.Namespace, config: PipelineConfig) -> None:
    """Measures a pipeline's denoiser, searches schedules or takes over another run's, runs them, writes the file."""
    from gen_turbo.api import denoiser
    from gen_turbo.factory import build_pipeline, quiet_loading
    from gen_turbo.output import check_writable
    from gen_turbo.training.schedule import Schedule, ScheduleFile, probe_of, undominated, write

    output = namespace.output or Path(f"runs/par/schedule-{config.steps}.yaml")
    check_writable(output.parent)
    quiet_loading()
    pipe = build_pipeline(config)
    pipe.set_progress_bar_config(disable=True)
    draw = _drawer(pipe, config, _prompts(namespace, config), namespace.seed + _OWN_SEED)
    model = denoiser(pipe)
    title = f"{config.checkpoint}, {config.steps} steps, guidance {config.guidance_scale:g}: gen-turbo calibrate par"
    title += "" if namespace.parts else " --no-parts"
    title += f" --init-schedule {namespace.init_schedule.name}" if namespace.init_schedule is not None else ""
    made = partial(ScheduleFile, type(model).__name__, tuple(probe_of(model).tolist()), type(pipe.scheduler).__name__)
    done: list[Schedule] = []

    def add(schedule: Schedule) -> None:
        done.append(schedule)
        write(output, made(undominated(done)), title)

    if namespace.init_schedule is None:
        _add_routes(pipe, namespace, draw, made, add)
    if namespace.init_schedule is not None or namespace.parts:
        found = (
            _searched(pipe, namespace, draw)
            if namespace.init_schedule is None
            else _taken_over(pipe, namespace.init_schedule, draw)
        )
        for schedule in found:
            add(_tried(pipe, made((schedule,)), draw, namespace.prompts))
    print(output)


def _add_routes(
    pipe: Any, namespace: argparse.Namespace, draw: _Draw, made: Callable[[Any], Any], add: Callable[[Any], None]
) -> None:
    """Searches schedules that skip whole calls, and tries them."""
    from gen_turbo.api import attach, denoisers
    from gen_turbo.methods.par import PARProcessor
    from gen_turbo.training.calibrate_route import num_images, record

    count = namespace.prompts
    recorded = record(pipe, denoisers(pipe)[1], partial(_pixels, draw), count, _note)
    num_calls = len(recorded.runs[0].guided)
    of_call, late = _costs_of_calls(pipe, draw, "turbo" in namespace.inner)
    budgets = [min(budget / of_call, 1.0) for budget in namespace.budgets]
    schedules = recorded.schedules(budgets) + ([] if late is None else recorded.schedules(budgets, late))
    num_few = 2 if late is None else 4
    whole = num_images(num_calls, count, [schedule.cost for schedule in schedules]) + num_few * _FEW_STEPS / num_calls
    _note(f"leaving whole calls out takes {whole:.0f} images' worth of calls in all")
    plain: list[tuple[float, float]] = []
    for schedule in schedules:
        distances = []
        for index in range(count):
            with attach(pipe, PARProcessor(budget=_ALMOST_ALL, schedule=made((schedule,)))):
                distances.append(_distance(recorded.images[index], _pixels(draw, index)))
        distance = sum(distances) / count
        how = "" if schedule.inner is None else ", the last one merged"
        _note(f"{schedule.cost:.3f} of the calls of stock{how}, {distance:.1f} dB")
        if schedule.inner is None:
            plain.append((schedule.cost, distance))
        elif any(cost <= schedule.cost and distance < known + _CLEAR_DB for cost, known in plain):
            continue
        add(replace(schedule, cost=round(schedule.cost * of_call, 4), psnr_db=round(distance, 2)))


def _costs_of_calls(pipe: Any, draw: _Draw, merges: bool) -> tuple[float, float | None]:
    """Arithmetic of a call with repeated text merged over that of stock, and of one that merges as a run's last may.

    The second is a share of the first, None where calls do not merge or that saves nothing. Both are counted.
    """
    from gen_turbo.api import attach, denoiser
    from gen_turbo.bench.arithmetic import counted
    from gen_turbo.engine.report import report
    from gen_turbo.methods.identity import IdentityProcessor
    from gen_turbo.methods.par import PARProcessor
    from gen_turbo.training.calibrate_route import LATE

    kind, few = type(denoiser(pipe)).__name__, partial(draw, 0, "latent", num_inference_steps=_FEW_STEPS)
    share, late = 1.0, None
    with attach(pipe, IdentityProcessor(0.0, text_ratio=None)):
        _, whole = counted(few, kind)
        num_text, num_left = report(pipe).text_tokens
    if num_text != num_left:
        share = whole / counted(few, kind)[1]
        _note(f"text of {num_text} tokens runs on {num_left} without loss: a call takes {share:.3f} of a stock call")
    if merges:
        merging: Any = PARProcessor(inner=LATE).reducer()
        try:
            with attach(pipe, merging):
                late = counted(few, kind)[1] / whole
            _note(f"a call that merges takes {late:.3f} of one that does not")
        except ValueError as error:
            _note(f"no call merges: {error}")
    return share, None if late is None or late >= 1 else late


def _searched(pipe: Any, namespace: argparse.Namespace, draw: _Draw) -> list[Any]:
    """Schedules for all budgets, with and without merging, by what every unit costs and what is lost without it."""
    from gen_turbo.api import adapter_of, denoiser
    from gen_turbo.engine.probing import Probe
    from gen_turbo.training.calibrate_denoiser import measure
    from gen_turbo.training.groups import groups_of, insides
    from gen_turbo.training.schedule import WHOLE, Schedule

    model = denoiser(pipe)
    host: Any = adapter_of(model)
    units = host.units(model)
    groups = groups_of(model, host, units)
    used = {name: units[name] for names in groups.values() for name in names}
    whole = _seconds(pipe, model, used, draw, namespace.prompts, None)
    num_calls = len(pipe.scheduler.timesteps)
    num_branches, others = divmod(len(whole[WHOLE]), num_calls * namespace.prompts)
    if others:
        raise ConfigError(
            f"{type(model).__name__} is called {len(whole[WHOLE])} times in {namespace.prompts} runs of {num_calls} "
            "steps, so its calls do not fall into steps of as many; use --no-parts"
        )
    prices = measure(Probe(model, host, used, groups, num_branches), draw, num_calls, namespace.prompts, _note)
    found = []
    for inner in namespace.inner:
        merging = None if inner == "none" else inner
        seconds = whole if merging is None else _seconds(pipe, model, used, draw, namespace.prompts, merging)
        base, shares = mean(seconds[WHOLE]) / mean(whole[WHOLE]), prices.shares(seconds, mean(whole[WHOLE]))
        parts = ", ".join(f"{group} {share:.1%}" for group, share in shares.items())
        _note(f"inner {merging}: {base:.1%} of a stock call; a call without {parts}")
        choices = prices.choices(base, shares, insides(groups, used), sorted(namespace.budgets, reverse=True))
        found += [(merging, skips) for skips in choices]
    times = tuple(prices.recordings[0].times)
    slopes = {unit: slope for unit, slope in prices.slopes.items() if any(unit in skips for _, skips in found)}
    return [Schedule(times, skips, slopes, inner=merging) for merging, skips in found]


def _taken_over(pipe: Any, path: Path, draw: _Draw) -> list[Any]:
    """The schedules of a file, carried over to the calls of this run."""
    from gen_turbo.api import denoiser
    from gen_turbo.training.schedule import carried_over, read

    file, model, scheduler = read(path), denoiser(pipe), type(pipe.scheduler).__name__
    if not file.is_for(model) or file.scheduler != scheduler:
        raise ConfigError(
            f"{path} was made for another {file.model} or scheduler ({file.scheduler}), not this "
            f"{type(model).__name__} and {scheduler}; search without --init-schedule"
        )
    # The times of some schedulers depend on the size of the image, so the pipeline sets them.
    draw(0, "latent")
    return [carried_over(schedule, [float(time) for time in pipe.scheduler.timesteps]) for schedule in file.schedules]


def _seconds(
    pipe: Any, model: Any, units: dict[str, Any], draw: _Draw, count: int, inner: str | None
) -> dict[str, list[float]]:
    """The seconds of every unit in every call of some images, with a merging method alone or of stock."""
    from gen_turbo.api import attach
    from gen_turbo.methods.par import PARProcessor
    from gen_turbo.training.stopwatch import timed

    merging = None if inner is None else PARProcessor(inner=inner).reducer()
    with attach(pipe, merging) if merging else nullcontext(), timed(model, units) as seconds:
        for index in range(count):
            _drawn(draw, index)
    return seconds


def _tried(pipe: Any, file: Any, draw: _Draw, count: int) -> Any:
    """Runs stock and a schedule in turn on every prompt, and gives it with its cost and its distance to stock."""
    from gen_turbo.api import attach
    from gen_turbo.methods.par import PARProcessor

    schedule = file.schedules[0]
    shares, distances = [], []
    for index in range(count):
        image, seconds = _drawn(draw, index)
        with attach(pipe, PARProcessor(budget=_ALMOST_ALL, schedule=file, inner=schedule.inner)):
            own, own_seconds = _drawn(draw, index)
        shares.append(own_seconds / seconds)
        distances.append(_distance(image, own))
    cost, distance = sum(shares) / len(shares), sum(distances) / len(distances)
    _note(f"inner {schedule.inner}: {cost:.3f} of the time of stock, {distance:.1f} dB")
    return replace(schedule, cost=round(cost, 4), psnr_db=round(distance, 2))


def _pixels(draw: _Draw, index: int) -> Any:
    """The i-th image, or the frames of the i-th video, as numbers from 0 to 1."""
    from gen_turbo.training.calibrate_denoiser import content

    return np.asarray(content(draw(index, "np")))[0]


def _distance(stock: Any, own: Any) -> float:
    """PSNR in dB, of all frames together."""
    error = float(np.square(stock.astype(np.float64) - own).mean())
    return min(_MOST_DB, -10 * math.log10(max(error, 1e-12)))


def _drawer(pipe: Any, config: PipelineConfig, prompts: list[str], seed: int) -> Callable[[int, str], Any]:
    """A function that makes the i-th image, always from the same noise."""
    given = {call: getattr(config, name) for name, call in CALL_SETTINGS.items() if getattr(config, name) is not None}

    def draw(index: int, output_type: str, **changed: Any) -> Any:
        generator = torch.Generator().manual_seed(seed + index)
        return pipe(prompt=prompts[index], generator=generator, output_type=output_type, **given | changed)

    return draw


def _drawn(draw: _Draw, index: int) -> tuple[Any, float]:
    """The pixels of an image or a video and the seconds that it took."""
    from gen_turbo.training.stopwatch import seconds_now

    start = seconds_now()
    image = _pixels(draw, index)
    return image, seconds_now() - start


def _prompts(namespace: argparse.Namespace, config: PipelineConfig) -> list[str]:
    """As many prompts as were asked for: those given, scenes for the embedded models, or some of our own."""
    check_count("--prompts", namespace.prompts)
    if namespace.prompt:
        known: list[str] = namespace.prompt
    elif config.checkpoint.startswith("embedded:"):
        known = list(scenes.captions(namespace.prompts, namespace.seed + _OWN_SEED))
    else:
        known = list(_PROMPTS)
    if namespace.prompts > len(known):
        raise ConfigError(f"--prompts must be at most {len(known)}, or give more --prompt; got {namespace.prompts}")
    return known[: namespace.prompts]


def _note(text: str) -> None:
    print(text, flush=True)
