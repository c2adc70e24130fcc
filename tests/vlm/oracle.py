"""Slow right answers: no cache, no hooks, one unpadded row at a time, everything recomputed for every new token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.core.plan import ReductionPlan


def reduce_row(x_NC: Tensor, plan: ReductionPlan, row: int, is_merged: bool) -> tuple[Tensor, list[int]]:
    """The slots of one picture by the definition of a plan: means (or anchors), and the anchors' places."""
    slots = plan.slot_BN[row % len(plan.slot_BN)].tolist()
    anchors = plan.anchor_BM[row % len(plan.anchor_BM)].tolist()
    rows = []
    for slot, anchor in enumerate(anchors):
        members = [token for token, other in enumerate(slots) if other == slot]
        rows.append(torch.stack([x_NC[member] for member in members]).mean(0) if is_merged else x_NC[anchor])
    return torch.stack(rows), anchors


def reduce_pictures(embeds_LC: Tensor, ids: Tensor, image: int, size: int, plan: Any, is_merged: bool) -> Any:
    """One row with every picture reduced by `plan(tokens)`: embeddings, and the columns they stand at."""
    parts, columns, at = [], [], 0
    while at < len(ids):
        if ids[at] != image:
            parts.append(embeds_LC[at : at + 1])
            columns.append(at)
            at += 1
            continue
        tokens = embeds_LC[at : at + size]
        slots, anchors = reduce_row(tokens, plan(tokens[None]), 0, is_merged)
        parts.append(slots)
        columns += [at + anchor for anchor in anchors]
        at += size
    return torch.cat(parts), columns


def run_layers(text: nn.Module, hidden: Tensor, positions: Tensor, first: int, last: int) -> Tensor:
    """Decoder layers `first` to `last` on one row (1, n, C) with a plain causal mask made here."""
    length = hidden.shape[1]
    mask = torch.full((length, length), torch.finfo(hidden.dtype).min).triu(1)[None, None]
    rotary = text.rotary_emb(hidden, position_ids=positions)
    for layer in text.layers[first:last]:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=None)
    return hidden


@torch.no_grad()
def next_logits(
    model: nn.Module, ids: Tensor, embeds: Tensor, positions: Tensor, size: int, plan: Any, cut: int, is_merged: bool
) -> Tensor:
    """Logits after one unpadded row whose pictures are in `embeds` already.

    Args:
        model: A causal model with `model.language_model`.
        ids: (n,) tokens, image placeholders among them.
        embeds: (n, C).
        positions: (..., n), the positions of the full row.
        size: Tokens of a picture.
        plan: Plans for (1, size, C).
        cut: 0 before the language model, else the first decoder layer without the dropped tokens.
        is_merged: Whether slots are averaged.
    """
    text, image = model.model.language_model, model.config.image_token_id
    hidden = run_layers(text, embeds[None], positions, 0, cut)[0]
    hidden, columns = reduce_pictures(hidden, ids, image, size, plan, is_merged and cut == 0)
    depth = text.config.num_hidden_layers
    out = text.norm(run_layers(text, hidden[None], positions[..., columns], cut, depth))
    return model.lm_head(out[0, -1])


@torch.no_grad()
def embeddings(model: nn.Module, ids: Tensor, features: list[Tensor]) -> Tensor:
    """One row of token embeddings with features in place of the placeholders."""
    embeds = model.get_input_embeddings()(ids)
    is_image = ids == model.config.image_token_id
    embeds[is_image] = torch.cat(features)
    return embeds


@torch.no_grad()
def generated_logits(
    model: nn.Module,
    inputs: dict[str, Tensor],
    tokens: Tensor,
    size: int,
    plan: Any,
    cut: int,
    is_merged: bool = True,
    features: list[Tensor] | None = None,
) -> Tensor:
    """Logits (B, steps, V) before each of the tokens (B, steps) that were generated after a prompt."""
    if features is None:
        features = list(model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output)
    rows = []
    for ids, mask, new in zip(inputs["input_ids"], inputs["attention_mask"], tokens, strict=True):
        ids = ids[mask.bool()]
        count = int((ids == model.config.image_token_id).sum()) // size
        own, features = features[:count], features[count:]
        steps = []
        for step in range(len(new)):
            row = torch.cat([ids, new[:step]])
            embeds = embeddings(model, row, own) if own else model.get_input_embeddings()(row)
            positions = torch.arange(len(row))[None]
            steps.append(next_logits(model, row, embeds, positions, size, plan, cut, is_merged))
        rows.append(torch.stack(steps))
    return torch.stack(rows)
