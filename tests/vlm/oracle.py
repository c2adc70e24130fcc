"""Slow right answers: no cache, no hooks, one unpadded row at a time, everything recomputed for every new token."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.tokens.token_map import TokenMap
from tests.vlm.tiny_kit import IMAGE, TinyVlm

NOT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


@dataclass
class Method:
    """What a method does to one image: its plan for (1, n, C), where, whether slots are averaged and keys weighed."""

    plan: Callable[[Tensor], TokenMap]
    cut: int = 0
    is_merged: bool = True
    is_weighed: bool = False


def reduce_row(x_NC: Tensor, plan: TokenMap, is_merged: bool) -> Tensor:
    """The slots of one image by the definition of a plan: means, or the anchors themselves."""
    slots = plan.slot_BN[0].tolist()
    rows = []
    for slot, anchor in enumerate(plan.anchor_BM[0].tolist()):
        members = [token for token, other in enumerate(slots) if other == slot]
        rows.append(torch.stack([x_NC[member] for member in members]).mean(0) if is_merged else x_NC[anchor])
    return torch.stack(rows)


def reduce_images(hidden_LC: Tensor, others: list[Tensor], ids: Tensor, size: int, method: Method) -> Any:
    """One row with every image reduced by the plan on its hidden states: those, the others, and the columns kept."""
    is_merged = method.is_merged and method.cut == 0
    streams, columns, at = [[] for _ in range(1 + len(others))], [], 0
    while at < len(ids):
        end = at + (size if ids[at] == IMAGE else 1)
        plan = method.plan(hidden_LC[None, at:end]) if ids[at] == IMAGE else TokenMap.identity(1, 1)
        for stream, x in zip(streams, (hidden_LC, *others), strict=True):
            stream.append(reduce_row(x[at:end], plan, is_merged))
        columns += [at + anchor for anchor in plan.anchor_BM[0].tolist()]
        at = end
    hidden, *others = (torch.cat(stream) for stream in streams)
    return hidden, others, columns


def sizes_of(hidden_LC: Tensor, ids: Tensor, size: int, method: Method) -> Tensor:
    """How many columns of one row each that is kept stands for."""
    found, at = [], 0
    while at < len(ids):
        end = at + (size if ids[at] == IMAGE else 1)
        slots = method.plan(hidden_LC[None, at:end]).slot_BN[0].tolist() if ids[at] == IMAGE else [0]
        found += [slots.count(slot) for slot in range(max(slots) + 1)]
        at = end
    return torch.tensor(found, dtype=hidden_LC.dtype)


def run_layers(
    text: nn.Module,
    hidden: Tensor,
    positions: Tensor,
    first: int,
    last: int,
    prefix: int,
    deep: Any,
    skip: Any = (),
    blocks: Tensor | None = None,
    sizes: Tensor | None = None,
    inputs: Tensor | None = None,
    experts: Tensor | None = None,
) -> Any:
    """Decoder layers `first` to `last`, but those to skip, on one row (1, n, C), causal behind `prefix` columns.

    Windows slide over the columns that are there, and chunks count them. Columns of one of the `blocks` (n,), but -1,
    see each other. Each column weighs as many as its size (n,) says. Where every layer has inputs of its own
    (1, n, layers, D), as in Gemma 4, keys are shared among layers and blocks are of those with windows alone. `experts`
    (1, n) says which columns are of images where these have experts of their own.
    """
    length = hidden.shape[1]
    mask = torch.full((length, length), torch.finfo(hidden.dtype).min).triu(1)[None, None]
    mask[..., :prefix, :prefix] = 0
    causal, shared = mask.clone(), {}
    if blocks is not None:
        mask[0, 0][(blocks[:, None] == blocks) & (blocks >= 0)] = 0
    if sizes is not None:
        causal, mask = causal + sizes.log(), mask + sizes.log()
    column = torch.arange(length)
    is_past = column[:, None] - column[None] >= (getattr(text.config, "sliding_window", None) or length)
    chunk = column // (getattr(text.config, "attention_chunk_size", None) or length)
    kinds = getattr(text.config, "layer_types", None) or []
    has_kinds = hasattr(text.rotary_emb, "layer_types")
    for index in range(first, last):
        if index not in skip:
            slides = "sliding_attention" in kinds[index : index + 1]
            kind = kinds[index : index + 1 if has_kinds else index]
            turns = not kind or text.config.rope_parameters[kind[0]] is not None
            rotary = text.rotary_emb(hidden, positions, *kind) if turns else None
            seen = mask.masked_fill(is_past, torch.finfo(hidden.dtype).min) if slides else mask
            if "chunked_attention" in kinds[index : index + 1]:
                seen = mask.masked_fill(chunk[:, None] != chunk, torch.finfo(hidden.dtype).min)
            seen = None if {"linear_attention", "conv"} & {*kinds[index : index + 1]} else seen
            more = {} if experts is None else {"moe_mm_token_type_ids": experts}
            if inputs is not None:
                seen = seen if slides else causal
                more = {"per_layer_input": inputs[:, :, index], "shared_kv_states": shared}
            known = {"position_embeddings": rotary, "position_ids": None}
            hidden = text.layers[index](hidden, attention_mask=seen, **known, **more)
        if index < len(deep):
            hidden = hidden + deep[index][None]
    return hidden


def positions_of(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    """Positions of one unpadded row."""
    base = getattr(model, "model", None)
    if hasattr(base, "get_rope_index"):
        names = inspect.signature(base.get_rope_index).parameters
        grid = torch.tensor([[1, 8, 8]] * count) if count else None
        given = {"attention_mask": torch.ones_like(ids)[None]}
        if "target_sizes" in names:
            given["target_sizes"] = torch.tensor([[16, 16]] * count) if count else None
        else:
            given["image_grid_thw"] = grid
        if "mm_token_type_ids" in names:
            given["mm_token_type_ids"] = (ids == IMAGE).int()[None]
        base.rope_deltas, before = None, base.rope_deltas
        positions = base.get_rope_index(ids[None], **given)[0]
        base.rope_deltas = before
        return positions
    one_based = int("PaliGemma" in type(model).__name__)
    return torch.arange(len(ids))[None] + one_based


def blocks_of(model: nn.Module, ids: Tensor) -> Tensor | None:
    """The image of each column of one row, -1 for words, where tokens of one image see each other."""
    if "Gemma3" not in type(model).__name__ and "Gemma4" not in type(model).__name__:
        return None
    is_image = ids == IMAGE
    starts = is_image & ~torch.cat([torch.tensor([False]), is_image[:-1]])
    return torch.where(is_image, starts.cumsum(0), -1)


def experts_of(model: nn.Module, ids: Tensor) -> Tensor | None:
    """Which columns (1, n) of one row are of images, where these have experts of their own."""
    return (ids == IMAGE).int()[None] if "Ernie" in type(model).__name__ else None


def logits_of(model: nn.Module, text: nn.Module, hidden: Tensor) -> Tensor:
    """Logits behind the last column that the last layer gives, (1, n, C)."""
    norm = text.norm if hasattr(text, "norm") else text.embedding_norm
    return model.get_output_embeddings()(norm(hidden)[0, -1])


def inputs_of(text: nn.Module, hidden_LC: Tensor, ids: Tensor) -> Tensor | None:
    """The inputs of every layer for what enters the first, as in Gemma 4: (1, n, layers, D)."""
    if not hasattr(text, "get_per_layer_inputs"):
        return None
    own = text.get_per_layer_inputs(ids.masked_fill(ids == IMAGE, 0)[None], None)
    return text.project_per_layer_inputs(hidden_LC[None], own)


@torch.no_grad()
def features_of(model: nn.Module, vlm: TinyVlm, inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Features of each image, and per later layer what is added to them there."""
    base = model if hasattr(model, "get_image_features") else model.model
    out = base.get_image_features(**{name: value for name, value in inputs.items() if name not in NOT_INPUTS})
    pooled = model.multi_modal_projector(out.last_hidden_state) if out.pooler_output is None else out.pooler_output
    images = [one for features in pooled if len(features) for one in features.split(vlm.num_tokens)]
    deep = getattr(out, "deepstack_features", None) or []
    return images, [[one for part in level for one in part.split(vlm.num_tokens)] for level in deep]


