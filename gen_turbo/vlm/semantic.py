"""Isolated attention: semantic tokens pass through a vision tower and read the image, while it does not see them.

Shape names: B images, T tokens of the tower (class tokens first), N patches, M semantic tokens, D channels, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.method import Grid
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.training.vistog import SemanticGrouping
from gen_turbo.vlm.call import Calls, Last
from gen_turbo.vlm.family import TowerFacts, square
from gen_turbo.vlm.projections import Projections
from gen_turbo.vlm.recomputed import Recomputed
from gen_turbo.vlm.stage import Handle


@dataclass
class _Stream:
    """One call of the tower: its own tokens, the mask that hides the others from them, and these at the end."""

    num_tokens: int = 0
    mask: Tensor | None = None
    tokens_BMD: Tensor | None = None


class SemanticStream:
    """The semantic tokens on their way through one vision tower.

    They stand behind the image's own tokens from the block where they enter to the last one in use, under a mask by
    which no token of the image attends to them: what it becomes is what it is without them, within rounding. Nothing
    else runs than the tower's own blocks, on more tokens.

    Attributes:
        slots: The group of each patch of the images seen last, (B, N); None before the first.
    """

    def __init__(self, model: nn.Module, facts: TowerFacts, grouping: SemanticGrouping) -> None:
        self.slots: Last[Tensor | None] = Last(lambda: None)
        self._calls: Calls[_Stream] = Calls(_Stream)
        self._left: Last[Tensor | None] = Last(lambda: None)
        self._facts, self._grouping = facts, grouping
        self._tower = tower = model.get_submodule(facts.module)
        (blocks, last), first = facts.stack(model), grouping.shape.first_block
        if first > last:
            raise ValueError(f"first_block must be one of the {last + 1} blocks that the projector reads; got {first}")
        self._blocks = blocks[first : last + 1]
        self._recomputed = Recomputed(self._blocks, self._calls)
        self._leading = facts.num_leading(model)
        self._norm = getattr(tower, facts.output_norm) if facts.output_norm else nn.Identity()

    def place(self) -> Iterator[Handle]:
        """Puts hooks on the tower and its blocks, one after the other, and gives what takes each off."""
        projections = [Projections(getattr(block, self._facts.attention), self._facts) for block in self._blocks]
        yield from self._recomputed.place()
        yield self._tower.register_forward_pre_hook(lambda tower, args: self._begin())
        yield self._blocks[0].register_forward_pre_hook(self._enter, with_kwargs=True)
        for one in projections:
            yield one.bias(lambda dtype: self._calls.now.mask)
        yield self._blocks[-1].register_forward_hook(self._leave)
        yield self._tower.register_forward_hook(self._after_tower)
        yield self._tower.register_forward_hook(lambda tower, args, output: self._calls.end(), always_call=True)

    def groups(self, patches_BND: Tensor, grid: Grid) -> tuple[Tensor, TokenMap]:
        """The groups (B, M, D) of the images that the tower has just seen, and the cells where they take place.

        Raises:
            ValueError: If the patches are not of the images that the tower saw last.
        """
        tokens = self._left.value
        self._left.forget()
        if tokens is None or len(tokens) != len(patches_BND):
            raise ValueError("these patches were not made by this model's tower in this call; pass pixel_values")
        groups, self.slots.value = self._grouping(self._norm(tokens), patches_BND, grid)
        return groups, self._grouping.cells(grid, patches_BND.device)

    def _begin(self) -> None:
        self._recomputed.check()
        self._calls.begin()

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        patches = hidden[:, self._leading :]
        weight = self._grouping.tokens
        if not self._grouping.training and (weight.device != hidden.device or weight.dtype != hidden.dtype):
            self._grouping.to(hidden.device, hidden.dtype)
        tokens = self._grouping.enter(patches, square(patches.shape[1]) or (1, patches.shape[1]))
        now = self._calls.now
        now.num_tokens = hidden.shape[1]
        now.mask = _isolating(hidden.shape[1], tokens.shape[1], hidden.device, hidden.dtype)
        given = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return (torch.cat([hidden, tokens], 1), *args[1:]), given

    def _leave(self, block: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        now = self._calls.now
        now.tokens_BMD = output[:, now.num_tokens :]
        return output[:, : now.num_tokens]

    def _after_tower(self, tower: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Keeps the semantic tokens for the projector, and takes them out of what was recorded of the blocks."""
        length = self._calls.now.num_tokens
        self._left.value = self._calls.now.tokens_BMD
        for name, axis in (("hidden_states", 1), ("attentions", 2), ("attentions", 3)):
            recorded = getattr(output, name, None)
            if recorded:
                short = (x if x is None or x.shape[axis] <= length else x.narrow(axis, 0, length) for x in recorded)
                setattr(output, name, tuple(short))


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _isolating(length: int, more: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What is added to logits so that the first tokens do not attend to those behind them: (1, 1, T + M, T + M)."""
    mask = torch.zeros(1, 1, length + more, length + more, dtype=dtype)
    mask[..., :length, length:] = torch.finfo(dtype).min
    return mask.to(device)
