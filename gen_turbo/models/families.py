"""The families of diffusers denoisers that can be reduced, one entry each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gen_turbo.models.adapter import SELF_ATTENTION, Adapter, LayerSignature, ModelCall, TextSignature, TokenArg
from gen_turbo.models.transformer import FrameGrid, TransformerAdapter, patches_of, text_length
from gen_turbo.models.unet import UNetAdapter

_SELF = ("encoder_hidden_states", "attention_mask")
_POSITIONS_INSIDE = "it gives text its positions inside"
"""Why some models' text cannot be merged: what is left of it would get other positions."""
_ROTARY = (TokenArg("image_rotary_emb"),)
_ROTARY_WITH_TEXT = (TokenArg("image_rotary_emb", has_text_before=True),)
_MASK_PAIRS = tuple(TokenArg("attention_mask", axis=axis, has_batch=True, has_text_before=True) for axis in (2, 3))
_MASK = (TokenArg("attention_mask", axis=1, has_batch=True, has_text_before=True),)


def _thousandths(time: float) -> float:
    return 1000 * time


def _share_of_the_way(time: float) -> float:
    """Lumina2 and Z-Image are given the share of the way from noise to image, which rises."""
    return 1000 * (1 - time)


def _block(**differences: Any) -> LayerSignature:
    return LayerSignature(is_residual=True, **differences)


PIXART = TransformerAdapter(
    ("PixArtTransformer2DModel", "DiTTransformer2DModel"),
    {"transformer_blocks.*.attn1": SELF_ATTENTION},
    {"transformer_blocks.*": _block()},
)
HUNYUAN_DIT = TransformerAdapter(
    ("HunyuanDiT2DModel",),
    {"blocks.*.attn1": LayerSignature(none=_SELF, token_args=_ROTARY)},
    # Long skip connections are merged with the tokens.
    {"blocks.*": _block(also=("skip",), token_args=_ROTARY)},
)
SD3 = TransformerAdapter(
    ("SD3Transformer2DModel",),
    {"transformer_blocks.*.attn": LayerSignature(has_text_keys=True), "transformer_blocks.*.attn2": SELF_ATTENTION},
    {"transformer_blocks.*": _block(none=(), outputs=(1,))},
    num_text=text_length,
    text=TextSignature(),
)


def _num_registers(model: Any) -> int:
    return int(model.register_tokens.shape[1])


AURA_FLOW = TransformerAdapter(
    ("AuraFlowTransformer2DModel",),
    {
        "joint_transformer_blocks.*.attn": LayerSignature(keys_before=True, has_text_keys=True, none=()),
        "single_transformer_blocks.*.attn": LayerSignature(has_text_before=True, keys_before=True, has_text_keys=True),
    },
    {
        "joint_transformer_blocks.*": _block(none=(), outputs=(1,)),
        "single_transformer_blocks.*": _block(none=(), has_text_before=True),
    },
    to_time=_thousandths,
    # The model puts its registers before the text; the pipeline makes the text's padding zero.
    num_text=lambda model, arguments: text_length(model, arguments) + _num_registers(model),
    text=lambda model: TextSignature(num_before=_num_registers(model)),
)
COGVIEW = TransformerAdapter(
    ("CogView4Transformer2DModel", "CogView3PlusTransformer2DModel"),
    {"transformer_blocks.*.attn1": LayerSignature(keys_before=True, has_text_keys=True, none=(), token_args=_ROTARY)},
    {"transformer_blocks.*": _block(none=(), token_args=_ROTARY)},
    num_text=text_length,
    text=TextSignature(mask="attention_mask"),
)


def _shapes(model: Any, arguments: Mapping[str, Any]) -> FrameGrid:
    """The one image of every row; several images in a row have no common grid."""
    shapes = arguments["img_shapes"]
    images = shapes[0] if isinstance(shapes[0], list) else shapes[:1]
    return (images[0][0], tuple(images[0][1:])) if len(images) == 1 else (1, None)


_ROTARY_OF_IMAGE = (TokenArg("image_rotary_emb", items=(0,)),)
QWEN_IMAGE = TransformerAdapter(
    ("QwenImageTransformer2DModel",),
    {"transformer_blocks.*.attn": LayerSignature(keys_before=True, none=(), token_args=_ROTARY_OF_IMAGE)},
    {"transformer_blocks.*": _block(none=("modulate_index",), outputs=(1,), token_args=_ROTARY_OF_IMAGE)},
    to_time=_thousandths,
    grid=_shapes,
    num_text=text_length,
    text=_POSITIONS_INSIDE,
)


