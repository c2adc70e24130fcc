"""What `scope="auto"` chooses for a run: the layers, how they merge and how often they run in full.

The choice follows from counted work, a table of devices and the number of steps; nothing is timed, so the same model,
shape, card and length always give the same choice and the same image. Of the programs that are near enough to stock it
is the nearest that is expected to reach a target; where none reaches it, the nearest that gains at all.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from gen_turbo.engine.base import counted
from gen_turbo.engine.choice import chosen_layers, unmatched
from gen_turbo.engine.costs.expected import Costs, Kinds, Rhythm, RunFacts
from gen_turbo.method import TokenReducer
from gen_turbo.models.adapter import LayerSpec

TYPICAL_STEPS = 25
"""Steps of a run of unknown length."""
SHORT_RUN = 8
"""Up to so many steps a run is in full until the last quarter and copies outputs there. On the embedded transformer, 4
steps, that is much nearer to stock than residuals of the first step, or than copies from the first or third on."""
TARGET = 1.15
"""Times faster than stock that is worth running layers in full less often."""
_MOST_REFRESHES, LEAST_REFRESHES = 8, 5
"""Layers run in full about eight times in a run, and no fewer than five times where that is needed for the target."""
_LEAST_PERIOD = 3
LEAST_GAIN = 1.04
"""What merging must gain over none, and a coarser level, which matters more to the image, over the finer ones: more
than the model of costs may be wrong by."""


@dataclass(frozen=True)
class Choice:
    """What a run does.

    Attributes:
        scope: "attention" or "block".
        rhythm: When layers run in full.
        layers: Those that are reduced; none where that gains nothing.
        gain: Stock's expected seconds, eager, over those of the run.
        merging_gain: The expected seconds of the same run without merging over those of the run.
        device: The name of the device's class.
        left: Why other layers that could be reduced are left alone, by name.
        flops: FLOPs of the run over those of stock.
        why: Why this rhythm and no other; empty where there was no other.
    """

    scope: str
    rhythm: Rhythm
    layers: tuple[str, ...]
    gain: float
    merging_gain: float
    device: str
    left: Mapping[str, str]
    flops: float
    why: str = ""

    def __str__(self) -> str:
        where = f"in {counted(self.rhythm.steps, 'step')} on a {self.device}"
        why = f"; {self.why}" if self.why else ""
        if not self.layers:
            gain = f"the denoiser is expected to be {self.gain:.2f} times faster"
            return f"no image token is merged {where}, for that would gain nothing; {gain}{why}"
        return (
            f"scope={self.scope!r} in {counted(len(self.layers), 'layer')}, {self.rhythm}; the denoiser is expected to "
            f"be {self.gain:.2f} times faster {where}, {self.merging_gain:.2f} by merging, with {self.flops:.0%} of "
            f"the FLOPs, counted for a class of devices and not timed{why}"
        )

    def settled(self, reducer: TokenReducer) -> TokenReducer:
        """The reducer with everything that was left open filled in."""
        own, rhythm = copy.copy(reducer), self.rhythm
        own.scope, own.restore = self.scope, rhythm.restore
        own.full_every, own.warmup_steps = rhythm.full_every, rhythm.warmup_steps
        if rhythm.start:
            own.step_scale = {0: 0.0, rhythm.start: 1.0}
        return own


def choose(costs: Costs, reducer: TokenReducer, run: RunFacts) -> Choice:
    """The program with the most full steps that is expected to reach the target.

    Where none reaches it, that with the most full steps that merges anything: a few percent are not worth a visible
    change of the image. One without layers where merging gains nothing.

    Raises:
        ValueError: If a level or a layer that is named is not there.
    """
    found: list[Choice] = []
    for rhythm in _rhythms(reducer, run):
        # At equal rhythm and ratio attention alone is nearer to stock than whole blocks, by 3 to 12 dB on the embedded
        # models, so blocks are for what attention does not reach.
        both = [expected(costs, reducer, run, scope, rhythm) for scope in _scopes(costs, reducer, run)]
        found.append(max(both, key=lambda choice: (bool(choice.layers), min(choice.gain, TARGET))))
        if found[-1].gain >= TARGET:
            break
    reached = found[-1].gain >= TARGET
    chosen = found[-1] if reached else next((choice for choice in found if choice.layers), found[0])
    if reached and len(found) > 1:
        return replace(chosen, why=f"in full less often than every {_nth(found[0])} step, to reach {TARGET}")
    if not reached and len(found) > 1:
        return replace(chosen, why=f"{TARGET} is not reached even in full every {_nth(found[-1])} step")
    return chosen


def advice(costs: Costs, reducer: TokenReducer, run: RunFacts) -> str:
    """Why no image token is merged and what would gain."""
    scope = _scopes(costs, reducer, run)[-1]
    copied = copy.copy(reducer)
    copied.match_every = 0
    found = expected(costs, copied, run, scope, Rhythm(run.steps, "copy", run.steps, 1))
    height, width = run.load.grid
    references = f" and no references (reference_ratio={reducer.reference_ratio})" if reducer.reference_ratio else ""
    why = (
        f"scope='auto' merges no image tokens{references} in this run of {counted(run.steps, 'step')} on a "
        f"{run.device.name}: at {height} x {width} tokens a full step in every few costs more than the merged ones save"
    )
    if found.layers:
        gain = f"expected {found.gain:.2f} times faster, but further from stock"
        return f"{why}; restore='copy' with scope={scope!r} and match_every=0 would gain ({gain})"
    return f"{why}, and copied outputs would gain nothing either; merging gains on larger images"


def _scopes(costs: Costs, reducer: TokenReducer, run: RunFacts) -> tuple[str, ...]:
    """Where tokens may be merged: inside attention, and in whole blocks where no setting is of attention alone."""
    blocks = costs.specs("block") if run.has_blocks else []
    is_inside = reducer.kv_only or reducer.proportional_attention or reducer.reads_attention
    return ("attention", "block") if blocks and not is_inside and not unmatched(reducer, blocks) else ("attention",)


def _rhythms(reducer: TokenReducer, run: RunFacts) -> Iterator[Rhythm]:
    """What may be chosen, with ever fewer full steps."""
    is_short = run.steps <= SHORT_RUN
    restore = reducer.restore if reducer.restore != "auto" else "copy" if is_short else "residual"
    is_late = is_short and restore == "copy" and not reducer.step_scale
    start = run.steps - max(1, run.steps // 4) if is_late else 0
    shortest = max(2, run.steps) if is_short else max(_LEAST_PERIOD, round(run.steps / _MOST_REFRESHES))
    # One full step first, not two: a slope over one step of noise, continued over several, is worse than none.
    rhythm = Rhythm(run.steps, restore, reducer.full_every or shortest, reducer.warmup_steps or 1, start)
    yield rhythm
    if restore == "copy" or reducer.full_every:
        return
    while (rhythm := replace(rhythm, full_every=rhythm.full_every + 1)).refreshes >= LEAST_REFRESHES:
        yield rhythm


def _nth(choice: Choice) -> str:
    every = choice.rhythm.full_every
    return f"{every}{'rd' if every == 3 else 'th'}"


def expected(costs: Costs, reducer: TokenReducer, run: RunFacts, scope: str, rhythm: Rhythm) -> Choice:
    """What one scope and rhythm is expected to gain, with those layers that gain, level by level from the finest.

    Layers that `ratios`, `layer_ratios` or `max_downsample` name are taken in any case.
    """
    specs, open_to_all = costs.specs(scope), copy.copy(reducer)
    is_named = reducer.max_downsample is not None or bool(reducer.ratios or reducer.layer_ratios)
    if not is_named:
        open_to_all.max_downsample = max((spec.downsample for spec in specs if not spec.left_alone), default=1)
    levels: dict[int, list[tuple[LayerSpec, float]]] = {}
    for spec, ratio in chosen_layers(open_to_all, specs, costs.name):
        if ratio > 0 or is_named:
            levels.setdefault(spec.downsample, []).append((spec, ratio))
    stock = costs.stock(run.load)
    plain = best = run.seconds(rhythm, stock, Kinds())
    total, taken = Kinds(), list[str]()
    for _, layers in sorted(levels.items()):
        kinds = {spec.name: costs.kinds(spec, ratio, run.load, reducer.kv_only) for spec, ratio in layers}
        gaining = [name for name, kind in kinds.items() if is_named or run.saves(rhythm, kind)]
        if not gaining:
            continue
        with_map = total + Kinds(matching=costs.matching(layers[0][0], run.load))
        with_level = sum((kinds[name] for name in gaining), with_map)
        seconds = run.seconds(rhythm, stock, with_level)
        if is_named or seconds * LEAST_GAIN <= best:
            best, total = seconds, with_level
            taken += gaining
    able = [spec.name for layers in levels.values() for spec, _ in layers]
    eager = run.steps * run.device.seconds(stock, run.load.itemsize)
    merged = stock * run.steps + total.refresh * rhythm.refreshes + total.reduced * rhythm.reduced
    return Choice(
        scope,
        rhythm,
        tuple(taken),
        eager / best,
        plain / best,
        run.device.name,
        {name: f"merging it would gain nothing on a {run.device.name}" for name in able if name not in taken},
        merged.flops / (stock.flops * run.steps),
    )
