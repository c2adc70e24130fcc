"""Qwen-Image and Qwen-Image 2.1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gen_turbo.models.adapter import Adapter, LayerSignature, TokenArg
from gen_turbo.models.conditions import CachedPrefix, Prefix, PrefixPart, Region
from gen_turbo.models.families.common import POSITIONS_INSIDE, block, thousandths
from gen_turbo.models.transformer import Regions, TransformerAdapter, text_length


def _shapes(model: Any, arguments: Mapping[str, Any]) -> Regions:
    """The image of a row and the references behind it; the layers of one image are its frames."""
    shapes = arguments["img_shapes"]
    images = shapes[0] if isinstance(shapes[0], list) else shapes[:1]
    num_layers = len(images) - 1 if getattr(model.config, "use_layer3d_rope", False) else 1
    target = Region(num_layers * images[0][0], tuple(images[0][1:]))
    return (target, *(Region(image[0], tuple(image[1:])) for image in images[num_layers:]))


_MODULATION = TokenArg("modulate_index", axis=1, has_batch=True)
"""Which of two times modulates a token: references, which are clean, take zero."""
_ROTARY_OF_IMAGE = (TokenArg("image_rotary_emb", items=(0,)),)
QWEN_IMAGE = TransformerAdapter(
    ("QwenImageTransformer2DModel",),
    {"transformer_blocks.*.attn": LayerSignature(keys_before=True, none=(), token_args=_ROTARY_OF_IMAGE)},
    {"transformer_blocks.*": block(none=(), outputs=(1,), token_args=(*_ROTARY_OF_IMAGE, _MODULATION))},
    to_time=thousandths,
    regions=_shapes,
    has_references=True,
    num_text=text_length,
    text=POSITIONS_INSIDE,
)


class _Sequence(NamedTuple):
    """What the joint sequence of Qwen-Image 2.1 consists of.

    Attributes:
        is_image: Whether a token is of an image, (P + N,); four of an image stand for one of the text's.
        is_word: Whether a row of the embedded text is text, (T,).
        num_prefix: Tokens before the target, P.
    """

    is_image: Tensor
    is_word: Tensor
    num_prefix: int


def _sequence(arguments: Mapping[str, Any]) -> _Sequence:
    slots: Tensor = arguments["img_mask"][0]
    is_image = slots.repeat_interleave(torch.where(slots, 4, 1))
    is_word = ~slots[: arguments["encoder_hidden_states"].shape[1]]
    return _Sequence(is_image, is_word, len(is_image) - math.prod(arguments["img_shapes"][0][-1]))


def _prefix_source(arguments: Mapping[str, Any]) -> Tensor | None:
    cache = arguments.get("kv_cache")
    keys: Tensor | None = None if cache is None else cache.layer_caches[0].k
    return keys if arguments.get("kv_cache_mode") == "cached" else None


def _prefix(arguments: Mapping[str, Any]) -> Prefix:
    is_image, is_word, num_prefix = _sequence(arguments)
    text, images = arguments["encoder_hidden_states"], arguments["hidden_states"]
    shapes, mask = arguments["img_shapes"][0], arguments.get("encoder_hidden_states_mask")
    words, places = ((~is_image[:num_prefix]).nonzero()[:, 0], is_image[:num_prefix].nonzero()[:, 0])
    regions = [Region(frames, (height, width)) for frames, height, width in shapes[:-1]]
    lengths = [region.num_tokens for region in regions]
    parts = [PrefixPart(words, text[:, is_word])]
    images = torch.split(images[:, : len(places)], lengths, 1)
    parts += map(PrefixPart, torch.split(places, lengths), images, regions)
    shown = is_image.new_ones(len(text), num_prefix)
    if mask is not None:
        shown[:, words] = mask.bool()[:, is_word]
    cache = arguments["kv_cache"]

    def kept(layers: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        short = type(cache)(len(layers))
        for layer, pair in zip(short.layer_caches, layers, strict=True):
            layer.store(*pair)
        return {"kv_cache": short, "encoder_hidden_states_mask": None}

    layers = [layer.get() for layer in cache.layer_caches]
    return Prefix(tuple(parts), layers, shown, kept)


def _target(model: Any, arguments: Mapping[str, Any]) -> Regions:
    frames, height, width = arguments["img_shapes"][0][-1]
    return (Region(frames, (height, width)),)


_FILLS_CACHE = ("segments", "cache_write_slice")
_BEHIND_PREFIX = (TokenArg("rotary_emb"), TokenArg("attention_mask", axis=3, has_batch=True, has_text_before=True))
QWEN_IMAGE_21 = TransformerAdapter(
    ("QwenImage21Transformer2DModel",),
    {
        "transformer_blocks.*.attn": LayerSignature(
            keys_before=True, has_text_keys=True, none=_FILLS_CACHE, token_args=_BEHIND_PREFIX
        )
    },
    {"transformer_blocks.*": block(none=_FILLS_CACHE, token_args=(*_BEHIND_PREFIX, TokenArg("target_token_mask")))},
    to_time=thousandths,
    regions=_target,
    # The call that fills the cache runs in full.
    left_alone=lambda arguments: "" if arguments.get("kv_cache") is not None else "it keeps no cache of its prefix",
    has_references=True,
    num_text=lambda model, arguments: _sequence(arguments).num_prefix,
    caches_text=True,
    text=CachedPrefix(_prefix_source, _prefix),
)

ADAPTERS: tuple[Adapter, ...] = (QWEN_IMAGE, QWEN_IMAGE_21)
