"""Smaller images: the vision tower reads fewer patches, and later code gets its full grid of them back."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gen_turbo.method import LayerInfo, StepInfo, TokenReducer
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.call import Calls
from gen_turbo.vlm.columns import protect_leading
from gen_turbo.vlm.counts import Counts
from gen_turbo.vlm.family import TowerFacts
from gen_turbo.vlm.images import Encoded
from gen_turbo.vlm.stage import Encoder, Handle


class Shrink(Encoder):
    """Makes a tower's images smaller.

    The images are resampled to the grid of the method's plan, which must be cells in raster order, and the tower
    interpolates its position embeddings by its own code. Its output is copied back to the patches of each cell where
    later code needs every patch; the copies leave before the language model.
    """

    def __init__(self, model: nn.Module, facts: TowerFacts, counts: Counts, reducer: TokenReducer) -> None:
        super().__init__()
        self._tower = model.get_submodule(facts.module)
        self._facts, self._counts, self._reducer = facts, counts, reducer
        self._leading = facts.num_leading(model)
        self._plans: Calls[list[TokenMap]] = Calls(list)
        counts.add(facts.module)

    def place(self, model: nn.Module) -> Iterator[Handle]:
        """Puts hooks on the tower."""
        yield self._tower.register_forward_pre_hook(self._before, with_kwargs=True)
        yield self._tower.register_forward_hook(self._after)
        yield self._tower.register_forward_hook(lambda tower, args, output: self._plans.end(), always_call=True)

    def _before(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plans = self._plans.begin()
        pixels = args[0] if args else kwargs["pixel_values"]
        config: Any = self._tower.config
        patch = config.patch_size
        grid = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
        tokens = pixels.new_empty(1, grid[0] * grid[1], 0)
        ratio = self._reducer.ratio_of(grid[0] * grid[1])
        plan = self._reducer.plan(tokens, LayerInfo("input", ratio, grid), StepInfo())
        self._counts.count(self._facts.module, plan.num_tokens, plan.num_slots, grid)
        if plan.is_identity:
            return None
        plans.append(plan)
        rows = len(torch.unique(plan.anchor_BM // grid[1]))
        size = (rows * patch, plan.num_slots // rows * patch)
        small = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True, align_corners=False)
        given = {**kwargs, "interpolate_pos_encoding": True}
        if args:
            return (small.to(pixels.dtype), *args[1:]), given
        return args, given | {"pixel_values": small.to(pixels.dtype)}

    def _after(self, tower: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        plans = self._plans.now
        self._last.value = Encoded(plans * len(output.last_hidden_state))
        if not plans or not self._facts.is_restored:
            return output
        slot, anchor = (protect_leading(x, self._leading) for x in (plans[0].slot_BN, plans[0].anchor_BM))
        plan = TokenMap(slot, anchor)
        output.last_hidden_state = plan.unmerge(output.last_hidden_state)
        states = getattr(output, "hidden_states", None)
        if states is not None:
            output.hidden_states = tuple(None if state is None else plan.unmerge(state) for state in states)
        return output


def can_shrink(model: nn.Module, facts: TowerFacts) -> bool:
    """Whether a tower offers to read images of another size."""
    return "interpolate_pos_encoding" in inspect.signature(model.get_submodule(facts.module).forward).parameters
