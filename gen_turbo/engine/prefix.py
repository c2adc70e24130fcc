"""What is shortened once per prompt; of models that keep keys and values of a prefix, these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gen_turbo.engine.text import MergedText, merge_text, text_rows
from gen_turbo.engine.values import num_bytes
from gen_turbo.method import LayerInfo, StepInfo, TokenReducer
from gen_turbo.models.conditions import CachedPrefix, MaskedText, Prefix, PrefixPart, TextSignature
from gen_turbo.tokens.farthest import farthest_point_plan
from gen_turbo.tokens.frames import one_sequence, side_by_side
from gen_turbo.tokens.ratios import num_removed
from gen_turbo.tokens.token_map import TokenMap

if TYPE_CHECKING:
    from gen_turbo.engine.arrangement import Arrangement
    from gen_turbo.engine.context import Context

_HIDDEN = 1e-30
"""Size of a key that attention may not read, whose logarithm all types can hold."""


def short_text(
    context: Context,
    arguments: Mapping[str, Any],
    form: TextSignature | MaskedText | CachedPrefix,
    arrangement: Arrangement,
) -> MergedText | None:
    """The text of a prompt on fewer tokens, made in its first call; None in a call that makes a prefix itself.

    Args:
        context: What is known of the prompt already.
        arguments: Of the call, by name.
        form: Where its text is.
        arrangement: The settings, and what is reduced by them.

    Raises:
        ValueError: If text is to be merged of which some attention cannot weigh the keys.
    """
    reducer = arrangement.reducer
    if isinstance(form, CachedPrefix):
        source = form.source(arguments)
        if source is not context.text_source:
            context.text, context.text_source = None, source
        if source is None:
            return None
    if context.text is not None:
        return context.text
    lost = [name for name, inside in arrangement.insides.items() if inside.has_text_keys and not inside.reaches]
    if lost and reducer.text_ratio is not None:
        raise ValueError(f"text cannot be weighed at {lost[0]}, whose attention was replaced by another one")
    if lost:
        return MergedText({})
    if isinstance(form, CachedPrefix):
        return merge_prefix(form.read(arguments), reducer, bool(arrangement.layers))
    return merge_text(arguments, form, reducer.text_ratio)


def merge_prefix(prefix: Prefix, reducer: TokenReducer, is_reduced: bool) -> MergedText:
    """Merges what a prefix holds, each part for itself; attention weighs every key by its size.

    What comes later in the sequence has read all of it already. The mean of keys that have their positions gives the
    mean of their logits; turned to the position of one of them first, keys are no nearer to stock.

    Args:
        prefix: As the model has it.
        reducer: The settings: `text_ratio` of the text, `reference_ratio` of references.
        is_reduced: Whether references without a ratio of their own take that of the target.

    Returns:
        What the model is given instead; where there are several rows, each has a map of its own.
    """
    ratio = reducer.reference_ratio
    if ratio is None:
        ratio = reducer.ratio if is_reduced else 0.0
    plan = side_by_side(
        [_planned(part, prefix.shown, reducer, ratio if part.region else reducer.text_ratio) for part in prefix.parts]
    )
    if plan.is_identity:
        return MergedText({})
    order = torch.cat([part.places for part in prefix.parts])
    weight = torch.where(prefix.shown[:, order], 1.0, _HIDDEN)
    sizes = plan.merge(weight[..., None])[..., 0] * plan.sizes()
    layers = [
        (plan.merge(keys[:, order], weight), plan.merge(values[:, order], weight)) for keys, values in prefix.layers
    ]
    held = num_bytes(*(tensor for layer in layers for tensor in layer))
    return MergedText(
        prefix.arguments(layers), plan.num_tokens - plan.num_slots, plan.num_slots, sizes, num_more_bytes=held
    )


def _planned(part: PrefixPart, shown: Tensor, reducer: TokenReducer, ratio: float | None) -> TokenMap:
    """Plans the merging of one part; `shown` is of the whole prefix, (B, P)."""
    tokens, num_tokens = part.tokens.detach(), part.tokens.shape[1]
    if not ratio or not num_tokens:
        return TokenMap.identity(len(tokens), num_tokens, tokens.device)
    if part.region is None:
        rows = text_rows(tokens, None, shown[:, part.places], hides=True)
        return farthest_point_plan(rows, num_tokens - num_removed(num_tokens, ratio))
    frames = part.region.num_frames
    metric = tokens.reshape(len(tokens) * frames, -1, tokens.shape[2])
    found = reducer.plan(metric, LayerInfo("prefix", ratio, part.region.grid), StepInfo())
    return one_sequence(found, frames) if frames > 1 else found