def embedded(model: nn.Module, ids: Tensor, own: list, deep: list) -> tuple[Tensor, list[Tensor]]:
    """What the first layer of one unpadded row (n,) reads, and what later layers add: the images in their places."""
    safe = ids.masked_fill(ids == IMAGE, 0) if "Gemma" in type(model).__name__ else ids
    hidden = model.get_input_embeddings()(safe).clone()
    added = [torch.zeros_like(hidden) for _ in deep]
    if own:
        hidden[ids == IMAGE] = torch.cat(own)
        for target, level in zip(added, deep, strict=True):
            target[ids == IMAGE] = torch.cat(level)
    return hidden, added


def whole_logits(model: nn.Module, text: nn.Module, hidden: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    """Logits behind the last column of what enters the first layer, (n, C), by the stock model as a whole."""
    if hasattr(text, "reverse_embedding"):
        # No embedding tells which token an image's is.
        text.reverse_embedding = lambda embeds: ids[None]
    mask = torch.ones(1, len(ids), dtype=torch.int64)
    given = {"inputs_embeds": hidden[None], "attention_mask": mask, "position_ids": positions}
    logits = model(**given, use_cache=False).logits[0, -1]
    vars(text).pop("reverse_embedding", None)
    return logits


@torch.no_grad()
def next_logits(model: nn.Module, vlm: TinyVlm, ids: Tensor, own: list, deep: list, prompt: int, method: Method) -> Any:
    """Logits after one unpadded row (n,) whose first `prompt` tokens are the prompt."""
    text = model.get_submodule(vlm.text)
    hidden, added = embedded(model, ids, own, deep)
    positions = positions_of(model, ids, len(own))
    is_prefix = "PaliGemma" in type(model).__name__
    blocks = blocks_of(model, ids)
    before = {"blocks": blocks, "experts": experts_of(model, ids)}
    if not vlm.is_whole:
        hidden = run_layers(text, hidden[None], positions, 0, method.cut, prompt * is_prefix, added, **before)[0]
    sizes = sizes_of(hidden, ids, vlm.num_tokens, method) if method.is_weighed else None
    hidden, added, columns = reduce_images(hidden, added, ids, vlm.num_tokens, method)
    kept = sum(column < prompt for column in columns) * is_prefix
    depth = text.config.num_hidden_layers
    blocks = None if blocks is None else blocks[columns]
    positions = positions[..., columns]
    if vlm.is_whole:
        return whole_logits(model, text, hidden, positions, ids[columns])
    given = {"blocks": blocks, "sizes": sizes, "inputs": inputs_of(text, hidden, ids[columns])}
    given["experts"] = experts_of(model, ids[columns])
    return logits_of(model, text, run_layers(text, hidden[None], positions, method.cut, depth, kept, added, **given))


@torch.no_grad()
def generated_logits(
    model: nn.Module, vlm: TinyVlm, inputs: dict, tokens: Tensor, method: Any, features: Any = None, logits: Any = None
) -> Tensor:
    """Logits (B, steps, V) before each of the tokens (B, steps) that were generated after a prompt.

    `logits` gives those after one row in place of `next_logits`, for methods that are no plan of each image.
    """
    images, deep = features if features is not None else features_of(model, vlm, inputs)
    logits = logits or next_logits
    rows = []
    for ids, mask, new in zip(inputs["input_ids"], inputs["attention_mask"], tokens, strict=True):
        ids = ids[mask.bool()]
        count = int((ids == IMAGE).sum()) // vlm.num_tokens
        own, images = images[:count], images[count:]
        levels, deep = [level[:count] for level in deep], [level[count:] for level in deep]
        grown = [torch.cat([ids, new[:step]]) for step in range(len(new))]
        rows.append(torch.stack([logits(model, vlm, row, own, levels, len(ids), method) for row in grown]))
    return torch.stack(rows)
