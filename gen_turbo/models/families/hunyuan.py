"""HunyuanVideo and HunyuanImage: joint blocks, text behind the image, masks of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gen_turbo.models.adapter import Adapter, LayerSignature, TokenArg
from gen_turbo.models.conditions import MaskedText, TextSignature
from gen_turbo.models.families.common import ROTARY, block, lengths
from gen_turbo.models.transformer import TransformerAdapter, text_length

_TEXTS = {f"encoder_hidden_states{which}": f"encoder_attention_mask{which}" for which in ("", "_2")}
_OTHER_TOKENS = "it puts other tokens among its text"


def _conditions(arguments: Mapping[str, Any]) -> dict[str, int]:
    """Tokens of two texts and an image, by the modules that read them."""
    names = {"context_embedder.": "encoder_hidden_states", "context_embedder_2.": "encoder_hidden_states_2"}
    return lengths(arguments, names | {"image_embedder.": "image_embeds"})


def _all_conditions(model: Any, arguments: Mapping[str, Any]) -> int:
    """The same together, in whatever order the model puts them."""
    return sum(_conditions(arguments).values())


_POSITIONS: dict[str, tuple[str, ...]] = {"rope": ()}
"""By the shape of the latents alone."""
_KEY_MASK = TokenArg("attention_mask", axis=3, has_batch=True)
_HUNYUAN_VIDEO = LayerSignature(none=(), has_text_keys=True, token_args=(*ROTARY, _KEY_MASK))
HUNYUAN_VIDEO = TransformerAdapter(
    ("HunyuanVideoTransformer3DModel",),
    {"transformer_blocks.*.attn": _HUNYUAN_VIDEO, "single_transformer_blocks.*.attn": _HUNYUAN_VIDEO},
    # A first frame that is given stays with attention scope.
    {
        "transformer_blocks.*": block(none=("token_replace_emb",), token_args=(TokenArg("freqs_cis"), _KEY_MASK)),
        "single_transformer_blocks.*": block(none=("token_replace_emb",), token_args=(*ROTARY, _KEY_MASK)),
    },
    is_one_stack=True,
    num_text=text_length,
    # What the mask hides nobody reads, and it stays behind what is shown.
    text=TextSignature(mask="encoder_attention_mask", hides=True),
    positions=_POSITIONS,
)
HUNYUAN_VIDEO_15 = TransformerAdapter(
    ("HunyuanVideo15Transformer3DModel",),
    # Every layer makes its mask of pairs from one of the text, as long as the sequence that it gets.
    {"transformer_blocks.*.attn": LayerSignature(none=(), has_text_keys=True, token_args=ROTARY)},
    {"transformer_blocks.*": block(none=(), token_args=(TokenArg("freqs_cis"),))},
    num_text=_all_conditions,
    counts=_conditions,
    # From text to video the image is zeros, which are hidden.
    text=MaskedText(_TEXTS | {"image_embeds": ""}, _OTHER_TOKENS),
    positions=_POSITIONS,
)
HUNYUAN_IMAGE = TransformerAdapter(
    ("HunyuanImageTransformer2DModel",),
    {"transformer_blocks.*.attn": _HUNYUAN_VIDEO, "single_transformer_blocks.*.attn": _HUNYUAN_VIDEO},
    {
        "transformer_blocks.*": block(none=(), token_args=(*ROTARY, _KEY_MASK)),
        "single_transformer_blocks.*": block(none=(), token_args=(*ROTARY, _KEY_MASK)),
    },
    is_one_stack=True,
    num_text=_all_conditions,
    counts=_conditions,
    positions=_POSITIONS,
    text=lambda model: (
        TextSignature(mask="encoder_attention_mask", hides=True)
        if model.context_embedder_2 is None
        else MaskedText(_TEXTS, _OTHER_TOKENS)
    ),
)

ADAPTERS: tuple[Adapter, ...] = (HUNYUAN_VIDEO, HUNYUAN_VIDEO_15, HUNYUAN_IMAGE)
