"""`gen-turbo calibrate par` on a diffusion pipeline: prompts in, a file of schedules out."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from gen_turbo.commands.drawing import OWN_SEED, Draw, distance_db, drawer, drawn, note, pixels, prompts_of
from gen_turbo.config import ConfigError, PipelineConfig

if TYPE_CHECKING:
    from gen_turbo.training.sampled import SampledRun
    from gen_turbo.training.schedule import Schedule

_ALMOST_ALL, _FEW_STEPS = 0.999, 2
_GUIDED = 2
"""Guidance branches in a batch of which one may be left out."""
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
    from gen_turbo.training.schedule import undominated
    from gen_turbo.training.schedule_file import ScheduleFile, probe_of, write

    output = namespace.output or Path(f"runs/par/schedule-{config.steps}.yaml")
    check_writable(output.parent)
    quiet_loading()
    pipe = build_pipeline(config)
    pipe.set_progress_bar_config(disable=True)
    draw = drawer(pipe, config, prompts_of(namespace, config), namespace.seed + OWN_SEED)
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
    pipe: Any, namespace: argparse.Namespace, draw: Draw, made: Callable[[Any], Any], add: Callable[[Any], None]
) -> None:
    """Searches schedules that skip whole calls, and tries them."""
    from gen_turbo.api import attach, denoisers
    from gen_turbo.methods.par import PARProcessor
    from gen_turbo.training.calibrate_route import Fits, num_images, record
    from gen_turbo.training.sampled import sampling

    count = namespace.prompts
    models = denoisers(pipe)[1]
    recorded = record(pipe, models, partial(pixels, draw), count, note)
    num_calls = len(recorded.runs[0].guided)
    of_call, late = _costs_of_calls(pipe, draw, "turbo" in namespace.inner)
    budgets = [min(budget / of_call, 1.0) for budget in namespace.budgets]
    routes = [(one, False) for one in recorded.schedules(budgets)]
    routes += [] if late is None else [(one, False) for one in recorded.schedules(budgets, late)]
    # Half of a call is what the unconditional one of two branches takes.
    routes += [(one, True) for one in recorded.schedules(budgets, saved=0.5)] if len(recorded.shares) == _GUIDED else []
    num_few = 2 if late is None else 4
    whole = num_images(num_calls, count, [same for same, _ in routes]) + num_few * _FEW_STEPS / num_calls
    note(f"leaving whole calls out takes at most {whole:.0f} images' worth of calls in all")
    plain: list[tuple[float, float]] = []

    def attached(schedule: Schedule) -> Any:
        return attach(pipe, PARProcessor(budget=_ALMOST_ALL, schedule=made((schedule,))), graphs=False)

    def follow(schedule: Schedule, index: int, known: Sequence[Any], last: int) -> SampledRun:
        with sampling(pipe, models, known, last=last) as run, attached(schedule):
            draw(index, "latent")
        return run

    def distance(schedule: Schedule, index: int, known: Sequence[Any]) -> float:
        with sampling(pipe, models, known), attached(schedule):
            return distance_db(recorded.images[index], pixels(draw, index))

    fits = Fits(recorded, follow, distance)
    for same, is_narrow in routes:
        schedule, nearest = fits.best(same, is_narrow)
        cost = schedule.cost
        how = "" if schedule.inner is None else ", the last one merged"
        how += ", the last one without its unconditional branch" if is_narrow else ""
        cost -= 0.5 / num_calls if is_narrow else 0.0
        note(f"{cost:.3f} of the calls of stock{how}, {nearest:.1f} dB")
        if schedule.inner is None:
            plain.append((cost, nearest))
        elif any(other <= cost and nearest < known + _CLEAR_DB for other, known in plain):
            continue
        add(replace(schedule, cost=round(cost * of_call, 4), psnr_db=round(nearest, 2)))


def _costs_of_calls(pipe: Any, draw: Draw, merges: bool) -> tuple[float, float | None]:
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
        note(f"text of {num_text} tokens runs on {num_left} without loss: a call takes {share:.3f} of a stock call")
    if merges:
        merging: Any = PARProcessor(inner=LATE).reducer()
        try:
            with attach(pipe, merging):
                late = counted(few, kind)[1] / whole
            note(f"a call that merges takes {late:.3f} of one that does not")
        except ValueError as error:
            note(f"no call merges: {error}")
    return share, None if late is None or late >= 1 else late


def _searched(pipe: Any, namespace: argparse.Namespace, draw: Draw) -> list[Any]:
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
    prices = measure(Probe(model, host, used, groups, num_branches), draw, num_calls, namespace.prompts, note)
    found = []
    for inner in namespace.inner:
        merging = None if inner == "none" else inner
        seconds = whole if merging is None else _seconds(pipe, model, used, draw, namespace.prompts, merging)
        base, shares = mean(seconds[WHOLE]) / mean(whole[WHOLE]), prices.shares(seconds, mean(whole[WHOLE]))
        parts = ", ".join(f"{group} {share:.1%}" for group, share in shares.items())
        note(f"inner {merging}: {base:.1%} of a stock call; a call without {parts}")
        choices = prices.choices(base, shares, insides(groups, used), sorted(namespace.budgets, reverse=True))
        found += [(merging, skips) for skips in choices]
    times = tuple(prices.recordings[0].times)
    slopes = {unit: slope for unit, slope in prices.slopes.items() if any(unit in skips for _, skips in found)}
    return [Schedule(times, skips, slopes, inner=merging) for merging, skips in found]


def _taken_over(pipe: Any, path: Path, draw: Draw) -> list[Any]:
    """The schedules of a file, carried over to the calls of this run."""
    from gen_turbo.api import denoiser
    from gen_turbo.training.schedule import carried_over
    from gen_turbo.training.schedule_file import read

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
    pipe: Any, model: Any, units: dict[str, Any], draw: Draw, count: int, inner: str | None
) -> dict[str, list[float]]:
    """The seconds of every unit in every call of some images, with a merging method alone or of stock."""
    from gen_turbo.api import attach
    from gen_turbo.methods.par import PARProcessor
    from gen_turbo.training.stopwatch import timed

    merging = None if inner is None else PARProcessor(inner=inner).reducer()
    with attach(pipe, merging) if merging else nullcontext(), timed(model, units) as seconds:
        for index in range(count):
            drawn(draw, index)
    return seconds


def _tried(pipe: Any, file: Any, draw: Draw, count: int) -> Any:
    """Runs stock and a schedule in turn on every prompt, and gives it with its cost and its distance to stock."""
    from gen_turbo.api import attach
    from gen_turbo.methods.par import PARProcessor

    schedule = file.schedules[0]
    shares, distances = [], []
    for index in range(count):
        image, seconds = drawn(draw, index)
        with attach(pipe, PARProcessor(budget=_ALMOST_ALL, schedule=file, inner=schedule.inner)):
            own, own_seconds = drawn(draw, index)
        shares.append(own_seconds / seconds)
        distances.append(distance_db(image, own))
    cost, distance = sum(shares) / len(shares), sum(distances) / len(distances)
    note(f"inner {schedule.inner}: {cost:.3f} of the time of stock, {distance:.1f} dB")
    return replace(schedule, cost=round(cost, 4), psnr_db=round(distance, 2))
