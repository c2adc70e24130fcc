"""The gates of models whose text reads the image by cross-attention: fewer image tokens are read.

Shape names: T tiles, n tokens of a tile, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


class _Shortening(Stage):
    """Fewer tokens of every image, or tile, behind its class tokens, which stay in front.

    Args:
        counts: Receives the row of the module.
        name: The module's path.
        reducer: Plans for the patches.
        is_merged: Whether patches are averaged, or only the anchor of each slot stays.
    """

    def __init__(self, counts: Counts, name: str, reducer: TokenReducer, is_merged: bool) -> None:
        self._counts, self._name, self._reducer, self._is_merged = counts, name, reducer, is_merged
        counts.add(name)

    def _shortened(
        self, tokens_TnC: Tensor, num_leading: int, semantic: Callable[[str], Tensor | None] | None = None
    ) -> Tensor:
        patches = tokens_TnC[:, num_leading:]
        tiles, count = patches.shape[:2]
        site = LayerInfo("pre_llm", self._reducer.ratio_of(count), square(count), semantic=semantic)
        plan = plan_tokens(self._reducer, patches, site, StepInfo())
        self._counts.count(self._name, tiles * count, tiles * plan.num_slots)
        if plan.is_identity:
            return tokens_TnC
        slots = plan.merge(patches) if self._is_merged else plan.select(patches)
        return torch.cat([tokens_TnC[:, :num_leading], slots], 1)


class CrossGate(_Shortening):
    """A tower's output.

    Cross-attention makes its mask from the number of tokens that it is given, so nothing has to be restored.

    Args:
        tower: The tower; what it knows of the images is asked after it has run.
    """

    def __init__(self, tower: Tower, counts: Counts, name: str, reducer: TokenReducer, is_merged: bool) -> None:
        super().__init__(counts, name, reducer, is_merged)
        self._tower = tower

    def place(self, model: nn.Module) -> Iterator[Handle]:
        """Puts a hook on the tower, behind its own."""
        yield self._tower.module.register_forward_hook(self._after)

    def _after(self, tower: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        def semantic(kind: str) -> Tensor | None:
            values = self._tower.encoded().values
            return torch.stack(values[kind]) if kind in values else None

        output.last_hidden_state = self._shortened(output.last_hidden_state, self._tower.num_leading, semantic)
        return output


class StatesGate(_Shortening):
    """A language model with cross-attention layers, as Llama 3.2 Vision has: tiles come shorter, with their mask.

    A tile's class token, its first, stays. Every tile keeps equally many tokens, so that what is left of the mask,
    which is one for all tokens of a tile, follows from the keys that a cache holds.

    Args:
        text: The language model.
        num_tokens: Tokens of a tile, with the class token.
    """

    def __init__(
        self, text: nn.Module, num_tokens: int, counts: Counts, name: str, reducer: TokenReducer, is_merged: bool
    ) -> None:
        super().__init__(counts, name, reducer, is_merged)
        self._text, self._num_tokens = text, num_tokens

    def place(self, model: nn.Module) -> Iterator[Handle]:
        """Puts a hook before the language model."""
        yield self._text.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, text: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        states, mask, cache = kwargs.get("cross_attention_states"), kwargs.get("cross_attention_mask"), cache_in(kwargs)
        if states is not None:
            states = self._shortened(states, 1)
            if states.shape[1] < self._num_tokens and isinstance(cache, StaticCache):
                raise ValueError("a static cache has places for whole images; leave cache_implementation out")
            num_left = states.shape[1]
        elif mask is not None:
            num_left = self._num_held(cache) // (mask.shape[-1] // self._num_tokens) or self._num_tokens
        if mask is not None:
            mask = mask.unflatten(-1, (-1, self._num_tokens))[..., :num_left].flatten(-2)
        return args, {**kwargs, "cross_attention_states": states, "cross_attention_mask": mask}

    def _num_held(self, cache: Any) -> int:
        """The image tokens, and places for some, whose keys a cache holds; 0 where no image came."""
        layer: int = min(self._text.cross_attention_layers)  # type: ignore[arg-type]
        keys = getattr(cache.layers[layer], "keys", None) if cache is not None and layer < len(cache.layers) else None
        return 0 if keys is None or not keys.numel() else int(keys.shape[-2])
