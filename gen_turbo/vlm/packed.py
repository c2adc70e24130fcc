"""Packed vision towers, as Qwen's: images of any size in one row of tokens, attention in windows, 2 x 2 patches each.

Shape names: S tokens of all images, U units of G tokens that become one feature, M slots of units, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from gen_turbo.method import Grid, LayerInfo, StepInfo, TokenReducer
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.call import CallState, begin_anew
from gen_turbo.vlm.family import TowerFacts
from gen_turbo.vlm.merging import Merging
from gen_turbo.vlm.packed_attention import PackedAttention, Seen
from gen_turbo.vlm.planning import plan_tokens
from gen_turbo.vlm.tower import EARLY, block_ratio, watched_blocks


@dataclass
class _Pass:
    """One call.

    Attributes:
        grids: (height, width) of each image in units.
        order: The unit, in raster order, at each place of the tower's own order; None where they are the same.
        left: Units that each image has now.
        by_block: Each block's merge of the units that entered it.
        totals: The units after each block, as a merge of those that the call began with.
        seen: What the watched blocks were given and projected.
    """

    grids: list[Grid]
    order: Tensor | None
    left: list[int]
    by_block: dict[int, Merging] = field(default_factory=dict)
    totals: dict[int, Merging] = field(default_factory=dict)
    seen: dict[int, Seen] = field(default_factory=dict)


class PackedTower:
    """The hooks on one packed tower.

    What merges are the units of 2 x 2 patches that the tower's end turns into one feature, patch by patch, so that
    every feature is made as in the stock model. A unit may merge with one of another window; the slot then stands
    in the window, and at the position, of the unit that lends it its place. As in `Tower` merging happens where the
    norm between attention and MLP is entered. Features, also those of inner blocks, are copied back to every unit.
    Videos pass as they are.

    Attributes:
        reducer: Plans each block's merge; None only watches.
        on_block: Receives the block and the units of all images before and after it.
        early: A block before the last whose attention is asked for as well; None if there is none.
        is_video: Says whether the tower is given frames of a video now, which pass as they are.
    """

    _pass: CallState[_Pass | None] = CallState(lambda: None)
    _plans: CallState[list[TokenMap]] = CallState(list)

    def __init__(self, model: nn.Module, facts: TowerFacts, reducer: TokenReducer | None) -> None:
        self.facts, self.reducer = facts, reducer
        tower: Any = model.get_submodule(facts.module)
        self.module = tower
        self.blocks: list[Any] = list(getattr(tower, facts.blocks))
        self.num_blocks = len(self.blocks)
        self.early: int | None = None
        self.is_video: Callable[[], bool] = lambda: False
        self.on_block: Callable[[int, int, int], None] = lambda block, before, after: None
        self._side: int = tower.spatial_merge_size
        self._unit = self._side**2
        self._attention = [PackedAttention(getattr(block, facts.attention)) for block in self.blocks]

    @property
    def watched(self) -> list[int]:
        """Blocks whose queries and keys are seen."""
        return watched_blocks(self.reducer, self.num_blocks, self.early)

    def plans(self) -> list[TokenMap]:
        """The plan of the whole tower on each image of the last call, in raster order; empty where none merged."""
        return self._plans

    def values(self, kind: str) -> list[Tensor] | None:
        """The attention that the units of each image received in the last block, in raster order.

        Args:
            kind: "self" for the column mean of attention, "early self" in the early block; None for every other kind.

        Returns:
            One (U,) for each image, summing to one.
        """
        if kind.removeprefix(EARLY) != "self" or (now := self._pass) is None:
            return None
        early = self.early if kind.startswith(EARLY) else None
        received = self._received(self.num_blocks - 1 if early is None else early, now)
        raster = received if now.order is None else torch.empty_like(received).index_copy(0, now.order, received)
        return list(raster.split_with_sizes(now.left))

    def install(self) -> Iterator[Any]:
        """Puts the hooks in place, one after the other, and gives what takes each off, with a method `remove`."""
        tower = self.module
        yield tower.register_forward_pre_hook(self._before_tower, with_kwargs=True)
        watched = self.watched
        for index in watched:
            yield from self._attention[index].watch(self._seen(index))
        if self.reducer is None:
            return
        for index, block in enumerate(self.blocks):
            yield self._attention[index].weigh(self._size_before(index))
            yield block.register_forward_pre_hook(self._before_block(index), with_kwargs=True)
            if index in watched:
                norm2 = getattr(block, self.facts.norm2)
                yield norm2.register_forward_pre_hook(self._before_norm2(index))
                yield block.mlp.register_forward_hook(self._after_mlp(index))
        deep = zip(
            getattr(tower, "deepstack_visual_indexes", ()), getattr(tower, "deepstack_merger_list", ()), strict=True
        )
        for index, merger in [(self.num_blocks - 1, tower.merger), *deep]:
            yield merger.register_forward_pre_hook(self._before_merger(index))
            yield merger.register_forward_hook(self._after_merger(index))
        yield tower.register_forward_hook(self._after_tower)

    def _before_tower(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        begin_anew(self)
        sizes, side = args[1] if len(args) > 1 else kwargs["grid_thw"], self._side
        if self.is_video() or bool((sizes[:, 0] > 1).any()):
            return None
        grids, order = [(height // side, width // side) for _, height, width in sizes.tolist()], None
        if hasattr(tower, "window_size"):
            index, bounds = get_vision_window_index(sizes, side, tower.window_size, tower.patch_size, {**kwargs})
            kwargs = {**kwargs, "window_index": index, "cu_window_seqlens": bounds}
            order = index.to((args[0] if args else kwargs["hidden_states"]).device)
        self._pass = _Pass(grids, order, [height * width for height, width in grids])
        return args, kwargs

    def _before_block(self, index: int) -> Any:
        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            now = self._pass
            total = now.totals.get(index - 1) if now is not None else None
            if now is None or total is None:
                return None
            # Stays where this block merges nothing.
            now.totals[index] = total
            anchors = total.anchor_BM[0]
            rotary = tuple(
                table.unflatten(0, (-1, self._unit)).index_select(0, anchors).flatten(0, 1)
                for table in kwargs["position_embeddings"]
            )
            anchors = anchors * self._unit
            held = torch.searchsorted(anchors, kwargs["cu_seqlens"].to(anchors))
            # Windows may have lost all their units.
            held = held[held.diff(prepend=held[:1] - 1) > 0]
            cu_seqlens = (held * self._unit).to(kwargs["cu_seqlens"].dtype)
            shorter = {"position_embeddings": rotary, "cu_seqlens": cu_seqlens, "max_seqlen": None}
            return (self._merged(index - 1, args[0]), *args[1:]), {**kwargs, **shorter}

        return before

    def _before_norm2(self, index: int) -> Any:
        def before(norm: nn.Module, args: tuple[Any, ...]) -> Any:
            now = self._pass
            merging = self._plan(index, now) if now is not None else None
            if now is None or merging is None:
                return None
            earlier = now.totals.get(index - 1)
            now.by_block[index] = merging
            now.totals[index] = merging if earlier is None else earlier.then(merging)
            return (self._by_units(merging.merge, args[0]),)

        return before

    def _after_mlp(self, index: int) -> Any:
        def after(mlp: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            merging = self._pass.by_block.get(index) if self._pass is not None else None
            return self._by_units(merging.unmerge, output) if merging is not None else None

        return after

    def _before_merger(self, index: int) -> Any:
        return lambda merger, args: (self._merged(index, args[0]),)

    def _after_merger(self, index: int) -> Any:
        def after(merger: nn.Module, args: tuple[Any, ...], features_MC: Tensor) -> Tensor | None:
            total = self._pass.totals.get(index) if self._pass is not None else None
            return total.unmerge(features_MC[None])[0] if total is not None else None

        return after

    def _after_tower(self, tower: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        now, last = self._pass, self.num_blocks - 1
        if now is None or last not in now.totals:
            return output
        output.last_hidden_state = self._restored(last, output.last_hidden_state)
        if (states := getattr(output, "hidden_states", None)) is not None:
            output.hidden_states = tuple(self._restored(index - 1, state) for index, state in enumerate(states))
        self._plans = self._raster_plans(now, now.totals[last])
        return output

    def _plan(self, index: int, now: _Pass) -> Merging | None:
        """Plans one block's merge, images of one size together, on the mean over heads of the keys of each unit."""
        keys = self._attention[index].keys(now.seen[index]).mean(1)
        metric_UC = keys.reshape(-1, self._unit * keys.shape[-1])
        before, total = list(now.left), now.totals.get(index - 1)
        groups: dict[tuple[int, Grid], list[int]] = {}
        for image, key in enumerate(zip(now.left, now.grids, strict=True)):
            groups.setdefault(key, []).append(image)
        places = [_places(before, images, metric_UC.device) for images in groups.values()]
        plans = [
            self._group_plan(index, now, images, place, metric_UC[place])
            for images, place in zip(groups.values(), places, strict=True)
        ]
        for images, plan in zip(groups.values(), plans, strict=True):
            for image in images:
                now.left[image] = plan.num_slots
        self.on_block(index, sum(before), sum(now.left))
        if now.left == before:
            return None
        slot_U = places[0].new_empty(sum(before))
        anchor_M = places[0].new_empty(sum(now.left))
        for images, place, plan in zip(groups.values(), places, plans, strict=True):
            slots = _places(now.left, images, place.device)
            anchor_M[slots] = place.gather(1, plan.anchor_BM.expand(len(place), -1))
            slot_U[place] = plan.slot_BN + slots[:, :1]
        return Merging.of(TokenMap(slot_U[None], anchor_M[None]), 1, 0, total.sizes if total is not None else None)

    def _group_plan(self, index: int, now: _Pass, images: list[int], place: Tensor, metric: Tensor) -> TokenMap:
        assert self.reducer is not None
        height, width = now.grids[images[0]]
        is_whole = now.order is None and index - 1 not in now.totals

        def semantic(kind: str) -> Tensor | None:
            return self._received(index, now)[place] if kind == "self" else None

        start, steps = height * width, self.watched
        ratio = block_ratio(start, metric.shape[1], self.reducer.ratio_of(start), steps.index(index), len(steps))
        site = LayerInfo(f"{self.facts.module}.{index}", ratio, (height, width) if is_whole else None, semantic)
        return plan_tokens(self.reducer, metric, site, StepInfo(num_plans=index))

    def _received(self, index: int, now: _Pass) -> Tensor:
        """Attention received by each unit, (U,), summing to one in each image."""
        earlier = now.totals.get(index - 1)
        received = self._attention[index].received(now.seen[index], self._log_size(earlier))
        units = received.reshape(-1, self._unit).sum(1)
        lengths = torch.tensor(now.left, device=units.device)
        image = torch.arange(len(now.left), device=units.device).repeat_interleave(lengths, output_size=len(units))
        return units / units.new_zeros(len(now.left)).index_add(0, image, units)[image]

    def _raster_plans(self, now: _Pass, total: Merging) -> list[TokenMap]:
        """The plan of each image on its units in raster order."""
        destination = total.anchor_BM[0][total.slot_BN[0]]
        if now.order is not None:
            destination = torch.empty_like(destination).index_copy(0, now.order, now.order[destination])
        lengths: list[int] = [height * width for height, width in now.grids]
        plans: dict[int, TokenMap] = {}
        for length in dict.fromkeys(lengths):
            images = [image for image, other in enumerate(lengths) if other == length]
            place = _places(lengths, images, destination.device)
            rows = TokenMap.from_destinations(destination[place] - place[:, :1], now.left[images[0]])
            plans.update(zip(images, rows.by_row(), strict=True))
        return [plans[image] for image in range(len(lengths))]

    def _merged(self, index: int, y_SC: Tensor) -> Tensor:
        merging = self._pass.by_block.get(index) if self._pass is not None else None
        if merging is None or len(y_SC) != merging.num_tokens * self._unit:
            return y_SC
        return self._by_units(merging.merge, y_SC)

    def _restored(self, index: int, y_SC: Tensor) -> Tensor:
        total, merged = self._pass.totals.get(index) if self._pass is not None else None, self._merged(index, y_SC)
        # The last of the recorded states may be the output of the tower, restored already.
        if total is None or len(merged) != total.num_slots * self._unit:
            return merged
        return self._by_units(total.unmerge, merged)

    def _seen(self, index: int) -> Callable[[], Seen]:
        return lambda: self._pass.seen.setdefault(index, {}) if self._pass is not None else {}

    def _size_before(self, index: int) -> Callable[[], Tensor | None]:
        """Gives the logarithm of the size of each token that enters a block; None if all are of size one."""
        return lambda: self._log_size(self._pass.totals.get(index - 1)) if self._pass is not None else None

    def _log_size(self, total: Merging | None) -> Tensor | None:
        return total.log_sizes[0].repeat_interleave(self._unit) if total is not None else None

    def _by_units(self, verb: Callable[[Tensor], Tensor], y_SC: Tensor) -> Tensor:
        """Applies a verb of a merge to units as tokens of one row, (1, U, G * C)."""
        return verb(y_SC.reshape(1, -1, self._unit * y_SC.shape[-1])).reshape(-1, y_SC.shape[-1])


def _places(lengths: list[int], images: list[int], device: torch.device) -> Tensor:
    """Where the units of images of one size stand in the row of all, (images, units)."""
    starts = [0, *accumulate(lengths)]
    first = torch.tensor([starts[image] for image in images], device=device)
    return first[:, None] + torch.arange(lengths[images[0]], device=device)
