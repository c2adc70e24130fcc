"""The gates of models whose text reads the image by cross-attention: fewer image tokens are read.

Shape names: T tiles, n tokens of a tile, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache

from gen_turbo.method import LayerInfo, StepInfo, TokenReducer
from gen_turbo.vlm.cache_argument import cache_in
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


class StatesGate(Stage):
    """A language model with cross-attention layers, as Llama 3.2 Vision has: tiles come shorter, with their mask.

    A tile's class token, its first, stays. Every tile keeps equally many tokens, so that what is left of the mask,
    which is one for all tokens of a tile, follows from the keys that a cache holds.

    Args:
        text: The language model.
        num_tokens: Tokens of a tile, with the class token.
        counts: Receives the row of the language model.
        name: The language model's path.
        reducer: Plans for the patches of every tile.
        is_merged: Whether patches are averaged, or only the anchor of each slot stays.
    """

    def __init__(
        self, text: nn.Module, num_tokens: int, counts: Counts, name: str, reducer: TokenReducer, is_merged: bool
    ) -> None:
        self._text, self._num_tokens, self._counts, self._name = text, num_tokens, counts, name
        self._reducer, self._is_merged = reducer, is_merged
        counts.add(name)

    def place(self, model: nn.Module) -> Iterator[Handle]:
        """Puts a hook before the language model."""
        yield self._text.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, text: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        states, mask, cache = kwargs.get("cross_attention_states"), kwargs.get("cross_attention_mask"), cache_in(kwargs)
        if states is not None:
            states = self._shortened(states)
            if states.shape[1] < self._num_tokens and isinstance(cache, StaticCache):
                raise ValueError("a static cache has places for whole images; leave cache_implementation out")
            num_left = states.shape[1]
        elif mask is not None:
            num_left = self._num_held(cache) // (mask.shape[-1] // self._num_tokens) or self._num_tokens
        if mask is not None:
            mask = mask.unflatten(-1, (-1, self._num_tokens))[..., :num_left].flatten(-2)
        return args, {**kwargs, "cross_attention_states": states, "cross_attention_mask": mask}

    def _shortened(self, states_TnC: Tensor) -> Tensor:
        patches = states_TnC[:, 1:]
        tiles, count = patches.shape[:2]
        site = LayerInfo("pre_llm", self._reducer.ratio_of(count), square(count))
        plan = plan_tokens(self._reducer, patches, site, StepInfo())
        self._counts.count(self._name, tiles * count, tiles * plan.num_slots)
        if plan.is_identity:
            return states_TnC
        slots = plan.merge(patches) if self._is_merged else plan.select(patches)
        return torch.cat([states_TnC[:, :1], slots], 1)

    def _num_held(self, cache: Any) -> int:
        """The image tokens, and places for some, whose keys a cache holds; 0 where no image came."""
        layer: int = min(self._text.cross_attention_layers)  # type: ignore[arg-type]
        keys = getattr(cache.layers[layer], "keys", None) if cache is not None and layer < len(cache.layers) else None
        return 0 if keys is None or not keys.numel() else int(keys.shape[-2])
