"""The first step of a layer in a run: where its tokens are, how they merge, what it remembers.

Nothing here is traced, but for `rewrite`, which makes a map anew inside of a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_turbo.engine.layer import ReducedLayer
from gen_turbo.engine.run_map import RunMap
from gen_turbo.engine.state import LayerState, Phase, SequenceShape
from gen_turbo.engine.values import num_bytes
from gen_turbo.method import LayerInfo, StepInfo, TokenReducer
from gen_turbo.models.adapter import Adapter, Geometry, LayerSpec, coarsened
from gen_turbo.tokens.frames import one_sequence, side_by_side
from gen_turbo.tokens.token_map import TokenMap

if TYPE_CHECKING:
    from gen_turbo.engine.context import Context


class Beginning:
    """Makes the maps of a run and the memory of its layers.

    Attributes:
        context: What the running call belongs to; the root sets it.
    """

    def __init__(self, reducer: TokenReducer, adapter: Adapter) -> None:
        self.reducer, self.adapter = reducer, adapter
        self.context: Context | None = None

    def check(self, geometry: Geometry) -> None:
        """Raises ValueError if references are to be reduced, which the first call of a run does not allow."""
        ratio = self.reducer.reference_ratio
        if ratio and geometry.left_alone and not self.reducer.keeps_all:
            raise ValueError(f"reference_ratio={ratio} has no effect, for {geometry.left_alone}; leave it out")

    def start(self, layer: ReducedLayer, given: dict[str, Any]) -> None:
        """Finds the layer's tokens and its map, or says in `layer.state.left_alone` why it runs in full."""
        state, context = layer.state, self.context
        assert context is not None
        signature, geometry = layer.spec.signature, context.geometry
        x = given.get(layer.tokens)
        context.release(state)
        if geometry.left_alone:
            self._leave(layer, geometry.left_alone)
            return
        if not isinstance(x, Tensor) or x.ndim != 3:
            self._leave(layer, "its tokens have another shape")
            return
        shape, state.sides = _shape_of(x, layer.spec, context)
        if shape.image <= 0:
            self._leave(layer, "it has no image tokens")
            return
        state.shape = shape
        base = self._map(layer, x[:, shape.leading : shape.leading + shape.image], state)
        state.num_kept = base.num_slots
        if base.num_slots == base.num_tokens:
            context.run.num_reduced += 1
            self._leave(layer, "its method keeps every token")
            return
        state.base, state.map = base, base.widened(shape.leading, shape.trailing)
        for arg in signature.token_args:
            value = given.get(arg.name)
            items: Any = enumerate(value) if isinstance(value, tuple | list) else [(None, value)]
            read = [(index, item) for index, item in items if arg.reads(item, index or 0)]
            state.rows.append([(index, base.rows_of(item, arg, context.num_text)) for index, item in read])

    def rewrite(self, layer: ReducedLayer, x: Tensor) -> None:
        """Makes the map of a layer anew, from what it reads now, for all that share it."""
        state = layer.state
        assert state.base is not None and state.map is not None
        first = state.map.leading
        image, info = x[:, first : first + state.base.num_tokens], layer.step_info
        for number in range(self.reducer.map_period):
            # A number that torch.compile knows, where it may have made the one in `step_info` a symbol.
            if info.num_plans == number:
                info = StepInfo(0, number)
        kept = state.base if layer.keeps_references else None
        state.base.write(self._matched(layer, image, state.ratio, info, kept))

    def allocate(self, layer: ReducedLayer, misses: list[Tensor | None]) -> None:
        """Keeps a layer's first residuals; one that would exceed the memory limit runs in full instead."""
        state, context, reducer = layer.state, self.context, self.reducer
        assert context is not None
        terms = 1 + reducer.extrapolation_order
        more = terms * num_bytes(*misses)
        limit = reducer.memory_limit_mb
        if limit is not None and context.run.num_bytes + more > limit * 1e6:
            self._leave(layer, "memory_limit_mb has no room for it")
            context.drop_unused()
            return
        context.residual_bytes += more
        state.details = [None if m is None else torch.stack([m, torch.zeros_like(m)][:terms]) for m in misses]

    def _leave(self, layer: ReducedLayer, why: str) -> None:
        assert self.context is not None
        self.context.release(layer.state)
        layer.state.left_alone = why
        layer.phase = Phase.FULL

    def _map(self, layer: ReducedLayer, tokens: Tensor, state: LayerState) -> RunMap:
        """The map of this resolution, made by the first layer that needs it and served to the others."""
        context = self.context
        assert context is not None
        # Layers that refresh at other steps keep a map of their own where maps are made anew.
        group = layer.state.weights if self.reducer.map_life and self.reducer.restore != "copy" else None
        stream = layer.spec.signature.stream
        key = (stream, state.grid, tokens.shape[1], len(tokens), state.ratio, id(group))
        known = context.maps.get(key)
        if known is not None and 0 < self.reducer.map_life <= context.step - known.made_at:
            known.made_at, known.num_maps = context.step, known.num_maps + 1
            known.write(self._matched(layer, tokens, state.ratio, StepInfo(context.step, known.num_maps), known))
        if known is None:
            dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
            value = self._matched(layer, tokens, state.ratio, StepInfo(context.step))
            known = context.maps[key] = RunMap(value, len(tokens), dtype, owner=layer.name)
            known.made_at = context.step
        return known

    @torch.no_grad()
    def _matched(
        self, layer: ReducedLayer, tokens: Tensor, ratio: float, step_info: StepInfo, kept: RunMap | None = None
    ) -> TokenMap:
        """Plans the merging of image tokens (B, N, C), those of references beside the target each for themselves.

        References do not change during a run: where there is a map already, `kept`, their part of it stays.
        """
        context, grid = self.context, layer.state.grid
        assert context is not None
        num_frames = context.geometry.num_frames if grid else 1
        # A layer may read the target alone.
        is_alone = grid is None or tokens.shape[1] == num_frames * grid[0] * grid[1]
        references = () if is_alone else context.geometry.references
        num_target = tokens.shape[1] - sum(region.num_tokens for region in references)
        target = self._region(layer, tokens[:, :num_target], num_frames, grid, ratio, step_info)
        if not references:
            return target
        if kept is not None:
            slot, anchor = kept.slot_BN[:, num_target:], kept.anchor_BM[:, target.num_slots :]
            return side_by_side([target, TokenMap(slot - target.num_slots, anchor - num_target)])
        plans, ratio = [target], ratio if self.reducer.reference_ratio is None else self.reducer.reference_ratio
        start = num_target
        for region in references:
            part = tokens[:, start : start + region.num_tokens]
            plans.append(self._region(layer, part, region.num_frames, region.grid, ratio, step_info))
            start += region.num_tokens
        return side_by_side(plans)

    def _region(
        self,
        layer: ReducedLayer,
        tokens: Tensor,
        num_frames: int,
        grid: tuple[int, int] | None,
        ratio: float,
        step_info: StepInfo,
    ) -> TokenMap:
        """Plans the merging of the tokens of one image or video.

        Under guidance the batch repeats its images: the second rows, which are conditional, plan for all. Where
        positions have no batch axis, one map serves all samples, by the mean of their similarities. Frames of a video
        are matched one by one.
        """
        context = self.context
        assert context is not None
        num = context.geometry.num_images
        rows = tokens[num : 2 * num] if 0 < num < len(tokens) and len(tokens) % num == 0 else tokens
        shares = layer.spec.signature.shares_map and len(rows) > 1
        metric = _side_by_side(rows) if shares else rows

        def value(kind: str) -> Tensor | None:
            if self.reducer.scope != "attention":
                # Blocks read tokens before any norm; their attention is not asked for the value of tokens.
                return None
            found = self.adapter.semantic_value(layer.module, rows, kind, context.conditioning)
            if found is None:
                return None
            found = found.mean(0, keepdim=True) if shares else found
            return found.reshape(len(found) * num_frames, -1)

        info = LayerInfo(layer.name, ratio, grid, semantic=value)
        # Where there is a grid, of a length that torch.compile knows.
        length = grid[0] * grid[1] if grid else metric.shape[1] // num_frames
        metric = metric.reshape(len(metric) * num_frames, length, metric.shape[2])
        found = self.reducer.plan(metric, info, step_info)
        return one_sequence(found, num_frames) if num_frames > 1 else found


def _shape_of(x: Tensor, spec: LayerSpec, context: Context) -> tuple[SequenceShape, str]:
    """Where image tokens are in a layer's tokens (B, N, C), and the sides of their grid as `LayerState` has them."""
    geometry, signature = context.geometry, spec.signature
    leading = context.num_text if signature.has_text_before else 0
    rest = x.shape[1] - leading
    grid = None if geometry.grid is None else coarsened(geometry.grid, spec.downsample)
    num_target = geometry.num_frames * grid[0] * grid[1] if grid else 0
    num_grid = num_target + sum(region.num_tokens for region in geometry.references)
    num_image = min(num_grid, rest) if signature.has_text_after else rest
    text = context.num_text, context.num_merged_text, geometry.caches_text
    sides = f"{grid[0]} {grid[1]}" if grid and num_image in (num_target, num_grid) else ""
    return SequenceShape(len(x), num_image, leading, rest - num_image, *text), sides


def _side_by_side(rows: Tensor) -> Tensor:
    """Joins samples (B, N, C) to (1, N, B * C) so that a cosine is the mean of the samples' cosines."""
    unit = F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)
    return unit.permute(1, 0, 2).reshape(1, rows.shape[1], -1)
