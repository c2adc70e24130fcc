"""A reducer bound to one layer: reduce the tokens, call the layer's own processor, restore its output."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from gen_turbo.contract import Frame, Grid, Site, TokenReducer
from gen_turbo.core.plan import ReductionPlan
from gen_turbo.hosts.base import DenoiserHost, Layer, coarsened
from gen_turbo.hosts.clock import Clock, Memory, PlannedAt, Stream


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


@dataclass
class Binding:
    """One layer, the processor it had, and the reducer that now works in front of it.

    Attributes:
        index: The layer's place among the reduced ones; staggers the full steps.
    """

    layer: Layer
    inner: Any
    reducer: TokenReducer
    ratio: float
    host: DenoiserHost
    clock: Clock
    index: int
    stats: LayerStats = field(default_factory=LayerStats)

    def run(self, attn: nn.Module, tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the layer's own processor on fewer tokens where that is due, otherwise exactly as it was called."""
        stream = self.clock.current
        if stream is None or not _is_plain_self_attention(tokens, args, kwargs):
            return self.inner(attn, tokens, *args, **kwargs)

        def layer(x: Tensor) -> Any:
            self.stats.flops += _attention_flops(x)
            return self.inner(attn, x, *args, **kwargs)

        grid = coarsened(stream.observation.grid, self.layer.downsample)
        self._note(tokens, grid)
        if self.ratio == 0:
            self.stats.num_full += 1
            return layer(tokens)
        if self.reducer.restore == "copy":
            plan = self._plan(attn, tokens, grid, stream)
            return self._reduced(layer, tokens, plan, stream)
        return self._corrected(layer, attn, tokens, grid, stream)

    def _corrected(self, layer: Any, attn: nn.Module, tokens: Tensor, grid: Grid, stream: Stream) -> Any:
        memory = stream.memories.get(self.layer.name)
        if memory is not None and not self._is_full_step(stream.step):
            output = self._reduced(layer, tokens, memory.plan, stream)
            output = output.add_(memory.detail) if not output.requires_grad else output + memory.detail
            if memory.slope is not None:
                output.add_(memory.slope, alpha=stream.step - memory.step)
            return output
        full = layer(tokens)
        self.stats.num_full += 1
        plan = self._plan(attn, tokens, grid, stream)
        if not self._fits(full, memory, stream):
            return full
        detail = full - plan.unmerge(layer(plan.merge(tokens)))
        slope = None
        if self.reducer.order == 1 and memory is not None and stream.step > memory.step:
            slope = (detail - memory.detail).div_(stream.step - memory.step)
        stream.memories[self.layer.name] = Memory(plan, stream.step, detail, slope)
        self.clock.note_bytes()
        self.stats.num_kept = plan.num_slots
        return full

    def _reduced(self, layer: Any, tokens: Tensor, plan: ReductionPlan, stream: Stream) -> Tensor:
        stream.num_reduced += 1
        self.stats.num_kept = plan.num_slots
        if plan.is_identity:
            self.stats.num_full += 1
        else:
            self.stats.num_reduced += 1
        return plan.unmerge(layer(plan.merge(tokens)))

    def _is_full_step(self, step: int) -> bool:
        settings = self.reducer
        offset = self.index % settings.refresh if settings.stagger else 0
        return step < settings.warmup or (step - settings.warmup + 1 + offset) % settings.refresh == 0

    def _fits(self, output: Tensor, memory: Memory | None, stream: Stream) -> bool:
        limit = self.reducer.memory_limit_mb
        if limit is None:
            return True
        wanted = (1 + self.reducer.order) * output.numel() * output.element_size()
        held = stream.num_bytes - (memory.num_bytes if memory else 0)
        return held + wanted <= limit * 1e6

    def _plan(self, attn: nn.Module, tokens: Tensor, grid: Grid, stream: Stream) -> ReductionPlan:
        """The plan of this resolution, made by the first layer that needs it and served to the others."""
        key = (grid, self.ratio)
        entry = stream.plans.get(key)
        if entry is None or self._is_stale(entry, stream.step):
            # Guidance halves show one picture: the conditional half plans for both.
            rows = tokens[len(tokens) // 2 :] if stream.is_guided and len(tokens) % 2 == 0 else tokens
            site = Site(
                self.layer.name,
                self.ratio,
                grid if grid[0] * grid[1] == tokens.shape[1] else None,
                semantic=lambda kind: self.host.semantic_value(attn, rows, kind),
            )
            count = entry.num_plans + 1 if entry else 0
            plan = self.reducer.plan(rows, site, Frame(stream.step, count))
            entry = stream.plans[key] = PlannedAt(plan, stream.step, count)
        return entry.plan

    def _is_stale(self, entry: PlannedAt, step: int) -> bool:
        serve = self.reducer.plan_steps
        return serve > 0 and step - entry.step >= serve

    def _note(self, tokens: Tensor, grid: Grid) -> None:
        stats = self.stats
        stats.grid, stats.num_tokens = grid, tokens.shape[1]
        stats.stock_flops += _attention_flops(tokens)
        stats.num_kept = stats.num_kept or stats.num_tokens


def _attention_flops(tokens: Tensor) -> int:
    """Operations of one self-attention with its four projections on tokens (B, N, C)."""
    batch, num_tokens, channels = tokens.shape
    return 4 * batch * num_tokens * channels * (num_tokens + 2 * channels)


def _is_plain_self_attention(tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call brings nothing that has a row per token besides the tokens themselves."""
    is_alone = all(value is None for value in args) and kwargs.get("encoder_hidden_states") is None
    return tokens.ndim == 3 and is_alone and kwargs.get("attention_mask") is None


class BoundProcessor:
    """A binding in the shape of the processor it stands for.

    Each layer has its own subclass, made by `bound_processor`, which holds the binding: diffusers filters arguments
    by the signature of `__call__` and makes new objects of a processor's class without arguments
    (`load_ip_adapter`), and both must find what they would have found before.
    """

    binding: Binding


def bound_processor(binding: Binding) -> BoundProcessor:
    """Makes the processor of one binding, with the signature of the inner processor."""
    inner = binding.inner

    def call(self: BoundProcessor, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return binding.run(attn, hidden_states, args, kwargs)

    call.__signature__ = inspect.signature(type(inner).__call__)  # type: ignore[attr-defined]
    members = {"binding": binding, "__call__": call, "__doc__": BoundProcessor.__doc__}
    made: type[BoundProcessor] = type(f"Bound{type(inner).__name__}", (BoundProcessor,), members)
    return made()