def _image_ids(model: Any, arguments: Mapping[str, Any]) -> FrameGrid:
    """Rows and columns by the largest position; images of one size that follow each other are frames."""
    height, width = (int(last) + 1 for last in arguments["img_ids"].reshape(-1, 3)[:, 1:].amax(0).tolist())
    num_frames, rest = divmod(arguments["hidden_states"].shape[1], height * width)
    return (num_frames, (height, width)) if rest == 0 else (1, None)


FLUX = TransformerAdapter(
    ("FluxTransformer2DModel",),
    {
        "transformer_blocks.*.attn": LayerSignature(
            keys_before=True, has_text_keys=True, outputs=(0, 2), token_args=_ROTARY_WITH_TEXT
        ),
        "single_transformer_blocks.*.attn": LayerSignature(
            none=_SELF, has_text_before=True, keys_before=True, has_text_keys=True, token_args=_ROTARY_WITH_TEXT
        ),
    },
    {
        "transformer_blocks.*": _block(outputs=(1,), none=(), token_args=_ROTARY_WITH_TEXT),
        "single_transformer_blocks.*": _block(outputs=(1,), none=(), token_args=_ROTARY_WITH_TEXT),
    },
    to_time=_thousandths,
    grid=_image_ids,
    is_one_stack=True,
    num_text=text_length,
    text=TextSignature(positions="txt_ids"),
)
CHROMA = TransformerAdapter(
    ("ChromaTransformer2DModel",),
    {
        "transformer_blocks.*.attn": LayerSignature(
            keys_before=True, has_text_keys=True, none=(), outputs=(0, 2), token_args=_ROTARY_WITH_TEXT + _MASK_PAIRS
        ),
        "single_transformer_blocks.*.attn": LayerSignature(
            none=("encoder_hidden_states",),
            has_text_before=True,
            keys_before=True,
            has_text_keys=True,
            token_args=_ROTARY_WITH_TEXT + _MASK_PAIRS,
        ),
    },
    {
        "transformer_blocks.*": _block(outputs=(1,), none=(), token_args=_ROTARY_WITH_TEXT + _MASK),
        "single_transformer_blocks.*": _block(none=(), has_text_before=True, token_args=_ROTARY_WITH_TEXT + _MASK),
    },
    to_time=_thousandths,
    grid=_image_ids,
    num_text=text_length,
    # The mask is added to attention's logits and so hides nothing; it goes with the tokens.
    text=TextSignature(positions="txt_ids", mask="attention_mask"),
)
_LUMINA = TokenArg("image_rotary_emb", axis=1, has_batch=True)
_LUMINA_WITH_TEXT = TokenArg("image_rotary_emb", axis=1, has_batch=True, has_text_before=True)
LUMINA2 = TransformerAdapter(
    ("Lumina2Transformer2DModel",),
    {
        "layers.*.attn": LayerSignature(
            has_text_before=True, keys_before=True, also=("encoder_hidden_states",), token_args=(_LUMINA_WITH_TEXT,)
        ),
        "noise_refiner.*.attn": LayerSignature(also=("encoder_hidden_states",), token_args=(_LUMINA,)),
    },
    {
        "layers.*": _block(has_text_before=True, token_args=(_LUMINA_WITH_TEXT,)),
        "noise_refiner.*": _block(token_args=(_LUMINA,)),
    },
    to_time=_share_of_the_way,
    # Words of the longest text; where rows differ, the layers get a mask and are left alone.
    num_text=lambda model, arguments: int(arguments["encoder_attention_mask"].sum(1).max()),
    text=_POSITIONS_INSIDE,
)


def _lists(arguments: Mapping[str, Any]) -> ModelCall:
    """Lists of latents and texts, of which the first tells the branches of guidance apart."""
    return ModelCall(_stacked(arguments["x"]), arguments["t"], arguments["cap_feats"][0])


def _stacked(images: Any) -> Tensor:
    """One tensor of a list of latents; of several sizes or nested lists, an empty one that says how many there are."""
    is_simple = isinstance(images[0], Tensor) and len({image.shape for image in images}) == 1
    return torch.stack(list(images)) if is_simple else torch.empty(len(images), 0)


def _patches_asked_for(model: Any, arguments: Mapping[str, Any]) -> FrameGrid:
    patch, patch_frames = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    sample = _stacked(arguments["x"])
    if sample.ndim < 5:
        return 1, None
    frames, height, width = sample.shape[2:]
    return frames // patch_frames, (height // patch, width // patch)


