"""Words of a prompt that leave before a causal language model, as its image tokens do.

Shape names: B rows, L columns of the call, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.method import LayerInfo, StepInfo, TokenReducer
from gen_turbo.tokens.ratios import num_removed
from gen_turbo.vlm.call import Calls
from gen_turbo.vlm.counts import Counts
from gen_turbo.vlm.planning import plan_tokens
from gen_turbo.vlm.run import Reduction, WordPlan
from gen_turbo.vlm.stage import Handle, Stage

PROMPT = "prompt"
"""What the report calls the words before the language model."""


class Words(Stage):
    """Chooses, in a prompt that brings images, the words that leave, row by row.

    The same part of the words of every row with an image is removed; others keep their position. Never removed are the
    first token of a row, its last, padding, image tokens, those whose logits the call requests (tokens that assisted
    generation guesses), and special tokens: those that the model's configurations name, and added ones, whose ids
    begin with the first that is named in the upper half of the vocabulary.

    Args:
        model: The model.
        counts: Receives the row of the prompt.
        reducer: Plans for the words of each row.
    """

    def __init__(self, model: nn.Module, counts: Counts, reducer: TokenReducer) -> None:
        self._counts, self._reducer = counts, reducer
        self._special, self._first_added = special_ids(model)
        self._asked: Calls[list[int | Tensor]] = Calls(list)
        counts.add(PROMPT)

    def place(self, model: nn.Module) -> Iterator[Handle]:
        """Puts hooks on the model that read which logits a call requests."""
        yield model.register_forward_pre_hook(self._before_model, with_kwargs=True)
        yield model.register_forward_hook(lambda model, args, output: self._asked.end(), always_call=True)

    def _before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._asked.begin().append(kwargs.get("logits_to_keep", 0))

    def added(self, reduction: Reduction, ids_BL: Tensor | None, real_BL: Tensor, embeds_BLC: Tensor) -> Reduction:
        """Adds the words that leave to what happens to the images of a prompt.

        Raises:
            ValueError: If the prompt came as embeddings, which do not distinguish words from special tokens.
        """
        if ids_BL is None:
            raise ValueError("text_ratio has to know words from special tokens; pass input_ids, not inputs_embeds")
        is_image_BL = reduction.images.is_image_BL
        # Rows without an image keep their words, whatever the others of the batch have.
        is_word_BL = real_BL & ~is_image_BL & is_image_BL.any(1, keepdim=True) & self._may_leave(ids_BL, real_BL)
        rows = [row.nonzero()[:, 0] for row in is_word_BL]
        plans = [self._plan(embeds_BLC, row, places) for row, places in enumerate(rows)]
        words = [plan for plan in plans if plan is not None]
        before = sum(map(len, rows))
        leaving = sum(one.plan.num_tokens - one.plan.num_slots for one in words)
        ratio = self._reducer.text_ratio or 0
        self._counts.count_words(PROMPT, before, before - leaving, max(map(len, rows)), ratio)
        if not leaving:
            return reduction
        keep_BL = reduction.keep_BL.clone()
        for one in words:
            keep_BL[one.row, one.places] = False
            keep_BL[one.row, one.anchors] = True
        return replace(reduction, keep_BL=keep_BL, words=words)

    def _may_leave(self, ids_BL: Tensor, real_BL: Tensor) -> Tensor:
        special = torch.isin(ids_BL, torch.tensor(sorted(self._special), device=ids_BL.device))
        count = real_BL.cumsum(1)
        stays = special | (ids_BL >= self._first_added) | (count == 1) | (count == count[:, -1:])
        for asked in self._asked.now:
            if isinstance(asked, Tensor):
                stays[:, asked] = True
            elif asked:
                stays[:, -asked:] = True
        return ~stays

    def _plan(self, embeds_BLC: Tensor, row: int, places: Tensor) -> WordPlan | None:
        """Plans for the words of one row; half a word more, so that rounding down removes exactly the number."""
        removed = num_removed(len(places), self._reducer.text_ratio or 0)
        if removed == 0:
            return None
        site = LayerInfo("text", (removed + 0.5) / len(places))
        return WordPlan(row, places, plan_tokens(self._reducer, embeds_BLC[row, places][None], site, StepInfo()))


def special_ids(model: nn.Module) -> tuple[set[int], int]:
    """The special token ids that a model's configurations name, and the first of those that tokenizers add.

    Returns:
        The ids named, and the first of them in the upper half of the vocabulary, or its size if none is there.
    """
    settings: Any = model
    known: set[int] = set()
    for config in (settings.config, settings.generation_config):
        known |= _named(config.to_dict())
    size: int = settings.config.get_text_config().vocab_size
    return known, min((token for token in known if token >= size // 2), default=size)


def _named(settings: dict[str, Any]) -> set[int]:
    found: set[int] = set()
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= _named(value)
        elif str(name).endswith(("token_id", "token_index")):
            values = value if isinstance(value, (list, tuple)) else [value]
            found |= {token for token in values if isinstance(token, int) and token >= 0}
    return found


def check_words(model: nn.Module, reducer: TokenReducer, place: str) -> None:
    """Says before anything is changed why the words of a prompt cannot leave; raises ValueError."""
    ratio = reducer.text_ratio
    if not ratio:
        return
    if place == "projector":
        name = type(model).__name__
        raise ValueError(
            f"words of the prompt of {name} leave at the gate, not at place='projector'; leave text_ratio 0"
        )
