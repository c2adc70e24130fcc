"""Smaller images: the vision tower reads fewer patches, and later code gets its full grid of them back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_turbo.method import Grid, LayerInfo, StepInfo, TokenReducer
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.call import CallState, begin_anew
from gen_turbo.vlm.columns import protect_leading
from gen_turbo.vlm.family import TowerFacts


class Shrink:
    """The hooks that make a tower's images smaller.

    The images are resampled to the grid of the method's plan, which must be cells in raster order, and the tower
    interpolates its position embeddings by its own code. Its output is copied back to the patches of each cell where
    later code needs every patch; the copies leave before the language model.

    Attributes:
        patches: The plan of the last call, (images, patches); None where nothing was made smaller.
        on_shrink: Receives the grid and the number of patches before and after.
    """

    patches: CallState[TokenMap | None] = CallState(lambda: None)
    _plan: CallState[TokenMap | None] = CallState(lambda: None)

    def __init__(self, model: nn.Module, facts: TowerFacts, reducer: TokenReducer) -> None:
        self.facts, self.reducer = facts, reducer
        self.module = model.get_submodule(facts.module)
        self.num_leading = facts.num_leading(model)
        self.on_shrink: Callable[[Grid, int, int], None] = lambda grid, before, after: None

    def install(self) -> Iterator[Any]:
        """Puts the hooks in place, one after the other, and gives the handle of each."""
        yield self.module.register_forward_pre_hook(self._before, with_kwargs=True)
        yield self.module.register_forward_hook(self._after)

    def plans(self) -> list[TokenMap]:
        """The plan of each image of the last call; empty where none was made smaller."""
        return self.patches.by_row() if self.patches is not None else []

    def values(self, kind: str) -> list[Tensor] | None:
        """No semantic value is known before the tower runs."""
        return None

    def _before(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        pixels = args[0] if args else kwargs["pixel_values"]
        config: Any = self.module.config
        patch = config.patch_size
        grid = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
        tokens = pixels.new_empty(1, grid[0] * grid[1], 0)
        begin_anew(self)
        ratio = self.reducer.ratio_of(grid[0] * grid[1])
        plan = self.reducer.plan(tokens, LayerInfo("input", ratio, grid), StepInfo())
        self.on_shrink(grid, plan.num_tokens, plan.num_slots)
        if plan.is_identity:
            return None
        rows = len(torch.unique(plan.anchor_BM // grid[1]))
        size = (rows * patch, plan.num_slots // rows * patch)
        small = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True, align_corners=False)
        self.patches = TokenMap(plan.slot_BN.repeat(len(pixels), 1), plan.anchor_BM.repeat(len(pixels), 1))
        leading = self.num_leading
        self._plan = TokenMap(protect_leading(plan.slot_BN, leading), protect_leading(plan.anchor_BM, leading))
        given = {**kwargs, "interpolate_pos_encoding": True}
        if args:
            return (small.to(pixels.dtype), *args[1:]), given
        return args, given | {"pixel_values": small.to(pixels.dtype)}

    def _after(self, tower: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        plan = self._plan
        if plan is None or not self.facts.is_restored:
            return output
        output.last_hidden_state = plan.unmerge(output.last_hidden_state)
        states = getattr(output, "hidden_states", None)
        if states is not None:
            output.hidden_states = tuple(None if state is None else plan.unmerge(state) for state in states)
        return output


def can_shrink(model: nn.Module, facts: TowerFacts) -> bool:
    """Whether a tower offers to read images of another size."""
    return "interpolate_pos_encoding" in inspect.signature(model.get_submodule(facts.module).forward).parameters