_Z_ARGS = (TokenArg("freqs_cis", axis=1, has_batch=True),)
_Z_BLOCK = _block(tokens="x", has_text_after=True, none=("attn_mask", "noise_mask"), token_args=_Z_ARGS)
Z_IMAGE = TransformerAdapter(
    ("ZImageTransformer2DModel",),
    # Image first, then padding and text.
    {
        "layers.*.attention": LayerSignature(has_text_after=True, token_args=_Z_ARGS),
        "noise_refiner.*.attention": LayerSignature(has_text_after=True, token_args=_Z_ARGS),
    },
    {"layers.*": _Z_BLOCK, "noise_refiner.*": _Z_BLOCK},
    to_time=_share_of_the_way,
    grid=_patches_asked_for,
    text=_POSITIONS_INSIDE,
    reading=_lists,
)
WAN = TransformerAdapter(
    ("WanTransformer3DModel",),
    {"blocks.*.attn1": LayerSignature(none=_SELF, token_args=(TokenArg("rotary_emb", axis=1),))},
    {"blocks.*": _block(none=(), token_args=(TokenArg("rotary_emb", axis=1),))},
)


def _sizes_given(model: Any, arguments: Mapping[str, Any]) -> FrameGrid:
    """As the call says; None where it leaves that to coordinates."""
    frames, height, width = (arguments.get(name) for name in ("num_frames", "height", "width"))
    return (frames, (height, width)) if frames and height and width else (1, None)


_ROTARY_PER_SAMPLE = (TokenArg("image_rotary_emb", axis=1, has_batch=True),)
LTX = TransformerAdapter(
    ("LTXVideoTransformer3DModel",),
    {"transformer_blocks.*.attn1": LayerSignature(none=_SELF, token_args=_ROTARY_PER_SAMPLE)},
    {"transformer_blocks.*": _block(none=(), token_args=_ROTARY_PER_SAMPLE)},
    grid=_sizes_given,
)


def _cogvideox_text(model: Any) -> TextSignature | str:
    embed = model.patch_embed
    is_fixed = embed.use_positional_embeddings or embed.use_learned_positional_embeddings
    return "its table of positions fixes the length of the text" if is_fixed else TextSignature()


COGVIDEOX = TransformerAdapter(
    ("CogVideoXTransformer3DModel",),
    {"transformer_blocks.*.attn1": LayerSignature(keys_before=True, has_text_keys=True, token_args=_ROTARY)},
    {"transformer_blocks.*": _block(none=(), token_args=_ROTARY)},
    # Latents are (batch, frames, channels, height, width).
    grid=lambda model, arguments: patches_of(model, arguments["hidden_states"].transpose(1, 2)),
    num_text=text_length,
    text=_cogvideox_text,
)
MOCHI = TransformerAdapter(
    ("MochiTransformer3DModel",),
    {"transformer_blocks.*.attn1": LayerSignature(none=(), token_args=_ROTARY)},
    {"transformer_blocks.*": _block(none=(), token_args=_ROTARY)},
    to_time=lambda time: -time,
    num_text=text_length,
    text="its attention leaves padding out by itself",
)
_KEY_MASK = TokenArg("attention_mask", axis=3, has_batch=True)
_HUNYUAN_VIDEO = LayerSignature(none=(), has_text_keys=True, token_args=(*_ROTARY, _KEY_MASK))
HUNYUAN_VIDEO = TransformerAdapter(
    ("HunyuanVideoTransformer3DModel",),
    {"transformer_blocks.*.attn": _HUNYUAN_VIDEO, "single_transformer_blocks.*.attn": _HUNYUAN_VIDEO},
    # A first frame that is given stays with attention scope.
    {
        "transformer_blocks.*": _block(none=("token_replace_emb",), token_args=(TokenArg("freqs_cis"), _KEY_MASK)),
        "single_transformer_blocks.*": _block(none=("token_replace_emb",), token_args=(*_ROTARY, _KEY_MASK)),
    },
    is_one_stack=True,
    num_text=text_length,
    # What the mask hides nobody reads, and it stays behind what is shown.
    text=TextSignature(mask="encoder_attention_mask", hides=True),
)

ADAPTERS: tuple[Adapter, ...] = (
    UNetAdapter(),
    PIXART,
    HUNYUAN_DIT,
    SD3,
    AURA_FLOW,
    FLUX,
    CHROMA,
    COGVIEW,
    QWEN_IMAGE,
    LUMINA2,
    Z_IMAGE,
    WAN,
    LTX,
    COGVIDEOX,
    MOCHI,
    HUNYUAN_VIDEO,
)
