"""Words merged in text encoders that read in both directions, as BLIP's do; attention counts each slot by its size.

Shape names: B rows, N tokens with padding, M slots, C channels, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.method import LayerInfo, StepInfo, TokenReducer
from gen_turbo.tokens.ratios import num_removed
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.call import Calls
from gen_turbo.vlm.counts import Counts
from gen_turbo.vlm.planning import plan_tokens
from gen_turbo.vlm.stage import Handle, Stage

TEXT_ENCODER = "text_encoder"
"""Where BLIP's models have a text encoder, if they have one."""
_FIRST = 1
"""The layer before which words merge: one layer has to show what attends to what."""


@dataclass
class _Read:
    """One call of the encoder: the attention of the layer before words merge, and the plan."""

    attention: Tensor | None = None
    plan: TokenMap | None = None


class TextMerge(Stage):
    """A text encoder.

    The first token of a row, its last, and padding stay as they are. As many words leave in every row as the ratio
    takes from the shortest, so that padding is what it was in the stock model.
    """

    def __init__(self, model: nn.Module, counts: Counts, reducer: TokenReducer) -> None:
        self._counts, self._reducer = counts, reducer
        encoder: Any = model.get_submodule(f"{TEXT_ENCODER}.encoder")
        self._encoder, self._layers = encoder, list(encoder.layer)
        self._reads: Calls[_Read] = Calls(_Read)
        counts.add(TEXT_ENCODER)

    def place(self, model: nn.Module) -> Iterator[Handle]:
        """Puts hooks on the encoder and its layers."""
        yield self._encoder.register_forward_pre_hook(lambda encoder, args: self._begin())
        yield self._encoder.register_forward_hook(lambda encoder, args, output: self._reads.end(), always_call=True)
        yield self._layers[_FIRST - 1].attention.self.register_forward_hook(self._watch)
        for index, layer in enumerate(self._layers[_FIRST:], _FIRST):
            yield layer.register_forward_pre_hook(self._before(index), with_kwargs=True)

    def _begin(self) -> None:
        self._reads.begin()

    def _watch(self, attention: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        self._reads.now.attention = output[1]

    def _before(self, index: int) -> Any:
        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, mask = args[0], kwargs.get("attention_mask")
            if mask is None:
                mask = hidden.new_zeros(len(hidden), 1, 1, hidden.shape[1])
            now = self._reads.now
            if index == _FIRST:
                now.plan = self._planned(now, hidden, mask)
            plan = now.plan
            if plan is None:
                return None
            sizes = plan.sizes().log().to(mask.dtype)[:, None, None]
            shorter = plan.select(mask[:, 0, 0])[:, None, None] + sizes
            merged = plan.merge(hidden) if index == _FIRST else hidden
            return (merged, *args[1:]), {**kwargs, "attention_mask": shorter}

        return before

    def _planned(self, now: _Read, hidden_BNC: Tensor, mask: Tensor) -> TokenMap | None:
        is_real = mask[:, 0, 0] >= 0
        words = [row.nonzero()[:, 0][1:-1] for row in is_real.expand(len(hidden_BNC), -1)]
        fewest = min(map(len, words))
        removed = num_removed(fewest, self._reducer.text_ratio or 0)
        num_tokens = hidden_BNC.shape[1]
        plans = [self._row_plan(now, hidden_BNC, removed, row, places) for row, places in enumerate(words) if removed]
        if not any(plan.num_slots < plan.num_tokens for plan in plans):
            removed = 0
        self._counts.count_words(TEXT_ENCODER, num_tokens, num_tokens - removed, fewest, self._reducer.text_ratio or 0)
        if removed == 0:
            return None
        destination = torch.arange(num_tokens, device=hidden_BNC.device).repeat(len(hidden_BNC), 1)
        for row, (places, plan) in enumerate(zip(words, plans, strict=True)):
            destination[row, places] = places[plan.anchor_BM[0, plan.slot_BN[0]]]
        return TokenMap.from_destinations(destination)

    def _row_plan(self, now: _Read, hidden_BNC: Tensor, removed: int, row: int, places: Tensor) -> TokenMap:
        """Plans for the words of one row; half a token more, so that rounding down removes exactly the number."""

        def semantic(kind: str) -> Tensor | None:
            assert now.attention is not None
            attention = now.attention[row].mean(0)
            first = places[0] - 1
            asking = {"class": attention[first : first + 1], "self": attention[first : places[-1] + 2]}.get(kind)
            if asking is None:
                return None
            value = asking.mean(0)[places]
            return (value / value.sum())[None]

        site = LayerInfo("text", (removed + 0.5) / len(places), semantic=semantic)
        return plan_tokens(self._reducer, hidden_BNC[row, places][None], site, StepInfo())


def check_text(model: nn.Module, reducer: TokenReducer) -> None:
    """Says before anything is changed why the words of a model cannot be merged; raises ValueError."""
    if not reducer.text_ratio:
        return
    name = type(model).__name__
    encoder: Any = getattr(model, TEXT_ENCODER, None)
    if encoder is None:
        raise ValueError(f"text_ratio concerns text that is read in both directions, which {name} has not; leave it 0")
    if len(encoder.encoder.layer) <= _FIRST:
        raise ValueError(
            f"the text encoder of this {name} has one layer, so there is none to merge for; set text_ratio to 0"
        )
