"""The gate of models whose text reads the image by cross-attention: fewer tokens leave the vision tower."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.method import LayerInfo, StepInfo, TokenReducer
from gen_turbo.vlm.counts import Counts
from gen_turbo.vlm.family import square
from gen_turbo.vlm.planning import plan_tokens
from gen_turbo.vlm.stage import Handle, Stage
from gen_turbo.vlm.tower import Tower


class CrossGate(Stage):
    """A tower's output.

    Cross-attention makes its mask from the number of tokens that it is given, so nothing has to be restored. Class
    tokens stay in front.

    Args:
        tower: The tower; what it knows of the images is asked after it has run.
        counts: Receives the row of the tower.
        name: The tower's path.
        reducer: Plans for the patches.
        is_merged: Whether patches are averaged, or only the anchor of each slot stays.
    """

    def __init__(self, tower: Tower, counts: Counts, name: str, reducer: TokenReducer, is_merged: bool) -> None:
        self._tower, self._counts, self._name = tower, counts, name
        self._reducer, self._is_merged = reducer, is_merged
        counts.add(name)

    def place(self, model: nn.Module) -> Iterator[Handle]:
        """Puts a hook on the tower, behind its own."""
        yield self._tower.module.register_forward_hook(self._after)

    def _after(self, tower: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        leading, tokens = self._tower.num_leading, output.last_hidden_state
        patches: Tensor = tokens[:, leading:]

        def semantic(kind: str) -> Tensor | None:
            values = self._tower.encoded().values
            return torch.stack(values[kind]) if kind in values else None

        count = patches.shape[1]
        site = LayerInfo("pre_llm", self._reducer.ratio_of(count), square(count), semantic=semantic)
        plan = plan_tokens(self._reducer, patches, site, StepInfo())
        self._counts.count(self._name, len(patches) * plan.num_tokens, len(patches) * plan.num_slots)
        if not plan.is_identity:
            slots = plan.merge(patches) if self._is_merged else plan.select(patches)
            output.last_hidden_state = torch.cat([tokens[:, :leading], slots], 1)
        return output
