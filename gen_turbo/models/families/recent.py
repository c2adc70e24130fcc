"""Image transformers of late 2026 with blocks of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gen_turbo.models.adapter import Adapter, LayerSignature, ModelCall, TokenArg
from gen_turbo.models.conditions import Region, TextSignature
from gen_turbo.models.families.common import POSITIONS_INSIDE, ROTARY, block, lengths, share_of_the_way, thousandths
from gen_turbo.models.transformer import Regions, TransformerAdapter, text_length


def _glm_writes(arguments: Mapping[str, Any]) -> str:
    """References are read in calls of their own, which keep their keys."""
    caches = arguments.get("kv_caches")
    return "the call keeps the keys of a reference" if caches is not None and caches[0].mode == "write" else ""


GLM_IMAGE = TransformerAdapter(
    ("GlmImageTransformer2DModel",),
    {"transformer_blocks.*.attn1": LayerSignature(keys_before=True, has_text_keys=True, none=(), token_args=ROTARY)},
    {"transformer_blocks.*": block(none=(), token_args=ROTARY)},
    left_alone=_glm_writes,
    num_text=text_length,
    text="keys of references may come before those of its text",
)
# Image first, then text, and a mask of the keys.
_ERNIE_MASK = TokenArg("attention_mask", axis=3, has_batch=True)
ERNIE_IMAGE = TransformerAdapter(
    ("ErnieImageTransformer2DModel",),
    {
        "layers.*.self_attention": LayerSignature(
            none=(),
            has_text_after=True,
            token_args=(TokenArg("image_rotary_emb", axis=1, has_batch=True), _ERNIE_MASK),
        )
    },
    {
        # Its modulations are repeated for every token.
        "layers.*": block(
            tokens="x",
            none=(),
            has_text_after=True,
            is_tokens_first=True,
            token_args=(TokenArg("rotary_pos_emb", axis=1, has_batch=True), _ERNIE_MASK, TokenArg("temb")),
        )
    },
    num_text=lambda model, arguments: int(arguments["text_bth"].shape[1]),
    text=POSITIONS_INSIDE,
    reading=lambda arguments: ModelCall(arguments["hidden_states"], arguments["timestep"], arguments["text_bth"]),
    ends_span=lambda model, name: True,
)
# Text gives keys alone, of the same features in every block.
PRX = TransformerAdapter(
    ("PRXTransformer2DModel",),
    {
        "blocks.*.attention": LayerSignature(
            none=(),
            keys_before=True,
            has_text_keys=True,
            token_args=(TokenArg("image_rotary_emb", axis=2, has_batch=True),),
        )
    },
    {"blocks.*": block(none=(), token_args=(TokenArg("image_rotary_emb", axis=2, has_batch=True),))},
    to_time=thousandths,
    num_text=text_length,
    caches_text=True,
    text=TextSignature(mask="attention_mask", hides=True),
)


def _ideogram_text(model: Any, arguments: Mapping[str, Any]) -> int:
    """Places before the image, padded on the left; the unconditional model has none."""
    return int((arguments["indicator"][0] != _IDEOGRAM_IMAGE).sum())


def _ideogram_grid(model: Any, arguments: Mapping[str, Any]) -> Regions:
    """Rows and columns by the positions."""
    places = arguments["position_ids"][0, _ideogram_text(model, arguments) :, 1:]
    height, width = (int(size) + 1 for size in (places.amax(0) - places.amin(0)).tolist())
    return (Region(1, (height, width)),) if height * width == len(places) else ()


_IDEOGRAM_IMAGE = 2
"""What its indicator says of tokens of the image."""
_IDEOGRAM_ARGS = (
    TokenArg("image_rotary_emb", axis=1, has_batch=True, has_text_before=True),
    *(TokenArg("attention_mask", axis=axis, has_batch=True, has_text_before=True) for axis in (2, 3)),
)
IDEOGRAM4 = TransformerAdapter(
    ("Ideogram4Transformer2DModel",),
    {"layers.*.attention": LayerSignature(has_text_before=True, keys_before=True, none=(), token_args=_IDEOGRAM_ARGS)},
    {
        "layers.*": block(
            has_text_before=True,
            none=(),
            token_args=(*_IDEOGRAM_ARGS, TokenArg("adaln_input", axis=1, has_batch=True, has_text_before=True)),
        )
    },
    to_time=share_of_the_way,
    regions=_ideogram_grid,
    num_text=_ideogram_text,
    # What embeds one reads the places of the other too.
    counts=lambda arguments: lengths(
        arguments, dict.fromkeys(("input_proj", "llm_cond_proj", "final_layer.linear"), "hidden_states")
    ),
    text="its text and image share one sequence from the start",
)

ADAPTERS: tuple[Adapter, ...] = (GLM_IMAGE, ERNIE_IMAGE, PRX, IDEOGRAM4)
