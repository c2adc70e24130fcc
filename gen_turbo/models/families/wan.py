"""Wan and the transformers of its blocks, with a control stream or without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gen_turbo.models.adapter import TEXT, Adapter, LayerSignature, TokenArg
from gen_turbo.models.families.common import SELF, block, lengths
from gen_turbo.models.transformer import TransformerAdapter

_WAN_CONDITIONS = {"condition_embedder.image_embedder.": "encoder_hidden_states_image"}


def _wan_counts(arguments: Mapping[str, Any]) -> dict[str, int]:
    """Cross-attention reads text and, from image to video, an image."""
    image, text = lengths(arguments, _WAN_CONDITIONS), lengths(arguments, {TEXT: "encoder_hidden_states"})
    return image | {TEXT: sum(image.values()) + text[TEXT]}


_WAN_ROTARY = TokenArg("rotary_emb", axis=1)
_POSITIONS: dict[str, tuple[str, ...]] = {"rope": ()}
"""By the shape of the latents alone."""
_CONTROL = "control"


def _reads_between(model: Any, name: str) -> bool:
    """VACE adds hints, and Animate the face, to every token behind some blocks; VACE's own blocks give the hints."""
    stack, _, number = name.rpartition(".")
    if stack == "vace_blocks":
        return True
    every = getattr(model.config, "inject_face_latents_blocks", 0)
    return int(number) in getattr(model.config, "vace_layers", ()) or (every > 0 and int(number) % every == 0)


WAN = TransformerAdapter(
    (
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
        "ChronoEditTransformer3DModel",
    ),
    {
        "blocks.*.attn1": LayerSignature(none=SELF, token_args=(_WAN_ROTARY,)),
        "vace_blocks.*.attn1": LayerSignature(none=SELF, token_args=(_WAN_ROTARY,), stream=_CONTROL),
    },
    {
        # Wan 2.2 TI2V has a time, and so a modulation, for each token.
        "blocks.*": block(none=(), token_args=(_WAN_ROTARY, TokenArg("temb", axis=1, has_batch=True, num_axes=4))),
        "vace_blocks.*": block(
            tokens="control_hidden_states",
            also=("hidden_states",),
            none=(),
            token_args=(_WAN_ROTARY,),
            outputs=(0, 1),
            plain=(0,),
            stream=_CONTROL,
        ),
    },
    counts=_wan_counts,
    positions=_POSITIONS,
    ends_span=_reads_between,
)
_CAUSAL_MASK = tuple(TokenArg("attention_mask", axis=axis, has_batch=True) for axis in (2, 3))
_TIME_OF_FRAMES = TokenArg("temb", axis=2, has_batch=True, num_axes=4)
SKYREELS = TransformerAdapter(
    ("SkyReelsV2Transformer3DModel",),
    {"blocks.*.attn1": LayerSignature(none=("encoder_hidden_states",), token_args=(_WAN_ROTARY, *_CAUSAL_MASK))},
    {"blocks.*": block(none=(), token_args=(_WAN_ROTARY, *_CAUSAL_MASK, _TIME_OF_FRAMES))},
    positions=_POSITIONS,
)

ADAPTERS: tuple[Adapter, ...] = (WAN, SKYREELS)
