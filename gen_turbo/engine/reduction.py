"""What one layer does in one call: run in full, or on merged tokens with the remembered detail added back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gen_turbo.engine.base import Layer
from gen_turbo.engine.call import Call, flat
from gen_turbo.engine.clock import Clock, Memory, PlannedAt, Stream
from gen_turbo.engine.planning import Semantic, plan_call
from gen_turbo.method import Grid, StepInfo, TokenReducer
from gen_turbo.tokens.ratios import ratio_at_step
from gen_turbo.tokens.token_map import TokenMap


@dataclass
class LayerStats:
    """What happened at one layer since it was attached."""

    num_full: int = 0
    num_reduced: int = 0
    num_tokens: int = 0
    num_kept: int = 0
    grid: Grid | None = None
    flops: int = 0
    stock_flops: int = 0
    plan_age: int = 0


@dataclass(frozen=True)
class Cost:
    """What one layer costs.

    Attributes:
        linear_weights: Weights of the linear layers that every token of the sequence goes through.
        width: Channels of all heads of the attention together.
    """

    linear_weights: int
    width: int

    def flops(self, call: Call, num_queries: int, num_keys: int, more_text: int = 0) -> int:
        """Operations on so many image queries and keys; text that shares the attention is counted with it."""
        batch = call.sequence.shape[0]
        inside = call.leading + call.trailing + (more_text if call.leading else 0)
        num_text = max(call.observation.num_text + more_text, inside)
        rows = num_queries + inside
        softmax = 2 * (num_queries + num_text) * (num_keys + num_text) * self.width
        return 2 * batch * (rows * self.linear_weights + softmax)


@dataclass
class Reduction:
    """One layer's share of a reducer: plans, full steps, memory, counts.

    Attributes:
        index: The layer's place among the reduced ones; staggers the full steps.
    """

    layer: Layer
    reducer: TokenReducer
    ratio: float
    clock: Clock
    index: int
    cost: Cost
    stats: LayerStats = field(default_factory=LayerStats)

    def plan(self, call: Call, stream: Stream, semantic: Semantic) -> TokenMap | None:
        """The plan to run this call on; None where it runs in full."""
        self._note(call)
        if self._ratio_at(stream.step) == 0:
            stream.memories.pop(self.layer.name, None)
            self._count_full(call)
            return None
        if self.reducer.restore == "copy":
            plan = self._served(self._planned(call, stream, semantic), stream)
        else:
            memory = self._memory(call, stream)
            if memory is None or self._is_due(memory.step, stream.step):
                self._count_full(call)
                return None
            plan = self._served(memory.planned, stream)
        stream.num_reduced += 1
        self.stats.num_kept = plan.num_slots
        if plan.is_identity:
            self._count_full(call)
            return None
        self.stats.num_reduced += 1
        self._spend(call, plan)
        return plan

    def remembered_plan(self, call: Call, stream: Stream, semantic: Semantic) -> TokenMap | None:
        """The plan whose misses a full call is going to remember; None where it remembers nothing."""
        if self._ratio_at(stream.step) == 0 or self.reducer.restore == "copy":
            return None
        plan = self._planned(call, stream, semantic).plan
        if plan.is_identity:
            stream.num_reduced += 1
            return None
        return plan if self._fits([call.sequence], self._memory(call, stream), stream) else None

    def follow(self, call: Call, plan: TokenMap | None, is_full: bool) -> None:
        """Counts a call whose plan another layer made; in a full call it is run by the plan as well."""
        self._note(call)
        if is_full:
            self._count_full(call)
        else:
            self.stats.num_reduced += 1
        if plan is not None:
            self.stats.num_kept = plan.num_slots
            self._spend(call, plan)

    def remember(
        self,
        call: Call,
        stream: Stream,
        semantic: Semantic,
        output: Any,
        on_slots: Callable[[TokenMap], list[Any]],
    ) -> None:
        """After a full call, keeps the detail that a call on merged tokens misses; that call is made here."""
        if self._ratio_at(stream.step) == 0 or self.reducer.restore == "copy":
            return
        planned = self._planned(call, stream, semantic)
        plan = self._served(planned, stream)
        if plan.is_identity:
            stream.num_reduced += 1
            return
        full, memory = flat(output), self._memory(call, stream)
        if not self._fits(full, memory, stream):
            return
        self._spend(call, plan)
        detail = [_difference(a, b) for a, b in zip(full, on_slots(plan), strict=True)]
        slope = None
        if (
            self.reducer.extrapolation_order == 1
            and memory is not None
            and stream.step > memory.step
            and memory.is_for(plan)
        ):
            steps = stream.step - memory.step
            slope = [_difference(a, b, steps) for a, b in zip(detail, memory.detail, strict=True)]
        stream.memories[self.layer.name] = Memory(planned, stream.step, call.sequence.shape, detail, slope)
        self.clock.note_bytes()
        self.stats.num_kept = plan.num_slots

    def corrected(self, outputs: list[Any], stream: Stream) -> list[Any]:
        """Adds what is remembered to the outputs of a call on merged tokens."""
        memory = stream.memories.get(self.layer.name)
        if self.reducer.restore == "copy" or memory is None:
            return outputs
        slopes = memory.slope or [None] * len(outputs)
        steps = stream.step - memory.step
        return [_sum(y, detail, slope, steps) for y, detail, slope in zip(outputs, memory.detail, slopes, strict=True)]

    def _ratio_at(self, step: int) -> float:
        return ratio_at_step(self.ratio, step, self.reducer.step_scale)

    def _count_full(self, call: Call) -> None:
        self.stats.num_full += 1
        self.stats.flops += self.cost.flops(call, call.num_image, call.num_image)

    def _spend(self, call: Call, plan: TokenMap) -> None:
        num_queries = call.num_image if self.reducer.kv_only else plan.num_slots
        self.stats.flops += self.cost.flops(call, num_queries, plan.num_slots)

    def _memory(self, call: Call, stream: Stream) -> Memory | None:
        memory = stream.memories.get(self.layer.name)
        return memory if memory is not None and memory.shape == call.sequence.shape else None

    def _is_due(self, last: int, step: int) -> bool:
        """Whether a full step lies after the last one that ran and not after this one, which may have been left out."""
        settings = self.reducer
        offset = self.index % settings.full_every if settings.stagger else 0
        periods = [(at - settings.warmup_steps + 1 + offset) // settings.full_every for at in (last, step)]
        return step < settings.warmup_steps or periods[1] > periods[0]

    def _fits(self, outputs: list[Any], memory: Memory | None, stream: Stream) -> bool:
        limit = self.reducer.memory_limit_mb
        if limit is None:
            return True
        once = sum(y.numel() * y.element_size() for y in outputs if y is not None)
        room = limit * 1e6 - (1 + self.reducer.extrapolation_order) * once + (memory.num_bytes if memory else 0)
        if stream.num_bytes > room:
            # Keys and values of text save little; they give way.
            stream.projected.clear()
        return bool(stream.num_bytes <= room)

    def _planned(self, call: Call, stream: Stream, semantic: Semantic) -> PlannedAt:
        """The plan of this resolution, made by the first layer that needs it and served to the others."""
        ratio = self._ratio_at(stream.step)
        key = (call.grid, call.num_image, call.sequence.shape[0], ratio)
        entry = stream.plans.get(key)
        if entry is None or self._is_stale(entry, stream.step):
            frame = StepInfo(stream.step, entry.num_plans + 1 if entry else 0)
            plan = plan_call(self.reducer, call, self.layer.name, ratio, frame, semantic)
            entry = stream.plans[key] = PlannedAt(plan, stream.step, frame.num_plans)
        return entry

    def _served(self, planned: PlannedAt, stream: Stream) -> TokenMap:
        self.stats.plan_age = max(self.stats.plan_age, stream.step - planned.step)
        return planned.plan

    def _is_stale(self, entry: PlannedAt, step: int) -> bool:
        serve = self.reducer.plan_life
        return serve > 0 and step - entry.step >= serve

    def _note(self, call: Call) -> None:
        stats = self.stats
        stats.grid, stats.num_tokens = call.grid, call.num_image
        merged = call.observation.num_merged_text
        stats.stock_flops += self.cost.flops(call, call.num_image, call.num_image, merged)
        stats.num_kept = stats.num_kept or stats.num_tokens


def _difference(a: Tensor | None, b: Tensor | None, divisor: int = 1) -> Tensor | None:
    if a is None or b is None:
        return None
    difference = a - b
    return difference if divisor == 1 else difference.div_(divisor)


def _sum(y: Tensor | None, detail: Tensor | None, slope: Tensor | None, steps: int) -> Tensor | None:
    if y is None or detail is None:
        return y
    total = y + detail if y.requires_grad else y.add_(detail)
    return total if slope is None else total.add_(slope, alpha=steps)
