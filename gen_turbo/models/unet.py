"""UNets: the self-attention of every transformer block of UNet2DConditionModel (SD 1.x, 2.x, XL) and ControlNets."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from gen_turbo.models.adapter import Geometry, LayerSignature, LayerSpec, ModelCall, Unit, units_of
from gen_turbo.models.conditions import Text
from gen_turbo.models.cuts import unet_cuts
from gen_turbo.models.inputs import num_images, time_of
from gen_turbo.tokens.score import attention_column_mean, text_attention

_NUM_QUERIES = 256
_BLOCK = LayerSignature(is_residual=True)
_ADDED_KV = LayerSignature(is_map=True, is_residual=True, keys_before=True)
"""Attention on the feature map itself with keys of text before its own, as in Kandinsky and DeepFloyd IF."""
_CROSS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
"""The cross-attention that stands beside a self-attention in its block, or None."""


class UNetAdapter:
    """Enters a UNet, or a ControlNet, which is the way down of one, by its `attn1` processors; all else stays."""

    models: tuple[str, ...] = ("UNet2DConditionModel", "ControlNetModel")
    is_transformer = is_one_stack = has_references = False
    positions: Mapping[str, tuple[str, ...]] = {}

    def units(self, model: nn.Module) -> dict[str, Unit]:
        """What can be skipped: the whole UNet, all that is deeper than a layer of the way up, transformer blocks."""
        return units_of(model, self, unet_cuts(model))

    def layers(self, model: nn.Module) -> list[LayerSpec]:
        """Every attention layer with its downsample factor, from the block that holds it."""
        num_levels = len(model.down_blocks)  # type: ignore[arg-type]
        blocks = {name: block for name, block in model.named_modules() if isinstance(block, BasicTransformerBlock)}
        found = []
        for name, module in model.named_modules():
            if not isinstance(module, Attention):
                continue
            owner, _, role = name.rpartition(".")
            if owner not in blocks and module.added_kv_proj_dim is not None:
                why = "cross-attention only" if module.only_cross_attention else ""
                found.append(LayerSpec(name, 2 ** level_of(name, num_levels), why, _ADDED_KV))
                continue
            reason = _left_alone(blocks.get(owner), role)
            if not reason:
                _CROSS[module] = blocks[owner].attn2
            found.append(LayerSpec(name, 2 ** level_of(name, num_levels), reason))
        return found

    def blocks(self, model: nn.Module) -> list[LayerSpec]:
        """Every transformer block whose first attention is over image tokens."""
        num_levels = len(model.down_blocks)  # type: ignore[arg-type]
        return [
            LayerSpec(name, 2 ** level_of(name, num_levels), _left_alone(block, "attn1"), _BLOCK)
            for name, block in model.named_modules()
            if isinstance(block, BasicTransformerBlock)
        ]

    def text_signature(self, model: nn.Module) -> Text:
        """None."""
        return "its text is in cross-attention"

    def read(self, arguments: Mapping[str, Any]) -> ModelCall:
        """Sample, timestep and encoder_hidden_states."""
        return ModelCall(arguments["sample"], arguments["timestep"], arguments.get("encoder_hidden_states"))

    def time(self, timestep: Any) -> float:
        """The time as the scheduler counts it."""
        return time_of(timestep)

    def geometry(self, model: nn.Module, arguments: Mapping[str, Any]) -> Geometry:
        """Every latent is a token of the finest level."""
        sample = arguments["sample"]
        return Geometry(tuple(sample.shape[-2:]), num_images=num_images(sample))

    def semantic_value(self, layer: nn.Module, tokens: Tensor, kind: str, condition: Tensor | None) -> Tensor | None:
        """The attention column mean over strided queries for "self", cross-attention to words for "text"."""
        if kind == "text":
            return _text_value(layer, tokens, condition)
        if kind != "self" or getattr(layer, "fused_projections", False):
            return None
        queries = tokens[:, :: max(1, tokens.shape[1] // _NUM_QUERIES)]
        return attention_column_mean(_heads(layer, "to_q", queries), _heads(layer, "to_k", tokens))


def _text_value(attn: nn.Module, tokens: Tensor, text: Tensor | None) -> Tensor | None:
    """Computes what the block's tokens, as self-attention is about to see them, find in the text by cross-attention.

    The first text token begins every text and takes what no word claims; rows of zeros are padding. Padding that the
    text encoder gave a state of its own, as CLIP does, looks like words, is attended to by the model and
    counts. With guidance the conditional half is last, in the text as in the tokens.
    """
    cross = _CROSS.get(attn)
    if cross is None or text is None or cross.to_k.in_features != text.shape[-1]:
        return None
    text = text[-len(tokens) :]
    is_word = text.ne(0).any(-1)
    is_word[:, 0] = False
    return text_attention(_heads(cross, "to_q", tokens), _heads(cross, "to_k", text), is_word)


def _heads(attn: nn.Module, projection: str, tokens: Tensor) -> Tensor:
    """Projects tokens (B, N, C) to (B, heads, N, channels of a head)."""
    projected: Tensor = attn.get_submodule(projection)(tokens)
    batch, num_tokens, _ = projected.shape
    heads: int = attn.heads  # type: ignore[assignment]
    return projected.view(batch, num_tokens, heads, -1).transpose(1, 2)


def level_of(name: str, num_levels: int) -> int:
    """How often the grid was halved at a layer: blocks go down, the middle stays, blocks come up again."""
    kind, _, rest = name.partition(".")
    index = int(rest.split(".")[0]) if kind in ("down_blocks", "up_blocks") else 0
    return {"down_blocks": index, "up_blocks": num_levels - 1 - index, "mid_block": num_levels - 1}.get(kind, 0)


def _left_alone(block: nn.Module | None, role: str) -> str:
    if block is None:
        return "not in a transformer block"
    if role != "attn1":
        return "cross-attention"
    return "cross-attention only" if block.only_cross_attention else ""
