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

from gen_turbo.method import Grid, LayerInfo, StepInfo
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.blocks import Pass, TowerStage, block_ratio
from gen_turbo.vlm.merging import Merging
from gen_turbo.vlm.packed_attention import PackedAttention, Seen
from gen_turbo.vlm.planning import plan_tokens
from gen_turbo.vlm.stage import Handle


@dataclass
class _Pass(Pass):
    """One call; of videos nothing is known.

    Attributes:
        grids: (height, width) of each image in units.
        order: The unit, in raster order, at each place of the tower's own order; None where they are the same.
        left: Units that each image has now.
        seen: What the watched blocks were given and projected.
    """

    grids: list[Grid] = field(default_factory=list)
    order: Tensor | None = None
    left: list[int] = field(default_factory=list)
    seen: dict[int, Seen] = field(default_factory=dict)


class PackedTower(TowerStage[_Pass]):
    """A packed tower.

    What merges are the units of 2 x 2 patches that the tower's end turns into one feature, patch by patch, so that
    every feature is made as in the stock model. A unit may merge with one of another window; the slot then stands
    in the window, and at the position, of the unit that lends it its place. Features, also those of inner blocks, are
    copied back to every unit. Videos pass as they are.

    What is known of images, plans and the attention that units received ("self"), is in raster order.
    """

    _make = _Pass

    def __init__(self, model: nn.Module, *settings: Any, **more: Any) -> None:
        super().__init__(model, *settings, **more)
        self._side: int = self._tower.spatial_merge_size
        self._unit: int = self._side**2
        self._attention = [PackedAttention(getattr(block, self._facts.attention)) for block in self._blocks]

    def place(self, model: nn.Module) -> Iterator[Handle]:
        """Puts hooks on the tower, its blocks and their parts."""
        tower = self._tower
        yield tower.register_forward_pre_hook(self._before_tower, with_kwargs=True)
        yield from self._place_blocks()
        if self._reducer is not None:
            levels = getattr(tower, "deepstack_visual_indexes", ()), getattr(tower, "deepstack_merger_list", ())
            for index, merger in [(self._last_block, tower.merger), *zip(*levels, strict=True)]:
                yield merger.register_forward_pre_hook(self._before_merger(index))
                yield merger.register_forward_hook(self._after_merger(index))
        yield tower.register_forward_hook(self._after_tower)
        yield tower.register_forward_hook(lambda module, args, output: self._passes.end(), always_call=True)

    def _watch(self, index: int) -> Iterator[Handle]:
        watching: Iterator[Handle] = self._attention[index].watch(lambda: self._passes.now.seen.setdefault(index, {}))
        return watching

    def _weigh(self, index: int) -> Handle:
        handle: Handle = self._attention[index].weigh(lambda: self._log_size(index))
        return handle

    def _before_tower(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._reducer is not None:
            self._recomputed.check()
        now = self._passes.begin()
        sizes, side = args[1] if len(args) > 1 else kwargs["grid_thw"], self._side
        if self._is_video or bool((sizes[:, 0] > 1).any()):
            return None
        now.grids = [(height // side, width // side) for _, height, width in sizes.tolist()]
        if hasattr(tower, "window_size"):
            index, bounds = get_vision_window_index(sizes, side, tower.window_size, tower.patch_size, {**kwargs})
            kwargs = {**kwargs, "window_index": index, "cu_window_seqlens": bounds}
            now.order = index.to((args[0] if args else kwargs["hidden_states"]).device)
        now.left = [height * width for height, width in now.grids]
        return args, kwargs

    def _before_block(self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = self._passes.now
        total = now.totals.get(index - 1)
        if total is None:
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
        return (self._merged(now, index - 1, args[0]), *args[1:]), {**kwargs, **shorter}

    def _before_merger(self, index: int) -> Any:
        return lambda merger, args: (self._merged(self._passes.now, index, args[0]),)

    def _after_merger(self, index: int) -> Any:
        def after(merger: nn.Module, args: tuple[Any, ...], features_MC: Tensor) -> Tensor | None:
            total = self._passes.now.totals.get(index)
            return total.unmerge(features_MC[None])[0] if total is not None else None

        return after

    def _after_tower(self, tower: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        now, last = self._passes.now, self._last_block
        if last in now.totals:
            output.last_hidden_state = self._restored(now, last, output.last_hidden_state)
        return super()._after_tower(tower, args, output)

    def _values(self, now: _Pass, kind: str, index: int) -> list[Tensor] | None:
        if kind != "self" or not now.grids:
            return None
        received = self._received(index, now)
        raster = received if now.order is None else torch.empty_like(received).index_copy(0, now.order, received)
        return list(raster.split_with_sizes(now.left))

    def _plan(self, now: _Pass, index: int) -> Merging | None:
        """Plans one block's merge, images of one size together, on the mean over heads of the keys of each unit."""
        if not now.grids:
            return None
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
        now.counted.append((self._name(index), sum(before), sum(now.left)))
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
        assert self._reducer is not None
        height, width = now.grids[images[0]]
        is_whole = now.order is None and index - 1 not in now.totals

        def semantic(kind: str) -> Tensor | None:
            return self._received(index, now)[place] if kind == "self" else None

        start, steps = height * width, self._watched
        ratio = block_ratio(start, metric.shape[1], self._reducer.ratio_of(start), steps.index(index), len(steps))
        site = LayerInfo(self._name(index), ratio, (height, width) if is_whole else None, semantic)
        return plan_tokens(self._reducer, metric, site, StepInfo(num_plans=index))

    def _received(self, index: int, now: _Pass) -> Tensor:
        """Attention received by each unit, (U,), summing to one in each image."""
        received: Tensor = self._attention[index].received(now.seen[index], self._log_size(index))
        units = received.reshape(-1, self._unit).sum(1)
        lengths = torch.tensor(now.left, device=units.device)
        image = torch.arange(len(now.left), device=units.device).repeat_interleave(lengths, output_size=len(units))
        return units / units.new_zeros(len(now.left)).index_add(0, image, units)[image]

    def _plans(self, now: _Pass) -> list[TokenMap]:
        total = now.totals.get(self._last_block)
        if total is None:
            return []
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

    def _log_size(self, index: int) -> Tensor | None:
        """The logarithm of how many tokens each token of a block's attention stands for, (S,); None if all are one."""
        total = self._passes.now.totals.get(index - 1)
        return total.log_sizes[0].repeat_interleave(self._unit) if total is not None else None

    def _length(self, y: Tensor) -> int:
        length: int = len(y) // self._unit
        return length

    def _apply(self, verb: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        """Applies a verb of a merge to units as tokens of one row, (1, U, G * C)."""
        return verb(y.reshape(1, -1, self._unit * y.shape[-1])).reshape(-1, y.shape[-1])


def _places(lengths: list[int], images: list[int], device: torch.device) -> Tensor:
    """Where the units of images of one size stand in the row of all, (images, units)."""
    starts = [0, *accumulate(lengths)]
    first = torch.tensor([starts[image] for image in images], device=device)
    return first[:, None] + torch.arange(lengths[images[0]], device=device)
