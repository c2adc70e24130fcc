"""Text tokens merged, or cut, once per prompt at the model's entrance; attention weighs what was merged by sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_turbo.engine.values import num_bytes
from gen_turbo.models.conditions import MaskedText, TextSignature
from gen_turbo.tokens.farthest import farthest_point_plan
from gen_turbo.tokens.ratios import num_removed

_WORTHWHILE = 1 / 2
"""Share of the text that must repeat before equal tokens are merged unasked: sizes take a channel in every attention.

On SD3 at 1,024 pixels that is paid back from two fifths of the text on, at 512 pixels from a sixteenth.
"""
_GRAIN = 8
"""On a GPU lengths of merged text are multiples of this: a length is a graph of its own, and one to compile."""


@dataclass(frozen=True)
class MergedText:
    """The text of one prompt on fewer tokens.

    Attributes:
        arguments: What the model is given in place of its own arguments; empty where nothing was merged or cut.
        num_merged: Text tokens that are gone.
        num_text: Tokens that are left, with those that the model puts before the text; 0 where nothing was merged.
        sizes: How many tokens each of them stands for, (b, num_text); None where none stands for others.
        hides: Whether a row hides tokens that another one shows; None where a layer's mask is what the model makes.
        num_more_bytes: Bytes of tensors inside of what is given that is no tensor itself.
    """

    arguments: dict[str, Any]
    num_merged: int = 0
    num_text: int = 0
    sizes: Tensor | None = None
    hides: bool | None = None
    num_more_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the merged text, its positions, mask and sizes."""
        return num_bytes(*self.arguments.values(), self.sizes) + self.num_more_bytes


def merge_text(arguments: Mapping[str, Any], signature: TextSignature | MaskedText, ratio: float | None) -> MergedText:
    """Merges the text tokens that are most alike, equal ones such as padding first; cuts what cannot be merged.

    Args:
        arguments: Those of the model, by name.
        signature: Which of them hold the text.
        ratio: Fraction of text tokens that is removed; None for all that repeat their neighbour, if they are half. On
            a GPU some of these stay, for prompts of about one length to share graphs.

    Returns:
        The merged text; where there are positions, one map serves the whole batch.
    """
    if isinstance(signature, MaskedText):
        return _cut(arguments, signature)
    text: Tensor = arguments[signature.embedding]
    num_tokens = text.shape[1]
    positions, mask = arguments.get(signature.positions), arguments.get(signature.mask)
    rows = text_rows(text, positions, mask, signature.hides)
    num_slots = _num_distinct(rows) if ratio is None else num_tokens - num_removed(num_tokens, ratio)
    if ratio is None and text.is_cuda:
        num_slots = min(num_tokens, -(-num_slots // _GRAIN) * _GRAIN)
    if ratio is None and num_tokens - num_slots < num_tokens * _WORTHWHILE:
        return MergedText({})
    plan = farthest_point_plan(rows, num_slots)
    merged: dict[str, Any] = {signature.embedding: plan.merge(text)}
    if positions is not None:
        merged[signature.positions] = plan.select(positions[None])[0] if positions.ndim == 2 else plan.select(positions)
    if mask is not None:
        merged[signature.mask] = plan.between(0, mask.shape[1] - num_tokens).select(mask)
    sizes = F.pad(plan.sizes(), (signature.num_before, 0), value=1)
    return MergedText(merged, num_tokens - num_slots, sizes.shape[1], sizes)


def _cut(arguments: Mapping[str, Any], signature: MaskedText) -> MergedText:
    """Drops the tokens that every row hides; the rest keeps its order."""
    short: dict[str, Any] = {}
    num_before = num_left = 0
    hides = False
    for name, mask_name in signature.masks.items():
        tokens, mask = arguments.get(name), arguments.get(mask_name)
        if tokens is None:
            continue
        shown = tokens.ne(0).any().expand(tokens.shape[:2]) if mask is None else mask.ne(0)
        places = shown.any(0).nonzero()[:, 0]
        num_before, num_left = num_before + shown.shape[1], num_left + len(places)
        hides = hides or not bool(shown[:, places].all())
        if len(places) < shown.shape[1]:
            short[name] = tokens[:, places]
            if mask is not None:
                short[mask_name] = mask[:, places]
    return MergedText(short, num_before - num_left, num_left, hides=hides)


def text_rows(text: Tensor, positions: Tensor | None, mask: Tensor | None, hides: bool) -> Tensor:
    """All that distinguishes text tokens, (B, T, C), or (1, T, C) where positions have no batch.

    Args:
        text: The tokens, (B, T, C).
        positions: Of each token, (T, d) or (B, T, d); None for none.
        mask: A value per token, (B, T), that is 0 where it is hidden; None for none.
        hides: Whether nothing of a hidden token counts.
    """
    rows = text.detach().to(torch.promote_types(text.dtype, torch.float32))
    if mask is not None:
        shown = mask[:, : text.shape[1], None].to(rows.dtype)
        rows = rows * shown.ne(0) if hides else rows
        # Farther apart than any two texts, so that a token of another mask is the last to be joined.
        rows = torch.cat([rows, shown * (2 * rows.norm(dim=-1).amax() + 1)], -1)
    if positions is None:
        return rows
    given = positions if positions.ndim == 2 else positions.transpose(0, 1).flatten(1)
    return torch.cat([rows.transpose(0, 1).flatten(1), given.to(rows.dtype)], -1)[None]


def _num_distinct(rows: Tensor) -> int:
    """Tokens that differ from the one before, in the row of the batch that has most of them."""
    differs = rows[:, 1:].ne(rows[:, :-1]).any(-1)
    return 1 + int(differs.sum(1).amax())
