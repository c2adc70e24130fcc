"""What each layer does in each step of a run, known from the settings before the step begins."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gen_turbo.engine.context import Context
from gen_turbo.engine.layer import ReducedLayer
from gen_turbo.engine.state import LayerState, Phase
from gen_turbo.method import StepInfo, TokenReducer
from gen_turbo.tokens.ratios import ratio_at_step
from gen_turbo.training.schedule import MERGING


@dataclass
class Group:
    """Layers that do the same in every step of a run.

    Attributes:
        ratio: The fraction of tokens that they remove.
        offset: Steps by which their refreshes come early, with `stagger`.
        units: The units that skip them, by name.
        layers: In the order in which the model has them.
    """

    ratio: float
    offset: int
    units: frozenset[str]
    layers: list[ReducedLayer] = field(default_factory=list)


@dataclass
class GroupState:
    """One group in one run.

    Attributes:
        weights: What its layers weigh their details with.
        last: The step of the last refresh; None before the first.
        ratio: The ratio of that refresh.
        written: The steps in `weights`.
        phase: What the layers do in the running step.
    """

    weights: Tensor
    last: int | None = None
    ratio: float = 0.0
    written: float = 1.0
    phase: Phase = Phase.FULL

    def write(self, gap: float) -> None:
        """Puts a number of steps into the buffer that graphs read."""
        if gap != self.written:
            # Unlike an assignment, which copies the number from the host and waits for the device.
            self.weights[1].fill_(gap)
            self.written = gap


class Program:
    """Chooses the phase of every layer of a model, once per step.

    Args:
        reducer: The settings.
        layers: The layers, those of one span one after the other.
        units: For each unit that may be skipped, the layers that are skipped with it, by name.
    """

    def __init__(self, reducer: TokenReducer, layers: list[ReducedLayer], units: dict[str, list[str]]) -> None:
        self.reducer = reducer
        self.layers = layers
        groups: dict[tuple[float, int, frozenset[str]], Group] = {}
        # Blocks of one span are one layer: what they share is made, and read, by all of them or by none.
        numbers: dict[int, int] = {}
        for layer in layers:
            number = numbers.setdefault(id(getattr(layer, "span", layer)), len(numbers))
            offset = number % reducer.refresh_every if reducer.stagger else 0
            inside = frozenset(unit for unit, names in units.items() if layer.name in names)
            groups.setdefault((layer.ratio, offset, inside), Group(layer.ratio, offset, inside)).layers.append(layer)
        self.groups = list(groups.values())
        if reducer.stagger and len(numbers) == 1 < len(layers):
            raise ValueError("stagger=True spreads nothing where all blocks share one short sequence; leave it out")

    def enter(self, context: Context) -> None:
        """Makes what a new context's layers hold, or empties what they held in an earlier one."""
        if context.is_revived:
            for state in context.groups:
                state.last = None
            for held in context.states.values():
                held.plan_age = 0
                held.calls.clear()
                for detail in held.details:
                    if detail is not None:
                        detail[1:] = 0
            context.residual_bytes = sum({id(held): held.num_bytes for held in context.states.values()}.values())
            return
        device = context.layout.device
        for group in self.groups:
            weights = torch.ones(2, device=device)
            context.groups.append(GroupState(weights))
            shared: dict[int, LayerState] = {}
            for layer in group.layers:
                span = id(getattr(layer, "span", layer))
                context.states[layer] = shared.setdefault(span, LayerState(weights))

    def begin(self, context: Context, skipped: frozenset[str]) -> tuple[object, ...]:
        """Sets every layer for the running step; gives what identifies its kind of step."""
        kind: list[object] = []
        written: set[int] = set()
        absent = {layer.name for group in self.groups if group.units & skipped for layer in group.layers}
        for group, state in zip(self.groups, context.groups, strict=True):
            ratio = ratio_at_step(group.ratio, context.step, self.reducer.step_scale)
            if all(context.states[layer].map is None for layer in group.layers):
                # No step has begun what the layers remember, as when a first call fills a cache of keys.
                state.last = None
            state.phase = self._phase(group, state, ratio, context.step, skipped)
            kind.append(state.phase)
            for layer in group.layers:
                held = layer.state = context.states[layer]
                if ratio == 0 and held.map is not None:
                    context.release(held)
                layer.phase = Phase.FULL if held.left_alone else state.phase
                layer.starts = layer.writes_map = False
                layer.keeps_references = True
                if layer.phase is not Phase.FULL:
                    kind += self._prepared(layer, context, ratio, written, absent)
        return tuple(kind)

    def _prepared(
        self, layer: ReducedLayer, context: Context, ratio: float, written: set[int], absent: set[str]
    ) -> list[object]:
        """Sets what a merging layer makes before: first map and memory, or another map; gives its part of the kind."""
        held = layer.state
        if context.is_revived and context.step == 0 and held.base is not None:
            # The buffers are there; what is in them is made anew, eagerly as in any first step.
            if id(held.base) not in written and held.base.owner == layer.name:
                written.add(id(held.base))
                held.base.made_at = held.base.num_maps = 0
                layer.writes_map, layer.step_info = True, StepInfo(0)
                layer.keeps_references = False
            return ["starts"]
        may_change = layer.phase is Phase.REFRESH or self.reducer.restore == "copy"
        if held.map is None or (may_change and held.ratio != ratio):
            context.release(held)
            layer.starts, held.ratio = True, ratio
            return ["starts"]
        if may_change and self._is_stale(held, context, layer, written, absent):
            layer.writes_map, layer.step_info = True, self._step_info(held, context)
            return [layer.step_info]
        return []

    def rest(self, context: Context | None) -> None:
        """Makes every layer stock, and keeps nothing that belongs to the step alone."""
        for layer in self.layers:
            layer.phase, layer.starts, layer.writes_map = Phase.FULL, False, False
        if context is not None:
            context.forget_positions()

    def end(self, context: Context, skipped: frozenset[str]) -> int:
        """Counts a step that is over; gives how many states were reduced in it."""
        num_reduced, seen = 0, set[int]()
        for group, state in zip(self.groups, context.groups, strict=True):
            # A step whose merging is left out runs the layers in full.
            runs = not group.units & (skipped - {MERGING})
            for layer in group.layers:
                held = context.states[layer]
                if not runs or id(held) in seen:
                    continue
                seen.add(id(held))
                phase = state.phase if held.map is not None else Phase.FULL
                held.calls[phase, held.num_kept] += 1
                num_reduced += phase is Phase.REDUCED
                if phase is not Phase.FULL and held.base is not None:
                    held.plan_age = max(held.plan_age, context.step - held.base.made_at)
        return num_reduced

    def _phase(self, group: Group, state: GroupState, ratio: float, step: int, skipped: frozenset[str]) -> Phase:
        if group.units & skipped:
            return Phase.FULL
        if ratio == 0:
            state.last = None
            return Phase.FULL
        if self.reducer.restore == "copy":
            return Phase.REDUCED
        last = state.last
        if last is not None and not self._is_due(group, last, step):
            state.write(step - last)
            return Phase.REDUCED
        # Of another ratio the residual says nothing of a change: divided by infinity it is none.
        state.write(float("inf") if last is None or state.ratio != ratio else step - last)
        state.last, state.ratio = step, ratio
        return Phase.REFRESH

    def _is_due(self, group: Group, last: int, step: int) -> bool:
        """Whether a full step lies after the last one and not after this one, which may have been left out."""
        warmup, every = self.reducer.num_warmup, self.reducer.refresh_every
        periods = [(at - warmup + 1 + group.offset) // every for at in (last, step)]
        return step < warmup or periods[1] > periods[0]

    def _is_stale(
        self, held: LayerState, context: Context, layer: ReducedLayer, written: set[int], absent: set[str]
    ) -> bool:
        """Whether a layer has to make its map anew for all that share it: the first to run of those does."""
        base, serve = held.base, self.reducer.map_life
        if base is None or serve == 0 or id(base) in written or not layer.is_first:
            return False
        if context.step - base.made_at < serve:
            return False
        # What a layer remembers belongs to the map of its refresh, so no other layer may change that behind it.
        is_turn = base.owner == layer.name or (base.owner in absent and self.reducer.restore == "copy")
        if is_turn:
            written.add(id(base))
            base.made_at, base.num_maps = context.step, base.num_maps + 1
        return is_turn

    def _step_info(self, held: LayerState, context: Context) -> StepInfo:
        """What the method receives: no more than what its choice depends on, so that graphs can be used again."""
        assert held.base is not None
        period, number = self.reducer.map_period, held.base.num_maps
        return StepInfo(0, number % period) if period else StepInfo(context.step, number)
