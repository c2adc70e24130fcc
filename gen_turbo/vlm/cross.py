"""The gate of models whose text reads the image by cross-attention: fewer tokens leave the vision tower."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.method import LayerInfo, StepInfo, TokenReducer
from gen_turbo.vlm.family import square
from gen_turbo.vlm.planning import plan_tokens
from gen_turbo.vlm.tower import Tower


class CrossGate:
    """The hook on a tower's output.

    Cross-attention makes its mask from the number of tokens that it is given, so nothing has to be restored. Class
    tokens stay in front.

    Attributes:
        on_reduction: Receives the number of patches of all images before and after.
    """

    def __init__(self, tower: Tower, reducer: TokenReducer, is_merged: bool) -> None:
        self.on_reduction: Callable[[int, int], None] = lambda before, after: None
        self._tower, self._reducer, self._is_merged = tower, reducer, is_merged

    def install(self) -> Iterator[Any]:
        """Puts the hook in place and gives its handle."""
        yield self._tower.module.register_forward_hook(self._after)

    def _after(self, tower: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        leading = self._tower.num_leading
        tokens = output.last_hidden_state
        patches: Tensor = tokens[:, leading:]

        def semantic(kind: str) -> Tensor | None:
            value = self._tower.value(kind)
            return value[:, leading:] if value is not None else None

        count = patches.shape[1]
        site = LayerInfo("pre_llm", self._reducer.ratio_of(count), square(count), semantic=semantic)
        plan = plan_tokens(self._reducer, patches, site, StepInfo())
        self.on_reduction(len(patches) * plan.num_tokens, len(patches) * plan.num_slots)
        if not plan.is_identity:
            slots = plan.merge(patches) if self._is_merged else plan.select(patches)
            output.last_hidden_state = torch.cat([tokens[:, :leading], slots], 1)
        return output
